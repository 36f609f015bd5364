/** What is seen: the controls, the text, the figures. The model runs in worker.js. */

import { checkSampling, parseSeed } from "./sampling.js";

const SHOWN = 20_000; // characters of the text that stay on the page
const POINTS = 120; // of the curve

const $ = (id) => document.getElementById(id);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const number = new Intl.NumberFormat("en");
const written = $("written").appendChild(document.createTextNode(""));
let [running, paused, lacking] = [false, false, false]; // lacking: a state that says nothing of its text needs a prompt
let [curve, each, recent] = [[], 1, []]; // each: tokens a point of the curve stands for

const send = (type, values = {}, transfer = []) => worker.postMessage({ type, ...values }, transfer);

/** The fields' values, or null after saying what is wrong with them. */
function settings() {
  const fields = { temperature: Number($("temperature").value), topK: Number($("top-k").value), topP: Number($("top-p").value), seed: 0n };
  try {
    fields.seed = parseSeed($("seed").value);
    checkSampling(fields);
    const limit = Number($("limit").value);
    if (!(Number.isSafeInteger(limit) && limit >= 0)) throw new Error(`pause after: ${limit}; use 0 or a positive integer`);
    return { sampling: fields, limit, pace: Number($("pace").value) };
  } catch (error) {
    say(error.message, true);
    return null;
  }
}

function say(message, error = false) {
  $("status").textContent = message;
  $("status").classList.toggle("error", error);
}

function show() {
  document.body.classList.toggle("running", running);
  $("pause").disabled = !running && !paused;
  $("pause").textContent = running || !paused ? "Pause" : "Go on";
  $("start").textContent = paused || running ? "Start anew" : "Write";
  $("save").disabled = running || !paused || lacking;
  $("bring").disabled = running;
}

function clear(given) {
  $("given").textContent = given;
  written.data = "";
  [curve, each, recent] = [[], 1, []];
  [$("tokens").textContent, $("speed").textContent, $("median").textContent] = ["0", "–", "–"];
  $("curve").firstElementChild.setAttribute("points", "");
}

function start(event) {
  event.preventDefault();
  const given = settings();
  if (!given) return;
  if (!$("prompt").value) return say("prompt: empty; write at least one character", true);
  if (running) return anew(given); // the text that is being written must end first
  clear($("prompt").value);
  go("start", given, { prompt: $("prompt").value });
}

let next = null;
function anew(given) {
  next = given;
  send("pause");
}

function go(type, given, values = {}) {
  send("sampling", given);
  send(type, values);
  [running, paused, lacking] = [true, false, false];
  say("Writing …");
  show();
}

function toggle() {
  if (running) return send("pause");
  const given = settings();
  if (!given) return;
  const prompt = lacking ? $("prompt").value : "";
  if (lacking) clear(prompt);
  go("resume", given, { prompt });
}

const arrived = {
  ready({ model, graphBytes, stateBytes }) {
    $("about").textContent = model.about ?? $("about").textContent;
    $("model").textContent = `${model.name} · graph ${number.format(graphBytes)} bytes · ${model.trained ?? ""}`;
    $("size").textContent = bytes(stateBytes);
    $("start").disabled = false;
    $("bring").disabled = false;
    say("Ready.");
    document.body.dataset.ready = "";
  },
  tokens({ ids, text, generated, times, stateBytes }) {
    append(text);
    recent = [...recent, ...times].slice(-200);
    for (const time of times) plot(time);
    draw();
    $("tokens").textContent = number.format(generated);
    $("size").textContent = bytes(stateBytes);
    const sorted = [...recent].sort((a, b) => a - b);
    $("median").textContent = `${sorted[sorted.length >> 1].toFixed(2)} ms`;
    $("speed").textContent = number.format(Math.round((1000 * recent.length) / recent.reduce((a, b) => a + b, 0)));
    document.dispatchEvent(new CustomEvent("unisono:tokens", { detail: ids })); // for scripts beside this one, such as its tests
  },
  paused({ generated }) {
    [running, paused] = [false, true];
    say(`Paused after ${number.format(generated)} tokens.`);
    show();
    document.dispatchEvent(new CustomEvent("unisono:paused", { detail: generated }));
    if (next) {
      const given = next;
      next = null;
      clear($("prompt").value);
      go("start", given, { prompt: $("prompt").value });
    }
  },
  saved({ bytes: data, generated }) {
    const name = `unisono-${generated}.safetensors`;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([data]));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    $("command").textContent = `unisono run model.onnx --state ${name}`;
    say(`${name} holds the state after ${number.format(generated)} tokens.`);
  },
  brought({ sampling, generated, unread }) {
    clear("… ");
    paused = true;
    lacking = unread === 0;
    if (sampling) fill(sampling);
    $("tokens").textContent = number.format(generated);
    say(lacking ? "A state alone: write what comes next above, and go on." : `A state after ${number.format(generated)} tokens: go on.`);
    show();
  },
  error({ message, during }) {
    if (during !== "save" && during !== "bring") running = false;
    say(message, true);
    show();
  },
};

function append(text) {
  const pane = $("text");
  const following = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 40;
  written.appendData(text);
  if (written.length > SHOWN) {
    $("given").textContent = "… ";
    written.deleteData(0, written.length - SHOWN);
  }
  if (following) pane.scrollTop = pane.scrollHeight;
}

/** Each point of the curve is a mean of so many tokens that the whole text always fits. */
function plot(time) {
  const last = curve[curve.length - 1];
  if (last && last.count < each) {
    last.sum += time;
    last.count += 1;
  } else {
    curve.push({ sum: time, count: 1 });
  }
  if (curve.length > POINTS) {
    const halves = [];
    for (let i = 0; i + 1 < curve.length; i += 2) halves.push({ sum: curve[i].sum + curve[i + 1].sum, count: curve[i].count + curve[i + 1].count });
    [curve, each] = [halves, each * 2];
  }
}

function draw() {
  const means = curve.map(({ sum, count }) => sum / count);
  const sorted = [...means].sort((a, b) => a - b);
  const top = Math.max(2 * sorted[sorted.length >> 1], 1.1 * sorted[Math.floor(0.95 * sorted.length)]); // a few peaks may be cut off
  const points = means.map((mean, i) => `${((120 * i) / Math.max(1, means.length - 1)).toFixed(1)},${(28 - 28 * Math.min(1, mean / top)).toFixed(1)}`);
  $("curve").firstElementChild.setAttribute("points", points.join(" "));
}

function fill({ temperature, topK, topP, seed }) {
  $("temperature").max = String(Math.max(2, temperature));
  $("temperature").step = Number.isInteger(temperature * 20) ? "0.05" : "any";
  $("temperature").value = String(temperature);
  $("temperature-value").textContent = temperature.toFixed(2);
  [$("top-k").value, $("top-p").value, $("seed").value] = [topK, topP, seed].map(String);
}

const bytes = (count) => `${number.format(count)} B`;

async function bring() {
  const [file] = $("file").files;
  if (!file) return;
  if (file.size > 1 << 28) return say(`${file.name}: ${number.format(file.size)} bytes; no state of this model is so large`, true);
  const data = new Uint8Array(await file.arrayBuffer());
  send("bring", { bytes: data }, [data.buffer]);
  $("file").value = "";
}

$("form").addEventListener("submit", start);
$("pause").addEventListener("click", toggle);
$("save").addEventListener("click", () => send("save"));
$("bring").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", bring);
$("draw").addEventListener("click", () => {
  $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  changed();
});
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("command").textContent);
    say("Copied.");
  } catch {
    getSelection().selectAllChildren($("command"));
    say("Selected: copy it with the keyboard.");
  }
});
$("temperature").addEventListener("input", () => ($("temperature-value").textContent = Number($("temperature").value).toFixed(2)));
for (const id of ["temperature", "seed", "top-k", "top-p", "limit", "pace"]) $(id).addEventListener("change", changed);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) send("pause");
});

/** What is chosen while the text is being written holds from the next token on. */
function changed() {
  const given = settings();
  if (given && running) send("sampling", given);
}

worker.onmessage = ({ data: { type, ...values } }) => arrived[type](values);
worker.onerror = (event) => say(`the page's worker failed (${event.message ?? "not loaded"}); build the page with nox -s playground`, true);
send("load");

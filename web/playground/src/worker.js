/** Where the model runs, so that the page stays awake. Messages in: load, start, resume, pause, sampling, save, bring. */

import * as ort from "onnxruntime-web/wasm";
import { checkModel, Engine } from "./engine.js";
import { checkSampling } from "./sampling.js";

const REPORT_MS = 33; // text is handed on, and messages are read, so often

ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", self.location.href).href };
ort.env.logLevel = "error";

/** @type {Engine} */
let engine;
let sampling = { temperature: 0.8, topK: 0, topP: 1, seed: 0n };
let [running, stopping, limit, pace] = [false, false, 0, 0];

const handlers = {
  async load() {
    const [model, graph] = await Promise.all([fetched("model.json", "json"), fetched("model.onnx", "arrayBuffer")]);
    checkModel(model);
    const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
    engine = new Engine(ort, session, model);
    post("ready", { model, graphBytes: graph.byteLength, stateBytes: engine.stateBytes });
  },
  start({ prompt }) {
    engine.begin();
    engine.add(prompt);
    return write();
  },
  resume: () => write(),
  sampling({ sampling: given, limit: most, pace: speed }) {
    checkSampling(given);
    [sampling, limit, pace] = [given, most, speed];
  },
  pause() {
    stopping = running;
  },
  save() {
    const bytes = engine.save(sampling);
    self.postMessage({ type: "saved", bytes, generated: engine.generated }, [bytes.buffer]);
  },
  bring({ bytes }) {
    if (running) throw new Error("state: a text is being written; pause it first");
    const found = engine.bring(bytes);
    if (found) sampling = found;
    post("brought", { sampling: found, generated: engine.generated, unread: engine.unread.length });
  },
};

async function write() {
  if (running) return;
  [running, stopping] = [true, false];
  let [count, since, ids, times] = [0, performance.now(), [], []];
  const report = () => {
    const text = engine.text.feed(ids);
    post("tokens", { ids, text, generated: engine.generated, times, stateBytes: engine.stateBytes });
    [ids, times, since] = [[], [], performance.now()];
  };
  try {
    while (!stopping && !(limit && count >= limit)) {
      const start = performance.now();
      ids.push(await engine.next(sampling));
      const took = performance.now() - start;
      times.push(took);
      count += 1;
      const wait = pace ? 1000 / pace - took : 0;
      if (wait > 0 || performance.now() - since > REPORT_MS) {
        report();
        await new Promise((resolve) => setTimeout(resolve, Math.max(0, wait)));
      }
    }
    if (ids.length) report();
    post("paused", { generated: engine.generated });
  } finally {
    running = false;
  }
}

async function fetched(name, kind) {
  const response = await fetch(new URL(name, self.location.href));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}; build the page with \`nox -s playground\``);
  return response[kind]();
}

const post = (type, values) => self.postMessage({ type, ...values });

self.onmessage = async ({ data }) => {
  try {
    await handlers[data.type](data);
  } catch (error) {
    post("error", { message: error.message, during: data.type });
  }
};

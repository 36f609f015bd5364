/** State files: what any room of Unisono saves and goes on from (spec/unisono_spec/contract/continuing.py). */

import { isObject, read, shown, write } from "./safetensors.js";
import { MOST, checkSampling, parseSeed } from "./sampling.js";

const VERSION = "1";
const MAX_POSITION = 2 ** 31 - 1;

/**
 * @typedef {import("./sampling.js").Sampling} Sampling
 * @typedef {{shape: number[], integer: boolean}} Declared a state's shape, [1, …], and whether it counts
 * @typedef {{state: Map<string, import("./safetensors.js").Tensor>, unread: number[], generated: number, held: number[], sampling: Sampling | null}} Saved
 */

/** @param {Saved} saved @param {string} config as JSON, in the model's own words @returns {Uint8Array} */
export function saveState({ state, unread, generated, held, sampling }, config) {
  const { temperature, topK, topP, seed } = sampling;
  const said = { unread, n_generated: generated, seed: String(seed), held, temperature, top_k: topK, top_p: topP };
  return write(state, { format: "unisono", version: VERSION, kind: "state", config, generation: JSON.stringify(said) });
}

/**
 * Throws an Error that says what does not fit.
 * @param {Uint8Array} bytes @param {string} config @param {Map<string, Declared>} declared @param {number} vocabulary @returns {Saved}
 */
export function loadState(bytes, config, declared, vocabulary) {
  const { metadata, tensors } = read(bytes);
  if (metadata.format !== "unisono") throw new Error("a safetensors file, but not one of unisono's; choose a saved state");
  if (metadata.version !== VERSION) throw new Error(`file version ${shown(metadata.version)}, this page reads "${VERSION}"; save it again`);
  if (metadata.kind !== "state") throw new Error(`holds ${shown(metadata.kind)}, expected "state"; choose a saved state`);
  checkConfig(metadata.config, config);
  const state = new Map();
  for (const name of tensors.keys()) {
    if (!declared.has(name)) throw new Error(`${shown(name)} is no state of this model; choose a state that it saved`);
  }
  for (const [name, { shape, integer }] of declared) {
    const found = tensors.get(name);
    if (!found) throw new Error(`${shown(name)} is missing; choose a state that this model saved`);
    if (String(found.shape) !== String(shape)) throw new Error(`${name} has shape [${found.shape}], expected [${shape}]; save one sequence`);
    const counts = found.data instanceof Int32Array || found.data instanceof BigInt64Array;
    if (counts !== integer) throw new Error(`${name} is not of ${integer ? "integers" : "floats"}; choose a state that this model saved`);
    const data = integer ? Int32Array.from(found.data, (n) => position(Number(n), name)) : Float32Array.from(found.data);
    if (!integer && !data.every(Number.isFinite)) throw new Error(`${name} holds NaN or infinite numbers; it is damaged`);
    state.set(name, { shape, data });
  }
  return { state, ...said(metadata.generation, vocabulary) };
}

function position(n, name) {
  if (!(n >= 0 && n < MAX_POSITION)) throw new Error(`${name} is ${n}; positions are 0 to ${MAX_POSITION}`);
  return n;
}

function said(text, vocabulary) {
  if (text === undefined) return { unread: [], generated: 0, held: [], sampling: null };
  const found = parse(text, "generation");
  const { unread, n_generated: generated, seed, held = [], temperature = 0, top_k: topK = 0, top_p: topP = 1, ...others } = found;
  const { repetition_penalty: penalty = 1, seen = null, ...more } = others; // seen: what a penalty is for
  if (Object.keys(more).length) throw new Error(`generation: ${shown(Object.keys(more)[0])} is no field of it`);
  if (penalty !== 1) throw new Error(`repetition_penalty: ${shown(penalty)}; this page draws without one: go on in Python, or save with 1`);
  for (const ids of [unread, held, seen ?? []]) {
    if (!Array.isArray(ids) || !ids.every((id) => Number.isInteger(id) && id >= 0 && id < vocabulary)) {
      throw new Error(`generation: ${shown(ids)} are not ids of this model's ${vocabulary}`);
    }
  }
  if (!(Number.isInteger(generated) && generated >= 0 && generated <= MOST)) throw new Error(`n_generated: ${shown(generated)}; it counts ids`);
  const sampling = { temperature, topK, topP, seed: parseSeed(String(seed)) };
  checkSampling(sampling);
  return { unread, generated, held, sampling };
}

function checkConfig(text, config) {
  const found = parse(text, "config");
  const wanted = JSON.parse(config);
  const name = [...Object.keys(wanted), ...Object.keys(found)].find((key) => JSON.stringify(found[key]) !== JSON.stringify(wanted[key]));
  if (name !== undefined) {
    throw new Error(`a state of another model: ${name} is ${shown(found[name])} there and ${shown(wanted[name])} here`);
  }
}

function parse(text, name) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`${name}: not JSON (${error.message}); save the state again`);
  }
  if (!isObject(found)) throw new Error(`${name}: not names with values; save the state again`);
  return found;
}

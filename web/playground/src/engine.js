/** A model that writes: the graph's session, its state, and the token that comes next. Memory is constant: each call's state replaces the last. */

import { choose, MOST } from "./sampling.js";
import { loadState, saveState } from "./state.js";
import { Utf8 } from "./text.js";

const PIECE = 512; // tokens of a prompt read at once
const TYPES = new Map([[Float32Array, "float32"], [Int32Array, "int32"], [BigInt64Array, "int64"]]);
const MARKS = ["tokens", "reset", "valid"];

/** What the page shows of a model; written beside the graph by `python -m unisono_tools.experiments.playground`. */
export function checkModel(model) {
  const { format, name, config, vocabulary, tokenizer } = model ?? {};
  if (format !== 1 || typeof name !== "string" || typeof config !== "string" || !Number.isSafeInteger(vocabulary)) {
    throw new Error("model.json: not what this page reads; build it again with `nox -s playground`");
  }
  if (tokenizer !== "bytes") throw new Error(`model.json: tokenizer ${JSON.stringify(tokenizer)}; this page reads bytes only`);
}

export class Engine {
  /**
   * @param {typeof import("onnxruntime-web")} ort @param {import("onnxruntime-web").InferenceSession} session
   * @param {{config: string, vocabulary: number}} model
   */
  constructor(ort, session, model) {
    Object.assign(this, { ort, session, model });
    /** @type {Map<string, {shape: number[], integer: boolean}>} */
    this.declared = new Map();
    for (const { name, shape, type } of session.inputMetadata) {
      if (MARKS.includes(name)) continue;
      if (shape.slice(1).some((size) => typeof size !== "number")) throw new Error(`${name}: grows with the text, and this page's memory does not`);
      this.declared.set(name, { shape: [1, ...shape.slice(1)], integer: type === "int32" });
    }
    this.begin();
  }

  /** Forget everything: the next token read begins a sequence. */
  begin() {
    this.state = new Map();
    for (const [name, { shape, integer }] of this.declared) {
      const size = shape.reduce((a, b) => a * b, 1);
      this.state.set(name, this.tensor(integer ? new Int32Array(size) : new Float32Array(size), shape));
    }
    this.fresh = true; // a state may begin with learned values: a reset puts them in place
    this.unread = [];
    this.generated = 0;
    this.text = new Utf8();
  }

  get stateBytes() {
    let bytes = 0;
    for (const { data } of this.state.values()) bytes += data.byteLength;
    return bytes;
  }

  /** @param {string} prompt what is read after all that was read and written so far */
  add(prompt) {
    this.unread.push(...new TextEncoder().encode(prompt));
  }

  /** Read the ids that are not read yet, in pieces; the next id is chosen and not read. @param {import("./sampling.js").Sampling} sampling */
  async next(sampling) {
    if (!this.unread.length) throw new Error("prompt: empty; write at least one character");
    if (this.generated >= MOST) throw new Error("seed: all its random numbers are used; take another seed and start anew");
    while (this.unread.length > PIECE) {
      await this.run(this.unread.slice(0, PIECE));
      this.unread.splice(0, PIECE);
    }
    const logits = await this.run(this.unread);
    const { id } = choose(logits, sampling, this.generated);
    this.unread = [id];
    this.generated += 1;
    return id;
  }

  async run(ids) {
    const shape = [1, ids.length];
    const feeds = Object.fromEntries(this.state);
    feeds.tokens = this.tensor(BigInt64Array.from(ids, BigInt), shape);
    feeds.reset = this.tensor(Uint8Array.from(ids, (_, i) => (this.fresh && i === 0 ? 1 : 0)), shape, "bool");
    feeds.valid = this.tensor(new Uint8Array(ids.length).fill(1), shape, "bool");
    const known = Object.fromEntries(Object.entries(feeds).filter(([name]) => this.session.inputNames.includes(name)));
    const found = await this.session.run(known);
    for (const name of this.declared.keys()) this.state.set(name, found[`next.${name}`]);
    this.fresh = false;
    return found.logits.data.subarray((ids.length - 1) * this.model.vocabulary);
  }

  /** @param {import("./sampling.js").Sampling} sampling @returns {Uint8Array} */
  save(sampling) {
    if (this.fresh) throw new Error("state: nothing is read yet; write some text first");
    const state = new Map([...this.state].map(([name, { data, dims }]) => [name, { data, shape: [...dims] }]));
    return saveState({ state, unread: this.unread, generated: this.generated, held: this.text.held, sampling }, this.model.config);
  }

  /** @param {Uint8Array} bytes @returns {import("./sampling.js").Sampling | null} how its text was sampled, where the file says so */
  bring(bytes) {
    const found = loadState(bytes, this.model.config, this.declared, this.model.vocabulary);
    for (const [name, { shape, data }] of found.state) this.state.set(name, this.tensor(data, shape));
    Object.assign(this, { fresh: false, unread: found.unread, generated: found.generated, text: new Utf8() });
    this.text.feed(found.held); // what of them could be shown was
    return found.sampling;
  }

  tensor(data, shape, type = TYPES.get(data.constructor)) {
    return new this.ort.Tensor(type, data, shape);
  }
}

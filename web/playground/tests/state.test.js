import assert from "node:assert/strict";
import test from "node:test";
import { read, write } from "../src/safetensors.js";
import { loadState, saveState } from "../src/state.js";
import { Utf8 } from "../src/text.js";

const config = '{"arch": "mamba", "dropout": 0.0, "d_model": 3}';
const declared = new Map([
  ["layers.0.ssm", { shape: [1, 2, 3], integer: false }],
  ["position", { shape: [1], integer: true }],
]);
const state = new Map([
  ["position", { shape: [1], data: Int32Array.of(9) }],
  ["layers.0.ssm", { shape: [1, 2, 3], data: Float32Array.of(1, 2, 3, -4, 5e-9, 6e30) }],
]);
const saved = { state, unread: [101], generated: 7, held: [226], sampling: { temperature: 0.8, topK: 3, topP: 0.9, seed: (1n << 64n) - 1n } };
const bytes = saveState(saved, config);
const load = (data) => loadState(data, config, declared, 256);

test("a state comes back as it was", () => {
  const found = load(bytes);
  assert.deepEqual({ ...found, state: [...found.state].sort() }, { ...saved, state: [...saved.state].sort() });
  assert.equal(new DataView(bytes.buffer).getBigUint64(0, true) % 8n, 0n);
});

test("a penalty of 1 is none", () => {
  const found = load(changed((m) => (m.generation = JSON.stringify({ ...JSON.parse(m.generation), repetition_penalty: 1.0, seen: null }))));
  assert.deepEqual(found.sampling, saved.sampling);
});

test("a state alone says nothing of its text", () => {
  const metadata = { format: "unisono", version: "1", kind: "state", config: '{"d_model":3,"arch":"mamba","dropout":0}' };
  const wide = new Map([["layers.0.ssm", { shape: [1, 2, 3], data: Float64Array.of(1, 2, 3, 4, 5, 6) }], ["position", { shape: [1], data: BigInt64Array.of(9n) }]]);
  const found = load(write(wide, metadata));
  assert.deepEqual([found.unread, found.generated, found.sampling], [[], 0, null]);
  assert.deepEqual(found.state.get("layers.0.ssm").data, Float32Array.of(1, 2, 3, 4, 5, 6));
});

function changed(change) {
  const { metadata, tensors } = read(bytes);
  change(metadata, tensors);
  return write(tensors, metadata);
}

test("what does not fit is refused, and said", () => {
  const ssm = (shape, values) => (_, tensors) => tensors.set("layers.0.ssm", { shape, data: values });
  const said = (values) => (metadata) => (metadata.generation = JSON.stringify({ ...JSON.parse(metadata.generation), ...values }));
  for (const [change, message] of [
    [(m) => (m.format = "pt"), /not one of unisono's/],
    [(m) => (m.version = "2"), /file version "2"/],
    [(m) => (m.kind = "params"), /holds "params", expected "state"/],
    [(m) => (m.config = config.replace("3}", "4}")), /d_model is 4 there and 3 here/],
    [(m) => (m.config = "{"), /config: not JSON/],
    [(m) => (m.config = "null"), /not names with values/],
    [(_, t) => t.delete("position"), /"position" is missing/],
    [(_, t) => t.set("constructor", { shape: [1], data: Float32Array.of(1) }), /"constructor" is no state/],
    [ssm([2, 3], new Float32Array(6)), /has shape \[2,3\], expected \[1,2,3\]/],
    [ssm([1, 2, 3], new Int32Array(6)), /is not of floats/],
    [ssm([1, 2, 3], Float32Array.of(1, 2, 3, 4, 5, NaN)), /NaN or infinite/],
    [ssm([1, 2, 3], Float64Array.of(1, 2, 3, 4, 5, 1e300)), /NaN or infinite/],
    [(_, t) => t.set("position", { shape: [1], data: Int32Array.of(-1) }), /position is -1/],
    [said({ unread: [256] }), /not ids of this model's 256/],
    [said({ held: "x" }), /not ids/],
    [said({ n_generated: -1 }), /n_generated: -1/],
    [said({ seed: "-1" }), /seed: /],
    [said({ temperature: "hot" }), /temperature: hot/],
    [said({ code: "x" }), /"code" is no field/],
    [said({ repetition_penalty: 1.2, seen: [1] }), /repetition_penalty: 1.2; this page draws without one/],
    [said({ seen: [-1] }), /not ids/],
  ]) {
    assert.throws(() => load(changed(change)), message);
  }
});

test("no damage to a file is read as a state", () => {
  for (let length = 0; length < bytes.length; length++) assert.throws(() => load(bytes.slice(0, length)), /choose|not|damaged/);
  assert.throws(() => load(Uint8Array.of(...bytes, 0)), /1 bytes belong to no array/);
  const size = bytes.slice();
  new DataView(size.buffer).setBigUint64(0, (1n << 64n) - 1n, true);
  assert.throws(() => load(size), /its header is said to have/);
  const text = new TextDecoder().decode(bytes);
  for (const [old, by] of [["[0,24]", "[0,20]"], ["[0,24]", "[4,28]"], ["[1,2,3]", "[1,2,9]"], ['"F32"', '"__p"'], ["[0,24]", "[0,-4]"]]) {
    assert.ok(text.includes(old));
    const damaged = bytes.slice();
    damaged.set(new TextEncoder().encode(by.padEnd(old.length).slice(0, old.length)), new TextEncoder().encode(text.slice(0, text.indexOf(old))).length);
    assert.throws(() => load(damaged), /not a safetensors file/);
  }
});

test("half a character is held, and nothing else", () => {
  const all = [..."né€😀 "].flatMap((letter) => [...new TextEncoder().encode(letter)]);
  for (let cut = 0; cut <= all.length; cut++) {
    const first = new Utf8();
    const second = new Utf8();
    const text = first.feed(all.slice(0, cut));
    second.feed(first.held);
    assert.equal(text + second.feed(all.slice(cut)), "né€😀 ");
  }
  for (const broken of [[0xe2, 0x41], [0xff], [0x80], [0xe0, 0x80], [0xf4, 0x90], [0xc3, 0xa9]]) {
    const utf8 = new Utf8();
    utf8.feed(broken);
    assert.deepEqual(utf8.held, []);
  }
});

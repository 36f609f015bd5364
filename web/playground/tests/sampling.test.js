import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import { philox, uniform } from "../src/philox.js";
import { checkSampling, choose, parseSeed } from "../src/sampling.js";

const path = new URL("../../../conformance/unisono_conformance/vectors/sampling.json", import.meta.url);
const vectors = JSON.parse(readFileSync(path, "utf8"));
const numbers = (logits) => logits.map((value) => (typeof value === "string" ? Number(value.replace("inf", "Infinity")) : value));

test("random numbers are NumPy's, bit for bit", () => {
  assert.ok(vectors.uniform.length > 20);
  for (const { seed, row, n, u } of vectors.uniform) assert.equal(uniform(BigInt(seed), row, n), u);
});

test("Philox4x64-10 is Random123's (its known answers)", () => {
  const ones = (1n << 64n) - 1n;
  assert.equal(philox([0n, 0n, 0n, 0n], [0n, 0n])[0], 0x16554d9eca36314cn);
  assert.equal(philox([ones, ones, ones, ones], [ones, ones])[0], 0x87b092c3013fe90bn);
});

test("tokens are chosen as the contract chooses them", () => {
  let drawn = 0;
  for (const { logits, temperature, top_k: topK, top_p: topP, seed, n, id, near_tie: nearTie } of vectors.choices) {
    const found = choose(numbers(logits), { temperature, topK, topP, seed: BigInt(seed) }, n);
    assert.equal(found.nearTie, nearTie);
    if (nearTie && temperature) continue; // where exp is rounded otherwise, it may fall otherwise
    assert.equal(found.id, id, JSON.stringify({ temperature, topK, topP, seed, n }));
    drawn += temperature > 0;
  }
  assert.ok(drawn > 50);
});

test("what cannot be drawn from is an error", () => {
  const way = { temperature: 1, topK: 0, topP: 1, seed: 0n };
  assert.throws(() => choose([0, NaN], way, 5), /NaN at generated token 5/);
  assert.throws(() => choose([-Infinity, -Infinity], way, 5), /-inf alone/);
  for (const [field, value] of [["temperature", -1], ["temperature", NaN], ["topK", 1.5], ["topP", 0], ["topP", 2], ["seed", 1n << 64n]]) {
    assert.throws(() => checkSampling({ ...way, [field]: value }), /use /);
  }
  for (const text of ["", "-1", "1.5", "x", "1".repeat(21)]) assert.throws(() => parseSeed(text), /seed: /);
  assert.equal(parseSeed("18446744073709551615"), (1n << 64n) - 1n);
});

/**
 * Choosing the next token, as spec/unisono_spec/contract/sampling.py does: float64 softmax, inverse CDF, a random number that is a
 * function of (seed, row, number generated so far). Sums are taken in another order than NumPy's; where that could matter is a near-tie.
 */

import { uniform } from "./philox.js";

const NEAR_TIE = 5e-5;
export const MOST = 2 ** 32; // ids that one seed has random numbers for

/**
 * @typedef {{temperature: number, topK: number, topP: number, seed: bigint}} Sampling
 * temperature 0 is greedy; topK 0 and topP 1 keep the whole vocabulary.
 */

/** @param {Sampling} sampling; throws an Error that names the field and the remedy */
export function checkSampling({ temperature, topK, topP, seed }) {
  if (!(Number.isFinite(temperature) && temperature >= 0)) {
    throw new Error(`temperature: ${temperature}; use 0 for greedy or a positive number`);
  }
  if (!(Number.isSafeInteger(topK) && topK >= 0)) throw new Error(`top_k: ${topK}; use 0 for all or a positive integer`);
  if (!(topP > 0 && topP <= 1)) throw new Error(`top_p: ${topP}; use a number in (0, 1]`);
  if (!(typeof seed === "bigint" && seed >= 0n && seed < 1n << 64n)) {
    throw new Error(`seed: ${seed}; use an integer from 0 to 2**64 - 1`);
  }
}

/** @param {string} text @returns {bigint} */
export function parseSeed(text) {
  if (!/^[0-9]{1,20}$/.test(text)) throw new Error(`seed: ${JSON.stringify(text.slice(0, 40))}; use the digits of an integer from 0 to 2**64 - 1`);
  return BigInt(text);
}

/**
 * The next id, and whether it was a near-tie.
 * @param {ArrayLike<number>} logits of one row @param {Sampling} sampling @param {number} count of ids generated before @param {number} row
 */
export function choose(logits, sampling, count, row = 0) {
  let z = Float64Array.from(logits);
  let best = -Infinity;
  for (const value of z) {
    if (Number.isNaN(value)) throw new Error(`logits: NaN at generated token ${count}; the weights or the state are damaged`);
    if (value > best) best = value;
  }
  if (best === -Infinity) throw new Error(`logits: a row of -inf alone at generated token ${count}; leave one id that can be chosen`);
  if (best === Infinity) {
    z = z.map((value) => (value === Infinity ? 0 : -Infinity));
    best = 0;
  }
  if (sampling.temperature === 0) return { id: z.indexOf(best), nearTie: close(z) };
  return draw(z, best, sampling, count, row);
}

/** Whether the two best are near, beside the spread of what can be chosen at all. */
function close(z) {
  let first = -Infinity;
  let second = -Infinity;
  let least = Infinity;
  for (const value of z) {
    const half = value / 2; // so that no difference overflows
    if (half > first) [first, second] = [half, first];
    else if (half > second) second = half;
    if (half > -Infinity && half < least) least = half;
  }
  return first - second <= NEAR_TIE * (first - least);
}

function draw(z, best, { temperature, topK, topP, seed }, count, row) {
  let scaled = z.map((value) => value / temperature);
  if (!Number.isFinite(best / temperature)) scaled = z.map((value) => (value - best) / temperature); // a temperature near 0
  const order = Array.from(z.keys()); // best first, the lowest id on ties
  order.sort((a, b) => (scaled[a] > scaled[b] ? -1 : scaled[a] < scaled[b] ? 1 : a - b));
  const top = scaled[order[0]];
  const p = Float64Array.from(order, (id) => Math.exp(scaled[id] - top));
  const total = sum(p);
  for (let i = 0; i < p.length; i++) p[i] /= total;
  if (topK) p.fill(0, topK);
  const cdf = cumulative(p); // of what top_p keeps, a beginning
  const enough = topP * cdf.at(-1);
  const kept = (by) => cdf.reduce((n, sum, i) => n + (p[i] !== 0 && (!i || topP === 1 || sum - p[i] < enough + by)), 0);
  const [few, some, many] = [-NEAR_TIE, 0, NEAR_TIE].map(kept);
  const u = uniform(seed, row, count);
  let rank = 0;
  while (rank < some - 1 && cdf[rank] <= u * cdf[some - 1]) rank++;
  const low = u * cdf[few - 1] - NEAR_TIE; // an edge here is one that rounding could move past u, where it also moves the cut
  const high = u * cdf[many - 1] + NEAR_TIE;
  const half = order.map((id) => z[id] / 2);
  const margin = NEAR_TIE * (half[0] - half.findLast((value) => value > -Infinity));
  const nearTie =
    cdf.subarray(0, many - 1).some((edge) => edge >= low && edge <= high) ||
    (rank > 0 && half[rank - 1] - half[rank] <= margin) ||
    half[rank] - half[rank + 1] <= margin;
  return { id: order[rank], nearTie };
}

function cumulative(p) {
  let running = 0;
  return p.map((value) => (running += value));
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

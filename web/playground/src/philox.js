/** Philox4x64-10 (Salmon et al. 2011) as NumPy's `Generator(Philox(key=[k0, k1])).random()` begins it: the counter is 1 at first. */

const MASK = (1n << 64n) - 1n;
const M0 = 0xd2e7470ee14c6c93n;
const M1 = 0xca5a826395121157n;
const W0 = 0x9e3779b97f4a7c15n;
const W1 = 0xbb67ae8584caa73bn;

/** @param {bigint[]} counter four words @param {bigint[]} key two words @returns {bigint[]} four words */
export function philox(counter, key) {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const a = M0 * c0;
    const b = M1 * c2;
    [c0, c1, c2, c3] = [(b >> 64n) ^ c1 ^ k0, b & MASK, (a >> 64n) ^ c3 ^ k1, a & MASK];
    k0 = (k0 + W0) & MASK;
    k1 = (k1 + W1) & MASK;
  }
  return [c0, c1, c2, c3];
}

/**
 * The uniform number in [0, 1) that chooses a token.
 * @param {bigint} seed 0 to 2⁶⁴ − 1 @param {number} row of the batch @param {number} count of ids generated before this one
 */
export function uniform(seed, row, count) {
  const [word] = philox([1n, 0n, 0n, 0n], [seed, (BigInt(row) << 32n) | BigInt(count)]);
  return Number(word >> 11n) * 2 ** -53;
}

/** The safetensors format, read with every check before anything of a declared size is made: eight bytes of length, JSON, raw arrays. */

const ARRAYS = { F64: Float64Array, F32: Float32Array, I64: BigInt64Array, I32: Int32Array };
const NAMES = new Map(Object.entries(ARRAYS).map(([name, array]) => [array, name]));
const MAX_HEADER = 1 << 20;
const MAX_AXES = 8;

/**
 * @typedef {{shape: number[], data: Float32Array | Float64Array | Int32Array | BigInt64Array}} Tensor
 * @param {Uint8Array} bytes @returns {{metadata: Record<string, string>, tensors: Map<string, Tensor>}}
 */
export function read(bytes) {
  const bad = (why) => new Error(`not a safetensors file that is read here: ${why}; choose a state that was saved whole`);
  if (bytes.length < 8) throw bad(`it has ${bytes.length} bytes`);
  const size = new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true);
  if (size > BigInt(Math.min(MAX_HEADER, bytes.length - 8))) throw bad(`its header is said to have ${size} bytes`);
  const start = 8 + Number(size);
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, start)));
  } catch (error) {
    throw bad(`its header is not JSON (${error.message})`);
  }
  if (!isObject(header)) throw bad("its header is not names with arrays");
  const { __metadata__: metadata = {}, ...entries } = header;
  if (!isObject(metadata) || !Object.values(metadata).every((value) => typeof value === "string")) throw bad("its metadata are not texts");
  const tensors = new Map();
  const spans = [];
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets: offsets } = isObject(entry) ? entry : {};
    if (!Object.hasOwn(ARRAYS, dtype)) throw bad(`${shown(name)} is of ${shown(dtype)}`);
    if (!isSizes(shape) || shape.length > MAX_AXES || !isSizes(offsets) || offsets.length !== 2) throw bad(`${shown(name)} has no shape`);
    const array = ARRAYS[dtype];
    const [begin, end] = offsets;
    const count = shape.reduce((a, b) => a * b, 1);
    if (begin > end || end > bytes.length - start || end - begin !== count * array.BYTES_PER_ELEMENT) {
      throw bad(`${shown(name)} of shape [${shape}] has bytes ${begin} to ${end} of ${bytes.length - start}`);
    }
    spans.push([begin, end]);
    // a copy: it is aligned, and lives without the file
    tensors.set(name, { shape, data: new array(bytes.slice(start + begin, start + end).buffer) });
  }
  let at = 0;
  for (const [begin, end] of spans.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    if (begin !== at) throw bad("its arrays overlap or leave holes");
    at = end;
  }
  if (at !== bytes.length - start) throw bad(`${bytes.length - start - at} bytes belong to no array`);
  return { metadata, tensors };
}

/** @param {Map<string, Tensor>} tensors @param {Record<string, string>} metadata @returns {Uint8Array} */
export function write(tensors, metadata) {
  const header = { __metadata__: Object.fromEntries(Object.entries(metadata).sort()) };
  const wide = ([a, { data: x }], [b, { data: y }]) => y.BYTES_PER_ELEMENT - x.BYTES_PER_ELEMENT || (a < b ? -1 : 1);
  const sorted = [...tensors].sort(wide); // the widest first, so that each lies aligned
  let end = 0;
  for (const [name, { shape, data }] of sorted) {
    header[name] = { dtype: NAMES.get(data.constructor), shape, data_offsets: [end, (end += data.byteLength)] };
  }
  let text = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(Math.ceil(text.length / 8) * 8).fill(0x20); // the format pads its header with spaces
  padded.set(text);
  const out = new Uint8Array(8 + padded.length + end);
  new DataView(out.buffer).setBigUint64(0, BigInt(padded.length), true);
  out.set(padded, 8);
  for (const [name, { data }] of sorted) {
    out.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), 8 + padded.length + header[name].data_offsets[0]);
  }
  return out;
}

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isSizes = (value) => Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0);
export const shown = (value) => String(JSON.stringify(value)).slice(0, 60);

/** Bytes to text as they come, without a character that is half there. */

export class Utf8 {
  constructor() {
    this.decoder = new TextDecoder("utf-8");
    this.tail = [];
  }

  /** @param {number[]} ids bytes @returns {string} */
  feed(ids) {
    this.tail = [...this.tail, ...ids].slice(-4);
    return this.decoder.decode(Uint8Array.from(ids), { stream: true });
  }

  /** The last bytes, where they begin a character that is not whole. */
  get held() {
    for (let n = Math.min(3, this.tail.length); n > 0; n--) {
      const bytes = this.tail.slice(-n);
      if (begins(bytes)) return bytes;
    }
    return [];
  }
}

/** Whether bytes are a proper beginning of one character in UTF-8 (Unicode, table 3-7). */
function begins([first, second, ...rest]) {
  const length = first >= 0xc2 && first <= 0xdf ? 2 : first >= 0xe0 && first <= 0xef ? 3 : first >= 0xf0 && first <= 0xf4 ? 4 : 0;
  const count = (second === undefined ? 1 : 2) + rest.length;
  const [low, high] = { 0xe0: [0xa0, 0xbf], 0xed: [0x80, 0x9f], 0xf0: [0x90, 0xbf], 0xf4: [0x80, 0x8f] }[first] ?? [0x80, 0xbf];
  const follows = (second === undefined || (second >= low && second <= high)) && rest.every((byte) => byte >= 0x80 && byte <= 0xbf);
  return count < length && follows;
}

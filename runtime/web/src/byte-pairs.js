/** CLIP's byte-pair vocabulary, as `tokenizer.json` holds it. */

import { BundleError } from "./errors.js";

export const SOT = "<start_of_text>";
export const EOT = "<end_of_text>";
const SPLIT = "<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+";
// A word has no white space, and JavaScript's idea of that differs from the vocabulary's.
const PIECES = /<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{L}\p{N}]+/gu;
const WORDS = 65536;

/** The 256 byte values as printable characters. @returns {string[]} */
export function byteAlphabet() {
  const alphabet = [];
  let hidden = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    alphabet.push(String.fromCharCode(printable ? byte : hidden++));
  }
  return alphabet;
}

/**
 * @param {any} document the parsed tokenizer.json
 * @returns {(word: string) => number[]} ids of one cleaned word
 * @throws {BundleError} another kind of tokenizer
 */
export function readBytePairs(document) {
  const model = document.model;
  const [split, levels] = document.pre_tokenizer?.pretokenizers ?? [];
  /** @type {Record<string, number>} */
  const found = model?.vocab ?? {};
  const alphabet = byteAlphabet();
  const asWritten =
    split?.pattern?.Regex === SPLIT && split.invert === true && levels?.type === "ByteLevel" && levels.add_prefix_space === false && levels.use_regex === false &&
    model.end_of_word_suffix === "</w>" && !model.dropout && !model.continuing_subword_prefix && !model.byte_fallback && !model.ignore_merges &&
    alphabet.every((letter) => letter in found && `${letter}</w>` in found) && SOT in found && EOT in found && Array.isArray(model.merges);
  if (!asWritten) throw new BundleError("tokenizer.json is not CLIP's byte-pair tokenizer as 'mclip export' writes it; export the bundle again");
  const vocab = new Map(Object.entries(found));
  /** @type {Map<string, number>} */
  const ranks = new Map(model.merges.map((/** @type {string | string[]} */ pair, /** @type {number} */ n) => [typeof pair === "string" ? pair : pair.join(" "), n]));
  const encoder = new TextEncoder();
  /** @type {Map<string, number[]>} */
  const words = new Map();

  /** @param {string} piece @returns {number[]} */
  function spell(piece) {
    if (piece === SOT || piece === EOT) return [/** @type {number} */ (vocab.get(piece))];
    const tokens = Array.from(encoder.encode(piece), (byte) => alphabet[byte]);
    tokens[tokens.length - 1] += "</w>";
    return merge(tokens, ranks).map((token) => /** @type {number} */ (vocab.get(token)));
  }

  return (word) => {
    const known = words.get(word);
    if (known) return known;
    const ids = (word.match(PIECES) ?? []).flatMap(spell);
    if (words.size >= WORDS) words.clear();
    if (word.length <= 4096) words.set(word, ids);
    return ids;
  };
}

/**
 * Join neighbours that are a merge, the first in the list first, the left ones first, until none is left. Long pieces are kept in a heap by rank and place,
 * so that no text is long enough to stop a page.
 * @param {string[]} tokens @param {Map<string, number>} ranks
 * @returns {string[]}
 */
function merge(tokens, ranks) {
  const count = tokens.length;
  /** @type {(string | null)[]} */
  const held = tokens.slice();
  const after = Int32Array.from({ length: count }, (_, n) => n + 1);
  const before = Int32Array.from({ length: count }, (_, n) => n - 1);
  /** @type {number[]} rank * 2^26 + place: exact in a double */
  const heap = [];
  const offer = (/** @type {number} */ left) => {
    const right = after[left];
    const rank = right < count ? ranks.get(`${held[left]} ${held[right]}`) : undefined;
    if (rank !== undefined) push(heap, rank * 67108864 + left);
  };
  for (let n = 0; n < count - 1; n++) offer(n);
  while (heap.length) {
    const next = pop(heap);
    const place = next % 67108864;
    const following = after[place];
    if (held[place] === null || following >= count || ranks.get(`${held[place]} ${held[following]}`) !== Math.floor(next / 67108864)) continue;
    held[place] = `${held[place]}${held[following]}`;
    held[following] = null;
    after[place] = after[following];
    if (after[place] < count) before[after[place]] = place;
    offer(place);
    if (before[place] >= 0) offer(before[place]);
  }
  return /** @type {string[]} */ (held.filter((token) => token !== null));
}

/** @param {number[]} heap @param {number} value */
function push(heap, value) {
  let n = heap.push(value) - 1;
  for (let up = (n - 1) >> 1; n > 0 && heap[up] > value; n = up, up = (n - 1) >> 1) heap[n] = heap[up];
  heap[n] = value;
}

/** @param {number[]} heap @returns {number} */
function pop(heap) {
  const top = heap[0];
  const value = /** @type {number} */ (heap.pop());
  if (!heap.length) return top;
  let n = 0;
  for (let down = 1; down < heap.length; down = 2 * n + 1) {
    if (down + 1 < heap.length && heap[down + 1] < heap[down]) down++;
    if (heap[down] >= value) break;
    heap[n] = heap[down];
    n = down;
  }
  heap[n] = value;
  return top;
}

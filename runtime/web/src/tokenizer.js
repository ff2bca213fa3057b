/** Texts to rows of token ids, from a bundle's `tokenizer.json`. */

import { EOT, SOT, readBytePairs } from "./byte-pairs.js";
import { cleanWords, needsRepair } from "./cleaning.js";
import { BundleError } from "./errors.js";
import { readWordPieces } from "./word-pieces.js";

export { needsRepair };

/**
 * @typedef {object} TextSpec
 * @property {number} context_length tokens a row
 * @property {number} vocab_size
 * @property {number} pad_id fills a row's rest
 * @property {string} cleaning "clip" or "none"
 */

/**
 * @param {string} json the file's content @param {TextSpec} spec
 * @returns {(texts: string[]) => Int32Array} rows of context_length, one after the other
 * @throws {BundleError} a tokenizer of another kind, or one that contradicts the manifest
 */
export function readTokenizer(json, spec) {
  let document;
  try {
    document = JSON.parse(json);
  } catch (error) {
    throw new BundleError(`tokenizer.json is no JSON (${/** @type {Error} */ (error).message}); fetch or export the bundle again`);
  }
  const { context_length: length, pad_id: pad } = spec;
  const byPairs = document?.model?.type === "BPE" && spec.cleaning === "clip";
  const [start, end] = byPairs ? [SOT, EOT].map((name) => document.model.vocab[name]) : around(document);
  const room = length - 2;
  if (room < 0) throw new BundleError(`context_length is ${length}, too short for the 2 special tokens of an empty text`);
  const spell = byPairs ? byWords(readBytePairs(document), room) : readWordPieces(document);
  if (!byPairs && spec.cleaning !== "none") throw new BundleError("tokenizer.json is not CLIP's and the manifest asks for CLIP's cleaning; export the bundle again");
  return (texts) => {
    const rows = new Int32Array(texts.length * length).fill(pad);
    texts.forEach((text, n) => {
      if (typeof text !== "string") throw new TypeError(`a text is a ${typeof text}, expected a string`);
      const ids = spell(byPairs ? text : text.toWellFormed()).slice(0, room);
      rows.set([start, ...ids, end], n * length);
    });
    return rows;
  };
}

/** @param {(word: string) => number[]} spell @param {number} room @returns {(text: string) => number[]} */
function byWords(spell, room) {
  // A word has at least one token, so that no more than `room` words count.
  return (text) => cleanWords(text).slice(0, room).flatMap(spell);
}

/** Ids of the two tokens around a text. @param {any} document @returns {[number, number]} */
function around(document) {
  const single = document?.post_processor?.single;
  const known = document?.post_processor?.special_tokens;
  const first = single?.[0]?.SpecialToken?.id;
  const last = single?.[2]?.SpecialToken?.id;
  if (single?.length !== 3 || known?.[first]?.ids?.length !== 1 || known?.[last]?.ids?.length !== 1) {
    throw new BundleError("tokenizer.json does not put one special token on each side of a text; such tokenizers do not run in the browser");
  }
  return [known[first].ids[0], known[last].ids[0]];
}

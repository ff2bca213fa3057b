/** BERT's WordPiece, as `tokenizer.json` describes it for uncased models. */

import { BundleError } from "./errors.js";
import { NEW_MARKS, NEW_PUNCTUATION } from "./newer.js";

const CHINESE = /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/gu;
// Rust's white space; JavaScript's has U+FEFF besides and lacks U+0085.
const SPACE = /[\t-\r\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;
const HIDDEN = new RegExp(`(?![\\t\\n\\r${NEW_MARKS}])[\\p{Cc}\\p{Cf}\\p{Co}\\0\\ufffd]`, "gu");
const MARKS = new RegExp(`(?![${NEW_MARKS}])[\\p{Mn}\\u1734\\u{1171e}]`, "gu");
const PUNCTUATION = new RegExp(`((?![${NEW_PUNCTUATION}])(?:[!-/:-@[-\`{-~\\u166d\\u{111c9}]|\\p{P}))`, "u");

/**
 * @param {any} document the parsed tokenizer.json
 * @returns {(text: string) => number[]} ids of a text without the special tokens around it
 * @throws {BundleError} a part that is not read here
 */
export function readWordPieces(document) {
  const { model, normalizer, pre_tokenizer: split, added_tokens: added } = document;
  const usual =
    model?.type === "WordPiece" && normalizer?.type === "BertNormalizer" && split?.type === "BertPreTokenizer" && Array.isArray(added) &&
    typeof model.unk_token === "string" && model.unk_token in model.vocab && typeof model.continuing_subword_prefix === "string" &&
    added.every((token) => !token.single_word && !token.lstrip && !token.rstrip && !token.normalized);
  if (!usual) throw new BundleError("tokenizer.json is neither CLIP's byte pairs nor BERT's WordPiece; only these two run in the browser");
  /** @type {Map<string, number>} */
  const vocab = new Map(Object.entries(model.vocab));
  const unknown = /** @type {number} */ (vocab.get(model.unk_token));
  const most = model.max_input_chars_per_word ?? 100;
  const prefix = model.continuing_subword_prefix;
  /** @type {Map<string, number>} */
  const specials = new Map(added.map((/** @type {{content: string, id: number}} */ token) => [token.content, token.id]));
  const escaped = [...specials.keys()].sort((a, b) => b.length - a.length).map((name) => name.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
  const literal = escaped.length ? new RegExp(`(${escaped.join("|")})`) : null;

  /** @param {string} text */
  function normal(text) {
    if (normalizer.clean_text) text = text.replace(HIDDEN, "").replace(new RegExp(SPACE, "gu"), " ");
    if (normalizer.handle_chinese_chars) text = text.replace(CHINESE, " $& ");
    if (normalizer.strip_accents ?? normalizer.lowercase) text = text.normalize("NFD").replace(MARKS, "");
    // Letter by letter: a final sigma is not told apart.
    return normalizer.lowercase ? Array.from(text, (c) => c.toLowerCase()).join("") : text;
  }

  /** @param {string} word @returns {number[]} */
  function spell(word) {
    const letters = Array.from(word);
    if (letters.length > most) return [unknown];
    const ids = [];
    for (let start = 0, end; start < letters.length; start = end) {
      let id;
      for (end = letters.length; end > start; end--) {
        id = vocab.get((start ? prefix : "") + letters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [unknown];
      ids.push(id);
    }
    return ids;
  }

  return (text) => {
    const ids = [];
    for (const part of literal ? text.split(literal) : [text]) {
      const special = specials.get(part);
      if (special !== undefined) ids.push(special);
      else for (const word of normal(part).split(SPACE)) ids.push(...word.split(PUNCTUATION).filter(Boolean).flatMap(spell));
    }
    return ids;
  };
}

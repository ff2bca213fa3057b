/**
 * What CLIP does to a text before it is split: HTML entities, one space, lower case. The repair of mojibake that Python leaves to ftfy is not written here:
 * `needsRepair` says which texts would need it.
 */

import { unescapeHtml, unescapeWhole } from "./entities.js";

// Python's white space; JavaScript's has U+FEFF besides and lacks five controls.
const SPACE = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;
const PLAIN = /^[\x20-\x25\x27-\x7e]*$/;

const EXCLUDED =
  "\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f-\\x9f" + // controls: removed, or the surest sign of mojibake
  "ÂÃÎÐØÙŒœƒЂ" + // mojibake even beside ASCII, or beside ordinary letters
  "ĲĳŉǄ-ǌǱ-ǳ\\ufb00-\\ufb06" + // ligatures that are taken apart
  "\\u206a-\\u206f\\ufeff\\uff00-\\uffff" + // removed, or changed in width
  "\\ud800-\\udfff\\ue000-\\uf8ff"; // surrogates, private use
const CAPITALS = Array.from({ length: 0x180 - 0xc0 }, (_, n) => String.fromCharCode(0xc0 + n)).filter((c) => /\p{Lu}/u.test(c) && !EXCLUDED.includes(c)).join("");
const EDGY =
  `¡-¬®-³µ¶¸-¿×÷${CAPITALS}ˆˇ\\u02d8-\\u02dd\\u0384\\u0385Ґ` + // signs of Latin-1, capitals, spacing accents
  "\\u2018\\u201a\\u201c-\\u201e\\u2020-\\u2022‰‹›\\u2044\\u20a0-\\u20cf№™" + // quotes, daggers, money
  "\\u2200-\\u22ff⌐\\u2500-\\u259f◊"; // mathematics, boxes
const TROUBLE = new RegExp(`[${EXCLUDED}]|(?<=[^\\x00-\\x7f])[${EDGY}]|[${EDGY}](?=[^\\x00-\\x7f])`, "u");

/** Quotes straightened and characters composed, as ftfy does where nothing has to be repaired. @param {string} text */
const composed = (text) => text.replace(/[\u02bc\u2018\u2019\u201a\u201b]/g, "'").replace(/[\u201c-\u201f]/g, '"').normalize("NFC");

/** ftfy's part, as far as it is written: {text, whether the rest would be needed}. @param {string} text */
function ftfyPart(text) {
  // ftfy leaves entities alone where there may be a tag.
  const resolve = !text.includes("<");
  let trouble = false;
  for (let round = 0; round < 100; round++) {
    const before = text;
    if (resolve) text = unescapeWhole(text);
    trouble ||= TROUBLE.test(text);
    text = composed(text);
    if (text === before) break;
  }
  return { text, trouble };
}

/**
 * Whether Python would repair this text (mojibake, ligatures, controls, odd widths), which this package does not: its tokens may differ.
 * It errs on the safe side: some of these texts come out of the repair as they went in.
 * @param {string} text @returns {boolean}
 */
export const needsRepair = (text) => !PLAIN.test(text) && ftfyPart(text).trouble;

/** Words of a cleaned text; none is empty. @param {string} text @returns {string[]} */
export function cleanWords(text) {
  const clean = PLAIN.test(text) ? text : unescapeHtml(unescapeHtml(ftfyPart(text).text));
  // open_clip's pattern passes over U+0345, and a token ends there. White space is joined before letters become small: a final sigma looks at its neighbours.
  const small = clean.split(SPACE).filter(Boolean).join(" ").toLowerCase();
  return small.split(/[ \u0345]/).filter(Boolean);
}

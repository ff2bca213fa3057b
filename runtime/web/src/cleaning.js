/**
 * What CLIP does to a text before it is split: repair, HTML entities, one space, lower case. Of ftfy's repair all that looks at single characters is written
 * here. What is not is its repair of mojibake ("schÃ¶n"), which weighs eleven character sets: `needsRepair` says which texts may call for it.
 */

import { unescapeHtml, unescapeWhole } from "./entities.js";

// Python's white space; JavaScript's has U+FEFF besides and lacks five controls.
const SPACE = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;
const PLAIN = /^[\x20-\x25\x27-\x7e]*$/;

// What the bytes 80 to 9f mean in windows-1252, where they mean anything.
const WINDOWS = "€\x81‚ƒ„…†‡ˆ‰Š‹Œ\x8dŽ\x8f\x90‘’“”•–—˜™š›œ\x9džŸ";
/** @type {Record<string, string>} */
const LIGATURES = {
  Ĳ: "IJ", ĳ: "ij", ŉ: "ʼn", Ǳ: "DZ", ǲ: "Dz", ǳ: "dz", Ǆ: "DŽ", ǅ: "Dž", ǆ: "dž", Ǉ: "LJ", ǈ: "Lj", ǉ: "lj", Ǌ: "NJ", ǋ: "Nj", ǌ: "nj",
  ﬀ: "ff", ﬁ: "fi", ﬂ: "fl", ﬃ: "ffi", ﬄ: "ffl", ﬅ: "ſt", ﬆ: "st",
};
const ALONE = "\\x80-\\x9fÂÃÎÐØÙŒœƒЂ\\ue000-\\uf8ff"; // mojibake even beside ASCII, or beside ordinary letters
const CAPITALS = Array.from({ length: 0x180 - 0xc0 }, (_, n) => String.fromCharCode(0xc0 + n)).filter((c) => /\p{Lu}/u.test(c) && !`${ALONE}Ĳ`.includes(c)).join("");
const EDGY =
  `¡-¬®-³µ¶¸-¿×÷${CAPITALS}ˆˇ\\u02d8-\\u02dd\\u0384\\u0385Ґ` + // signs of Latin-1, capitals, spacing accents
  "\\u2018\\u201a\\u201c-\\u201e\\u2020-\\u2022‰‹›\\u2044\\u20a0-\\u20cf№™" + // quotes, daggers, money
  "\\u2200-\\u22ff⌐\\u2500-\\u259f◊"; // mathematics, boxes
const TROUBLE = new RegExp(`[${ALONE}]|(?<=[^\\x00-\\x7f])[${EDGY}]|[${EDGY}](?=[^\\x00-\\x7f])`, "u");

/** One round of ftfy's steps on single characters. @param {string} text */
const mended = (text) =>
  text
    .replace(/[\x80-\x9f]/g, (c) => WINDOWS[c.charCodeAt(0) - 0x80])
    .replace(/[ĲĳŉǄ-ǌǱ-ǳ\ufb00-\ufb06]/g, (c) => LIGATURES[c])
    .replace(/[\u3000\uff01-\uffef]/g, (c) => c.normalize("NFKC"))
    .replace(/[\u201c-\u201f]/g, '"')
    .replace(/[\u02bc\u2018-\u201b]/g, "'")
    .replace(/\r\n|[\r\u2028\u2029\x85]/g, "\n")
    .replace(/\p{Surrogate}/gu, "\ufffd")
    .replace(/\x1b\[[\d;]*[a-zA-Z]/g, "")
    .replace(/[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]/g, "")
    .normalize("NFC");

/** ftfy's part, line by line until nothing changes: {text, whether it may be mojibake}. @param {string} text */
function ftfyPart(text) {
  let whole = "";
  let trouble = false;
  // From the first line on where there may be a tag, ftfy leaves entities alone.
  let resolve = true;
  for (let line of text.split(/(?<=\n)/)) {
    resolve &&= !line.includes("<");
    for (let before = null; before !== line; ) {
      before = line;
      if (resolve) line = unescapeWhole(line);
      trouble ||= TROUBLE.test(line);
      line = mended(line);
    }
    whole += line;
  }
  return { text: whole, trouble };
}

/**
 * Whether Python might repair the character set of this text, which this package does not: its tokens may differ.
 * It errs on the safe side: most of these texts come out of the repair as they went in.
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

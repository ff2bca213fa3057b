// Python's numbers against these modules. VECTORS names the folder that tests/web/vectors.py wrote.
import assert from "node:assert/strict";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { normalise, resizeAndCrop } from "../../runtime/web/src/preprocess.js";
import { needsRepair, readTokenizer } from "../../runtime/web/src/tokenizer.js";

const folder = process.env.VECTORS ?? "";
const summary = { web_tokenizer_texts: 0, web_tokenizer_mismatches: 0, web_texts_to_repair: 0, web_repair_mismatches: 0, web_pictures: 0, web_pixel_mismatches: 0 };

for (const name of readdirSync(folder).filter((file) => /^texts-\d+\.json$/.test(file))) {
  const { tokenizer, spec, texts, rows, trouble } = JSON.parse(readFileSync(join(folder, name), "utf8"));
  test(`tokens equal Python's: ${tokenizer}`, () => {
    const tokenize = readTokenizer(readFileSync(tokenizer, "utf8"), spec);
    const wrong = [];
    let judged = 0;
    for (const [n, text] of texts.entries()) {
      // Stricter than Python's own decision, which asks ftfy for less too.
      if (trouble[n] === false) assert.equal(needsRepair(text), false, `needsRepair(${JSON.stringify(text)})`);
      if (spec.cleaning === "clip" && needsRepair(text)) {
        summary.web_texts_to_repair++;
        summary.web_repair_mismatches += Array.from(tokenize([text])).some((id, k) => id !== rows[n][k]) ? 1 : 0;
        continue;
      }
      judged++;
      const found = Array.from(tokenize([text]));
      if (found.some((id, k) => id !== rows[n][k])) wrong.push(`${JSON.stringify(text.slice(0, 80))}: ${found} instead of ${rows[n]}`);
    }
    summary.web_tokenizer_texts += judged;
    summary.web_tokenizer_mismatches += wrong.length;
    assert.ok(judged >= 1000, `only ${judged} texts need no repair`);
    assert.deepEqual(wrong.slice(0, 5), [], `${wrong.length} of ${judged}`);
  });
}

test("pixels equal Python's, bit for bit", () => {
  const bytes = readFileSync(join(folder, "pictures.bin"));
  const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
  const entries = JSON.parse(readFileSync(join(folder, "pictures.json"), "utf8"));
  assert.ok(entries.length >= 40);
  for (const { width, height, channels, spec, at } of entries) {
    const given = width * height * channels;
    const made = spec.image_size ** 2 * 3;
    const small = resizeAndCrop({ width, height, channels, data: new Uint8Array(buffer, at, given) }, spec);
    const wrong = small.filter((value, n) => value !== bytes[at + given + n]).length;
    const wanted = new Float32Array(buffer.slice(at + given + made, at + given + made * 5));
    const off = normalise(small, spec).filter((value, n) => value !== wanted[n]).length;
    summary.web_pictures++;
    summary.web_pixel_mismatches += wrong;
    assert.deepEqual([wrong, off], [0, 0], `${width} x ${height} x ${channels} ${spec.interpolation}`);
  }
});

test.after(() => process.env.SUMMARY && writeFileSync(process.env.SUMMARY, JSON.stringify(summary)));

// The index and hostile bundles, without a browser.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { createServer } from "node:http";
import { after, before, test } from "node:test";
import { hasDuplicates, openBundle, parseManifest } from "../../runtime/web/src/manifest.js";
import { BundleError, ClipError, ImageError } from "../../runtime/web/src/errors.js";
import { Index } from "../../runtime/web/src/index-store.js";
import { resizeAndCrop } from "../../runtime/web/src/preprocess.js";
import { needsRepair, readTokenizer } from "../../runtime/web/src/tokenizer.js";
import { candidates, cutLength } from "../../runtime/web/src/towers.js";

const graph = Buffer.from("a graph");
const hex = (data) => createHash("sha256").update(data).digest("hex");
const artefact = (more) => ({
  id: "text-onnx-fp32", tower: "text", target: "onnx", precision: "fp32", batch: "dynamic", status: "proven", path: "onnx/text.onnx", reason: null, parity: { cosine_min: 1 }, latency: null, ...more,
});

/** A sound manifest, changed, and its own hash put right. */
function manifest(change = () => {}) {
  const document = {
    schema: 1, manifest_sha256: "0".repeat(64), name: "toy", embed_dim: 4, loss: "softmax", logit_scale: 10, logit_bias: null, languages: ["en"], golden: {}, licences: [], provenance: {},
    image: { image_size: 8, mean: [0, 0, 0], std: [1, 1, 1], interpolation: "bilinear", resize: "shortest", crop: "center", crop_pct: 1, input: "image", output: "e" },
    text: { context_length: 20, vocab_size: 600, pad_id: 0, mask: "causal", cleaning: "clip", input: "tokens", output: "e" },
    artefacts: [artefact()], files: { "onnx/text.onnx": { sha256: hex(graph), bytes: graph.length } },
  };
  change(document);
  return signed(JSON.stringify(document));
}

const signed = (text) => Buffer.from(text.replace(`"${"0".repeat(64)}"`, `"${hex(text)}"`));

test("a sound manifest is read", async () => assert.equal((await parseManifest(manifest())).name, "toy"));

const HOSTILE = {
  "another schema": [(d) => (d.schema = 2), /schema 2/],
  "a lacking field": [(d) => delete d.embed_dim, /lacks the field 'embed_dim'/],
  "a field of another type": [(d) => (d.logit_scale = true), /'logit_scale' is true/],
  "a path that leaves the bundle": [(d) => (d.files["../../etc/passwd"] = { sha256: "0", bytes: 1 }), /leaves the bundle/],
  "another host": [(d) => (d.files["https://example.org/x"] = { sha256: "0", bytes: 1 }), /leaves the bundle/],
  "a query in a path": [(d) => (d.files["a?b"] = { sha256: "0", bytes: 1 }), /leaves the bundle/],
  "an artefact that is no file": [(d) => (d.artefacts[0].path = "onnx/other.onnx"), /not among its files/],
  "a prototype as a field": [(d) => (d.image = { __proto__: null }), /lacks the field/],
  "std of 0": [(d) => (d.image.std = [1, 0, 1]), /std/],
  "a huge input": [(d) => (d.image.image_size = 1e9), /image_size/],
  "an unknown loss": [(d) => (d.loss = "hinge"), /loss/],
};
for (const [name, [change, message]] of Object.entries(HOSTILE)) {
  test(`refused in a sentence: ${name}`, async () => {
    await assert.rejects(parseManifest(manifest(change)), (error) => error instanceof BundleError && message.test(error.message) && !error.message.includes("\n"));
  });
}

test("every changed byte of a manifest is noticed", async () => {
  const bytes = manifest();
  for (let at = 0; at < bytes.length; at += 7) {
    const damaged = Buffer.from(bytes);
    damaged[at] ^= 1;
    await assert.rejects(parseManifest(damaged), BundleError, `byte ${at}`);
  }
  await assert.rejects(parseManifest(bytes.subarray(0, 400)), /not the JSON/);
  await assert.rejects(parseManifest(new Uint8Array(17 * 1024 * 1024)), /no manifest/);
});

test("names that come twice are found, and only these", async () => {
  assert.equal(hasDuplicates('{"a": 1, "b": {"a": 2}, "c": ["a", "a", {"a": "a"}]}'), false);
  assert.equal(hasDuplicates('{"a": {"b": 1, "\\u0062": 2}}'), true);
  const twice = manifest().toString().replace(/"manifest_sha256":"\w+"/, `"manifest_sha256":"${"0".repeat(64)}"`).replace('"name":"toy"', '"name":"toy","name":"boy"');
  await assert.rejects(parseManifest(signed(twice)), /a name twice/);
});

let server, base, served;
before(async () => {
  server = createServer((request, response) => {
    const body = served[request.url.slice(1)];
    response.writeHead(body ? 200 : 404).end(body);
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  base = `http://127.0.0.1:${server.address().port}/`;
});
after(() => server.close());

test("files are checked against the manifest; what is missing, longer, shorter or unlisted is refused", async () => {
  served = { "manifest.json": manifest(), "onnx/text.onnx": graph };
  const bundle = await openBundle(base);
  assert.deepEqual(Buffer.from(await bundle.read("onnx/text.onnx")), graph);
  for (const other of [Buffer.from("b graph"), Buffer.from("a gra"), Buffer.alloc(5000)]) {
    served["onnx/text.onnx"] = other;
    await assert.rejects(bundle.read("onnx/text.onnx"), BundleError);
  }
  delete served["onnx/text.onnx"];
  await assert.rejects(bundle.read("onnx/text.onnx"), /404/);
  await assert.rejects(bundle.read("toString"), /has no file/);
  served = {};
  await assert.rejects(openBundle(base), /manifest.json cannot be fetched/);
});

test("only what is proven and near enough is a candidate", async () => {
  const others = [{ status: "failed" }, { status: "unproven" }, { parity: { cosine_min: 0.99 } }, { parity: null }, { target: "coreml" }, { parity: { cosine_min: 1, recall1_clear: -0.1 } }];
  const read = await parseManifest(manifest((d) => (d.artefacts = [artefact({ id: "int8", precision: "int8" }), artefact({ id: "one", batch: "1" }), artefact(), ...others.map((more, n) => artefact({ id: `bad${n}`, ...more }))])));
  assert.deepEqual(candidates(read, "text").map((a) => a.id), ["text-onnx-fp32", "int8"]);
  assert.deepEqual(candidates(read, "text", "one").map((a) => a.id), ["one"]);
  assert.throws(() => candidates(read, "text", "bad0"), BundleError);
  assert.throws(() => candidates(read, "image"), BundleError);
});

test("rows are cut after their last token, and after the largest", () => {
  const row = (ids, length = 77) => Int32Array.from({ length }, (_, n) => ids[n] ?? 0);
  assert.deepEqual([row([5, 9]), row([5, 1, 1, 1, 1, 1, 1, 9]), row([5, 1, 1, 1, 1, 1, 1, 1, 9]), row(Array(77).fill(3)), row([5, 9], 6)].map((r) => cutLength(r, 0)), [8, 8, 16, 77, 6]);
});

test("search equals sorting everything; adding twice replaces; removing removes", () => {
  let seed = 1;
  const random = () => ((seed = (seed * 16807) % 2147483647) / 2147483647 - 0.5);
  const index = new Index({ model: "m", dimension: 8 });
  const kept = new Map();
  for (let n = 0; n < 500; n++) {
    const key = `k${Math.floor((random() + 0.5) * 200)}`;
    if (n % 5 === 4) assert.equal(index.remove(key), kept.delete(key));
    else {
      const vector = Float32Array.from({ length: 8 }, random);
      const norm = Math.hypot(...vector);
      index.add(key, vector, n);
      kept.set(key, { vector: vector.map((x) => x / norm), n });
    }
  }
  const query = Float32Array.from({ length: 8 }, random);
  const wanted = [...kept].map(([key, { vector, n }]) => [key, vector.reduce((sum, x, d) => sum + x * query[d], 0), n]).sort((a, b) => b[1] - a[1]).slice(0, 10);
  assert.equal(index.size, kept.size);
  assert.deepEqual(index.search(query).map(({ key, data }) => [key, data]), wanted.map(([key, , n]) => [key, n]));
  assert.deepEqual(index.search(query, 10, 99), []);
  assert.throws(() => index.add("x", new Float32Array(7).fill(1)), ClipError);
  assert.throws(() => index.add("x", new Float32Array(8).fill(NaN)), ClipError);
  assert.throws(() => index.search(new Float32Array(7)), ClipError);
});

test("pictures that cannot be meant, and tokenizers of another kind, are refused in a sentence", () => {
  const spec = { image_size: 64, mean: [0, 0, 0], std: [1, 1, 1], interpolation: "bilinear", crop_pct: 1 };
  assert.throws(() => resizeAndCrop({ width: 1, height: 40000, channels: 3, data: new Uint8Array(120000) }, spec), ImageError);
  for (const picture of [{ width: 2, height: 2, data: new Uint8Array(15) }, { width: 0, height: 2, data: new Uint8Array(0) }, { width: 1.5, height: 2, data: new Uint8Array(12) }]) {
    assert.throws(() => resizeAndCrop(picture, spec), ImageError);
  }
  const text = { context_length: 20, vocab_size: 600, pad_id: 0, cleaning: "clip" };
  for (const json of ["", "[]", "null", "{}", '{"model": {"type": "Unigram"}}', '{"model": {"type": "BPE", "vocab": {}, "merges": []}}']) assert.throws(() => readTokenizer(json, text), BundleError, json);
});

test("what needs repair says so", () => {
  for (const text of ["schÃ¶n", "â€œquotedâ€\x9d", "naÃ¯ve Ã  la", "a\u0080b", "&Atilde;&para;"]) assert.equal(needsRepair(text), true, text);
  for (const text of ["", "a cat", "fish &amp; chips", "café naïve", "猫と犬", "“quoted” …", "👩‍🚀", "ﬁsh", "a\u0007b", "ｗｉｄｅ"]) assert.equal(needsRepair(text), false, text);
});

/** A bundle's manifest, checked as `docs/bundle-format.md` asks, and its files, each checked against its sha256. */

import { BundleError } from "./errors.js";

/**
 * @typedef {object} Artefact
 * @property {string} id
 * @property {string} tower
 * @property {string} target
 * @property {string} precision
 * @property {string} batch
 * @property {string} status
 * @property {string | null} path
 * @property {string | null} reason
 * @property {any} parity
 * @property {any} latency
 * @property {number | null} [threshold]
 * @property {boolean} [any_length]
 */
/**
 * @typedef {object} Manifest
 * @property {string} name
 * @property {string} manifest_sha256
 * @property {number} embed_dim
 * @property {import("./preprocess.js").ImageSpec & {input: string, output: string, resize: string, crop: string}} image
 * @property {import("./tokenizer.js").TextSpec & {mask: string, input: string, output: string}} text
 * @property {string} loss
 * @property {number} logit_scale
 * @property {number | null} logit_bias
 * @property {Artefact[]} artefacts
 * @property {any} provenance
 * @property {any} golden
 * @property {Record<string, {sha256: string, bytes: number}>} files
 */

const MOST_BYTES = 16 * 1024 * 1024;
const ARTEFACT = { id: "string", tower: "string", target: "string", precision: "string", batch: "string", status: "string", path: "string?", reason: "string?", parity: "object?", latency: "object?" };
const FIELDS = {
  name: "string", embed_dim: "count", image: "object", text: "object", loss: "string", logit_scale: "number", logit_bias: "number?", languages: "array",
  artefacts: "array", golden: "object", licences: "array", provenance: "object", files: "object",
};
const IMAGE = { image_size: "count", mean: "triple", std: "triple", interpolation: "string", resize: "string", crop: "string", crop_pct: "number", input: "string", output: "string" };
const TEXT = { context_length: "count", vocab_size: "count", pad_id: "integer", mask: "string", cleaning: "string", input: "string", output: "string" };

/** @type {Record<string, (value: any) => boolean>} */
const KINDS = {
  string: (v) => typeof v === "string",
  number: (v) => typeof v === "number",
  integer: (v) => Number.isInteger(v) && v >= 0,
  count: (v) => Number.isInteger(v) && v >= 1,
  object: (v) => typeof v === "object" && v !== null && !Array.isArray(v),
  array: Array.isArray,
  triple: (v) => Array.isArray(v) && v.length === 3 && v.every((x) => typeof x === "number"),
};

/** @param {Uint8Array} bytes @returns {Promise<string>} lower-case hex */
export async function sha256(bytes) {
  const digest = await crypto.subtle.digest("SHA-256", /** @type {Uint8Array<ArrayBuffer>} */ (bytes));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @param {any} owner @param {Record<string, string>} fields @param {string} where */
function check(owner, fields, where) {
  if (!KINDS.object(owner)) throw new BundleError(`the manifest's ${where || "content"} is no object; export the bundle again`);
  for (const [name, kind] of Object.entries(fields)) {
    const value = Object.hasOwn(owner, name) ? owner[name] : undefined;
    if (value === undefined) throw new BundleError(`the manifest lacks the field '${where}${name}'; export the bundle again`);
    const optional = kind.endsWith("?");
    if (!(optional && value === null) && !KINDS[kind.replace("?", "")](value)) {
      throw new BundleError(`the manifest's field '${where}${name}' is ${JSON.stringify(value).slice(0, 60)}, expected ${kind.replace("?", " or null")}`);
    }
  }
}

/** Whether an object of this JSON has a name twice: `JSON.parse` would keep the last. @param {string} text valid JSON */
export function hasDuplicates(text) {
  /** @type {(Set<string> | null)[]} */
  const open = [];
  const tokens = /"(?:[^"\\]|\\.)*"|[{}[\]]/g;
  for (let found; (found = tokens.exec(text)); ) {
    const token = found[0];
    if (token === "{") open.push(new Set());
    else if (token === "[") open.push(null);
    else if (token === "}" || token === "]") open.pop();
    else if (/^\s*:/.test(text.slice(tokens.lastIndex, tokens.lastIndex + 64))) {
      const names = open.at(-1);
      const name = JSON.parse(token);
      if (names?.has(name)) return true;
      names?.add(name);
    }
  }
  return false;
}

/** @param {string} path @returns {boolean} a/b/c, nothing that leaves the folder */
const sound = (path) => path !== "" && !/[\\:\r\n\0?#%]/.test(path) && path.split("/").every((part) => part !== "" && part !== "." && part !== "..");

/**
 * @param {Uint8Array} bytes of manifest.json
 * @returns {Promise<Manifest>}
 * @throws {BundleError} one sentence on the first thing that is wrong
 */
export async function parseManifest(bytes) {
  if (bytes.length > MOST_BYTES) throw new BundleError(`manifest.json has ${bytes.length} bytes, expected at most ${MOST_BYTES}; it is no manifest`);
  let text;
  let document;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    document = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`manifest.json is not the JSON of a manifest (${/** @type {Error} */ (error).message}); fetch or export the bundle again`);
  }
  check(document, { schema: "integer", manifest_sha256: "string" }, "");
  if (document.schema !== 1) throw new BundleError(`manifest.json has schema ${document.schema}, this version reads schema 1; upgrade, or export the bundle again`);
  const digest = document.manifest_sha256;
  const parts = text.split(`"${digest}"`);
  const blank = new TextEncoder().encode(parts.join(`"${"0".repeat(64)}"`));
  if (!/^[0-9a-f]{64}$/.test(digest) || parts.length !== 2 || (await sha256(blank)) !== digest) {
    throw new BundleError("manifest.json was changed: it does not match its own manifest_sha256; fetch or export the bundle again");
  }
  if (hasDuplicates(text)) throw new BundleError("manifest.json has a name twice in one object; export the bundle again");
  check(document, FIELDS, "");
  check(document.image, IMAGE, "image.");
  check(document.text, TEXT, "text.");
  const { image, text: texts } = document;
  const wrong =
    (!["bilinear", "bicubic"].includes(image.interpolation) && `image.interpolation is '${image.interpolation}'`) ||
    ((image.resize !== "shortest" || image.crop !== "center") && `image.resize and image.crop are '${image.resize}' and '${image.crop}'`) ||
    (!(image.crop_pct > 0 && image.crop_pct <= 1) && `image.crop_pct is ${image.crop_pct}`) ||
    (!image.std.every((/** @type {number} */ x) => x > 0) && `image.std is ${image.std}`) ||
    (image.image_size > 8192 && `image.image_size is ${image.image_size}`) ||
    (texts.context_length > 65536 && `text.context_length is ${texts.context_length}`) ||
    (texts.pad_id >= texts.vocab_size && `text.pad_id is ${texts.pad_id} of ${texts.vocab_size}`) ||
    (!["clip", "none"].includes(texts.cleaning) && `text.cleaning is '${texts.cleaning}'`) ||
    (!["causal", "pad", "none"].includes(texts.mask) && `text.mask is '${texts.mask}'`) ||
    (!["softmax", "sigmoid"].includes(document.loss) && `loss is '${document.loss}'`) ||
    (!(document.logit_scale > 0) && `logit_scale is ${document.logit_scale}`);
  if (wrong) throw new BundleError(`the manifest's ${wrong}, which this version does not read; upgrade, or export the bundle again`);
  for (const [path, facts] of Object.entries(document.files)) {
    if (!sound(path)) throw new BundleError(`the manifest lists the path ${JSON.stringify(path).slice(0, 80)}, which leaves the bundle or cannot be fetched; export it again`);
    check(facts, { sha256: "string", bytes: "integer" }, `files['${path}'].`);
  }
  document.artefacts.forEach((/** @type {any} */ artefact, /** @type {number} */ n) => {
    check(artefact, ARTEFACT, `artefacts[${n}].`);
    if (artefact.target === "onnx" && artefact.path !== null && !Object.keys(document.files).some((path) => path === artefact.path || path.startsWith(`${artefact.path}/`))) {
      throw new BundleError(`the manifest's artefact '${artefact.id}' is at '${artefact.path}', which is not among its files; export the bundle again`);
    }
  });
  return document;
}

/**
 * A bundle's files by name.
 * @param {string | URL} url its folder
 * @returns {Promise<{manifest: Manifest, read: (path: string) => Promise<Uint8Array<ArrayBuffer>>}>}
 * @throws {BundleError} it cannot be fetched, or is damaged
 */
export async function openBundle(url) {
  const base = new URL(String(url).replace(/\/?$/, "/"), globalThis.location?.href);
  const manifest = await parseManifest(await fetched(base, "manifest.json", MOST_BYTES));
  return {
    manifest,
    async read(path) {
      const facts = Object.hasOwn(manifest.files, path) ? manifest.files[path] : undefined;
      if (!facts) throw new BundleError(`the bundle '${manifest.name}' has no file '${path}'; export it again`);
      const bytes = await fetched(base, path, facts.bytes);
      if (bytes.length !== facts.bytes || (await sha256(bytes)) !== facts.sha256) {
        throw new BundleError(`'${path}' of the bundle '${manifest.name}' was changed or cut short: ${bytes.length} bytes, expected ${facts.bytes} with another sha256; copy the bundle again`);
      }
      return bytes;
    },
  };
}

/** @param {URL} base @param {string} path @param {number} most @returns {Promise<Uint8Array<ArrayBuffer>>} */
async function fetched(base, path, most) {
  const url = new URL(path, base);
  let response;
  try {
    response = await fetch(url);
    if (response.ok) {
      const size = Number(response.headers.get("content-length"));
      if (size > most && !response.headers.get("content-encoding")) throw new Error(`it has ${size} bytes, expected at most ${most}`);
      return new Uint8Array(await response.arrayBuffer());
    }
  } catch (error) {
    throw new BundleError(`${url.href} cannot be fetched (${/** @type {Error} */ (error).message}); is the bundle's folder there?`);
  }
  throw new BundleError(`${url.href} cannot be fetched (the server says ${response.status}); is the bundle's folder there?`);
}

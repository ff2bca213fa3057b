/** The towers of a bundle on onnxruntime-web: which artefact runs here, found by measuring, and how rows are fed to it. */

import { BundleError } from "./errors.js";

/** @typedef {import("./manifest.js").Artefact} Artefact */
/** @typedef {{id: string, why: string, milliseconds: Record<string, number>}} Choice */

const LEAST = /** @type {Record<string, number>} */ ({ fp32: 0.99999, fp16: 0.999, mixed: 0.999, bf16: 0.99, int8: 0.9 });
const PRECISIONS = ["fp32", "fp16", "mixed", "bf16", "int8"];
const LENGTHS = [8, 16, 24, 32, 48, 64];
const BATCH = 16;

/** @param {Artefact} artefact @returns {number} */
export const threshold = (artefact) => artefact.threshold ?? LEAST[artefact.precision] ?? 0.9;

/**
 * Proven ONNX artefacts of a tower that may run here. Those of a fixed batch are the same graphs again: they only run where there is no other, or by their id.
 * @param {import("./manifest.js").Manifest} manifest @param {string} tower @param {string} [prefer] an id or a precision
 * @returns {Artefact[]} the most precise first
 * @throws {BundleError} none is left
 */
export function candidates(manifest, tower, prefer) {
  const fit = manifest.artefacts.filter((a) => {
    const change = a.parity?.recall1_clear ?? a.parity?.recall1_change ?? 0;
    return a.tower === tower && a.target === "onnx" && a.status === "proven" && a.path !== null && a.path in manifest.files && a.parity?.cosine_min >= threshold(a) && change >= -0.02;
  });
  const asked = prefer === undefined ? fit : fit.filter((a) => prefer === a.id || prefer === a.precision);
  const dynamic = asked.filter((a) => a.batch === "dynamic" || a.id === prefer);
  const left = (dynamic.length ? dynamic : asked).sort((a, b) => PRECISIONS.indexOf(a.precision) - PRECISIONS.indexOf(b.precision));
  if (!left.length) {
    const usable = fit.map((a) => `${a.id} (${a.precision})`).join(", ") || "none";
    throw new BundleError(`bundle '${manifest.name}' has no usable ${tower} artefact${prefer === undefined ? "" : ` '${prefer}'`} for ONNX Runtime; usable: ${usable}`);
  }
  return left;
}

/** Places of a row up to its last token that is no padding, and up to its largest id. @param {Int32Array} row @param {number} pad */
export function tokenCount(row, pad) {
  let last = row.length;
  while (last > 1 && row[last - 1] === pad) last--;
  return Math.max(last, row.indexOf(Math.max(...row)) + 1);
}

/** The length that a row is cut to: one of a few, so that the runtime plans for few shapes. @param {Int32Array} row @param {number} pad */
export const cutLength = (row, pad) => LENGTHS.find((length) => length >= tokenCount(row, pad) && length < row.length) ?? row.length;

/**
 * @param {any} ort the module @param {any} session @param {Artefact} artefact @param {string} input @param {string} output
 * @param {(Float32Array | Int32Array)[]} rows all of one length @param {number[]} shape of one row @param {number} width of an embedding
 * @returns {Promise<Float32Array[]>}
 */
export async function runRows(ort, session, artefact, input, output, rows, shape, width) {
  const fixed = artefact.batch === "dynamic" ? 0 : Number(artefact.batch);
  const found = [];
  for (let first = 0; first < rows.length; first += fixed || BATCH) {
    const part = rows.slice(first, first + (fixed || BATCH));
    const count = fixed || part.length;
    const size = rows[0].length;
    const data = rows[0] instanceof Int32Array ? new Int32Array(count * size) : new Float32Array(count * size);
    for (let n = 0; n < count; n++) data.set(part[Math.min(n, part.length - 1)], n * size);
    const tensor = new ort.Tensor(data instanceof Int32Array ? "int32" : "float32", data, [count, ...shape]);
    const results = await session.run({ [input]: tensor });
    const values = results[output]?.data;
    if (!(values instanceof Float32Array) || values.length !== count * width) {
      throw new BundleError(`artefact '${artefact.id}' gives '${output}' of ${values?.length} values, expected float32 ${count} x ${width}; export the bundle again`);
    }
    for (let n = 0; n < part.length; n++) {
      const row = values.slice(n * width, (n + 1) * width);
      if (!row.every(Number.isFinite)) throw new BundleError(`artefact '${artefact.id}' gives values that are not finite here; prefer another`);
      found.push(row);
    }
    tensor.dispose?.();
    for (const value of Object.values(results)) value.dispose?.();
  }
  return found;
}

/** @param {Float32Array} a @param {ArrayLike<number>} b @returns {number} */
export function cosine(a, b) {
  let dot = 0;
  let left = 0;
  let right = 0;
  for (let n = 0; n < a.length; n++) {
    dot += a[n] * b[n];
    left += a[n] * a[n];
    right += b[n] * b[n];
  }
  return dot / Math.max(Math.sqrt(left * right), 1e-12);
}

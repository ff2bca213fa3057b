/** Golden inputs and what the checkpoint makes of them: `golden/` of a bundle. */

import { BundleError } from "./errors.js";

/** @typedef {{shape: number[], data: Float32Array | Int32Array}} Tensor */

/**
 * A safetensors file of float32 and int32 tensors.
 * @param {Uint8Array} bytes @returns {Record<string, Tensor>}
 * @throws {BundleError} not such a file
 */
export function readTensors(bytes) {
  const whole = bytes.slice().buffer;
  try {
    const length = Number(new DataView(whole).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(whole, 8, length)));
    delete header.__metadata__;
    const found = Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
      const part = whole.slice(8 + length + from, 8 + length + to);
      const data = dtype === "F32" ? new Float32Array(part) : dtype === "I32" ? new Int32Array(part) : null;
      if (!data || data.length !== shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1)) throw new Error(`${name} is ${dtype} ${shape}`);
      return [name, { shape, data }];
    });
    return Object.fromEntries(found);
  } catch (error) {
    throw new BundleError(`golden.safetensors cannot be read (${/** @type {Error} */ (error).message}); export the bundle again`);
  }
}

/**
 * @param {{manifest: import("./manifest.js").Manifest, read: (path: string) => Promise<Uint8Array>}} bundle
 * @returns {Promise<{images: string[], texts: string[], hardTexts: string[], tensors: Record<string, Tensor>}>}
 */
export async function readGolden(bundle) {
  const index = JSON.parse(new TextDecoder().decode(await bundle.read("golden/golden.json")));
  return { images: index.images, texts: index.texts, hardTexts: index.hard_texts ?? [], tensors: readTensors(await bundle.read("golden/golden.safetensors")) };
}

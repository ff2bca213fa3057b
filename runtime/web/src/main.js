/** Image-text bundles in the browser: `load` a bundle, embed, classify, search. */

export { Clip, load } from "./clip.js";
export { BundleError, ClipError, ImageError } from "./errors.js";
export { Index } from "./index-store.js";
export { needsRepair } from "./tokenizer.js";

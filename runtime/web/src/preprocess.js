/**
 * Pictures to model input, number for number as Pillow resizes 8-bit RGB: coefficients in 22-bit fixed point, across, then down,
 * 8 bits between (tall pictures the other way). Only what the central crop keeps is computed.
 */

import { ImageError } from "./errors.js";

/**
 * @typedef {object} ImageSpec How a picture becomes input.
 * @property {number} image_size height and width of the input, pixels
 * @property {number[]} mean per RGB channel, scale 0 to 1
 * @property {number[]} std per RGB channel
 * @property {string} interpolation "bilinear" or "bicubic"
 * @property {number} crop_pct the short side becomes floor(image_size / crop_pct) before the crop
 */
/**
 * @typedef {object} Pixels A decoded picture.
 * @property {number} width
 * @property {number} height
 * @property {Uint8Array | Uint8ClampedArray} data height x width x channels, rows from the top
 * @property {1 | 2 | 3 | 4} [channels] grey, grey and alpha, RGB, RGBA; RGBA where it is not given, as in ImageData. Alpha is not premultiplied.
 */

const BITS = 22;
const MOST_PIXELS = 64 * 1024 * 1024;

/** @type {Record<string, {support: number, weight: (x: number) => number}>} */
const FILTERS = {
  bilinear: { support: 1, weight: (x) => (x < 0 ? (x > -1 ? 1 + x : 0) : x < 1 ? 1 - x : 0) },
  bicubic: {
    support: 2,
    weight: (x) => {
      const a = -0.5;
      const d = x < 0 ? -x : x;
      if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    },
  },
};

/**
 * Where each output takes its inputs from, and with which fixed-point weights.
 * @param {number} from input length @param {number} to output length @param {number} first first output wanted @param {number} count outputs wanted
 * @param {string} filter
 */
function coefficients(from, to, first, count, filter) {
  const { support, weight } = FILTERS[filter];
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  const width = Math.ceil(reach) * 2 + 1;
  const starts = new Int32Array(count);
  const lengths = new Int32Array(count);
  const weights = new Int32Array(count * width);
  const inverse = 1 / stretch;
  const exact = new Float64Array(width);
  for (let n = 0; n < count; n++) {
    const center = (first + n + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - reach + 0.5));
    const length = Math.min(from, Math.trunc(center + reach + 0.5)) - start;
    let sum = 0;
    for (let k = 0; k < length; k++) sum += exact[k] = weight((k + start - center + 0.5) * inverse);
    for (let k = 0; k < length; k++) {
      const share = (sum === 0 ? exact[k] : exact[k] / sum) * (1 << BITS);
      weights[n * width + k] = Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    }
    starts[n] = start;
    lengths[n] = length;
  }
  return { starts, lengths, weights, width };
}

/** @param {number} sum */
const clip = (sum) => (sum < 0 ? 0 : (sum >>= BITS) > 255 ? 255 : sum);

/** Python's `round`: halves to even. @param {number} x */
const round = (x) => (x % 1 === 0.5 || x % 1 === -0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/**
 * RGB bytes of a decoded picture; transparency composed on white as Pillow's `alpha_composite` rounds it.
 * @param {Pixels} picture
 * @returns {Uint8Array} height x width x 3
 * @throws {ImageError} sizes that do not fit the data
 */
export function toRgb(picture) {
  const { width, height, data } = picture;
  const channels = picture.channels ?? 4;
  const count = width * height;
  if (!(Number.isInteger(width) && Number.isInteger(height) && count > 0 && data.length === count * channels)) {
    throw new ImageError(`a picture has ${data.length} bytes and is said to be ${width} x ${height} x ${channels}; give the bytes of whole rows`);
  }
  if (channels === 3) return new Uint8Array(data.buffer, data.byteOffset, data.length);
  const rgb = new Uint8Array(count * 3);
  const step = channels < 3 ? 0 : 1;
  const alphaAt = channels === 2 ? 1 : channels === 4 ? 3 : -1;
  for (let n = 0, from = 0, to = 0; n < count; n++, from += channels, to += 3) {
    const alpha = alphaAt < 0 ? 255 : data[from + alphaAt];
    for (let c = 0; c < 3; c++) {
      const value = data[from + c * step];
      if (alpha === 255) rgb[to + c] = value;
      else if (alpha === 0) rgb[to + c] = 255;
      else {
        const mixed = (value * alpha + 255 * (255 - alpha) + 128) << 7;
        rgb[to + c] = (((mixed >> 8) + mixed) >> 8) >> 7;
      }
    }
  }
  return rgb;
}

/**
 * Short side to floor(image_size / crop_pct), then the central square.
 * @param {Pixels} picture @param {ImageSpec} spec
 * @returns {Uint8Array} image_size x image_size x 3
 * @throws {ImageError} a picture so narrow that its resized form would be huge
 */
export function resizeAndCrop(picture, spec) {
  const { width, height } = picture;
  const size = spec.image_size;
  const target = Math.floor(size / spec.crop_pct);
  const longTarget = Math.trunc((target * Math.max(width, height)) / Math.min(width, height));
  if (target * longTarget > MOST_PIXELS) {
    throw new ImageError(`a picture of ${width} x ${height} pixels would become ${target} x ${longTarget} when its short side is resized; crop it first`);
  }
  const rgb = toRgb(picture);
  const [wide, high] = width <= height ? [target, longTarget] : [longTarget, target];
  const left = round((wide - size) / 2);
  const top = round((high - size) / 2);
  const filter = spec.interpolation;
  const x = wide === width ? null : coefficients(width, wide, left, size, filter);
  const y = high === height ? null : coefficients(height, high, top, size, filter);
  const [firstColumn, lastColumn] = x ? reach(x, size) : [left, left + size];
  const [firstRow, lastRow] = y ? reach(y, size) : [top, top + size];
  const part = cut(rgb, width, firstColumn, lastColumn, firstRow, lastRow);
  const columns = lastColumn - firstColumn;
  const across = (/** @type {Uint8Array} */ pixels, /** @type {number} */ rows) => (x ? resizeAcross(pixels, columns, rows, size, x, firstColumn) : pixels);
  const down = (/** @type {Uint8Array} */ pixels, /** @type {number} */ line) => (y ? resizeDown(pixels, line, size, y, firstRow) : pixels);
  // Pillow goes across first, but for tall pictures that shrink; with 8 bits between, the order shows.
  const downFirst = height > 2 * width && high < height;
  return downFirst ? across(down(part, columns * 3), size) : down(across(part, lastRow - firstRow), size * 3);
}

/** First input that any output takes, and the one after the last. @param {ReturnType<typeof coefficients>} table @param {number} count */
const reach = (table, count) => [table.starts[0], table.starts[count - 1] + table.lengths[count - 1]];

/** @param {Uint8Array} rgb @param {number} width @param {number} left @param {number} right @param {number} top @param {number} bottom */
function cut(rgb, width, left, right, top, bottom) {
  if (left === 0 && right === width) return rgb.subarray(top * width * 3, bottom * width * 3);
  const line = (right - left) * 3;
  const out = new Uint8Array((bottom - top) * line);
  for (let y = top; y < bottom; y++) out.set(rgb.subarray((y * width + left) * 3, (y * width + right) * 3), (y - top) * line);
  return out;
}

/** @param {Uint8Array} rgb @param {number} width @param {number} height @param {number} size @param {ReturnType<typeof coefficients>} table @param {number} first */
function resizeAcross(rgb, width, height, size, table, first) {
  const { starts, lengths, weights, width: reach } = table;
  const out = new Uint8Array(height * size * 3);
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < size; x++, to += 3) {
      let r = 1 << (BITS - 1);
      let g = r;
      let b = r;
      let from = (y * width + starts[x] - first) * 3;
      for (let k = x * reach, end = k + lengths[x]; k < end; k++, from += 3) {
        const weight = weights[k];
        r = (r + rgb[from] * weight) | 0;
        g = (g + rgb[from + 1] * weight) | 0;
        b = (b + rgb[from + 2] * weight) | 0;
      }
      out[to] = clip(r);
      out[to + 1] = clip(g);
      out[to + 2] = clip(b);
    }
  }
  return out;
}

/** @param {Uint8Array} rows @param {number} line bytes of one @param {number} size @param {ReturnType<typeof coefficients>} table @param {number} first */
function resizeDown(rows, line, size, table, first) {
  const { starts, lengths, weights, width: reach } = table;
  const out = new Uint8Array(size * line);
  for (let y = 0; y < size; y++) {
    const start = (starts[y] - first) * line;
    for (let x = 0; x < line; x++) {
      let sum = 1 << (BITS - 1);
      for (let k = 0, from = start + x; k < lengths[y]; k++, from += line) sum = (sum + rows[from] * weights[y * reach + k]) | 0;
      out[y * line + x] = clip(sum);
    }
  }
  return out;
}

/**
 * uint8 size x size x 3 -> float32 planes, `(x / 255 - mean) / std`, each step rounded to float32.
 * @param {Uint8Array} rgb @param {ImageSpec} spec @param {Float32Array} [out] 3 x size x size
 * @returns {Float32Array}
 */
export function normalise(rgb, spec, out = new Float32Array(rgb.length)) {
  const plane = rgb.length / 3;
  const { fround } = Math;
  for (let c = 0; c < 3; c++) {
    const mean = fround(spec.mean[c]);
    const std = fround(spec.std[c]);
    const table = Float32Array.from({ length: 256 }, (_, v) => fround(fround(fround(v / 255) - mean) / std));
    for (let n = 0, from = c; n < plane; n++, from += 3) out[c * plane + n] = table[rgb[from]];
  }
  return out;
}

/**
 * @param {Pixels} picture @param {ImageSpec} spec
 * @returns {Float32Array} 3 x image_size x image_size
 */
export const preprocess = (picture, spec) => normalise(resizeAndCrop(picture, spec), spec);

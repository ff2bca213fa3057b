/** Encoded pictures to pixels, by the browser's own decoders: colours as stored, upright, transparency kept. */

import { ImageError } from "./errors.js";

/** @typedef {Blob | ImageBitmap | ImageData | import("./preprocess.js").Pixels} ImageSource a file, a bitmap, or pixels */

/**
 * @param {ImageSource} source @returns {Promise<import("./preprocess.js").Pixels>}
 * @throws {ImageError} it does not decode
 */
export async function decode(source) {
  if (source instanceof Blob) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(source, { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" });
    } catch (error) {
      throw new ImageError(`${/** @type {File} */ (source).name ?? "the picture"}: does not decode as a picture (${/** @type {Error} */ (error).message}); replace or remove it`);
    }
    try {
      return pixelsOf(bitmap, /jpe?g/.test(source.type));
    } finally {
      bitmap.close();
    }
  }
  if (source instanceof ImageBitmap) return pixelsOf(source, false);
  if (source?.data && source.width && source.height) return source;
  throw new ImageError("a picture is neither a Blob, an ImageBitmap nor pixels with width, height and data; give one of these");
}

/** @type {{gl: WebGL2RenderingContext, texture: WebGLTexture} | null | undefined} */
let graphics;

/** @param {ImageBitmap} bitmap @param {boolean} opaque @returns {import("./preprocess.js").Pixels} */
function pixelsOf(bitmap, opaque) {
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  if (!context) throw new ImageError(`a picture of ${width} x ${height} pixels is too large for this browser; make it smaller`);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  if (opaque || !someTransparent(data)) return { width, height, data };
  // A 2D canvas multiplies colours by their alpha and rounds them; WebGL hands them back as they were.
  return { width, height, data: unmultiplied(bitmap) ?? data };
}

/** @param {Uint8ClampedArray} data */
function someTransparent(data) {
  for (let n = 3; n < data.length; n += 4) if (data[n] !== 255) return true;
  return false;
}

/** @param {ImageBitmap} bitmap @returns {Uint8Array | null} null: this browser has no WebGL 2, or the picture is too large for it */
function unmultiplied(bitmap) {
  if (graphics === undefined) {
    const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
    graphics = gl && { gl, texture: gl.createTexture() };
    if (graphics) graphics.gl.bindFramebuffer(graphics.gl.FRAMEBUFFER, graphics.gl.createFramebuffer());
  }
  if (!graphics || graphics.gl.isContextLost()) return null;
  const { gl, texture } = graphics;
  const { width, height } = bitmap;
  if (Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const data = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data);
  return gl.getError() === gl.NO_ERROR ? data : null;
}

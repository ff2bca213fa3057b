/** A bundle, picture or text that cannot be used; the message is one sentence. */
export class ClipError extends Error {
  /** @param {string} message */
  constructor(message) {
    super(message);
    this.name = new.target.name;
  }
}

/** The bundle is missing, damaged, or of a kind that this package does not read. */
export class BundleError extends ClipError {}

/** A picture does not decode, or has a size that cannot be meant. */
export class ImageError extends ClipError {}

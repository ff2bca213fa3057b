/** A bundle, loaded: pictures and texts to embeddings, labels to probabilities. */

import { decode } from "./decode.js";
import { BundleError } from "./errors.js";
import { readGolden } from "./golden.js";
import { openBundle } from "./manifest.js";
import { preprocess } from "./preprocess.js";
import { readTokenizer } from "./tokenizer.js";
import { candidates, cosine, cutLength, runRows, threshold } from "./towers.js";

/** @typedef {import("./decode.js").ImageSource} ImageSource */
/**
 * @typedef {object} Options
 * @property {number} [threads] of WebAssembly; as many as there are cores, at most 4, where the page is cross-origin isolated, else 1
 * @property {string} [prefer] an artefact's id or a precision; nothing is measured then
 * @property {boolean} [webgpu] try WebGPU (a larger runtime is fetched); WebAssembly where it does not start or computes something else
 * @property {string | URL} [runtime] the folder of onnxruntime-web's files; "../ort/" beside this module where it is not given
 */

const CACHED = 1024;
const ROUNDS = 5;

/**
 * Open a bundle. Towers are fetched when first used, or by `ready()`.
 * @param {string | URL} url the bundle's folder @param {Options} [options]
 * @returns {Promise<Clip>}
 * @throws {BundleError} one sentence on what is wrong with the bundle
 */
export async function load(url, options = {}) {
  const bundle = await openBundle(url);
  const folder = new URL(options.runtime ?? "../ort/", import.meta.url);
  const webgpu = Boolean(options.webgpu && /** @type {any} */ (globalThis.navigator)?.gpu);
  const ort = await import(new URL(webgpu ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs", folder).href);
  ort.env.wasm.wasmPaths = folder.href;
  ort.env.wasm.numThreads = options.threads ?? (globalThis.crossOriginIsolated ? Math.min(4, globalThis.navigator?.hardwareConcurrency ?? 1) : 1);
  ort.env.logLevel = "error";
  return new Clip(bundle, ort, { prefer: options.prefer, webgpu });
}

/** @typedef {{artefact: import("./manifest.js").Artefact, session: any, choice: import("./towers.js").Choice}} Tower */

export class Clip {
  /** @type {Record<string, Promise<Tower> | undefined>} */
  #towers = {};
  /** @type {Promise<(texts: string[]) => Int32Array> | undefined} */
  #tokenize;
  /** @type {Map<string, Float32Array>} */
  #cache = new Map();
  /** @type {Promise<any>} */
  #turn = Promise.resolve();
  #bundle;
  #ort;
  #settings;

  /** @param {Awaited<ReturnType<typeof openBundle>>} bundle @param {any} ort @param {{prefer?: string, webgpu: boolean}} settings */
  constructor(bundle, ort, settings) {
    this.#bundle = bundle;
    this.#ort = ort;
    this.#settings = settings;
    this.manifest = bundle.manifest;
    this.name = bundle.manifest.name;
    this.dimension = bundle.manifest.embed_dim;
    /** Where the last tower was started: "wasm" or "webgpu". */
    this.device = "wasm";
    /** What an index of these vectors belongs to. */
    this.model = String(bundle.manifest.provenance.checkpoint_sha256 ?? bundle.manifest.manifest_sha256);
  }

  /** Fetch and start both towers. @param {("image" | "text")[]} [towers] */
  async ready(towers = ["image", "text"]) {
    await Promise.all([...towers.map((tower) => this.#tower(tower)), towers.includes("text") ? this.#tokenizer() : null]);
  }

  /** Which artefact runs for a tower, and why. @returns {Promise<Record<"image" | "text", import("./towers.js").Choice>>} */
  async explain() {
    return { image: (await this.#tower("image")).choice, text: (await this.#tower("text")).choice };
  }

  /**
   * Pictures to vectors of unit length.
   * @param {ImageSource | ImageSource[]} images @returns {Promise<Float32Array[]>} one for each picture
   */
  async encodeImage(images) {
    const rows = [];
    for (const source of Array.isArray(images) ? images : [images]) rows.push(preprocess(await decode(source), this.manifest.image));
    return this.encodePixels(rows);
  }

  /** As `encodeImage`, from normalised planes. @param {Float32Array[]} rows 3 x image_size x image_size each @returns {Promise<Float32Array[]>} */
  async encodePixels(rows) {
    return rows.length ? this.#run(await this.#tower("image"), rows) : [];
  }

  /**
   * Texts to vectors of unit length. The last 1,024 are remembered.
   * @param {string | string[]} texts @returns {Promise<Float32Array[]>} one for each text
   */
  async encodeText(texts) {
    const asked = Array.isArray(texts) ? texts : [texts];
    const fresh = [...new Set(asked.filter((text) => !this.#cache.has(text)))];
    const vectors = new Map(asked.map((text) => [text, this.#cache.get(text)]));
    if (fresh.length) {
      const found = await this.encodeTokens((await this.#tokenizer())(fresh));
      fresh.forEach((text, n) => vectors.set(text, found[n]));
    }
    for (const [text, vector] of vectors) {
      this.#cache.delete(text);
      this.#cache.set(text, /** @type {Float32Array} */ (vector));
    }
    for (const old of this.#cache.keys()) {
      if (this.#cache.size <= CACHED) break;
      this.#cache.delete(old);
    }
    return asked.map((text) => /** @type {Float32Array} */ (vectors.get(text)).slice());
  }

  /** As `encodeText`, from rows of context_length tokens, one after the other; nothing is remembered. @param {Int32Array} tokens @returns {Promise<Float32Array[]>} */
  async encodeTokens(tokens) {
    const length = this.manifest.text.context_length;
    const rows = Array.from({ length: tokens.length / length }, (_, n) => tokens.slice(n * length, (n + 1) * length));
    return this.#run(await this.#tower("text"), rows);
  }

  /** Token rows of texts. @param {string[]} texts @returns {Promise<Int32Array>} */
  async tokens(texts) {
    return (await this.#tokenizer())(texts);
  }

  /**
   * Which of these labels fits a picture.
   * @param {ImageSource} image @param {string[]} labels @param {{templates?: string[]}} [options] a template has the label in place of {}
   * @returns {Promise<{label: string, probability: number, cosine: number}[]>} the most probable first
   */
  async classify(image, labels, { templates = ["{}"] } = {}) {
    if (!labels.length) return [];
    const [picture] = await this.encodeImage(image);
    const texts = await this.encodeText(labels.flatMap((label) => templates.map((template) => template.replaceAll("{}", () => label))));
    const { logit_scale: scale, logit_bias: bias, loss } = this.manifest;
    const found = labels.map((label, n) => {
      const mean = new Float32Array(this.dimension);
      for (let t = 0; t < templates.length; t++) texts[n * templates.length + t].forEach((value, d) => (mean[d] += value));
      return { label, probability: 0, cosine: cosine(picture, mean) };
    });
    const logits = found.map((entry) => scale * entry.cosine + (bias ?? 0));
    const most = Math.max(...logits);
    const sum = logits.reduce((total, logit) => total + Math.exp(logit - most), 0);
    found.forEach((entry, n) => (entry.probability = loss === "sigmoid" ? 1 / (1 + Math.exp(-logits[n])) : Math.exp(logits[n] - most) / sum));
    return found.sort((a, b) => b.probability - a.probability);
  }

  /** Free the sessions. */
  async release() {
    for (const tower of Object.values(this.#towers)) await (await tower)?.session.release();
    this.#towers = {};
  }

  async #tokenizer() {
    this.#tokenize ??= this.#bundle.read("tokenizer.json").then((bytes) => readTokenizer(new TextDecoder().decode(bytes), this.manifest.text));
    return this.#tokenize;
  }

  /** @param {"image" | "text"} name @returns {Promise<Tower>} */
  #tower(name) {
    return (this.#towers[name] ??= this.#open(name).catch((error) => {
      this.#towers[name] = undefined;
      throw error;
    }));
  }

  /** @param {"image" | "text"} name @returns {Promise<Tower>} */
  async #open(name) {
    const { prefer, webgpu } = this.#settings;
    const key = `mclip ${this.manifest.manifest_sha256} ${name} ${webgpu} ${this.#ort.env.wasm.numThreads} ${this.#ort.env.versions?.web}`;
    const remembered = prefer === undefined ? recall(key) : null;
    const usable = candidates(this.manifest, name, prefer);
    const field = usable.some((a) => a.id === remembered?.id) ? usable.filter((a) => a.id === remembered?.id) : usable;
    if (field.length === 1) {
      const tower = await this.#start(field[0], webgpu);
      const why = remembered ? remembered.why : prefer === undefined ? "the only proven artefact that runs here" : `'${prefer}' was asked for`;
      return { ...tower, choice: { id: field[0].id, why, milliseconds: remembered?.milliseconds ?? {} } };
    }
    return this.#measure(name, field, key);
  }

  /** Run the golden inputs through each candidate: who is wrong here is out, the fastest of the others stays. @param {"image" | "text"} name @param {import("./manifest.js").Artefact[]} field @param {string} key */
  async #measure(name, field, key) {
    const { tensors } = await readGolden(this.#bundle);
    const wanted = tensors[`${name}_embedding`].data;
    const given = tensors[name === "image" ? "pixels" : "tokens"];
    const width = given.data.length / given.shape[0];
    const rows = Array.from({ length: Math.min(8, given.shape[0]) }, (_, n) => given.data.slice(n * width, (n + 1) * width));
    /** @type {Tower[]} */
    const good = [];
    /** @type {Record<string, number>} */
    const milliseconds = {};
    const refused = [];
    for (const artefact of field) {
      try {
        const tower = { ...(await this.#start(artefact, this.#settings.webgpu)), choice: { id: artefact.id, why: "", milliseconds } };
        const found = await this.#run(tower, rows);
        const least = Math.min(...found.map((row, n) => cosine(row, wanted.subarray(n * this.dimension, (n + 1) * this.dimension))));
        if (!(least >= threshold(artefact))) throw new BundleError(`its least cosine to the golden vectors is ${least} here`);
        const times = [];
        for (let round = -1; round < ROUNDS; round++) {
          const start = performance.now();
          await this.#run(tower, [rows[0]]);
          if (round >= 0) times.push(performance.now() - start);
        }
        milliseconds[artefact.id] = times.sort((a, b) => a - b)[ROUNDS >> 1];
        good.push(tower);
      } catch (error) {
        refused.push(`${artefact.id}: ${/** @type {Error} */ (error).message}`);
      }
    }
    if (!good.length) throw new BundleError(`no ${name} artefact of the bundle '${this.name}' computes here what it should (${refused.join("; ")})`);
    // A clock in a browser is coarse: what is within a tenth is equally fast, and the most precise comes first.
    const quickest = Math.min(...Object.values(milliseconds));
    const best = /** @type {Tower} */ (good.find((tower) => milliseconds[tower.artefact.id] <= quickest * 1.1 + 0.1));
    for (const tower of good) if (tower !== best) await tower.session.release();
    best.choice.why = `${milliseconds[best.artefact.id].toFixed(1)} ms here, the most precise of the fastest among ${field.length} proven artefacts${refused.length ? `; left out: ${refused.join("; ")}` : ""}`;
    remember(key, best.choice);
    return best;
  }

  /** @param {import("./manifest.js").Artefact} artefact @param {boolean} webgpu */
  async #start(artefact, webgpu) {
    const bytes = await this.#bundle.read(/** @type {string} */ (artefact.path));
    const start = (/** @type {string} */ provider) => this.#ort.InferenceSession.create(bytes, { executionProviders: [provider], graphOptimizationLevel: "all" });
    const create = async () => {
      if (!webgpu) return start("wasm");
      try {
        const session = await start("webgpu");
        this.device = "webgpu";
        return session;
      } catch {
        return start("wasm");
      }
    };
    // One at a time: the runtime starts itself with the first.
    const made = this.#turn.then(create, create);
    this.#turn = made.catch(() => undefined);
    return { artefact, session: await made };
  }

  /** @param {Tower} tower @param {(Float32Array | Int32Array)[]} rows @returns {Promise<Float32Array[]>} */
  #run(tower, rows) {
    const work = () => (tower.artefact.tower === "image" ? this.#runImages(tower, rows) : this.#runTexts(tower, /** @type {Int32Array[]} */ (rows)));
    const done = this.#turn.then(work, work);
    this.#turn = done.catch(() => undefined);
    return done;
  }

  /** @param {Tower} tower @param {(Float32Array | Int32Array)[]} rows */
  #runImages({ session, artefact }, rows) {
    const { input, output, image_size: size } = this.manifest.image;
    return runRows(this.#ort, session, artefact, input, output, rows, [3, size, size], this.dimension);
  }

  /** @param {Tower} tower @param {Int32Array[]} rows @returns {Promise<Float32Array[]>} */
  async #runTexts({ session, artefact }, rows) {
    const { input, output, pad_id: pad } = this.manifest.text;
    /** @type {Map<number, number[]>} */
    const byLength = new Map();
    rows.forEach((row, n) => {
      const length = artefact.any_length ? cutLength(row, pad) : row.length;
      byLength.set(length, [...(byLength.get(length) ?? []), n]);
    });
    /** @type {Float32Array[]} */
    const found = new Array(rows.length);
    for (const [length, places] of byLength) {
      const vectors = await runRows(this.#ort, session, artefact, input, output, places.map((n) => rows[n].slice(0, length)), [length], this.dimension);
      places.forEach((n, k) => (found[n] = vectors[k]));
    }
    return found;
  }
}

/** @param {string} key @returns {import("./towers.js").Choice | null} */
function recall(key) {
  try {
    const found = JSON.parse(globalThis.localStorage?.getItem(key) ?? "null");
    return typeof found?.id === "string" && typeof found.why === "string" ? found : null;
  } catch {
    return null; // no storage here, or something else wrote there
  }
}

/** @param {string} key @param {import("./towers.js").Choice} choice */
function remember(key, choice) {
  try {
    globalThis.localStorage?.setItem(key, JSON.stringify(choice));
  } catch {
    // Storage is off or full: measured again next time.
  }
}

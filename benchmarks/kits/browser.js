// Times towers and the SDK's own phases inside a page. The program that opened the page calls `window.bench`; nothing is fetched but this folder.
import * as ort from "./ort/ort.wasm.min.mjs";

const nanoseconds = (milliseconds) => Math.max(1, Math.round(milliseconds * 1e6));
const calls = {};
const WINDOW = 5;

const fetched = async (name) => {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name} is not in the folder (${answer.status})`);
  return answer.arrayBuffer();
};

const middle = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

/** The smallest step that this page's clock makes, in milliseconds. */
function clockStep() {
  let least = Infinity;
  for (let n = 0; n < 20; n++) {
    const before = performance.now();
    let after = before;
    while (after === before) after = performance.now();
    least = Math.min(least, after - before);
  }
  return least;
}

window.bench = {
  facts: () => ({ isolated: crossOriginIsolated, cores: navigator.hardwareConcurrency, agent: navigator.userAgent, clock_step_ns: nanoseconds(clockStep()), ort: ort.env.versions?.web }),

  /** Open a tower under a name. Rows come from a file of raw values; `place` n takes `batch` rows from row n on, the first again after the last. */
  async open({ name, file, input, output, rows, type, shape, batch, threads }) {
    ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
    ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "error";
    const raw = await fetched(rows);
    const values = type === "int32" ? new Int32Array(raw) : new Float32Array(raw);
    const size = shape.reduce((a, b) => a * b, 1);
    const count = values.length / size;
    const feeds = Array.from({ length: count }, (_, first) => {
      const data = new values.constructor(batch * size);
      for (let n = 0; n < batch; n++) data.set(values.subarray(((first + n) % count) * size, (((first + n) % count) + 1) * size), n * size);
      return { [input]: new ort.Tensor(type, data, [batch, ...shape]) };
    });
    const started = performance.now();
    const bytes = new Uint8Array(await fetched(file));
    const read = performance.now();
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    const loaded = performance.now();
    const wanted = output ?? session.outputNames[0];
    calls[name] = async (turn) => (await session.run(feeds[turn % count]))[wanted];
    calls[name].places = count;
    return { file_read: nanoseconds(read - started), load: nanoseconds(loaded - read), threads: ort.env.wasm.numThreads };
  },

  /** The SDK's own phases: decode, preprocess, tokenise, on the pictures and texts of the folder. */
  async host({ pictures, texts, image, text }) {
    const [{ decode }, { preprocess }, { readTokenizer }] = await Promise.all(["decode", "preprocess", "tokenizer"].map((part) => import(`./src/${part}.js`)));
    const blobs = await Promise.all(pictures.map(async (name) => new Blob([await fetched(name)], { type: "image/jpeg" })));
    const decoded = await Promise.all(blobs.map(decode));
    const tokens = readTokenizer(new TextDecoder().decode(await fetched("tokenizer.json")), text);
    calls.decode = (turn) => decode(blobs[turn % blobs.length]);
    calls.preprocess = (turn) => preprocess(decoded[turn % decoded.length], image);
    calls.tokenise = (turn) => tokens([texts[turn % texts.length]]);
  },

  /** Embeddings of the first row of every place. */
  async embeddings(name) {
    const found = [];
    for (let place = 0; place < calls[name].places; place++) {
      const { data, dims } = await calls[name](place);
      found.push(Array.from(data.subarray(0, dims[dims.length - 1])));
    }
    return found;
  },

  /** Everything that a run at this place gives. */
  async run(name, place) {
    const { data, dims } = await calls[name](place);
    return { data: Array.from(data), dims };
  },

  /** One run: nanoseconds. */
  async once(name, turn) {
    const before = performance.now();
    await calls[name](turn);
    return nanoseconds(performance.now() - before);
  },

  /** Warm up until two windows of five agree within 2 %, then time until the plan is done; `repeats` runs are one sample, their mean. */
  async timed(name, plan) {
    const call = calls[name];
    const clock = async (turn, repeats) => {
      const before = performance.now();
      for (let n = 0; n < repeats; n++) await call(turn);
      return (performance.now() - before) / repeats;
    };
    const first = await clock(0, 1);
    await clock(0, 10); // compiled by now
    let repeats = 1;
    while (repeats < 4096 && repeats * (await clock(0, repeats)) < 100 * clockStep()) repeats *= 2;
    const seen = [];
    let converged = false;
    let started = performance.now();
    while (seen.length < plan.warmup || (!converged && seen.length < plan.warmup + plan.settle && performance.now() - started < 1000 * Math.max(1, plan.seconds))) {
      seen.push(await clock(seen.length, repeats));
      if (seen.length >= 2 * WINDOW && seen.length % WINDOW === 0) {
        converged = Math.abs(middle(seen.slice(-WINDOW)) / middle(seen.slice(-2 * WINDOW, -WINDOW)) - 1) <= 0.02;
      }
    }
    const samples = [];
    started = performance.now();
    while (samples.length < plan.max_samples) {
      const passed = (performance.now() - started) / 1000;
      if ((passed >= plan.seconds && samples.length >= plan.min_samples) || (passed >= 4 * plan.seconds && samples.length >= 10)) break;
      samples.push(nanoseconds(await clock(samples.length, repeats)));
    }
    return { samples, warmup: seen.length, converged, first: nanoseconds(first), repeats };
  },
};
document.documentElement.dataset.ready = "1";

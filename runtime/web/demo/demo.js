import { Index, load, needsRepair } from "./src/main.js";

const NAME = "demo";
const MOST_SHOWN = 120;
const find = (id) => document.getElementById(id);
const [form, query, status, problem, progress, results, empty, clear] = ["form", "query", "status", "problem", "progress", "results", "empty", "clear"].map(find);

let clip;
let index;
let similarTo = null;
let turn = 0;
const urls = new Map();

/** @param {string} tag @param {object} [facts] @param {(Node | string)[]} [inside] */
function make(tag, facts = {}, inside = []) {
  const element = Object.assign(document.createElement(tag), facts);
  element.append(...inside);
  return element;
}

function complain(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

function address(key, blob) {
  if (!urls.has(key)) urls.set(key, URL.createObjectURL(blob));
  return urls.get(key);
}

function show(hits, scored) {
  const focused = document.activeElement?.closest?.("#results button")?.dataset.key;
  const most = hits[0]?.score ?? 1;
  const least = hits.at(-1)?.score ?? 0;
  results.replaceChildren(
    ...hits.slice(0, MOST_SHOWN).map(({ key, score, data }, n) => {
      const image = make("img", { src: address(key, data.blob), alt: "", decoding: "async" });
      const button = make("button", { type: "button" }, [image, make("span", { className: "name", textContent: data.name })]);
      button.dataset.key = key;
      button.setAttribute("aria-label", `${data.name}${scored ? `, score ${score.toFixed(2)}` : ""}. Find similar pictures`);
      if (scored) {
        const bar = make("i");
        bar.style.width = `${Math.round(100 * Math.max(0.02, (score - least) / Math.max(most - least, 1e-6)))}%`;
        const line = make("span", { className: "score", title: `score ${score.toFixed(3)}` }, [bar]);
        button.append(line);
      }
      button.addEventListener("click", () => {
        similarTo = { key, name: data.name, blob: data.blob };
        query.value = "";
        search();
      });
      const item = make("li", {}, [button]);
      if (scored && n === 0) item.classList.add("best");
      return item;
    }),
  );
  if (focused) [...results.querySelectorAll("button")].find((button) => button.dataset.key === focused)?.focus();
  empty.hidden = index.size > 0;
  clear.hidden = index.size === 0;
}

async function search() {
  if (!index) return;
  const text = query.value.trim();
  const mine = ++turn;
  const start = performance.now();
  if (!index.size || (!text && !similarTo)) {
    show(index.search(new Float32Array(index.dimension), index.size), false);
    status.textContent = index.size ? `${index.size} pictures. Type words to sort them.` : "Ready. Add pictures, or take the sample set.";
    return;
  }
  if (text) similarTo = null;
  const [vector] = text ? await clip.encodeText(text) : await clip.encodeImage(similarTo.blob);
  if (mine !== turn) return;
  const hits = index.search(vector, index.size);
  show(hits, true);
  const took = performance.now() - start;
  document.documentElement.dataset.queryMs = took.toFixed(1);
  const what = text ? `“${text}”` : `pictures like “${similarTo.name}”`;
  const doubt = text && needsRepair(text) ? " This text may be damaged: Python might repair it first." : "";
  status.textContent = `${index.size} pictures sorted by ${what} in ${took.toFixed(0)} ms. Best: ${hits[0].data.name}.${doubt}`;
}

/** @param {{blob: Blob, name: string, key: string}[]} pictures */
async function add(pictures) {
  complain("");
  progress.hidden = false;
  progress.max = pictures.length;
  const failed = [];
  for (const [n, { blob, name, key }] of pictures.entries()) {
    progress.value = n;
    if (n % 8 === 0) status.textContent = `Reading picture ${n + 1} of ${pictures.length} …`;
    if (index.has(key)) continue;
    try {
      const [vector] = await clip.encodeImage(blob);
      index.add(key, vector, { blob, name });
    } catch (error) {
      failed.push(error.message);
    }
  }
  progress.hidden = true;
  if (failed.length) complain(`${failed.length} left out. ${failed[0]}`);
  await index.save(NAME).catch((error) => complain(error.message));
  await search();
}

const fromFiles = (files) => [...files].map((file) => ({ blob: file, name: file.name, key: `${file.name} ${file.size} ${file.lastModified}` }));

async function addSamples() {
  const list = await (await fetch("samples/samples.json")).json();
  const pictures = await Promise.all(list.map(async ({ file, caption }) => ({ blob: await (await fetch(`samples/${file}`)).blob(), name: caption, key: file })));
  await add(pictures);
}

/** Buttons rest while one of them works. */
async function busy(work) {
  const buttons = [find("add"), find("samples"), clear];
  for (const button of buttons) button.disabled = true;
  try {
    await work();
  } catch (error) {
    complain(error.message);
  } finally {
    for (const button of buttons) button.disabled = false;
    progress.hidden = true;
  }
}

function explain(choice) {
  const facts = {
    Model: `${clip.name}, ${clip.dimension} numbers a picture`,
    Pictures: `${choice.image.id}: ${choice.image.why}`,
    Texts: `${choice.text.id}: ${choice.text.why}`,
    Threads: crossOriginIsolated ? `as many as ${Math.min(4, navigator.hardwareConcurrency)}` : "one: the server does not isolate this page",
  };
  find("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

form.addEventListener("submit", (event) => event.preventDefault());
query.addEventListener("input", () => search().catch((error) => complain(error.message)));
find("add").addEventListener("click", () => find("files").click());
find("files").addEventListener("change", (event) => busy(() => add(fromFiles(event.target.files))).then(() => (event.target.value = "")));
find("samples").addEventListener("click", () => busy(addSamples));
clear.addEventListener("click", () =>
  busy(async () => {
    await Index.delete(NAME);
    for (const url of urls.values()) URL.revokeObjectURL(url);
    urls.clear();
    index = new Index(clip);
    similarTo = null;
    await search();
    query.focus();
  }),
);
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (index && event.dataTransfer.files.length) busy(() => add(fromFiles(event.dataTransfer.files)));
});

await busy(async () => {
  clip = await load("./bundle");
  await clip.ready();
  index = (await Index.restore(NAME, clip).catch(() => null)) ?? new Index(clip);
  explain(await clip.explain());
  await search();
  document.documentElement.dataset.ready = performance.now().toFixed(0);
}).finally(() => navigator.serviceWorker?.register("service-worker.js").catch(() => undefined));
if (!index) status.textContent = "The model did not load.";

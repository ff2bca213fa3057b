// The page and the package in a real Chromium. SITE: what `make web` made; VECTORS: what tests/web/vectors.py wrote; PYTHON and CHROMIUM: programs.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";

const root = resolve(dirname(fileURLToPath(import.meta.url)), "../..");
const { chromium } = createRequire(join(root, "runtime/web/package.json"))("playwright-core");
const site = resolve(process.env.SITE ?? join(root, "out/web"));
const vectors = process.env.VECTORS ?? "";
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const shots = join(site, "screenshots");
const summary = {};
let server, browser, address;

before(async () => {
  assert.ok(existsSync(join(site, "index.html")), `${site} holds no page; run 'make web'`);
  mkdirSync(shots, { recursive: true });
  server = spawn(process.env.PYTHON ?? "python3", ["-m", "runtime.web_server", site, "--port", "0"], { cwd: root, stdio: ["ignore", "pipe", "inherit"] });
  address = await new Promise((done) => server.stdout.once("data", (line) => done(String(line).trim())));
  browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  server?.kill();
  if (process.env.SUMMARY) writeFileSync(process.env.SUMMARY, JSON.stringify(summary));
});

/** A fresh page; whatever it logs as an error, or asks of another host, fails the test that closes it. */
async function open(options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
  const page = await context.newPage();
  const wrong = [];
  page.on("console", (message) => message.type() === "error" && wrong.push(message.text()));
  page.on("pageerror", (error) => wrong.push(String(error)));
  page.on("request", (request) => request.url().startsWith(address) || request.url().startsWith("blob:") || wrong.push(`asks for ${request.url()}`));
  await page.goto(address);
  return { context, page, wrong };
}

const ready = (page) => page.waitForFunction(() => document.documentElement.dataset.ready, null, { timeout: 60000 });
const first = (page) => page.locator("#results .name").first();
const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

test("embeddings equal the golden ones within 1e-3, fp32 on WebAssembly with threads; the chosen artefacts reach their threshold", async () => {
  const { context, page, wrong } = await open();
  await ready(page);
  const found = await page.evaluate(async () => {
    const [{ load }, { openBundle }, { readGolden }] = await Promise.all(["./src/main.js", "./src/manifest.js", "./src/golden.js"].map((name) => import(name)));
    const bundle = await openBundle("./bundle");
    const { images, texts, hardTexts, tensors } = await readGolden(bundle);
    const blobs = await Promise.all(images.map(async (name) => new Blob([await bundle.read(name)], { type: "image/png" })));
    const off = (rows, wanted) => Math.max(...rows.flatMap((row, n) => Array.from(row, (value, d) => Math.abs(value - wanted[n * row.length + d]))));
    const result = { isolated: crossOriginIsolated };
    for (const threads of [1, 2]) {
      const clip = await load("./bundle", { prefer: "fp32", threads });
      result[`image ${threads}`] = off(await clip.encodeImage(blobs), tensors.image_embedding.data);
      result[`text ${threads}`] = off(await clip.encodeText(texts), tensors.text_embedding.data);
      result[`one ${threads}`] = off(await clip.encodeImage(blobs[0]), tensors.image_embedding.data);
      result.explain = await clip.explain();
      const { needsRepair } = await import("./src/tokenizer.js");
      const tokens = await clip.tokens([...texts, ...hardTexts]);
      const wanted = [...tensors.tokens.data, ...tensors.hard_tokens.data];
      const length = clip.manifest.text.context_length;
      result.tokens = [...texts, ...hardTexts].filter((text, n) => !needsRepair(text) && wanted.slice(n * length, (n + 1) * length).some((id, k) => id !== tokens[n * length + k]));
      const labels = await clip.classify(blobs[3], ["panda", "dagger", "wastebasket"], { templates: ["{}", "a picture of {}"] });
      result.labels = labels;
      await clip.release();
    }
    return result;
  });
  assert.equal(found.isolated, true);
  const differences = Object.entries(found).filter(([name]) => /^(image|text|one) \d/.test(name)).map(([, value]) => value);
  summary.web_max_difference = Math.max(...differences);
  assert.ok(differences.length === 6 && summary.web_max_difference <= 1e-3, JSON.stringify(found));
  assert.deepEqual(found.tokens, []);
  assert.equal(found.labels[0].label, "panda");
  assert.ok(Math.abs(found.labels.reduce((sum, { probability }) => sum + probability, 0) - 1) < 1e-6);
  assert.deepEqual(wrong, []);
  await context.close();
});

test("pictures decode as in Python: EXIF, grey, palette, transparency", { skip: !vectors && "no VECTORS" }, async () => {
  const { context, page } = await open();
  const entries = JSON.parse(readFileSync(join(vectors, "files.json"), "utf8"));
  const worst = {};
  for (const { name, width, height } of entries) {
    const file = readFileSync(join(vectors, "files", name)).toString("base64");
    const rgb = await page.evaluate(
      async ([data, kind]) => {
        const [{ decode }, { toRgb }] = await Promise.all([import("./src/decode.js"), import("./src/preprocess.js")]);
        const picture = await decode(new Blob([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], { type: `image/${kind}` }));
        return { width: picture.width, height: picture.height, rgb: Array.from(toRgb(picture)) };
      },
      [file, name.endsWith("jpg") ? "jpeg" : name.split(".").pop()],
    );
    assert.deepEqual([rgb.width, rgb.height], [width, height], name);
    const wanted = readFileSync(join(vectors, "files", `${name}.rgb`));
    worst[name] = Math.max(...rgb.rgb.map((value, n) => Math.abs(value - wanted[n])));
  }
  summary.web_decode_worst = worst;
  for (const [name, most] of Object.entries(worst)) assert.ok(most <= (name.endsWith("jpg") ? 6 : 0), `${name} differs by ${most}`);
  await context.close();
});

test("the page by clicks: sample set, words, similar pictures, own pictures, kept over a reload", async () => {
  const { context, page, wrong } = await open();
  await ready(page);
  await page.screenshot({ path: join(shots, "desktop-empty.png") });
  await page.getByRole("button", { name: "Sample set" }).click();
  await page.waitForFunction(() => document.querySelectorAll("#results li").length >= 40, null, { timeout: 60000 });
  const query = page.getByRole("searchbox", { name: "What is in the picture?" });
  const captions = await page.evaluate(async () => (await (await fetch("samples/samples.json")).json()).map(({ caption }) => caption));
  const times = [];
  let hits = 0;
  for (const caption of captions.slice(0, 20)) {
    await query.fill("");
    await query.fill(caption);
    await page.waitForFunction((text) => document.getElementById("status").textContent.includes(`“${text}”`), caption.trim());
    times.push(Number(await page.evaluate(() => document.documentElement.dataset.queryMs)));
    hits += (await page.locator("#results .name").allTextContents()).slice(0, 5).includes(caption);
  }
  summary.web_query_ms = median(times);
  summary.web_sample_recall5 = hits / 20;
  assert.ok(summary.web_query_ms <= 100, `a query takes ${summary.web_query_ms} ms`);
  assert.ok(hits >= 10, `only ${hits} of 20 captions find their picture among the first five`);
  await page.screenshot({ path: join(shots, "desktop.png") });
  await page.locator("#results button").nth(2).click();
  await page.waitForFunction(() => document.getElementById("status").textContent.includes("pictures like"));
  const before = await page.locator("#results li").count();
  await page.setInputFiles("#files", [{ name: "mine <b>.png", mimeType: "image/png", buffer: readFileSync(join(site, "bundle/golden/03.png")) }, { name: "broken.png", mimeType: "image/png", buffer: Buffer.from("no picture") }]);
  await page.getByRole("alert").filter({ hasText: "broken.png" }).waitFor();
  assert.equal(await page.locator("#results li").count(), before + 1);
  await page.reload();
  await ready(page);
  assert.equal(await page.locator("#results li").count(), before + 1);
  assert.ok((await page.locator("#results .name").allTextContents()).includes("mine <b>.png"));
  await page.getByRole("button", { name: "Remove all" }).click();
  await page.waitForFunction(() => !document.querySelectorAll("#results li").length);
  assert.deepEqual(wrong, []);
  await context.close();
});

test("interactive within three seconds, and offline after the first load", async () => {
  const seconds = [];
  for (let round = 0; round < 3; round++) {
    const { context, page, wrong } = await open();
    await ready(page);
    seconds.push(Number(await page.evaluate(() => document.documentElement.dataset.ready)) / 1000);
    if (round === 2) {
      await page.evaluate(() => navigator.serviceWorker.ready);
      await page.waitForFunction(() => navigator.serviceWorker.controller);
      await context.setOffline(true);
      await page.reload();
      await ready(page);
      summary.web_interactive_again_seconds = Number(await page.evaluate(() => document.documentElement.dataset.ready)) / 1000;
      await page.getByRole("button", { name: "Sample set" }).click();
      await page.waitForFunction(() => document.querySelectorAll("#results li").length >= 40, null, { timeout: 60000 });
      await page.getByRole("searchbox").fill("red heart");
      await page.waitForFunction(() => document.getElementById("status").textContent.includes("red heart"));
      assert.deepEqual(wrong, []);
    }
    await context.close();
  }
  summary.web_interactive_seconds = median(seconds);
  assert.ok(summary.web_interactive_seconds <= 3, `${seconds} s`);
});

test("phone, dark, keyboard, names and roles", async () => {
  const { context, page, wrong } = await open({ viewport: { width: 390, height: 844 }, colorScheme: "dark", deviceScaleFactor: 2, hasTouch: true });
  await ready(page);
  const reached = [];
  for (let n = 0; n < 5; n++) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => document.activeElement.id || document.activeElement.className));
    if (n) assert.notEqual(await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle), "none", reached.at(-1));
  }
  assert.deepEqual(reached.slice(0, 4), ["skip", "query", "add", "samples"]);
  await page.locator("#samples").focus();
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll("#results li").length >= 40, null, { timeout: 60000 });
  await page.getByRole("searchbox").fill("a green plant");
  await page.waitForFunction(() => document.getElementById("status").textContent.includes("a green plant"));
  await page.screenshot({ path: join(shots, "phone-dark.png") });
  assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "the page is wider than the phone");
  const nameless = await page.evaluate(() => [...document.querySelectorAll("button, input:not([hidden])")].filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length)).length);
  assert.equal(nameless, 0);
  assert.match(await page.locator("body").ariaSnapshot(), /searchbox "What is in the picture\?"[\s\S]*status[\s\S]*list "Pictures, best match first"/);
  await page.locator("#results button").first().focus();
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.getElementById("status").textContent.includes("pictures like"));
  assert.equal(await first(page).count(), 1);
  assert.deepEqual(wrong, []);
  await context.close();
});

test("WebGPU on the software adapter computes the same", async (t) => {
  const gpu = await chromium.launch({ executablePath, args: ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"] });
  t.after(() => gpu.close());
  const page = await gpu.newPage();
  await page.goto(address);
  const adapter = await page.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter()));
  summary.web_webgpu = adapter ? "ran" : "this Chromium gives no WebGPU adapter";
  if (!adapter) return t.skip(summary.web_webgpu);
  const found = await page.evaluate(async () => {
    const [{ load }, { openBundle }, { readGolden }] = await Promise.all(["./src/main.js", "./src/manifest.js", "./src/golden.js"].map((name) => import(name)));
    const { texts, tensors } = await readGolden(await openBundle("./bundle"));
    const clip = await load("./bundle", { prefer: "fp32", webgpu: true });
    const width = tensors.pixels.data.length / texts.length;
    const images = await clip.encodePixels(texts.map((_, n) => tensors.pixels.data.slice(n * width, (n + 1) * width)));
    const off = (rows, wanted) => Math.max(...rows.flatMap((row, n) => Array.from(row, (value, d) => Math.abs(value - wanted[n * row.length + d]))));
    return { device: clip.device, off: [off(images, tensors.image_embedding.data), off(await clip.encodeText(texts), tensors.text_embedding.data)] };
  });
  assert.equal(found.device, "webgpu");
  summary.web_webgpu_max_difference = Math.max(...found.off);
  assert.ok(summary.web_webgpu_max_difference <= 1e-3, String(found.off));
});

// Clicks through the page in a headless Chromium, compares what it shows with known answers, and keeps pictures of it.
// usage: node page.mjs [FOLDER FOR PICTURES]

import fs from "node:fs";
import os from "node:os";
import path from "node:path";

import { Browser, serve } from "./browser.mjs";

const web = path.resolve(path.dirname(new URL(import.meta.url).pathname), "..");
const root = path.dirname(web);
const pictures = path.resolve(process.argv[2] || fs.mkdtempSync(path.join(os.tmpdir(), "cross-attention-page-")));
fs.mkdirSync(pictures, { recursive: true });

const started = Date.now();
let checks = 0;

function truly(condition, what) {
  checks += 1;
  if (!condition) throw new Error(what);
}

const server = await serve({ "/": path.join(web, "site") });
const browser = await Browser.open();
let page;

const click = (selector) => page.evaluate(`document.querySelector(${JSON.stringify(selector)}).click()`);
const text = (selector) => page.evaluate(`document.querySelector(${JSON.stringify(selector)}).textContent`);
const choose = (selector, value) =>
  page.evaluate(`(() => { const e = document.querySelector(${JSON.stringify(selector)}); e.value = ${JSON.stringify(value)}; e.dispatchEvent(new Event("change", { bubbles: true })); })()`);
const keep = (name, selector) => page.screenshot(path.join(pictures, `${name}.png`), selector);
/** Colours of a canvas: how many there are, and a sum of all. */
const ink = (selector) =>
  page.evaluate(`(() => { const c = document.querySelector(${JSON.stringify(selector)}); const { data } = c.getContext("2d").getImageData(0, 0, c.width, c.height);
    const seen = new Set(); let sum = 0; for (let n = 0; n < data.length; n += 4) { seen.add((data[n] << 16) | (data[n + 1] << 8) | data[n + 2]); sum = (sum * 31 + data[n] * 3 + data[n + 1] * 5 + data[n + 2] * 7) | 0; } return { colours: seen.size, sum }; })()`);

/** Gives the page a file as if it was dropped. */
async function dropFile(name, bytes) {
  const text = Buffer.from(bytes).toString("base64");
  await page.evaluate(`(async () => { const bytes = Uint8Array.from(atob(${JSON.stringify(text)}), (c) => c.charCodeAt(0));
    const data = new DataTransfer(); data.items.add(new File([bytes], ${JSON.stringify(name)}));
    document.querySelector("#drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })); })()`);
  return page.until("page.sections.file && !page.sections.file.working && page.sections.file", 120);
}

function safetensors(tensors, metadata = {}) {
  const header = { __metadata__: metadata };
  const parts = [];
  let at = 0;
  for (const [name, [dtype, shape, array]] of Object.entries(tensors)) {
    const bytes = Buffer.from(array.buffer);
    header[name] = { dtype, shape, data_offsets: [at, at + bytes.length] };
    at += bytes.length;
    parts.push(bytes);
  }
  const head = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(head.length));
  return Buffer.concat([length, head, ...parts]);
}

/** The pairs once more, in f64 and with nothing of the package. */
function pairsInPlainNumbers() {
  const file = fs.readFileSync(path.join(root, "tests/golden/lightglue/layer4.safetensors"));
  const length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.subarray(8, 8 + length));
  const halves = (name) => {
    const [from, to] = header[name].data_offsets;
    return Float64Array.from({ length: (to - from) / 2 }, (_, n) => {
      const bits = file.readUInt16LE(8 + length + from + 2 * n);
      const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
      return (bits & 0x8000 ? -1 : 1) * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15));
    });
  };
  const [heads, width] = [4, 64];
  const sides = [halves("qk0"), halves("qk1")];
  const [count, others] = sides.map((side) => side.length / heads / width);
  const looks = (query, key, rows, columns) => {
    const mean = new Float64Array(rows * columns);
    for (let h = 0; h < heads; h += 1) {
      for (let i = 0; i < rows; i += 1) {
        const scores = Float64Array.from({ length: columns }, (_, j) => {
          let dot = 0;
          for (let d = 0; d < width; d += 1) dot += query[(h * rows + i) * width + d] * key[(h * columns + j) * width + d];
          return dot / Math.sqrt(width);
        });
        const most = Math.max(...scores);
        const sum = scores.reduce((all, score) => all + Math.exp(score - most), 0);
        scores.forEach((score, j) => (mean[i * columns + j] += Math.exp(score - most) / sum / heads));
      }
    }
    return mean;
  };
  const [there, back] = [looks(sides[0], sides[1], count, others), looks(sides[1], sides[0], others, count)];
  const both = (i, j) => there[i * others + j] * back[j * count + i];
  const best = (n, of) => Array.from({ length: n }, (_, k) => of(k)).reduce((most, value, k, all) => (value > all[most] ? k : most), 0);
  const pairs = [];
  for (let i = 0; i < count; i += 1) {
    const j = best(others, (k) => both(i, k));
    if (both(i, j) > 0.1 && best(count, (k) => both(k, j)) === i) pairs.push([i, j]);
  }
  return pairs;
}

async function speech() {
  const found = await page.evaluate("page.sections.speech");
  truly(!found.error, `speech: ${found.error}`);
  truly(found.passed && found.off < 2e-3, `speech: ${JSON.stringify({ ...found, words: 0 })}`);
  // the method of the whole model uses eight heads of three layers, this page five of one
  const transcript = JSON.parse(fs.readFileSync(path.join(root, "examples/data/whisper-tiny-en/transcript.json"), "utf8"));
  truly(found.words.length === transcript.words.length, "as many words as were spoken");
  const near = found.words.filter(({ from }, n) => Math.abs(from - transcript.words[n].start) < 0.15).length;
  truly(near >= found.words.length * 0.9, `${near} of ${found.words.length} words begin within 0.15 s of the whole model's times`);
  truly((await text("#words")).trim() === found.words.map(({ word }) => word).join(" "), "the text is shown");
  // the middle of a word lights it up; the short "it" at the head of a clause takes no time by the whole model either
  for (const n of [3, 13, found.words.length - 2]) {
    const { from, to, word } = found.words[n];
    await page.evaluate(`document.querySelector("#audio").currentTime = ${(from + to) / 2}`);
    await page.until(`document.querySelector("#words .now")?.textContent === ${JSON.stringify(word)} && document.querySelectorAll("#words .now").length === 1`, 20);
  }
  truly((await page.evaluate(`document.querySelector("#audio").duration`)) > 10.6, "ten seconds of sound");
  const seen = new Set([(await ink("#heat")).sum]);
  for (const head of ["0", "5"]) {
    await choose("#head", head);
    const { colours, sum } = await ink("#heat");
    truly(colours > 50, `the picture of head ${head} has ${colours} colours`);
    seen.add(sum);
  }
  truly(seen.size === 3, "each head has a picture of its own");
  await choose("#head", "mean");
  truly((await page.evaluate(`document.querySelectorAll("#times tr").length`)) === found.words.length + 1, "a table of times");
  // sound that is played moves on and lights words up by itself
  await click("#words button:nth-of-type(2)");
  await page.until(`document.querySelector("#audio").currentTime > ${found.words[1].from} && document.querySelector("#words .now")`, 20);
  await page.evaluate(`document.querySelector("#audio").pause()`);
  return found;
}

async function photographs() {
  const found = await page.evaluate("page.sections.photographs");
  truly(!found.error, `photographs: ${found.error}`);
  truly(found.passed && found.off < 1e-3, `output is ${found.off} off, ${found.passed}`);
  const wanted = pairsInPlainNumbers();
  truly(wanted.length > 300 && JSON.stringify(found.all) === JSON.stringify(wanted), `${found.all.length} pairs, ${wanted.length} by plain arithmetic`);
  truly(found.near / found.pairs > 0.85, `${found.near} of ${found.pairs} pairs are near the truth`);
  const all = await ink("#pairs");
  const box = await page.evaluate(`(() => { const c = document.querySelector("#pairs"); c.scrollIntoView(); const r = c.getBoundingClientRect(); return { x: r.x, y: r.y, scale: c.clientWidth / c.width }; })()`);
  const [from] = found.all[20];
  const points = fs.readFileSync(path.join(root, "examples/data/lightglue/keypoints.safetensors"));
  const start = 8 + Number(points.readBigUInt64LE(0));
  const [x, y] = [points.readFloatLE(start + 8 * from), points.readFloatLE(start + 8 * from + 4)];
  await page.send("Input.dispatchMouseEvent", { type: "mouseMoved", x: box.x + x * box.scale, y: box.y + y * box.scale });
  await page.until(`document.querySelector("#point").textContent.startsWith("Point ")`, 20);
  truly((await ink("#pairs")).sum !== all.sum, "the chosen point is drawn");
  await page.evaluate(`document.querySelector("#pairs").focus()`);
  const before = await text("#point");
  await page.send("Input.dispatchKeyEvent", { type: "keyDown", key: "ArrowRight" });
  await page.until(`document.querySelector("#point").textContent !== ${JSON.stringify(before)}`, 20);
  await keep("photographs-point", "#photographs");
  await page.evaluate(`document.querySelector("#pairs").blur()`);
  return found;
}

async function benchmark(names) {
  await page.evaluate(`document.querySelectorAll("#workloads input").forEach((box) => (box.checked = ${JSON.stringify(names)}.includes(box.value)))`);
  await page.evaluate(`document.querySelector("#seconds").value = "0.2"`);
  await click("#bench-run");
  const found = await page.until("page.sections.benchmark?.rows && page.sections.benchmark", 200);
  truly(found.failed === 0 && found.rows.length === names.length, JSON.stringify(found));
  const lines = (await page.evaluate(`document.querySelector("#bench-json").value`)).split("\n").map((line) => JSON.parse(line));
  truly(lines.length === names.length, "a line of JSON for each workload");
  const native = fs.readFileSync(path.join(root, "src/bin/cross-attention/bench/report.rs"), "utf8");
  // the names in both objects that make up a row
  const fields = ["as_json", "measured"].flatMap((name) => {
    const body = native.slice(native.indexOf(`fn ${name}(`));
    return [...body.slice(0, body.indexOf("\n}\n")).matchAll(/^ {8}"(\w+)":/gm)].map(([, field]) => field);
  });
  truly(["workload", "cold", "kernel", "blocks_ms", "kernels"].every((field) => fields.includes(field)), `fields of bench --json: ${fields}`);
  for (const line of lines) {
    const missing = fields.filter((field) => !(field in line));
    truly(missing.length === 0, `fields of bench --json that are missing: ${missing}`);
    truly(line.software && line.median_ms > 0 && line.roof_share > 0 && line.max_abs_error < 1e-3, JSON.stringify(line));
    truly(line.min_ms <= line.p10_ms && line.p90_ms <= line.max_ms && line.blocks_ms.length === Math.min(line.rounds, 32), JSON.stringify(line));
  }
  truly((await text("#bench-status")).includes("say nothing about a GPU"), "a software driver is said to be one");
  await browser.send("Browser.grantPermissions", { permissions: ["clipboardReadWrite", "clipboardSanitizedWrite"] }).catch(() => {});
  await click("#bench-copy");
  await page.until(`/Copied|does not let/.test(document.querySelector("#bench-status").textContent)`, 20);
  return found;
}

async function file() {
  await click("#example");
  const speech = await page.until("page.sections.file?.rows && page.sections.file", 120);
  truly(speech.heads === 6 && speech.rows === 39 && speech.columns === 1500, JSON.stringify(speech));
  await keep("file", "#file");
  // two keys, one of which is twice as likely: weights 2/3 and 1/3
  const known = safetensors(
    {
      query: ["F32", [1, 1, 1, 1], Float32Array.of(1)],
      key: ["F32", [1, 1, 2, 1], Float32Array.of(Math.log(2), 0)],
      value: ["F32", [1, 1, 2, 1], Float32Array.of(1, 2)],
    },
    { scale: "1" },
  );
  const small = await dropFile("known.safetensors", known);
  truly(Math.abs(small.largest - 2 / 3) < 1e-6 && Math.abs(small.sums[0] - 1) < 1e-6, JSON.stringify(small));
  truly((await text("#file-caption")).includes("known.safetensors"), "the file's name is shown");
  const bad = [
    ["empty.safetensors", Buffer.alloc(0), "0 bytes"],
    ["text.safetensors", Buffer.from("this is not a file of tensors at all"), "no safetensors file"],
    ["cut.safetensors", known.subarray(0, known.length - 6), "outside of the file"],
    ["other.safetensors", safetensors({ weight: ["F32", [2], Float32Array.of(1, 2)] }), "needs query, key and value"],
    ["flat.safetensors", safetensors({ query: ["F32", [2], Float32Array.of(1, 2)], key: ["F32", [1], Float32Array.of(1)], value: ["F32", [1], Float32Array.of(1)] }), "needs [batch, heads, length, width]"],
    ["mixed.safetensors", safetensors({ query: ["F32", [1, 1, 1, 2], Float32Array.of(1, 2)], key: ["F32", [1, 1, 1, 1], Float32Array.of(1)], value: ["F32", [1, 1, 1, 1], Float32Array.of(1)] }), "key has shape"],
  ];
  for (const [name, bytes, words] of bad) {
    await dropFile(name, bytes);
    const shown = await text("#file-error");
    truly(shown.includes(words) && shown.includes(name), `${name}: ${JSON.stringify(shown)} does not say ${JSON.stringify(words)}`);
  }
  await dropFile("known.safetensors", known);
  truly((await text("#file-error")) === "", "an error goes when the next file is good");
}

try {
  page = await browser.page(`${server.origin}/`);
  await page.until("globalThis.page?.ready", 120);
  const ready = (Date.now() - started) / 1000;
  truly(/WebGPU/.test(await text("#device")) && /software driver/.test(await text("#device")), await text("#device"));
  const heard = await speech();
  await keep("speech", "#speech");
  const seen = await photographs();
  await keep("photographs", "#photographs");
  const timed = await benchmark(["whisper_decode", "sam_token_to_image", "detr"]);
  await keep("benchmark", "#benchmark");
  await file();
  await keep("page");

  // the same answers from the CPU, without WebGPU at all, and in the dark
  await choose("#prefer", "cpu");
  await page.until(`page.ready && page.device.kind === "cpu"`, 120);
  truly((await text("#device")).includes("on the CPU"), "the page says that the CPU computes");
  const again = await page.evaluate("page.sections");
  truly(again.speech.worst === heard.worst && again.photographs.pairs === seen.pairs, "the CPU finds the same times and pairs");
  truly(page.errors.length === 0, `errors in the console: ${page.errors.join("\n")}`);
  const elsewhere = page.requests.filter((url) => !url.startsWith(server.origin) && !url.startsWith("data:") && !url.startsWith("blob:"));
  truly(elsewhere.length === 0, `requests to other places: ${elsewhere}`);
  await page.close();

  page = await browser.page("about:blank", { dark: true, width: 420, height: 900 });
  await page.send("Page.addScriptToEvaluateOnNewDocument", { source: `Object.defineProperty(navigator, "gpu", { value: undefined, configurable: true });` });
  await page.send("Page.navigate", { url: `${server.origin}/` });
  await page.until("globalThis.page?.ready", 120);
  truly((await text("#device")).includes("no WebGPU"), await text("#device"));
  truly((await page.evaluate("page.sections.speech.worst")) === heard.worst, "the same times without WebGPU");
  const wide = await page.evaluate("document.documentElement.scrollWidth");
  truly(wide <= 420, `on a narrow screen the page is ${wide} wide`);
  truly(page.errors.length === 0, `errors in the console: ${page.errors.join("\n")}`);
  await keep("dark-narrow");
  console.log(
    `page: ${checks} checks in ${((Date.now() - started) / 1000).toFixed(0)} s, ready after ${ready.toFixed(1)} s; ` +
      `words at most ${heard.worst.toFixed(2)} s off, ${seen.near} of ${seen.pairs} pairs near the truth, ${timed.rows.length} workloads; pictures: ${pictures}`,
  );
} catch (error) {
  console.log(`page: ${error.stack}\nerrors in the console: ${page?.errors.join("\n")}`);
  if (page) await keep("failed").catch(() => {});
  process.exitCode = 1;
} finally {
  await browser.close();
  server.close();
}

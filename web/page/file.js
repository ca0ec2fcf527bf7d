// A file of the visitor's: its attention as a picture.

import { drawHeat } from "./heat.js";
import { FileError, parse } from "./safetensors.js";

const $ = (id) => document.getElementById(id);

/** Weights that are drawn at most: more rows or columns than a screen has pixels show nothing. */
const MOST = 4_000_000;

export function file() {
  let device;
  let shown;

  const drop = $("drop");
  for (const event of ["dragenter", "dragover"]) {
    drop.addEventListener(event, (dragged) => {
      dragged.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const event of ["dragleave", "drop"]) drop.addEventListener(event, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (dropped) => {
    dropped.preventDefault();
    const [first] = dropped.dataTransfer.files;
    if (first) take(first.name, () => first.arrayBuffer());
  });
  $("pick").addEventListener("change", () => {
    const [first] = $("pick").files;
    if (first) take(first.name, () => first.arrayBuffer());
  });
  $("example").addEventListener("click", () =>
    take("whisper.safetensors", async () => (await fetch("data/whisper.safetensors")).arrayBuffer()),
  );
  for (const id of ["file-batch", "file-head"]) $(id).addEventListener("change", draw);

  async function take(name, read) {
    $("file-error").textContent = "";
    globalThis.page.sections.file = { working: true };
    try {
      globalThis.page.sections.file = await attend(name, await read());
    } catch (error) {
      for (const id of ["file-figure", "file-plan", "file-choice"]) $(id).hidden = true;
      shown = undefined;
      $("file-error").textContent = `${name}: ${error.message}.`;
      globalThis.page.sections.file = { error: error.message };
    }
  }

  async function attend(name, buffer) {
    const tensors = parse(buffer);
    for (const needed of ["query", "key", "value"]) {
      if (!tensors.has(needed)) {
        throw new FileError(`there is no tensor ${needed}; needs query, key and value, found ${tensors.names.join(", ") || "none"}`);
      }
      if (tensors.shape(needed).length !== 4) {
        throw new FileError(`${needed} has shape [${tensors.shape(needed).join(", ")}], needs [batch, heads, length, width]`);
      }
    }
    const options = {
      shape: { query: tensors.shape("query"), key: tensors.shape("key"), value: tensors.shape("value") },
      query: tensors.numbers("query"),
      key: tensors.numbers("key"),
      value: tensors.numbers("value"),
    };
    const padded = (shape) => [1, 1, 1, 1, ...shape].slice(-4);
    if (tensors.has("bias")) [options.bias, options.shape.bias] = [tensors.numbers("bias"), padded(tensors.shape("bias"))];
    if (tensors.has("mask")) [options.mask, options.shape.mask] = [tensors.bytes("mask"), padded(tensors.shape("mask"))];
    if (tensors.has("q_lens")) options.qLens = tensors.counts("q_lens");
    if (tensors.has("kv_lens")) options.kvLens = tensors.counts("kv_lens");
    const { metadata } = tensors;
    if (metadata.scale !== undefined) options.scale = Number(metadata.scale);
    const ignored = tensors.names.filter((tensor) => !["query", "key", "value", "bias", "mask", "q_lens", "kv_lens"].includes(tensor));
    const [batch, heads, rows] = options.shape.query;
    const columns = options.shape.key[2];
    if (batch * heads * rows * columns > MOST) {
      throw new FileError(`there are ${batch * heads * rows * columns} weights, at most ${MOST} are drawn; cut the file`);
    }
    const result = await device.attention({ ...options, weights: true });
    let labels;
    try {
      labels = JSON.parse(metadata.row_labels);
    } catch {
      labels = undefined;
    }
    if (!Array.isArray(labels) || labels.length !== rows) labels = Array.from({ length: rows }, (_, row) => `row ${row}`);
    shown = { name, weights: result.weights, batch, heads, rows, columns, labels: labels.map(String), ignored };
    const fill = (id, texts) => $(id).replaceChildren(...texts.map((text, n) => new Option(text, String(n))));
    fill("file-batch", Array.from({ length: batch }, (_, n) => String(n)));
    fill("file-head", [...Array.from({ length: heads }, (_, n) => `head ${n}`), "mean of all heads"]);
    $("file-head").value = String(heads);
    $("file-plan").querySelector("pre").textContent = result.plan;
    for (const id of ["file-figure", "file-plan", "file-choice"]) $(id).hidden = false;
    draw();
    const sums = Array.from({ length: batch * heads * rows }, (_, row) => result.weights.subarray(row * columns, (row + 1) * columns).reduce((a, b) => a + b, 0));
    return { batch, heads, rows, columns, largest: result.weights.reduce((a, b) => Math.max(a, b), 0), sums: [Math.min(...sums), Math.max(...sums)] };
  }

  function draw() {
    if (!shown) return;
    const { weights, batch, heads, rows, columns, labels, name, ignored } = shown;
    const [entry, head] = [Number($("file-batch").value), Number($("file-head").value)];
    const plane = (n) => weights.subarray((entry * heads + n) * rows * columns, (entry * heads + n + 1) * rows * columns);
    let matrix = new Float32Array(rows * columns);
    if (head < heads) matrix = plane(head);
    else for (let n = 0; n < heads; n += 1) plane(n).forEach((x, at) => (matrix[at] += x / heads));
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((step) => columns / step <= 12) ?? columns;
    const ticks = Array.from({ length: Math.floor(columns / step) + 1 }, (_, n) => [n * step, String(n * step)]);
    drawHeat($("file-heat"), { weights: matrix, rows, columns, labels, ticks, axis: "key" });
    const which = head < heads ? `head ${head}` : `the mean of ${heads} heads`;
    const more = ignored.length > 0 ? ` Not used: ${ignored.join(", ")}.` : "";
    const text = `${name}: batch entry ${entry} of ${batch}, ${which}; ${rows} query rows downwards, ${columns} keys to the right.${more}`;
    $("file-heat").setAttribute("aria-label", text);
    $("file-caption").textContent = text;
  }

  return {
    name: "file",
    async run(opened) {
      device = opened;
      return {};
    },
    redraw: draw,
    failed: (error) => ($("file-error").textContent = error.message),
  };
}

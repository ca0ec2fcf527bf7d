// Whisper's cross-attention: a picture of it, and the times of the words that follow from it.

import { verify } from "./pkg/index.js";
import { drawHeat } from "./heat.js";
import { fetched } from "./safetensors.js";

const $ = (id) => document.getElementById(id);

/** Heads of this layer that follow the sound, by the model's authors. */
const FOLLOWING = [0, 1, 2, 3, 4];
/** Start of transcript, no time stamps. */
const PROMPT = 2;

export function speech() {
  let data;
  let shown;
  let words = [];

  async function load() {
    const [tensors, transcript, exact] = await Promise.all([
      fetched("data/whisper.safetensors"),
      fetch("data/transcript.json").then((response) => response.json()),
      fetched("data/whisper-exact.safetensors"),
    ]);
    const select = $("head");
    select.append(new Option("mean of the heads that follow the sound", "mean"));
    for (let head = 0; head < 6; head += 1) select.append(new Option(`head ${head}${FOLLOWING.includes(head) ? ", follows the sound" : ""}`, String(head)));
    select.addEventListener("change", draw);
    const audio = $("audio");
    let frame;
    const follow = () => {
      light(audio.currentTime);
      frame = audio.paused ? undefined : requestAnimationFrame(follow);
    };
    audio.addEventListener("play", () => (frame ??= requestAnimationFrame(follow)));
    for (const event of ["seeked", "timeupdate", "pause"]) audio.addEventListener(event, () => light(audio.currentTime));
    $("heat").addEventListener("click", (event) => {
      const { left, inner } = shown.place;
      const at = ((event.offsetX - left) / inner) * shown.columns * 0.02;
      if (at >= 0) audio.currentTime = at;
    });
    return { tensors, transcript, exact, labels: JSON.parse(tensors.metadata.row_labels) };
  }

  async function run(device) {
    data ??= await load();
    const { tensors, transcript, exact, labels } = data;
    const options = {
      shape: { query: tensors.shape("query"), key: tensors.shape("key") },
      query: tensors.numbers("query"),
      key: tensors.numbers("key"),
      value: tensors.numbers("value"),
      scale: Number(tensors.metadata.scale),
    };
    const columns = transcript.frames_with_speech;
    const result = await device.attention({ ...options, weights: { keys: { from: 0, to: columns } } });
    const [, heads, rows] = result.weightsShape;
    const head = (n) => result.weights.subarray(n * rows * columns, (n + 1) * rows * columns);
    const stored = exact.numbers("out");
    const off = result.output.reduce((most, x, n) => Math.max(most, Math.abs(x - stored[n])), 0);
    const report = await verify(options, { output: result.output, lse: result.lse }, 64);
    const starts = warp(alignment(FOLLOWING.map(head), rows, columns), rows - PROMPT, columns);
    let at = 0;
    let worst = 0;
    words = transcript.words.map(({ word, tokens, start, end }) => {
      const from = starts[at] * transcript.seconds_per_frame;
      at += tokens.length;
      const to = starts[at] * transcript.seconds_per_frame;
      worst = Math.max(worst, Math.abs(from - start), Math.abs(to - end));
      return { word: word.trim(), from, to, start, end };
    });
    shown = { head, heads, rows, columns, labels, place: { left: 0, inner: 1 } };
    list();
    draw();
    $("speech-result").textContent =
      `The times are at most ${worst.toFixed(2)} s off those that the whole model's own method gives, which uses heads of three more layers. ` +
      `The output is at most ${off.toExponential(1)} off the exact one; ${report.rows} of ${report.allRows} rows compared with the oracle: ${report.passed ? "passed" : "failed"}.`;
    return { worst, off, passed: report.passed, words, kernel: result.kernel ?? result.plan.split("\n")[0] };
  }

  function list() {
    $("words").replaceChildren(
      ...words.flatMap(({ word, from, to }, n) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = word;
        button.title = `${from.toFixed(2)} to ${to.toFixed(2)} s`;
        button.addEventListener("click", () => {
          $("audio").currentTime = from;
          $("audio").play().catch(() => {});
        });
        return n === 0 ? [button] : [" ", button];
      }),
    );
    const cell = (text, tag = "td") => Object.assign(document.createElement(tag), { textContent: text });
    const row = (...cells) => {
      const row = document.createElement("tr");
      row.append(...cells);
      return row;
    };
    const head = row(...["word", "from", "to", "whole model from", "to"].map((text) => cell(text, "th")));
    head.childNodes.forEach((each) => each.setAttribute("scope", "col"));
    const seconds = (time) => cell(time.toFixed(2));
    $("times").replaceChildren(head, ...words.map((each) => row(cell(each.word), ...[each.from, each.to, each.start, each.end].map(seconds))));
  }

  /** The word that is spoken at a time lights up, and a line in the picture. */
  function light(time) {
    const now = words.findIndex(({ from, to }) => from <= time && time < to);
    $("words").querySelectorAll("button").forEach((button, n) => {
      button.classList.toggle("now", n === now);
      if (n === now) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    });
    draw(time);
  }

  function draw(time = $("audio").currentTime) {
    if (!shown) return;
    const { head, rows, columns, labels } = shown;
    const chosen = $("head").value;
    let weights;
    if (chosen === "mean") {
      weights = new Float32Array(rows * columns);
      for (const n of FOLLOWING) head(n).forEach((x, at) => (weights[at] += x / FOLLOWING.length));
    } else {
      weights = head(Number(chosen));
    }
    const ticks = Array.from({ length: 11 }, (_, second) => [second / 0.02, `${second} s`]);
    const mark = typeof time === "number" && time > 0 ? Math.min(time / 0.02, columns) : undefined;
    shown.place = drawHeat($("heat"), { weights, rows, columns, labels, ticks, axis: "time in the sound", mark });
    const name = chosen === "mean" ? "The mean of heads 0 to 4" : `Head ${chosen}`;
    $("heat").setAttribute("aria-label", `${name}: attention weights of ${rows} tokens over ${(columns * 0.02).toFixed(1)} seconds of sound. The times of the words stand in the table below.`);
    $("heat-caption").textContent = `${name}, layer 3: tokens downwards, time to the right; the darker (on a dark page: the lighter), the larger the weight, by its square root. Click to listen from there.`;
  }

  return { name: "speech", run, redraw: () => draw(), failed: (error) => ($("speech-result").textContent = `Failed: ${error.message}`) };
}

/** For each token of the text and the end: each frame's weights over all tokens brought to mean 0 and deviation 1, smoothed over 7
 * frames by their median, averaged over the heads; as the model's authors do. */
function alignment(heads, rows, frames) {
  const mean = new Float64Array((rows - PROMPT) * frames);
  for (const weights of heads) {
    const head = Float64Array.from(weights);
    // what lies behind the speech is left out of the softmax
    for (let i = 0; i < rows; i += 1) {
      const row = head.subarray(i * frames, (i + 1) * frames);
      const sum = row.reduce((sum, weight) => sum + weight, 0);
      row.forEach((weight, frame) => (row[frame] = weight / sum));
    }
    const normal = head.slice();
    for (let frame = 0; frame < frames; frame += 1) {
      let [sum, squares] = [0, 0];
      for (let i = 0; i < rows; i += 1) sum += head[i * frames + frame];
      const middle = sum / rows;
      for (let i = 0; i < rows; i += 1) squares += (head[i * frames + frame] - middle) ** 2;
      const deviation = Math.sqrt(squares / rows) || 1;
      for (let i = 0; i < rows; i += 1) normal[i * frames + frame] = (head[i * frames + frame] - middle) / deviation;
    }
    // the row of a token looks for the one behind it
    for (let i = PROMPT - 1; i < rows - 1; i += 1) {
      for (let frame = 0; frame < frames; frame += 1) {
        mean[(i + 1 - PROMPT) * frames + frame] += median(normal, i * frames, frame, frames) / heads.length;
      }
    }
  }
  return mean;
}

/** Of the 7 frames around one; at the ends the row is mirrored. */
function median(all, row, frame, frames) {
  const near = [];
  for (let at = frame - 3; at <= frame + 3; at += 1) {
    const inside = Math.abs(at);
    near.push(all[row + (inside < frames ? inside : 2 * (frames - 1) - inside)]);
  }
  return near.sort((a, b) => a - b)[3];
}

/** The first frame of every token, along the path with the largest sum (dynamic time warping). */
function warp(matrix, tokens, frames) {
  const width = frames + 1;
  const cost = new Float64Array((tokens + 1) * width).fill(Infinity);
  const from = new Uint8Array(cost.length);
  cost[0] = 0;
  for (let j = 1; j <= frames; j += 1) {
    for (let i = 1; i <= tokens; i += 1) {
      const before = [cost[(i - 1) * width + j - 1], cost[(i - 1) * width + j], cost[i * width + j - 1]];
      let best = 2;
      if (before[0] < before[1] && before[0] < before[2]) best = 0;
      else if (before[1] < before[0] && before[1] < before[2]) best = 1;
      cost[i * width + j] = before[best] - matrix[(i - 1) * frames + j - 1];
      from[i * width + j] = best;
    }
  }
  const starts = new Array(tokens).fill(0);
  let [i, j] = [tokens, frames];
  while (i > 0 && j > 0) {
    starts[i - 1] = j - 1;
    const step = from[i * width + j];
    if (step !== 2) i -= 1;
    if (step !== 1) j -= 1;
  }
  return starts;
}

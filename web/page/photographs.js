// LightGlue: key points of two photographs attend to each other.

import { verify } from "./pkg/index.js";
import { fetched } from "./safetensors.js";

const $ = (id) => document.getElementById(id);

/** A pair's weight there times the weight back, at least. */
const SURE = 0.1;
/** Off the true place, at most, in pixels. */
const NEAR = 3;
const GAP = 8;

const image = (src) =>
  new Promise((resolve, reject) => {
    const picture = new Image();
    picture.onload = () => resolve(picture);
    picture.onerror = () => reject(new Error(`${src} cannot be shown`));
    picture.src = src;
  });

export function photographs() {
  let data;
  let found;
  let chosen;

  async function load() {
    const [points, layer, known, left, right] = await Promise.all([
      fetched("data/keypoints.safetensors"),
      fetched("data/lightglue.safetensors"),
      fetch("data/matches.json").then((response) => response.json()),
      image("data/left.jpg"),
      image("data/right.jpg"),
    ]);
    const canvas = $("pairs");
    canvas.addEventListener("mousemove", ({ offsetX, offsetY }) => {
      const scale = canvas.width / canvas.clientWidth;
      nearest(offsetX * scale, offsetY * scale);
    });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step || !found) return;
      event.preventDefault();
      const count = found.sides[0].length / 2;
      choose(chosen === undefined ? 0 : (chosen + step + count) % count);
    });
    canvas.addEventListener("blur", () => choose(undefined));
    return { points: [points.numbers("keypoints0"), points.numbers("keypoints1")], layer, known, pictures: [left, right] };
  }

  /** How much each query looks at each key, mean over the heads; and how far the output is off the exact one. */
  async function looks(device, from, to) {
    const { layer } = data;
    const [query, key, value] = [layer.numbers(`qk${from}`), layer.numbers(`qk${to}`), layer.numbers(`v${to}`)];
    const shape = { query: layer.shape(`qk${from}`), key: layer.shape(`qk${to}`) };
    const options = { shape, query, key, value, outputElement: "f32" };
    const result = await device.attention({ ...options, weights: { reduce: "mean" } });
    const report = await verify(options, { output: result.output, lse: result.lse }, 64);
    const exact = layer.numbers(`out${from}`);
    return { weights: result.weights, passed: report.passed, off: result.output.reduce((most, x, n) => Math.max(most, Math.abs(x - exact[n])), 0) };
  }

  async function run(device) {
    data ??= await load();
    const sides = data.points;
    const [count, others] = sides.map((points) => points.length / 2);
    const [there, back] = [await looks(device, 0, 1), await looks(device, 1, 0)];
    const both = (i, j) => there.weights[i * others + j] * back.weights[j * count + i];
    const best = (n, of) => {
      let most = 0;
      for (let k = 1; k < n; k += 1) if (of(k) > of(most)) most = k;
      return most;
    };
    const pairs = [];
    for (let i = 0; i < count; i += 1) {
      const j = best(others, (j) => both(i, j));
      if (both(i, j) > SURE && best(count, (i) => both(i, j)) === i) pairs.push([i, j]);
    }
    const homography = data.known.homography_left_to_right;
    const off = ([i, j]) => {
      const [u, v, w] = homography.map((row) => row[0] * sides[0][2 * i] + row[1] * sides[0][2 * i + 1] + row[2]);
      return Math.hypot(u / w - sides[1][2 * j], v / w - sides[1][2 * j + 1]);
    };
    const near = pairs.filter((pair) => off(pair) < NEAR).length;
    const known = data.known.matches.filter(({ left, right }) => pairs.some(([i, j]) => i === left && j === right)).length;
    found = { sides, there: there.weights, others, pairs, right: new Set(pairs.filter((pair) => off(pair) < NEAR).map(([i]) => i)) };
    chosen = undefined;
    draw();
    const worst = Math.max(there.off, back.off);
    const passed = there.passed && back.passed;
    $("pairs-caption").textContent =
      `${pairs.length} pairs of ${count} and ${others} key points: ${near} within ${NEAR} pixels of the truth (solid lines), ${pairs.length - near} not (dashed). ` +
      `${known} of the ${data.known.matches.length} matches that the whole model finds four layers later are among them. ` +
      `The output is at most ${worst.toExponential(1)} off the exact one; rows compared with the oracle: ${passed ? "passed" : "failed"}.`;
    return { passed, pairs: pairs.length, near, known, off: worst, all: pairs };
  }

  function nearest(x, y) {
    if (!found) return;
    const points = found.sides[0];
    let [most, at] = [Infinity, undefined];
    for (let i = 0; i < points.length / 2; i += 1) {
      const distance = Math.hypot(points[2 * i] - x, points[2 * i + 1] - y);
      if (distance < most) [most, at] = [distance, i];
    }
    choose(most < 60 ? at : undefined);
  }

  function choose(point) {
    if (point === chosen) return;
    chosen = point;
    draw();
    if (point === undefined) {
      $("point").textContent = "No point is chosen.";
      return;
    }
    const [x, y] = [found.sides[0][2 * point], found.sides[0][2 * point + 1]].map(Math.round);
    const looked = strongest(point).map(([j, weight]) => `${j} at (${Math.round(found.sides[1][2 * j])}, ${Math.round(found.sides[1][2 * j + 1])}), ${(100 * weight).toFixed(0)} %`);
    $("point").textContent = `Point ${point} of the left photograph, at (${x}, ${y}), looks most at points of the right one: ${looked.slice(0, 3).join("; ")}.`;
  }

  /** The keys that a point looks at most, with their weights. */
  function strongest(point) {
    const row = found.there.subarray(point * found.others, (point + 1) * found.others);
    return [...row].map((weight, j) => [j, weight]).sort((a, b) => b[1] - a[1]).slice(0, 12);
  }

  function draw() {
    if (!found) return;
    const canvas = $("pairs");
    const [left, right] = data.pictures;
    const beside = left.width + GAP;
    canvas.width = beside + right.width;
    canvas.height = Math.max(left.height, right.height);
    const context = canvas.getContext("2d");
    context.drawImage(left, 0, 0);
    context.drawImage(right, beside, 0);
    const [from, to] = found.sides;
    const line = (i, j) => {
      context.beginPath();
      context.moveTo(from[2 * i], from[2 * i + 1]);
      context.lineTo(beside + to[2 * j], to[2 * j + 1]);
      context.stroke();
    };
    if (chosen === undefined) {
      context.lineWidth = 1;
      for (const [i, j] of found.pairs) {
        const good = found.right.has(i);
        context.strokeStyle = good ? "rgb(80 220 100 / 70%)" : "rgb(255 90 70)";
        context.setLineDash(good ? [] : [5, 4]);
        line(i, j);
      }
      context.setLineDash([]);
    } else {
      context.fillStyle = "rgb(0 0 0 / 45%)";
      context.fillRect(0, 0, canvas.width, canvas.height);
      for (const [j, weight] of strongest(chosen).reverse()) {
        if (weight < 0.005) continue;
        context.strokeStyle = `rgb(255 210 77 / ${Math.min(1, 0.15 + weight)})`;
        context.lineWidth = 1 + 5 * weight;
        line(chosen, j);
        context.fillStyle = "rgb(255 210 77)";
        context.beginPath();
        context.arc(beside + to[2 * j], to[2 * j + 1], 2 + 8 * Math.sqrt(weight), 0, 7);
        context.fill();
      }
      context.fillStyle = "#fff";
      context.beginPath();
      context.arc(from[2 * chosen], from[2 * chosen + 1], 5, 0, 7);
      context.fill();
    }
    context.font = "bold 14px system-ui, sans-serif";
    for (const [text, x] of [["left", 8], ["right", beside + 8]]) {
      context.fillStyle = "rgb(0 0 0 / 60%)";
      context.fillRect(x - 4, 4, context.measureText(text).width + 8, 20);
      context.fillStyle = "#fff";
      context.fillText(text, x, 19);
    }
  }

  return { name: "photographs", run, redraw: draw, failed: (error) => ($("pairs-caption").textContent = `Failed: ${error.message}`) };
}

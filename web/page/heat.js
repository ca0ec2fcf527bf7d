// A matrix of weights as a picture: a row a line, with labels on both axes.

// from light to dark on a light page and the other way round on a dark one, so that no weight looks like the paper
const LIGHT = [[247, 250, 252], [176, 205, 232], [74, 137, 196], [16, 66, 122], [6, 24, 54]];
const DARK = [[24, 30, 38], [27, 72, 122], [60, 132, 201], [158, 201, 240], [244, 249, 255]];

export const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

function colour(weight) {
  const stops = isDark() ? DARK : LIGHT;
  const at = Math.min(Math.max(weight, 0), 1) * (stops.length - 1);
  const [low, part] = [Math.min(Math.floor(at), stops.length - 2), at - Math.min(Math.floor(at), stops.length - 2)];
  return stops[low].map((from, n) => from + (stops[low + 1][n] - from) * part);
}

/** Draws `[rows, columns]` weights. Returns where the columns lie, in CSS pixels. */
export function drawHeat(canvas, { weights, rows, columns, labels, ticks, axis, mark }) {
  const width = Math.max(320, canvas.parentElement.clientWidth - 2);
  const size = Math.min(18, Math.max(3, Math.floor(620 / Math.max(rows, 1))));
  const font = Math.min(12, Math.max(8, size - 2));
  const every = Math.ceil(10 / size);
  const context = canvas.getContext("2d");
  context.font = `${font}px ui-monospace, monospace`;
  const left = 12 + Math.max(20, ...labels.map((label) => context.measureText(label).width));
  const [top, bottom, right] = [8, 36, 10];
  const [inner, tall] = [width - left - right, rows * size];
  const scale = devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = (top + tall + bottom) * scale;
  canvas.style.aspectRatio = `${width} / ${top + tall + bottom}`;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const style = getComputedStyle(document.documentElement);
  const [text, soft, back, marked] = ["--text", "--soft", "--back", "--mark"].map((name) => style.getPropertyValue(name));
  context.fillStyle = back;
  context.fillRect(0, 0, width, top + tall + bottom);
  if (rows > 0 && columns > 0) {
    const image = new ImageData(columns, rows);
    const most = weights.reduce((all, x) => Math.max(all, x), 0) || 1;
    weights.forEach((weight, n) => {
      // the root makes small weights visible; the caption says so
      image.data.set([...colour(Math.sqrt(Math.max(weight, 0) / most)), 255], 4 * n);
    });
    const small = new OffscreenCanvas(columns, rows);
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = columns > inner;
    context.drawImage(small, left, top, inner, tall);
  }
  context.font = `${font}px ui-monospace, monospace`;
  context.fillStyle = text;
  context.textAlign = "right";
  context.textBaseline = "middle";
  labels.forEach((label, row) => {
    if (row % every === 0) context.fillText(label, left - 6, top + (row + 0.5) * size);
  });
  context.textAlign = "center";
  context.textBaseline = "top";
  context.font = "11px ui-monospace, monospace";
  let free = 0;
  for (const [at, label] of ticks) {
    const x = left + (at / columns) * inner;
    const half = context.measureText(label).width / 2 + 4;
    if (x - half < free && free > 0) continue;
    free = x + half;
    context.fillStyle = soft;
    context.fillRect(x, top + tall, 1, 4);
    context.fillStyle = text;
    context.fillText(label, Math.min(x, width - right - 8), top + tall + 6);
  }
  context.fillStyle = soft;
  context.fillText(axis, left + inner / 2, top + tall + 20);
  if (mark !== undefined) {
    context.fillStyle = marked;
    context.fillRect(left + (mark / columns) * inner - 1, top, 2.5, tall);
  }
  return { left, inner };
}

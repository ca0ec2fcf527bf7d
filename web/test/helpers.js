// What the tests of the package share.

import { AttentionError } from "/pkg/index.js";

export function is(found, wanted, what = "value") {
  if (JSON.stringify(found) !== JSON.stringify(wanted)) throw new Error(`${what} is ${JSON.stringify(found)}, not ${JSON.stringify(wanted)}`);
}

export function truly(condition, what) {
  if (!condition) throw new Error(what);
}

/** A call must fail with this kind, and a sentence that has these words. */
export async function refuses(kind, words, call) {
  try {
    await call();
  } catch (error) {
    truly(error instanceof AttentionError, `no AttentionError but ${error.stack ?? error}`);
    truly(error instanceof Error && error.name === "AttentionError", "an Error");
    truly(error.kind === kind, `kind is ${error.kind}, not ${kind}: ${error.message}`);
    for (const word of [words].flat()) truly(error.message.includes(word), `${JSON.stringify(error.message)} does not say ${JSON.stringify(word)}`);
    return error;
  }
  throw new Error(`was not refused (${kind}: ${words})`);
}

/** Numbers with a spread of a few units, the same every time. */
export function numbers(length, seed = 1) {
  let state = seed >>> 0;
  return Float32Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 32 - 0.5) * 4;
  });
}

export const product = (shape) => shape.reduce((all, n) => all * n, 1);

export function half(values) {
  const bits = new Uint16Array(values.length);
  const [float, word] = [new Float32Array(1), new Uint32Array(1)];
  const view = new Uint32Array(float.buffer);
  values.forEach((value, n) => {
    float[0] = value;
    word[0] = view[0];
    const [sign, exponent, fraction] = [(word[0] >>> 16) & 0x8000, ((word[0] >>> 23) & 255) - 112, (word[0] >>> 13) & 1023];
    bits[n] = exponent <= 0 ? sign : sign | (exponent << 10) | fraction;
  });
  return bits;
}

/** The upper halves of f32. */
export const brain = (values) => Uint16Array.from(new Uint32Array(Float32Array.from(values).buffer), (bits) => bits >>> 16);

/** Numbers out of stored elements. */
export function widened(array, element = "f16") {
  if (!(array instanceof Uint16Array)) return Float32Array.from(array);
  if (element === "bf16") return new Float32Array(Uint32Array.from(array, (bits) => (bits << 16) >>> 0).buffer);
  return Float32Array.from(array, (bits) => {
    const [exponent, fraction] = [(bits >>> 10) & 31, bits & 1023];
    return (bits & 0x8000 ? -1 : 1) * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15));
  });
}

export function near(found, wanted, share, what) {
  is(found.length, wanted.length, `length of ${what}`);
  const largest = Math.max(...wanted.filter(Number.isFinite).map(Math.abs), 0);
  wanted.forEach((x, n) => truly(found[n] === x || Math.abs(found[n] - x) <= share * largest, `${what}[${n}] is ${found[n]}, not ${x}`));
}

/** A problem with its arrays. */
export function problem([batch, heads, kvHeads, queries, keys, width, valueWidth], more = {}) {
  const shape = { query: [batch, heads, queries, width], key: [batch, kvHeads, keys, width], value: [batch, kvHeads, keys, valueWidth] };
  return {
    shape,
    query: numbers(product(shape.query), 1),
    key: numbers(product(shape.key), 2),
    value: numbers(product(shape.value), 3),
    ...more,
  };
}

export const small = () => problem([2, 4, 2, 9, 21, 8, 12]);

/** Bytes of any value, and scales. */
export const bytes = (length, seed) => Int8Array.from(numbers(length, seed), (x) => Math.round(x * 63));
export const scales = (length, seed) => numbers(length, seed).map((x) => (Math.abs(x) + 0.1) / 100);

// What the package must do, in a browser. Each test is a function with a name; run() calls all of them.

import { AttentionError, fromDevice, open, verify, version, workloadInputs, workloads } from "/pkg/index.js";
import * as gradients from "./backward.js";
import { brain, bytes, half, is, near, numbers, problem, product, refuses, scales, small, truly, widened } from "./helpers.js";

const tests = {};
const notes = {};
let device;

/** The same problem in f32, with keys and values side by side, made by plain loops. */
function inPlainNumbers({ shape, element = {}, key, value, keyScale, valueScale, blockTable, query, ...rest }) {
  const of = (name) => (typeof element === "string" ? element : element[name]);
  const [batch] = shape.query;
  const [pages, heads, length] = shape.key;
  const tableLength = blockTable ? blockTable.length / batch : 1;
  const keys = shape.keys ?? tableLength * length;
  const rows = (name, data, scale, width) => {
    const [stored, factors] = [widened(data, of(name)), scale && widened(scale)];
    const block = factors && width / (factors.length / (pages * heads * length));
    const out = new Float32Array((blockTable ? batch : pages) * heads * keys * width);
    let n = 0;
    for (let b = 0; b < (blockTable ? batch : pages); b += 1) for (let h = 0; h < heads; h += 1) for (let j = 0; j < keys; j += 1) {
      const [page, token] = blockTable ? [blockTable[b * tableLength + Math.floor(j / length)], j % length] : [b, j];
      const row = (page * heads + h) * length + token;
      for (let d = 0; d < width; d += 1, n += 1) {
        out[n] = stored[row * width + d] * (factors ? factors[(row * width + d) / block | 0] : 1);
      }
    }
    return out;
  };
  const [width, valueWidth] = [shape.key[3], (shape.value ?? shape.key)[3]];
  const lay = (width) => [blockTable ? batch : pages, heads, keys, width];
  return {
    ...rest,
    shape: { query: shape.query, key: lay(width), value: lay(valueWidth), bias: shape.bias, mask: shape.mask },
    query: widened(query, of("query")),
    key: rows("key", key, keyScale, width),
    value: rows("value", value, valueScale, valueWidth),
    ...(rest.bias && { bias: widened(rest.bias, of("bias")) }),
    outputElement: undefined,
  };
}

async function right(options, on = device) {
  const result = await on.attention(options);
  const report = await verify(options, result, 1000);
  truly(report.passed, report.text);
  return result;
}

tests.opens_what_there_is_and_says_it = async () => {
  is(device.kind, "gpu");
  truly(device.software, "SwiftShader is a fallback adapter");
  truly(device.reason.includes("software driver"), device.reason);
  truly(device.name.length > 0 && device.gpuDevice instanceof GPUDevice, "a name, a device");
  is(device.caps.subgroups, false, "subgroups");
  truly(/^\d+\.\d+\.\d+$/.test(await version()), "a version");
};

tests.gives_output_lse_and_plan = async () => {
  const result = await right(small());
  truly(result.output instanceof Float32Array && result.output.length === 2 * 4 * 9 * 12, "output");
  truly(result.lse instanceof Float32Array && result.lse.length === 2 * 4 * 9, "lse");
  truly(result.plan.includes(result.kernel), result.plan);
};

tests.is_right_with_every_term = async () => {
  const base = [2, 4, 2, 9, 21, 8, 12];
  const scores = 2 * 4 * 9 * 21;
  const bits = (n, keep) => Uint8Array.from({ length: n }, (_, at) => (((at * 7919) % 13) < keep ? 1 : 0));
  const cases = {
    bias: problem(base, { bias: numbers(scores, 4) }),
    bias_broadcast: (() => { const p = problem(base, { bias: numbers(4 * 21, 4) }); p.shape.bias = [1, 4, 1, 21]; return p; })(),
    mask: problem(base, { mask: bits(scores, 9) }),
    mask_broadcast: (() => { const p = problem(base, { mask: bits(2 * 21, 9) }); p.shape.mask = [2, 1, 1, 21]; return p; })(),
    lengths: problem(base, { kvLens: [21, 3] }),
    query_lengths: problem(base, { qLens: [9, 2], kvLens: [21, 3], causal: "endOfKeys" }),
    lengths_typed: problem(base, { kvLens: Uint32Array.of(0, 20) }),
    ranges: problem(base, { rowStart: Int32Array.from({ length: 18 }, (_, n) => n % 5), rowEnd: Int32Array.from({ length: 18 }, (_, n) => n + 2) }),
    causal: problem(base, { causal: "bottomRight" }),
    causal_by_number: problem(base, { causal: 4 }),
    not_causal: problem(base, { causal: false }),
    window: problem(base, { windowLeft: 3, windowRight: 2, diagonal: "bottomRight" }),
    alibi: problem(base, { alibiSlopes: Float32Array.of(0.5, 0.25, 0.125, 0.1), diagonal: "endOfKeys" }),
    sinks: problem(base, { sinks: Float32Array.of(0, 1, -2, 3) }),
    softcap: problem(base, { softcap: 2, scale: 0.7 }),
    state: problem(base, { rowState: true }),
    probs: problem(base, { scores: "probs" }),
    no_lse: problem(base, { lse: false }),
    tokens_first: problem(base, { layout: "blhd" }),
    shared_keys: (() => { const p = problem([1, 4, 2, 9, 21, 8, 12]); p.shape.query = [3, 4, 9, 8]; p.query = numbers(3 * 4 * 9 * 8, 5); return p; })(),
    no_keys: problem([1, 2, 2, 3, 0, 4, 4]),
    no_queries: problem([1, 2, 2, 0, 3, 4, 4]),
  };
  for (const [name, options] of Object.entries(cases)) {
    for (const kernel of [undefined, "plain"]) {
      try {
        const result = await right({ ...options, kernel });
        if (name === "no_lse") is(result.lse, undefined, "lse");
        if (name === "state") truly(result.rowMax.length === 72 && result.rowSum.length === 72, "maximum and sum");
        if (name === "probs") truly(Math.abs(result.scores.slice(0, 21).reduce((a, b) => a + b) - 1) < 1e-5, "a row of probabilities");
      } catch (error) {
        throw new Error(`${name} with ${kernel ?? "the plan's kernel"}: ${error.message}`);
      }
    }
  }
};

tests.takes_f16_and_strides = async () => {
  const base = problem([1, 2, 2, 5, 33, 16, 16]);
  const options = { ...base, query: half(base.query), key: half(base.key), value: half(base.value) };
  const result = await right(options);
  truly(result.output instanceof Uint16Array, "output as the query");
  const wide = await right({ ...options, outputElement: "f32" });
  truly(wide.output instanceof Float32Array, "output as asked");
  if (typeof Float16Array !== "undefined") {
    const floats = { ...base, query: Float16Array.from(base.query), key: Float16Array.from(base.key), value: Float16Array.from(base.value) };
    truly((await device.attention(floats)).output instanceof Uint16Array, "Float16Array");
  }
  // keys and values packed in one array, [batch, keys, 2, heads, width]
  const packed = numbers(33 * 2 * 2 * 16, 7);
  const strides = [33 * 64, 16, 64, 1];
  await right({
    shape: { query: [1, 2, 5, 16], key: [1, 2, 33, 16] },
    query: base.query, key: packed, value: packed,
    layout: { key: { strides }, value: { strides, offset: 32 } },
  });
};

/** Stored formats, each by what it is in plain numbers. */
function storedProblems() {
  const base = [2, 4, 2, 9, 21, 8, 12];
  const plain = problem(base);
  const [keyRows, valueRows] = [2 * 2 * 21, 2 * 2 * 21];
  const coded = { ...plain, key: bytes(keyRows * 8, 4), value: bytes(valueRows * 12, 5) };
  // 7 pages of 8 tokens; 3 make an entry
  const paged = (more) => ({
    shape: { query: [2, 4, 9, 8], key: [7, 2, 8, 8], value: [7, 2, 8, 12] },
    query: plain.query, key: numbers(7 * 2 * 8 * 8, 6), value: numbers(7 * 2 * 8 * 12, 7),
    blockTable: Int32Array.of(5, 0, 3, 1, 6, 0), ...more,
  });
  const shaped = (options, more) => ({ ...options, shape: { ...options.shape, ...more } });
  return {
    bf16: { ...plain, element: "bf16", query: brain(plain.query), key: brain(plain.key), value: brain(plain.value) },
    bf16_to_f32: { ...plain, element: "bf16", query: brain(plain.query), key: brain(plain.key), value: brain(plain.value), outputElement: "f32" },
    f32_to_bf16: { ...plain, outputElement: "bf16" },
    f16_to_bf16: { ...plain, query: half(plain.query), key: half(plain.key), value: half(plain.value), outputElement: "bf16" },
    mixed: {
      ...plain, element: { key: "bf16", value: "f16", bias: "bf16" }, key: brain(plain.key), value: half(plain.value),
      bias: brain(numbers(2 * 4 * 9 * 21, 8)),
    },
    bytes_by_row: { ...coded, keyScale: scales(keyRows, 1), valueScale: scales(valueRows, 2) },
    bytes_by_blocks: { ...coded, keyScale: scales(keyRows * 2, 1), valueScale: half(scales(valueRows * 3, 2)) },
    bytes_by_element: { ...coded, keyScale: scales(keyRows * 8, 1), valueScale: scales(valueRows * 12, 2) },
    bytes_with_shapes: shaped(
      { ...coded, keyScale: half(scales(keyRows * 4, 1)), valueScale: scales(valueRows, 2), element: { key: "i8", keyScale: "f16" } },
      { keyScale: [2, 2, 21, 4], valueScale: [2, 2, 21, 1] },
    ),
    bytes_as_keys_alone: { ...plain, key: coded.key, keyScale: scales(keyRows, 1), softcap: 3, kvLens: [21, 4] },
    bytes_as_values_alone: { ...plain, query: half(plain.query), key: half(plain.key), value: coded.value, valueScale: scales(valueRows, 2), causal: "bottomRight" },
    pages: paged(),
    pages_in_part: shaped(paged({ kvLens: [19, 3], blockTable: Int32Array.of(5, 0, 3, 1, -1, 99), causal: "endOfKeys" }), { keys: 19 }),
    pages_with_shapes: shaped(paged({ bias: numbers(2 * 4 * 9 * 17, 9) }), { keys: 17, blockTable: [2, 3] }),
    pages_of_bf16: paged({ element: { key: "bf16", value: "bf16" }, key: brain(numbers(7 * 2 * 8 * 8, 6)), value: brain(numbers(7 * 2 * 8 * 12, 7)) }),
    pages_of_bytes: paged({
      key: bytes(7 * 2 * 8 * 8, 6), value: bytes(7 * 2 * 8 * 12, 7), keyScale: half(scales(7 * 2 * 8 * 2, 3)), valueScale: scales(7 * 2 * 8, 4),
    }),
    // one page each, of any length: which context an entry attends to
    pages_as_contexts: {
      shape: { query: [3, 2, 4, 8], key: [2, 2, 21, 8] }, query: numbers(3 * 2 * 4 * 8, 1), key: numbers(2 * 2 * 21 * 8, 2), value: numbers(2 * 2 * 21 * 8, 3),
      blockTable: Int32Array.of(1, 0, 1),
    },
  };
}

tests.stored_formats_are_right = async () => {
  const [cpu, oracle] = [await open({ prefer: "cpu" }), await open({ prefer: "oracle" })];
  for (const [name, options] of Object.entries(storedProblems())) {
    const wanted = await oracle.attention(inPlainNumbers(options));
    const asQuery = typeof options.element === "string" ? options.element : options.query instanceof Uint16Array ? "f16" : "f32";
    const element = options.outputElement ?? asQuery;
    for (const [on, kernel] of [[device], [device, "plain"], [cpu], [oracle]]) {
      try {
        const result = await right({ ...options, kernel }, on);
        is(result.output instanceof Uint16Array, element !== "f32", "bits");
        near(widened(result.output, element), wanted.output, element === "f32" ? 1e-5 : element === "f16" ? 1e-3 : 5e-3, "output");
        near(result.lse, wanted.lse, 1e-5, "lse");
      } catch (error) {
        throw new Error(`${name} on the ${on.kind} with ${kernel ?? "the plan's kernel"}: ${error.message}`);
      }
    }
  }
  // heads within tokens, for scales as for bytes
  const swapped = (array, [batch, heads, length, width]) => array.map((_, n) => {
    const [d, h, j, b] = [n % width, Math.floor(n / width) % heads, Math.floor(n / width / heads) % length, Math.floor(n / width / heads / length)];
    return array[((b * heads + h) * length + j) * width + d];
  });
  const options = storedProblems().bytes_by_blocks;
  const by = { query: 8, key: 8, value: 12, keyScale: 2, valueScale: 3 };
  const tokensFirst = { ...options, layout: "blhd" };
  for (const [name, width] of Object.entries(by)) {
    tokensFirst[name] = swapped(options[name], name === "query" ? options.shape.query : [2, 2, 21, width]);
  }
  const [one, other] = [await oracle.attention(options), await right(tokensFirst)];
  near(other.output, swapped(one.output, [2, 4, 9, 12]), 1e-5, "output of heads within tokens");
  // a scale for all rows, by strides of 0
  const { shape, ...data } = options;
  await right({
    ...data, keyScale: Float32Array.of(0.01), valueScale: new Float32Array(2 * 2 * 21).fill(0.02), shape: { ...shape, keyScale: [2, 2, 21, 1] },
    layout: { keyScale: { strides: [0, 0, 0, 0] } },
  });
  // the same bits are f16 where nothing is said, and a Float16Array is nothing else
  const { element, ...bits } = storedProblems().bf16;
  const read = await right(bits);
  truly(read.output.some((x, n) => x !== brain(one.output)[n]) && (await right({ ...bits, element: "f16" })).output.every((x, n) => x === read.output[n]), "f16 by default");
  if (typeof Float16Array !== "undefined") {
    const floats = { ...bits, query: Float16Array.from(widened(bits.query)) };
    is([...(await right(floats)).output], [...read.output], "output");
    await refuses("input", "query holds f16, element says bf16", () => device.attention({ ...floats, element }));
  }
  cpu.free();
  oracle.free();
};

tests.stored_formats_are_prepared = async () => {
  for (const name of ["bf16", "mixed", "bytes_by_blocks", "pages_of_bytes", "pages_in_part"]) {
    const { shape, query, key, value, element, layout, outputElement, causal, ...data } = storedProblems()[name];
    const typeOf = (array) => (array instanceof Float32Array ? "f32" : array instanceof Int8Array ? "i8" : "f16");
    const of = (tensor, array) => (typeof element === "string" ? element : element?.[tensor]) ?? typeOf(array);
    const announced = { shape: { ...shape }, element: { query: of("query", query), key: of("key", key), value: of("value", value) }, causal };
    for (const term of Object.keys(data)) announced[term] = ["bias", "keyScale", "valueScale"].includes(term) ? of(term, data[term]) : true;
    for (const [term, rows] of [["keyScale", shape.key], ["valueScale", shape.value]]) {
      if (data[term]) announced.shape[term] = [...rows.slice(0, 3), data[term].length / product(rows.slice(0, 3))];
    }
    if (data.blockTable && !shape.keys) announced.shape.blockTable = [2, 3];
    truly(device.explain(announced).includes("kernel"), "a plan");
    const prepared = await device.prepare(announced);
    const wanted = await device.attention({ ...storedProblems()[name], kernel: prepared.kernel });
    const found = await prepared.run({ query, key, value, ...data });
    is([...found.output], [...wanted.output], `output of ${name}`);
    is([...found.lse], [...wanted.lse], `lse of ${name}`);
    // and from tensors
    const tensors = {};
    for (const [tensor, array] of Object.entries({ query, key, value, ...data })) {
      const type = array instanceof Uint16Array ? of(tensor, array) : undefined;
      tensors[tensor] = device.tensor(Array.isArray(array) ? Uint32Array.from(array) : array, { element: type });
      if (type) is(tensors[tensor].element, type, "element");
      is([...(await tensors[tensor].read())], [...array], "what was written");
    }
    const bound = prepared.bind(tensors);
    await bound.run();
    is(bound.output.element, announced.element.query, "element of the output");
    is([...(await bound.output.read())], [...wanted.output], `output of ${name}, bound`);
    if (name === "bf16") {
      const other = device.tensor(query);
      await refuses("input", "query is a tensor of f16, this attention was prepared for bf16", () => prepared.bind({ ...tensors, query: other }));
      await refuses("input", "the array holds f32, the tensor bf16", () => tensors.query.write(new Float32Array(query.length)));
      tensors.query.write(query);
      other.free();
    }
    if (name === "bytes_by_blocks") {
      const { keyScale, ...less } = tensors;
      await refuses("buffer", "key_scale", () => prepared.bind(less));
      await refuses("input", "key_scale is missing", () => prepared.run({ query, key, value, valueScale: data.valueScale }));
      await refuses("input", "key holds f32, the spec says i8", () => prepared.run({ query, key: Float32Array.from(key), value, ...data }));
      is(keyScale.element, "f32", "element");
    }
    bound.free();
    prepared.free();
    for (const tensor of Object.values(tensors)) tensor.free();
  }
  const { shape } = small();
  const prepare = (more) => () => device.explain({ shape, ...more });
  await refuses("option", "shape.keyScale is missing", prepare({ element: { key: "i8" }, keyScale: "f32" }));
  await refuses("option", "keyScale must be \"f32\" or \"f16\"", prepare({ element: { key: "i8" }, keyScale: "bf16" }));
  await refuses("option", "bias must be", prepare({ bias: "i8" }));
  await refuses("option", "blockTable must be true or false", prepare({ blockTable: new Int32Array(4) }));
  await refuses("option", "shape.blockTable is missing", prepare({ blockTable: true }));
  await refuses("input", "bias is announced as f16, element.bias says bf16", prepare({ bias: "f16", element: { bias: "bf16" } }));
  await refuses("option", "element.bias is given, bias is not", prepare({ element: { bias: "bf16" } }));
  await refuses("problem", "key holds i8 and needs key_scale", prepare({ element: { key: "i8" } }));
};

tests.bad_stored_formats_are_refused = async () => {
  const { bytes_by_blocks: coded, pages, bf16, mixed } = storedProblems();
  const call = (options, more = {}, shape = {}) => () => device.attention({ ...options, ...more, shape: { ...options.shape, ...shape } });
  await refuses("problem", ["key holds i8 and needs key_scale", "blocks"], call(coded, { keyScale: undefined }));
  await refuses("problem", ["value holds i8 and needs value_scale"], call(coded, { valueScale: undefined }));
  await refuses("problem", "key_scale is given, but key holds f32", call(coded, { key: numbers(coded.key.length) }));
  await refuses("input", ["keyScale has 85 elements", "84 rows of key"], call(coded, { keyScale: scales(85) }));
  await refuses("input", ["valueScale has 0 elements", "84 rows of value"], call(coded, { valueScale: new Float32Array(0) }));
  await refuses("problem", "key_scale has 3 blocks a row, which does not divide the width of 8", call(coded, { keyScale: scales(84 * 3) }));
  await refuses("problem", "key_scale has 3 blocks a row", call(coded, { keyScale: scales(84 * 3) }, { keyScale: [2, 2, 21, 3] }));
  await refuses("problem", "key_scale has shape", call(coded, {}, { keyScale: [2, 2, 42, 1] }));
  await refuses("input", "key_scale has 168 elements, its layout reaches over 336", call(coded, {}, { keyScale: [2, 2, 21, 4] }));
  await refuses("input", "keyScale has 168 elements, its shape has 84", call(coded, {}, { keyScale: [2, 2, 21, 1] }));
  await refuses("option", "shape.keyScale is missing; where the scales have a layout", call(coded, { layout: { keyScale: "blhd" } }));
  await refuses("option", "shape.keyScale is given, keyScale is not", call(pages, {}, { keyScale: [7, 2, 8, 1] }));
  await refuses("problem", "key_scale holds i8, needs f32 or f16", call(coded, { keyScale: bytes(84) }));
  await refuses("problem", "key_scale holds bf16, needs f32 or f16", call(coded, { keyScale: brain(scales(84)), element: { keyScale: "bf16" } }));
  await refuses("problem", "query holds i8", call(small(), { query: bytes(576) }));
  await refuses("problem", "bias holds i8", call(small(), { bias: bytes(2 * 4 * 9 * 21) }));
  await refuses("option", "outputElement must be \"f32\", \"f16\" or \"bf16\"", call(small(), { outputElement: "i8" }));
  await refuses("option", ["element must be", "an object", "f64"], call(small(), { element: "f64" }));
  await refuses("option", "element.key must be", call(small(), { element: { key: "f64" } }));
  await refuses("option", "element has no field \"mask\"", call(small(), { element: { mask: "f32" } }));
  await refuses("option", "element.keyScale is given, keyScale is not", call(small(), { element: { keyScale: "f32" } }));
  await refuses("input", "query holds f32, element says bf16", call(small(), { element: "bf16" }));
  await refuses("input", "key holds i8, element says bf16", call(bf16, { key: coded.key }));
  await refuses("input", "key holds f16 or bf16, element.key says i8", call(mixed, { element: { key: "i8" } }));
  await refuses("option", ["bias is a Uint16Array", "say of each"], call(bf16, { bias: mixed.bias }));
  await refuses("option", ["key must be a Float32Array", "Int8Array", "Uint8Array"], call(coded, { key: new Uint8Array(coded.key) }));

  await refuses("input", ["block_table[1][2] is 7", "7 pages"], call(pages, { blockTable: Int32Array.of(5, 0, 3, 1, 6, 7) }));
  await refuses("input", ["block_table[0][0] is -1", "7 pages"], call(pages, { blockTable: Int32Array.of(-1, 0, 3, 1, 6, 0) }));
  await refuses("input", ["blockTable has 5 elements", "2 entries of the batch"], call(pages, { blockTable: Int32Array.of(5, 0, 3, 1, 6) }));
  await refuses("option", "blockTable must be an Int32Array", call(pages, { blockTable: [5, 0, 3, 1, 6, 0] }));
  await refuses("problem", "does not reach over kv_len 25", call(pages, {}, { keys: 25 }));
  await refuses("option", "shape.keys is given, blockTable is not", call(small(), {}, { keys: 21 }));
  await refuses("option", "shape.blockTable is given, blockTable is not", call(small(), {}, { blockTable: [2, 1] }));
  await refuses("option", "shape.blockTable has 3 rows", call(pages, {}, { blockTable: [3, 2] }));
  await refuses("option", "shape.blockTable must be an array of two", call(pages, {}, { blockTable: 3 }));
  await refuses("input", "block_table has 6 elements, needs 4", call(pages, {}, { blockTable: [2, 2] }));
  await refuses("problem", "page_len is 7", call(pages, {}, { key: [8, 2, 7, 8], value: [8, 2, 7, 12] }));
  await refuses("problem", "value has shape", call(pages, {}, { value: [6, 2, 8, 12] }));

  await refuses("option", "the options of tensor has no field", () => device.tensor(new Uint16Array(4), { type: "bf16" }));
  await refuses("input", "the array holds f16 or bf16, element says i8", () => device.tensor(new Uint16Array(4), { element: "i8" }));
  await refuses("option", "element must be one of", () => device.tensor(new Uint16Array(4), { element: "half" }));
  await refuses("option", "has no field \"element\"", () => device.tensor({ length: 4 }, { element: "i8" }));
  const context = (more) => () => device.context({ key: numbers(64), value: numbers(64), shape: [1, 1, 2, 32], ...more });
  await refuses("option", ["key must be", "Int8Array", "int8"], context({ key: bytes(64) }));
  await refuses("option", ["storage must be", "bf16", "i8"], context({ storage: "i8" }));
  await refuses("context", ["value[3] is NaN", "int8"], context({ storage: "int8", value: numbers(64).fill(NaN, 3, 4) }));
  await refuses("input", "key holds f32, element says bf16", context({ element: "bf16" }));
};

tests.the_cpu_and_the_oracle_agree = async () => {
  for (const prefer of ["cpu", "oracle"]) {
    const other = await open({ prefer });
    is(other.kind, prefer);
    const options = problem([2, 4, 2, 9, 21, 8, 12], { kvLens: [21, 3], causal: "bottomRight" });
    await right(options, other);
    await refuses("input", "needs a GPU", () => other.tensor(new Float32Array(4)));
    other.free();
    await refuses("freed", "freed", () => other.attention(options));
  }
};

tests.random_problems_are_right = async () => {
  let state = 12345;
  const below = (n) => ((state = (Math.imul(state, 1103515245) + 12345) >>> 0), (state >>> 8) % n);
  for (let n = 0; n < 24; n += 1) {
    const kvHeads = 1 + below(3);
    const dims = [1 + below(2), kvHeads * (1 + below(3)), kvHeads, below(40), below(150), 1 + below(40), 1 + below(40)];
    const options = problem(dims);
    const [batch, heads, , queries, keys] = dims;
    if (below(3) === 0) options.kvLens = Array.from({ length: batch }, () => below(keys + 1));
    if (below(3) === 0) options.mask = Uint8Array.from({ length: batch * heads * queries * keys }, () => below(4) && 1);
    if (below(3) === 0) options.bias = numbers(batch * heads * queries * keys, n);
    if (below(3) === 0) options.causal = ["topLeft", "bottomRight", "endOfKeys", below(9) - 4][below(4)];
    if (below(4) === 0) options.windowLeft = below(20);
    if (below(4) === 0) options.softcap = 1 + below(5);
    if (below(4) === 0) options.sinks = numbers(heads, n + 50);
    if (below(3) === 0) options.layout = "blhd";
    try {
      await right(options);
    } catch (error) {
      throw new Error(`problem ${n}, ${JSON.stringify(dims)}, ${Object.keys(options)}: ${error.message}`);
    }
  }
};

tests.prepared_calls_give_the_same = async () => {
  const options = problem([2, 4, 2, 9, 21, 8, 12], { kvLens: [21, 3], mask: new Uint8Array(2 * 4 * 9 * 21).fill(1) });
  const { query, key, value, kvLens, mask, shape } = options;
  const prepared = await device.prepare({ shape, kvLens: true, mask: true });
  truly(prepared.plan.includes(prepared.kernel), prepared.plan);
  const wanted = await device.attention({ ...options, kernel: prepared.kernel });
  const found = await prepared.run({ query, key, value, kvLens, mask });
  is([...found.output], [...wanted.output], "output");
  is([...found.lse], [...wanted.lse], "lse");
  await refuses("input", "kv_lens is missing", () => prepared.run({ query, key, value, mask }));
  await refuses("option", "no field", () => prepared.run({ query, key, value, kvLens, mask, causal: 1 }));
  prepared.free();
  await refuses("freed", "freed", () => prepared.run({ query, key, value, kvLens, mask }));
};

tests.tensors_stay_on_the_gpu = async () => {
  const options = small();
  const [query, key, value] = ["query", "key", "value"].map((name) => device.tensor(options[name]));
  is([...(await query.read())], [...options.query], "what was written");
  const prepared = await device.prepare({ shape: options.shape });
  const bound = prepared.bind({ query, key, value });
  await bound.run();
  const wanted = await device.attention({ ...options, kernel: prepared.kernel });
  is([...(await bound.output.read())], [...wanted.output], "output");
  is([...(await bound.lse.read())], [...wanted.lse], "lse");
  // new data in place, and the output of the caller's own buffer
  const gpu = device.gpuDevice;
  const own = gpu.createBuffer({ size: 4096 + wanted.output.byteLength, usage: GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC });
  const output = device.tensorFrom(own, { length: wanted.output.length, offset: 4096 });
  const doubled = options.value.map((x) => 2 * x);
  value.write(doubled);
  const again = prepared.bind({ query, key, value, output });
  // between the caller's own commands
  const encoder = gpu.createCommandEncoder();
  again.encode(encoder);
  gpu.queue.submit([encoder.finish()]);
  const found = await output.read();
  wanted.output.forEach((x, n) => truly(Math.abs(found[n] - 2 * x) < 1e-5, `output[${n}] is ${found[n]}, not ${2 * x}`));
  await refuses("buffer", "is written to the buffer", () => prepared.bind({ query, key, value, output: value }));
  await refuses("option", "query is missing", () => prepared.bind({ key, value }));
  await refuses("input", "must be a tensor", () => prepared.bind({ query: options.query, key, value }));
  await refuses("buffer", "needs", () => prepared.bind({ query: key, key: device.tensor(new Float32Array(4)), value }));
  await refuses("input", "21", () => value.write(new Float32Array(21)));
  await refuses("input", "holds u32", () => value.write(new Uint32Array(value.length)));
  await refuses("buffer", "offset must be", () => device.tensorFrom(own, { offset: own.size, length: 0 }));
  await refuses("buffer", "offset must be", () => device.tensorFrom(own, { offset: 2 }));
  await refuses("buffer", "multiple of", () => prepared.bind({ query, key, value, output: device.tensorFrom(own, { offset: 4, length: wanted.output.length }) }));
  await refuses("buffer", "ends at byte", () => device.tensorFrom(own, { length: own.size }));
  await refuses("input", "no tensor is made of", () => device.tensor(new Float64Array(4)));
  const before = device.memory().buffers;
  again.free();
  bound.free();
  prepared.free();
  for (const tensor of [query, key, value]) tensor.free();
  truly(device.memory().buffers < before, "buffers are given back");
  await refuses("freed", "freed", () => query.read());
  own.destroy();
};

tests.a_prepared_call_costs_little = async () => {
  const options = problem([1, 8, 8, 1, 64, 64, 64]);
  const [query, key, value] = ["query", "key", "value"].map((name) => device.tensor(options[name]));
  const prepared = await device.prepare({ shape: options.shape });
  const bound = prepared.bind({ query, key, value });
  const times = [];
  for (let n = 0; n < 200; n += 1) {
    const start = performance.now();
    const running = bound.run();
    times.push(performance.now() - start);
    await running;
    if (n % 20 === 19) await device.gpuDevice.queue.onSubmittedWorkDone();
  }
  const encode = [];
  for (let n = 0; n < 50; n += 1) {
    const encoder = device.gpuDevice.createCommandEncoder();
    const start = performance.now();
    bound.encode(encoder);
    encode.push(performance.now() - start);
    device.gpuDevice.queue.submit([encoder.finish()]);
  }
  await device.gpuDevice.queue.onSubmittedWorkDone();
  const mean = (list) => list.reduce((a, b) => a + b) / list.length;
  notes.prepared_call_ms = mean(times);
  notes.encode_ms = mean(encode);
  bound.free();
  prepared.free();
  for (const tensor of [query, key, value]) tensor.free();
  const median = times.sort((a, b) => a - b)[100];
  truly(median < 0.2, `a prepared call takes ${median} ms of JavaScript and wasm`);
};

tests.shares_a_device_of_the_callers = async () => {
  const adapter = await navigator.gpu.requestAdapter();
  const own = await adapter.requestDevice();
  let uncaptured = 0;
  own.onuncapturederror = () => (uncaptured += 1);
  const handler = own.onuncapturederror;
  const gpu = navigator.gpu;
  const shared = await fromDevice(own);
  truly(navigator.gpu === gpu && !Object.hasOwn(navigator, "gpu"), "navigator.gpu is as before");
  is(shared.gpuDevice === own, true, "the same device");
  await right(small(), shared);
  truly(own.onuncapturederror === handler, "the caller's handler stays");
  const foreign = device.tensor(new Float32Array(8));
  const prepared = await shared.prepare({ shape: { query: [1, 1, 1, 8], key: [1, 1, 1, 8] } });
  await refuses("input", "another device", () => prepared.bind({ query: foreign, key: foreign, value: foreign }));
  foreign.free();
  shared.free();
  is(shared.memory(), { buffers: 0, bytes: 0 }, "held after free");
  const buffer = own.createBuffer({ size: 16, usage: GPUBufferUsage.COPY_DST });
  own.queue.writeBuffer(buffer, 0, new Float32Array(4));
  await own.queue.onSubmittedWorkDone();
  is(uncaptured, 0, "errors on the caller's device");
  await refuses("option", "needs a GPUDevice", () => fromDevice({}));
  own.destroy();
};

tests.contexts_are_stored_once = async () => {
  const key = numbers(3 * 2 * 7 * 32, 1);
  const value = numbers(3 * 2 * 7 * 32, 2);
  const query = numbers(4 * 4 * 5 * 32, 3);
  const off = { f32: 1e-5, f16: 5e-3, bf16: 3e-2, q8_0: 0.05, int8: 0.05 };
  for (const [storage, most] of Object.entries(off)) {
    const before = device.memory().buffers;
    const context = await device.context({ key, value, shape: [3, 2, 7, 32], storage, kvLens: [7, 4, 1] });
    const index = [2, 0, 0, 1];
    const once = await context.attend({ query, shape: [4, 4, 5, 32], contextIndex: index });
    const held = device.memory().buffers;
    const twice = await context.attend({ query, shape: [4, 4, 5, 32], contextIndex: index });
    is(device.memory().buffers, held, "a second call holds no more");
    is([...twice.output], [...once.output], "the same bits");
    const part = (array, n) => array.subarray((n * array.length) / 3, ((n + 1) * array.length) / 3);
    for (const [entry, n] of index.entries()) {
      const plain = await device.attention({
        shape: { query: [1, 4, 5, 32], key: [1, 2, 7, 32] },
        query: query.subarray(entry * 640, (entry + 1) * 640), key: part(key, n), value: part(value, n), kvLens: [[7, 4, 1][n]],
      });
      plain.output.forEach((x, at) => truly(Math.abs(once.output[entry * 640 + at] - x) < most, `${storage}, entry ${entry}: ${once.output[entry * 640 + at]}, not ${x}`));
    }
    await refuses("context", "3", () => context.attend({ query, shape: [4, 4, 5, 32], contextIndex: [0, 1, 2, 3] }));
    context.free();
    is(device.memory().buffers, before, "buffers after free");
    await refuses("freed", "freed", () => context.attend({ query, shape: [4, 4, 5, 32], contextIndex: index }));
  }
  // what is stored as bf16 is bf16 again, and a query may be as well
  const shape = [3, 2, 7, 32];
  const halves = await device.context({ key: brain(key), value: brain(value), element: "bf16", shape, storage: "bf16" });
  is(halves.bytes, 2 * 3 * 1024, "bytes");
  const found = await halves.attend({ query: brain(query), element: "bf16", outputElement: "f32", shape: [4, 4, 5, 32], contextIndex: [1, 1, 1, 1] });
  const same = await device.attention({
    shape: { query: [4, 4, 5, 32], key: [1, 2, 7, 32] }, query: widened(brain(query), "bf16"),
    key: widened(brain(key), "bf16").slice(448, 896), value: widened(brain(value), "bf16").slice(448, 896),
  });
  near(found.output, same.output, 1e-5, "output");
  halves.free();
  const narrow = await device.context({ key: numbers(24), value: numbers(24), shape: [1, 1, 1, 24], storage: "int8" });
  truly(narrow.bytes < 24 * 4 * 2 + 1024, "a byte an element");
  narrow.free();
  await refuses("context", "multiple", () => device.context({ key: numbers(24), value: numbers(24), shape: [1, 1, 1, 24], storage: "q8_0" }));
};

tests.selected_weights = async () => {
  const options = small();
  const all = await right({ ...options, scores: "probs" });
  const at = (b, h, i, j) => all.scores[((b * 4 + h) * 9 + i) * 21 + j];
  for (const on of [device, await open({ prefer: "cpu" })]) {
    const some = await on.attention({ ...options, weights: { heads: [3, 0], rows: { from: 2, to: 4 }, keys: Uint32Array.of(20, 1, 5) } });
    is(some.weightsShape, [2, 2, 2, 3]);
    let n = 0;
    for (const b of [0, 1]) for (const h of [3, 0]) for (const i of [2, 3]) for (const j of [20, 1, 5]) {
      truly(Math.abs(some.weights[n] - at(b, h, i, j)) < 1e-5, `weight ${n}`);
      n += 1;
    }
    const mass = await on.attention({ ...options, weights: { reduce: "mean", segments: [[0, 21], [3, 3]] } });
    is(mass.weightsShape, [2, 1, 9, 2]);
    for (let row = 0; row < 18; row += 1) {
      truly(Math.abs(mass.weights[2 * row] - 1) < 1e-5 && mass.weights[2 * row + 1] === 0, "the mass of all keys, and of none");
    }
    is((await on.attention({ ...options, weights: true })).weightsShape, [2, 4, 9, 21]);
    await refuses("weights", "heads[0] is 4", () => on.attention({ ...options, weights: { heads: [4] } }));
    await refuses("option", "keys and segments", () => on.attention({ ...options, weights: { keys: [1], segments: [[0, 1]] } }));
    await refuses("option", "weights has no field", () => on.attention({ ...options, weights: { head: [1] } }));
    if (on !== device) on.free();
  }
};

tests.explains = async () => {
  const text = device.explain({ shape: { query: [1, 8, 4096, 40], key: [1, 8, 77, 40] } });
  truly(text.includes("kernel"), text);
  truly(text.includes("wgpu does not reach the subgroups of browsers"), `subgroups are spoken of: ${text}`);
  const forced = device.explain({ shape: { query: [1, 8, 4096, 40], key: [1, 8, 77, 40] }, kernel: "plain" });
  truly(forced.includes("plain"), forced);
  await refuses("plan", "subgroups", () => device.explain({ shape: { query: [1, 8, 4096, 40], key: [1, 8, 77, 40] }, kernel: "rows" }));
  await refuses("kernel", "does not run on", () => device.explain({ shape: { query: [1, 8, 4, 40], key: [1, 8, 77, 40] }, kernel: "cpu_fused" }));
  await refuses("option", "data comes with the call", () => device.explain(small()));
  await refuses("option", "asked for with attention", () => device.prepare({ shape: small().shape, weights: true }));
  await refuses("option", "mask must be true or false", () => device.prepare({ shape: small().shape, mask: new Uint8Array(4) }));
  await refuses("kernel", "there is no kernel", () => device.explain({ shape: { query: [1, 8, 4, 40], key: [1, 8, 77, 40] }, kernel: "fast" }));
};

tests.bad_input_is_refused = async () => {
  const ok = small();
  const with_ = (more) => () => device.attention({ ...ok, ...more });
  const shaped = (more) => () => device.attention({ ...ok, shape: { ...ok.shape, ...more } });
  await refuses("input", ["query has 3 elements", "576"], with_({ query: new Float32Array(3) }));
  await refuses("input", ["query has 577 elements", "its shape has 576"], with_({ query: new Float32Array(577) }));
  await refuses("option", ["query must be a Float32Array", "Float64Array"], with_({ query: new Float64Array(576) }));
  await refuses("option", ["key must be a Float32Array", "array of"], with_({ key: Array.from(ok.key) }));
  await refuses("option", "value is missing", with_({ value: undefined }));
  await refuses("option", "mask must be a Uint8Array", with_({ mask: [true] }));
  await refuses("input", "mask has 2 elements", with_({ mask: new Uint8Array(2) }));
  await refuses("option", "rowStart and rowEnd", with_({ rowStart: new Int32Array(18) }));
  await refuses("option", "rowEnd must be an Int32Array", with_({ rowStart: new Int32Array(18), rowEnd: new Float32Array(18) }));
  await refuses("input", "kv_lens[1] is 22, the sequence has 21 tokens", with_({ kvLens: [1, 22] }));
  await refuses("option", "kvLens must be", with_({ kvLens: [1, -1] }));
  await refuses("option", "kvLens must be", with_({ kvLens: [1, 0.5] }));
  await refuses("input", "kv_lens has 3 elements, needs 2", with_({ kvLens: [1, 1, 1] }));
  for (const query of [[2, 4, 9], [2, 4, 9, 8, 1], [2, 4, 9, "8"], [2, 4, 9, -8], [2, 4, 9, 0.5], [2, 4, 9, NaN], [2, 4, 9, 2 ** 32], "2,4,9,8", 5, {}]) {
    await refuses("option", "shape.query must be an array of four whole numbers", shaped({ query }));
  }
  await refuses("option", "shape.key is missing", shaped({ key: undefined }));
  await refuses("option", "shape is missing", with_({ shape: undefined }));
  await refuses("option", "shape has no field \"queries\"", shaped({ queries: 1 }));
  await refuses("problem", "key has shape", shaped({ key: [2, 2, 21, 9] }));
  await refuses("problem", "does not divide", () => device.attention(problem([1, 4, 3, 2, 2, 4, 4])));
  await refuses("problem", "head_dim is 0", shaped({ query: [2, 4, 9, 0] }));
  await refuses("problem", "larger than memory", shaped({ query: [65535, 4, 65535, 8], key: [65535, 2, 21, 8], value: [65535, 2, 21, 12] }));
  await refuses("problem", "softcap", with_({ softcap: 0 }));
  await refuses("problem", "scale", with_({ scale: NaN }));
  await refuses("option", "scale must be a number", with_({ scale: "1" }));
  await refuses("option", ["causal must be", "true"], with_({ causal: true }));
  await refuses("option", "causal must be", with_({ causal: "bottom_right" }));
  await refuses("option", "windowLeft must be", with_({ windowLeft: -1 }));
  await refuses("option", ["no field \"casual\"", "causal"], with_({ casual: "topLeft" }));
  await refuses("option", "shape.bias is given, bias is not", shaped({ bias: [1, 1, 1, 1] }));
  await refuses("option", "layout must be", with_({ layout: "lbhd" }));
  await refuses("option", "layout has no field", with_({ layout: { keys: "bhld" } }));
  await refuses("option", "lse must be true or false", with_({ lse: 1 }));
  await refuses("option", "scores:", with_({ scores: "all" }));
  await refuses("input", "element says f16", with_({ element: "f16" }));
  await refuses("option", "the options must be an object", () => device.attention(5));
  await refuses("option", "the options must be an object", () => device.attention());
  await refuses("option", "the options must be an object", () => device.attention([ok]));
  await refuses("option", "prefer must be one of", () => open({ prefer: "tpu" }));
  await refuses("option", "no field", () => open({ preferred: "gpu" }));
  await refuses("option", "powerPreference must be one of", () => open({ powerPreference: "high" }));
  await refuses("option", "must be an object", () => open("gpu"));
  await refuses("option", "there is no workload", () => workloadInputs("none"));
  await refuses("buffer", "more than the", () => device.tensor({ length: 2 ** 40 }));
  await refuses("option", "length must be", () => device.tensor({ length: -1 }));
  await refuses("option", "element must be", () => device.tensor({ length: 1, element: "f64" }));
};

tests.memory_beyond_4_gb_is_an_error = async () => {
  const cpu = await open({ prefer: "cpu" });
  // a result of 3.2 GB from inputs of a few bytes, by strides of 0
  const strides = [0, 0, 0, 1];
  const options = {
    shape: { query: [1, 200, 1000, 1], key: [1, 1, 1, 1], value: [1, 1, 1, 4000] },
    query: new Float32Array(1), key: new Float32Array(1), value: new Float32Array(4000), layout: { query: { strides } },
  };
  await refuses("memory", "bytes", () => cpu.attention(options));
  await right(small(), cpu);
  cpu.free();
};

tests.two_calls_at_once = async () => {
  const [one, two] = [small(), problem([1, 2, 1, 30, 50, 16, 16], { causal: "bottomRight" })];
  const alone = [await device.attention(one), await device.attention(two)];
  const together = await Promise.all([one, two, one, two, one, two].map((options) => device.attention(options)));
  together.forEach(({ output }, n) => is([...output], [...alone[n % 2].output], "output"));
};

tests.nothing_leaks = async () => {
  const options = small();
  await device.attention(options);
  const before = device.memory();
  for (let n = 0; n < 20; n += 1) await device.attention({ ...options, weights: n % 2 ? { heads: [1] } : undefined });
  await Promise.all(Array.from({ length: 8 }, () => device.attention(options)));
  for (let n = 0; n < 5; n += 1) await refuses("input", "kv_lens", () => device.attention({ ...options, kvLens: [99, 1] }));
  const prepared = await device.prepare({ shape: options.shape });
  for (let n = 0; n < 5; n += 1) await prepared.run({ query: options.query, key: options.key, value: options.value });
  prepared.free();
  prepared.free();
  is(device.memory(), before, "held after all");
  const other = await open();
  await other.attention(options);
  other.free();
  other.free();
  is(other.memory(), { buffers: 0, bytes: 0 }, "held after free");
};

tests.a_lost_device_is_told = async () => {
  const options = problem([1, 8, 8, 256, 512, 32, 32]);
  const other = await open();
  const prepared = await other.prepare({ shape: options.shape });
  const call = other.attention(options);
  const failing = refuses("deviceLost", "the device was lost", () => call);
  other.gpuDevice.destroy();
  await failing;
  is(other.alive, false, "alive");
  await refuses("deviceLost", "open a new one", () => other.attention(options));
  await refuses("deviceLost", "lost", () => prepared.run(options));
  await refuses("deviceLost", "lost", () => other.tensor(new Float32Array(4)));
  prepared.free();
  other.free();
  await right(small());
};

tests.freeing_ends_what_runs = async () => {
  const other = await open();
  const call = refuses("freed", "freed", () => other.attention(small()));
  other.free();
  await call;
};

tests.without_webgpu_the_cpu_computes = async () => {
  Object.defineProperty(navigator, "gpu", { value: undefined, configurable: true });
  try {
    const other = await open({ prefer: "gpu" });
    is(other.kind, "cpu");
    truly(other.reason.includes("no WebGPU"), other.reason);
    await right(small(), other);
    other.free();
    await refuses("noAdapter", ["no WebGPU", "required"], () => open({ required: true }));
    Object.defineProperty(navigator, "gpu", { value: { requestAdapter: async () => null }, configurable: true });
    const none = await open();
    truly(none.kind === "cpu" && none.reason.includes("no adapter"), none.reason);
    none.free();
  } finally {
    delete navigator.gpu;
  }
};

tests.auto_prefers_the_cpu_to_a_software_driver = async () => {
  const other = await open({ prefer: "auto" });
  is(other.kind, "cpu");
  truly(other.reason.includes("software driver"), other.reason);
  other.free();
};

tests.works_in_a_worker = async () => {
  const options = small();
  const wanted = await device.attention(options);
  for (const prefer of ["gpu", "cpu"]) {
    const worker = new Worker("/test/worker.js", { type: "module" });
    const found = await new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => resolve(data);
      worker.onerror = (event) => reject(new Error(event.message));
      worker.postMessage({ prefer, options });
    });
    worker.terminate();
    is(found.error, undefined, "error");
    is(found.kind, prefer);
    wanted.output.forEach((x, n) => truly(Math.abs(found.output[n] - x) < 1e-5, `output[${n}]`));
  }
};

tests.a_closed_worker_stops_its_calls = async () => {
  // as a page that is closed while a call runs: the device of this page is not affected
  const worker = new Worker("/test/worker.js", { type: "module" });
  worker.postMessage({ prefer: "gpu", options: problem([1, 8, 8, 256, 512, 32, 32]) });
  await new Promise((resolve) => setTimeout(resolve, 200));
  worker.terminate();
  await right(small());
};

tests.workloads_are_those_of_the_program = async () => {
  const all = await workloads();
  truly(all.length > 20 && all[0].name === "sd15_64" && all[0].shape.query.length === 4, "the list");
  const { query, key, value, flops } = await workloadInputs("sam_token_to_image");
  const { shape } = all.find(({ name }) => name === "sam_token_to_image");
  is([query.length, key.length, value.length], [product(shape.query), product(shape.key), product(shape.value)]);
  is(flops, 2 * 8 * 7 * 4096 * 32);
  await right({ shape, query, key, value });
  const wrong = await device.attention({ shape, query, key, value });
  wrong.output[0] += 1;
  is((await verify({ shape, query, key, value }, wrong)).passed, false, "a wrong result");
};

tests.the_cpu_is_vectorised = async () => {
  const cpu = await open({ prefer: "cpu" });
  const options = problem([1, 8, 8, 4096, 77, 40, 40]);
  const prepared = await cpu.prepare({ shape: options.shape });
  const arrays = { query: options.query, key: options.key, value: options.value };
  const times = [];
  for (let n = 0; n < 4; n += 1) {
    const start = performance.now();
    await prepared.run(arrays);
    times.push(performance.now() - start);
  }
  notes.cpu_sd15_64_ms = Math.min(...times);
  prepared.free();
  cpu.free();
};

export async function run() {
  const only = new URLSearchParams(location.search).get("only");
  const passed = [];
  const failed = [];
  const seconds = {};
  const start = performance.now();
  globalThis.progress = "opening";
  device = await open();
  const opened = performance.now();
  await device.attention(small());
  notes.open_ms = opened - start;
  notes.first_attention_ms = performance.now() - start;
  for (const [name, test] of [...Object.entries(tests), ...Object.entries(gradients.tests)]) {
    if (only && !name.includes(only)) continue;
    const began = performance.now();
    globalThis.progress = name;
    try {
      await test(device);
      passed.push(name);
    } catch (error) {
      failed.push(`${name}: ${error.stack ?? error}`);
    }
    seconds[name] = (performance.now() - began) / 1000;
  }
  if (notes.first_attention_ms > 3000) failed.push(`the first attention took ${notes.first_attention_ms} ms from loading on, more than 3 s`);
  return { passed, failed, notes, seconds };
}

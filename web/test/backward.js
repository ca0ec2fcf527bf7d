// What gradients of the package must be, in a browser. package.js runs these tests with its own.

import { fetched } from "/page/safetensors.js";
import { open, verifyBackward } from "/pkg/index.js";
import { brain, bytes, half, is, near, numbers, problem, refuses, scales, small, truly, widened } from "./helpers.js";

export const tests = {};

const GRADIENTS = ["dQuery", "dKey", "dValue", "dBias", "dAlibiSlopes", "dSinks", "dScale"];
/**
 * Files of gradients that others computed, all of which the CPU has, and a software driver one in so many, for each compiles shaders of its own.
 * It computes the biases' gradients of 3 and 6, whose true values are 0, a little beyond the stated bounds, and so it does outside of browsers.
 */
const [GOLDEN, EVERY] = [31, 8];

const arrays = ({ query, key, value }) => ({ query, key, value });
const bits = (gradients) => GRADIENTS.flatMap((name) => {
  const found = gradients[name] ?? [];
  return typeof found === "number" ? [found] : [...found];
});

function same(first, second) {
  const [one, other] = [bits(first), bits(second)];
  truly(one.length === other.length && one.every((x, n) => Object.is(x, other[n])), "another call gives other bits");
}

/** A call of gradients: the options, behind the device's own forward. */
async function behindForward(on, { wants, gradientElement, dOutput, dLse, dWeights, weights, element, layout, ...rest }) {
  const less = (names) => (given) => given && typeof given === "object" ? Object.fromEntries(Object.entries(given).filter(([name]) => !names.includes(name))) : given;
  const attention = { ...rest, element: less(["dOutput"])(element), layout: less(["dOutput", ...GRADIENTS])(layout), rowState: true };
  const forward = await on.attention(attention);
  return { ...rest, wants, gradientElement, dOutput, dLse, dWeights, weights, element, layout, forward };
}

/** Gradients within the oracle's bounds, the same twice. */
async function right(on, options) {
  const call = await behindForward(on, options);
  const [first, second] = [await on.backward(call), await on.backward(call)];
  is(Object.keys(first).sort(), [...(call.wants ?? GRADIENTS.slice(0, 3)), "kernel", "plan"].sort(), "what is there");
  same(first, second);
  const report = await verifyBackward(call, first);
  truly(report.passed && report.elements > 0, report.text);
  return first;
}

const diagonal = (text) => (text.startsWith("fixed:") ? Number(text.slice(6)) : text.replace(/_(\w)/g, (_, letter) => letter.toUpperCase()));

/** Gradients of a file within the bounds that it states. */
async function golden(on, n) {
  const file = await fetched(`/golden/backward/case${String(n).padStart(2, "0")}.safetensors`);
  const { metadata } = file;
  const given = (name, read) => (file.has(name) ? read(name) : undefined);
  const number = (name) => (metadata[name] === undefined ? undefined : Number(metadata[name]));
  const counts = (name) => given(name, file.counts);
  const positions = (name) => given(name, (name) => new Int32Array(file.counts(name).buffer));
  const shape = {};
  for (const name of ["query", "key", "value", "bias", "mask"]) if (file.has(name)) shape[name] = file.shape(name);
  const options = {
    shape,
    query: file.numbers("query"), key: file.numbers("key"), value: file.numbers("value"), bias: given("bias", file.numbers), mask: given("mask", file.bytes),
    kvLens: counts("kv_lens"), rowStart: positions("row_start"), rowEnd: positions("row_end"),
    alibiSlopes: given("alibi_slopes", file.numbers), sinks: given("sinks", file.numbers),
    scale: number("scale"), softcap: number("softcap"), windowLeft: number("window_left"), windowRight: number("window_right"),
    causal: metadata.causal && diagonal(metadata.causal), diagonal: metadata.offset && diagonal(metadata.offset),
    dOutput: file.numbers("d_output"), dLse: given("d_lse", file.numbers),
    wants: GRADIENTS.filter((name) => file.has(`expected_${snake(name)}`)),
  };
  const call = await behindForward(on, options);
  const [found, again] = [await on.backward(call), await on.backward(call)];
  same(found, again);
  for (const name of options.wants) {
    const [wanted, bound] = [file.numbers(`expected_${snake(name)}`), Number(metadata[`bound_${snake(name)}`])];
    is(found[name].length, wanted.length, `length of ${name}`);
    wanted.forEach((x, at) => {
      const error = Math.abs(found[name][at] - x);
      truly(error <= bound, `${name}[${at}] is ${found[name][at]}, not ${x}: off by ${error}, allowed ${bound}`);
    });
  }
  return options.wants.length;
}

const snake = (name) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);

tests.gradients_are_those_of_others = async (device) => {
  const cpu = await open({ prefer: "cpu" });
  let compared = 0;
  for (let n = 0; n < GOLDEN; n += 1) {
    for (const on of n % EVERY === 0 ? [device, cpu] : [cpu]) {
      try {
        compared += await golden(on, n);
      } catch (error) {
        throw new Error(`case ${n} on the ${on.kind}: ${error.message}`);
      }
    }
  }
  truly(compared > 3 * GOLDEN, `${compared} gradients were compared`);
  cpu.free();
};

/** Problems with gradients, each with something that the files do not have. */
function problems() {
  const base = [2, 4, 2, 9, 21, 8, 12];
  const plain = problem(base, { dOutput: numbers(2 * 4 * 9 * 12, 9) });
  const [rows, scores] = [2 * 4 * 9, 2 * 4 * 9 * 21];
  const shared = problem([1, 4, 2, 9, 21, 8, 12], { query: numbers(3 * 4 * 9 * 8, 1), dOutput: numbers(3 * 4 * 9 * 12, 9) });
  shared.shape.query = [3, 4, 9, 8];
  return {
    every_term: {
      ...plain, bias: numbers(scores, 4), mask: Uint8Array.from({ length: scores }, (_, n) => (n * 7919) % 13 < 9), qLens: [9, 4], kvLens: [21, 5],
      causal: "endOfKeys", windowLeft: 15, alibiSlopes: numbers(8, 5), sinks: numbers(4, 6), softcap: 3, scale: 0.4, dLse: numbers(rows, 7), wants: GRADIENTS,
    },
    of_chosen_weights: {
      ...plain, wants: ["dQuery", "dScale"], dOutput: new Float32Array(2 * 4 * 9 * 12), dWeights: numbers(2 * 9 * 2, 8),
      weights: { reduce: "mean", segments: [[0, 4], [3, 21]] },
    },
    of_few_weights: { ...plain, dWeights: numbers(2 * 2 * 3 * 2, 8), weights: { heads: [3, 0], rows: { from: 2, to: 5 }, keys: Uint32Array.of(20, 1) } },
    halves: {
      ...plain, query: half(plain.query), key: half(plain.key), value: half(plain.value), dOutput: half(plain.dOutput), gradientElement: "f16",
    },
    bf16: {
      ...plain, element: { query: "bf16", key: "bf16", value: "f16", dOutput: "bf16" }, query: brain(plain.query), key: brain(plain.key),
      value: half(plain.value), dOutput: brain(plain.dOutput), outputElement: "f32", gradientElement: { dKey: "bf16", dValue: "f32" },
    },
    // bits of dOutput are of the output's type
    all_bf16: { ...plain, element: "bf16", query: brain(plain.query), key: brain(plain.key), value: brain(plain.value), dOutput: brain(plain.dOutput) },
    tokens_first: { ...plain, layout: "blhd", bias: numbers(4 * 21, 4), shape: { ...plain.shape, bias: [1, 4, 1, 21] }, wants: ["dKey", "dBias"] },
    strides: { ...plain, layout: { dOutput: "blhd", dQuery: { strides: [4 * 9 * 16, 9 * 16, 16, 1], offset: 8 }, dValue: "blhd" } },
    shared_keys: { ...shared, wants: ["dKey", "dValue"] },
    bytes: {
      ...plain, key: bytes(84 * 8, 4), value: bytes(84 * 12, 5), keyScale: scales(84 * 2, 1), valueScale: scales(84, 2), wants: ["dQuery", "dScale"],
    },
    pages: {
      shape: { query: [2, 4, 9, 8], key: [7, 2, 8, 8], value: [7, 2, 8, 12], keys: 21 }, query: plain.query, key: numbers(7 * 2 * 8 * 8, 6),
      value: numbers(7 * 2 * 8 * 12, 7), blockTable: Int32Array.of(5, 0, 3, 1, 6, 0), sinks: numbers(4, 6), dOutput: plain.dOutput, wants: ["dQuery", "dSinks"],
    },
    no_keys: problem([1, 2, 2, 3, 0, 4, 4], { dOutput: numbers(24, 9) }),
  };
}

tests.gradients_are_within_the_oracles_bounds = async (device) => {
  const [cpu, oracle] = [await open({ prefer: "cpu" }), await open({ prefer: "oracle" })];
  for (const [name, options] of Object.entries(problems())) {
    let wanted;
    for (const on of [oracle, cpu, device]) {
      try {
        const found = await right(on, options);
        wanted ??= found;
        // a saved output of 16 bits is rounded this way or that
        if (options.element === "bf16" || name === "halves") continue;
        for (const [gradient, array] of Object.entries(found).filter(([, array]) => ArrayBuffer.isView(array))) {
          const said = options.gradientElement?.[gradient] ?? options.gradientElement;
          const element = typeof said === "string" ? said : "f32";
          is(array instanceof Uint16Array, element !== "f32", `bits of ${gradient}`);
          near(widened(array, element), widened(wanted[gradient], element), element === "f32" ? 1e-4 : 1e-2, gradient);
        }
      } catch (error) {
        throw new Error(`${name} on the ${on.kind}: ${error.message}`);
      }
    }
  }
  const call = await behindForward(cpu, problems().every_term);
  const found = await cpu.backward(call);
  for (const name of call.wants) {
    const wrong = { ...found, [name]: name === "dScale" ? found.dScale * 1.01 : found[name].map((x, n) => (n === 1 ? x + 0.1 : x)) };
    is((await verifyBackward(call, wrong)).passed, false, `a wrong ${name}`);
  }
  await refuses("input", "d_bias", () => verifyBackward(call, { ...found, dBias: undefined }));
  cpu.free();
  oracle.free();
};

tests.gradients_guide_queries_to_a_word = async (device) => {
  const options = small();
  const weights = { reduce: "mean", segments: [[2, 4]] };
  const masses = [];
  for (let step = 0; step < 8; step += 1) {
    const forward = await device.attention({ ...options, weights, rowState: true });
    masses.push(forward.weights.reduce((sum, x) => sum + x) / forward.weights.length);
    const [dWeights, dOutput] = [new Float32Array(forward.weights.length).fill(1), new Float32Array(forward.output.length)];
    const { dQuery } = await device.backward({ ...options, forward, dOutput, weights, dWeights, wants: ["dQuery"] });
    options.query = options.query.map((x, n) => x + 4 * dQuery[n]);
  }
  truly(masses.every((mass, n) => n === 0 || mass > masses[n - 1]) && masses[7] > 2 * masses[0], `masses ${masses}`);
};

tests.a_step_against_the_gradients_lowers_the_loss = async (device) => {
  const options = { ...small(), rowState: true };
  const target = numbers(2 * 4 * 9 * 12, 20);
  const loss = (output) => output.reduce((sum, x, n) => sum + 0.5 * (x - target[n]) ** 2, 0);
  const forward = await device.attention(options);
  const dOutput = forward.output.map((x, n) => x - target[n]);
  const gradients = await device.backward({ ...options, forward, dOutput });
  const [step, moved] = [1e-3, { ...options }];
  let fall = 0;
  for (const [name, gradient] of [["query", "dQuery"], ["key", "dKey"], ["value", "dValue"]]) {
    moved[name] = options[name].map((x, n) => x - step * gradients[gradient][n]);
    fall += step * gradients[gradient].reduce((sum, x) => sum + x * x, 0);
  }
  const before = loss(forward.output);
  const found = before - loss((await device.attention(moved)).output);
  truly(Math.abs(found - fall) < 0.05 * fall, `the loss of ${before} falls by ${found}, not by ${fall}`);
};

tests.gradients_are_prepared_and_stay_on_the_gpu = async (device) => {
  const options = small();
  const { shape } = options;
  const kvLens = Uint32Array.of(21, 4);
  const weights = { reduce: "sum", segments: [[0, 5]] };
  const data = { dOutput: numbers(864, 9), dLse: numbers(72, 7), dWeights: numbers(18, 8) };
  const announced = { shape, kvLens: true, dLse: true, weights, wants: ["dQuery", "dValue", "dSinks", "dScale"], sinks: true };
  const sinks = numbers(4, 6);
  const inputs = { ...arrays(options), kvLens, sinks };
  const attention = await device.prepare({ shape, kvLens: true, sinks: true, rowState: true });
  const backward = await device.prepareBackward(announced);
  is(backward.plan, device.explainBackward(announced), "the plan");
  const forward = await attention.run(inputs);
  const wanted = await device.backward({ shape, ...inputs, ...data, weights, wants: announced.wants, forward });
  is([wanted.kernel, wanted.plan], [backward.kernel, backward.plan], "kernel and plan");
  for (const n of [1, 2]) is(bits(await backward.run({ ...inputs, ...data, forward })), bits(wanted), `gradients of run ${n}`);
  await refuses("input", "d_lse is missing", () => backward.run({ ...inputs, ...data, dLse: undefined, forward }));
  await refuses("option", "the arrays has no field \"causal\"", () => backward.run({ ...inputs, ...data, forward, causal: 1 }));

  // both in one encoder of the caller's
  const tensors = Object.fromEntries(Object.entries({ ...inputs, ...data }).map(([name, array]) => [name, device.tensor(array)]));
  const { dOutput, dLse, dWeights, ...given } = tensors;
  const before = device.memory();
  const first = attention.bind(given);
  const gpu = device.gpuDevice;
  const own = gpu.createBuffer({ size: 1024 + 576 * 4, usage: GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC });
  const dQuery = device.tensorFrom(own, { offset: 1024, length: 576 });
  const saved = { output: first.output, rowState: first.lse };
  const second = backward.bind({ ...tensors, ...saved, dQuery });
  truly(second.dQuery === dQuery && second.dKey === undefined && second.output === undefined, "what is written");
  for (const n of [1, 2]) {
    const encoder = gpu.createCommandEncoder();
    first.encode(encoder);
    second.encode(encoder);
    gpu.queue.submit([encoder.finish()]);
    const found = {};
    for (const name of announced.wants) found[name] = await second[name].read();
    found.dScale = found.dScale[0];
    is(bits(found), bits(wanted), `gradients of encoding ${n}`);
  }
  // another gradient in place
  dOutput.write(data.dOutput.map((x) => 2 * x));
  await second.run();
  near(await second.dValue.read(), wanted.dValue.map((x) => 2 * x), 1e-5, "dValue of twice the gradient");
  await refuses("buffer", "is written to the buffer", () => backward.bind({ ...tensors, ...saved, dValue: tensors.value }));
  await refuses("buffer", "is written to the buffer", () => backward.bind({ ...tensors, ...saved, dQuery: second.dValue, dValue: second.dValue }));
  await refuses("buffer", "d_lse", () => backward.bind({ ...given, dOutput, dWeights, ...saved }));
  await refuses("buffer", "d_key", () => backward.bind({ ...tensors, ...saved, dKey: second.dValue }));
  await refuses("option", "rowState is missing", () => backward.bind({ ...tensors, output: first.output }));
  await refuses("buffer", "row_state", () => backward.bind({ ...tensors, ...saved, rowState: dLse }));
  await refuses("option", "no field \"lse\"", () => backward.bind({ ...tensors, ...saved, lse: first.lse }));
  await refuses("input", "dOutput must be a tensor", () => backward.bind({ ...tensors, ...saved, dOutput: data.dOutput }));
  const bits16 = device.tensor({ element: "f16", length: 864 });
  await refuses("input", "dOutput is a tensor of f16, this attention was prepared for f32", () => backward.bind({ ...tensors, ...saved, dOutput: bits16 }));
  bits16.free();
  first.free();
  second.free();
  is(device.memory(), before, "what was made for it is given back");
  await refuses("freed", "freed", () => second.run());
  attention.free();
  backward.free();
  await refuses("freed", "freed", () => backward.run({ ...inputs, ...data, forward }));
  for (const tensor of Object.values(tensors)) tensor.free();
  own.destroy();

  const cpu = await open({ prefer: "cpu" });
  const there = await cpu.prepareBackward(announced);
  is(there.plan, cpu.explainBackward(announced), "the plan on the CPU");
  truly(there.kernel === "cpu_backward" && there.plan.includes("threads"), there.plan);
  near((await there.run({ ...inputs, ...data, forward })).dQuery, wanted.dQuery, 1e-4, "dQuery on the CPU");
  await refuses("input", "on a GPU only", () => there.bind({}));
  there.free();
  cpu.free();
};

tests.bad_gradients_are_refused = async (device) => {
  const options = { ...small(), dOutput: numbers(864, 9) };
  const call = await behindForward(device, options);
  const { forward } = call;
  const with_ = (more) => () => device.backward({ ...call, ...more });
  const state = { ...forward, rowMax: undefined };
  await refuses("option", ["forward is missing", "attention()", "rowState: true"], with_({ forward: undefined }));
  await refuses("option", ["forward.rowMax is missing", "rowState is true"], with_({ forward: state }));
  await refuses("option", "forward.rowSum is missing", with_({ forward: { ...forward, rowSum: undefined } }));
  await refuses("option", "forward.output is missing", with_({ forward: { ...forward, output: undefined } }));
  await refuses("option", "forward has no field \"out\"", with_({ forward: { ...forward, out: 1 } }));
  await refuses("option", "forward must be an object", with_({ forward: 5 }));
  await refuses("input", "row_max has 71 elements", with_({ forward: { ...forward, rowMax: forward.rowMax.slice(1) } }));
  await refuses("input", "output has 863 elements", with_({ forward: { ...forward, output: forward.output.slice(1) } }));
  await refuses("input", "forward.output has 865 elements, its shape has 864", with_({ forward: { ...forward, output: new Float32Array(865) } }));
  await refuses("input", "output holds f16, the spec says f32", with_({ forward: { ...forward, output: half(forward.output) } }));
  await refuses("option", ["dOutput is missing", "all zeros"], with_({ dOutput: undefined }));
  await refuses("input", "d_output has 863 elements", with_({ dOutput: new Float32Array(863) }));
  await refuses("input", "dOutput has 865 elements, its shape has 864", with_({ dOutput: new Float32Array(865) }));
  await refuses("option", "dOutput must be a Float32Array", with_({ dOutput: [...options.dOutput] }));
  await refuses("backward", "d_output holds i8, needs f32, f16 or bf16", with_({ dOutput: new Int8Array(864) }));
  await refuses("input", "dOutput holds f32, element.dOutput says bf16", with_({ element: { dOutput: "bf16" } }));
  await refuses("input", "d_lse has 3 elements, needs 72", with_({ dLse: new Float32Array(3) }));
  await refuses("option", "dLse must be a Float32Array", with_({ dLse: true }));
  await refuses("option", ["wants must be an array", "dAlibiSlopes", "\"query\""], with_({ wants: ["query"] }));
  await refuses("option", "wants must be an array", with_({ wants: [] }));
  await refuses("option", "wants must be an array", with_({ wants: "dQuery" }));
  for (const [want, input] of [["dBias", "bias"], ["dAlibiSlopes", "alibi_slopes"], ["dSinks", "sinks"]]) {
    await refuses("backward", [`${snake(want)} is asked for`, `no ${input}`], with_({ wants: [want] }));
  }
  await refuses("option", "gradientElement must be", with_({ gradientElement: "i8" }));
  await refuses("option", "gradientElement has no field \"dSinks\"", with_({ gradientElement: { dSinks: "f16" } }));
  await refuses("option", "gradientElement.dBias is given, dBias is not asked for", with_({ gradientElement: { dBias: "f16" } }));
  await refuses("option", "layout.dKey is given, dKey is not asked for", with_({ layout: { dKey: "blhd" }, wants: ["dQuery"] }));
  await refuses("option", "layout has no field \"dScale\"", with_({ layout: { dScale: "blhd" } }));
  await refuses("backward", ["d_query", "share a place"], with_({ layout: { dQuery: { strides: [0, 0, 0, 1] } } }));
  await refuses("option", ["weights is missing", "dWeights"], with_({ dWeights: new Float32Array(4) }));
  await refuses("option", ["dWeights is missing", "weights"], with_({ weights: true }));
  await refuses("input", "d_weights has 4 elements", with_({ weights: true, dWeights: new Float32Array(4) }));
  await refuses("weights", "heads[0] is 4", with_({ weights: { heads: [4] }, dWeights: new Float32Array(4) }));
  await refuses("backward", "whose gradient cannot be given", with_({ scores: "probs" }));
  await refuses("option", "kernel cannot be chosen for gradients", with_({ kernel: "plain" }));
  await refuses("option", "no field \"dQuery\"", with_({ dQuery: new Float32Array(576) }));
  await refuses("option", "key is missing", with_({ key: undefined }));
  await refuses("input", "key has 3 elements", with_({ key: new Float32Array(3) }));
  await refuses("problem", "softcap", with_({ softcap: 0 }));
  await refuses("option", "the options must be an object", () => device.backward());
  const { bytes: coded, pages } = problems();
  for (const [stored, how] of [[coded, "in signed bytes"], [pages, "in pages"]]) {
    const made = await behindForward(device, stored);
    await refuses("backward", ["d_key is asked for", how, "can be had"], () => device.backward({ ...made, wants: ["dQuery", "dKey"] }));
    await refuses("backward", ["d_key is asked for", how], () => device.backward({ ...made, wants: undefined }));
  }
  // what is of gradients is of no attention
  await refuses("option", "no field \"dOutput\"", () => device.attention(options));
  await refuses("option", "layout has no field \"dQuery\"", () => device.attention({ ...small(), layout: { dQuery: "bhld" } }));
  await refuses("option", "element has no field \"dOutput\"", () => device.attention({ ...small(), element: { dOutput: "f16" } }));
  const prepare = (more) => () => device.prepareBackward({ shape: options.shape, ...more });
  await refuses("option", "data comes with the call", prepare({ dOutput: options.dOutput }));
  await refuses("option", "data comes with the call", prepare({ forward }));
  await refuses("option", "dLse must be true or false", prepare({ dLse: new Float32Array(72) }));
  await refuses("backward", "d_bias is asked for", prepare({ wants: ["dBias"] }));
  await refuses("backward", "d_sinks is asked for", () => device.explainBackward({ shape: options.shape, wants: ["dSinks"] }));
};

tests.gradients_leak_nothing = async (device) => {
  const call = await behindForward(device, { ...small(), dOutput: numbers(864, 9) });
  await device.backward(call);
  const before = device.memory();
  for (let n = 0; n < 10; n += 1) await device.backward(call);
  await Promise.all(Array.from({ length: 4 }, () => device.backward(call)));
  await refuses("input", "d_output", () => device.backward({ ...call, dOutput: new Float32Array(3) }));
  const { forward, dOutput } = call;
  const prepared = await device.prepareBackward({ shape: call.shape, wants: ["dQuery", "dScale"] });
  truly(device.memory().bytes > before.bytes, "a workspace is held");
  for (let n = 0; n < 3; n += 1) await prepared.run({ ...arrays(call), forward, dOutput });
  prepared.free();
  is(device.memory(), before, "held after all");
  const other = await open();
  const running = refuses("freed", "freed", () => other.backward(call));
  other.free();
  await running;
  is(other.memory(), { buffers: 0, bytes: 0 }, "held after free");
  const lost = await open();
  const failing = refuses("deviceLost", "the device was lost", () => lost.backward(call));
  lost.gpuDevice.destroy();
  await failing;
  lost.free();
};

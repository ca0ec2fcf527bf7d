// Attention in the browser, on WebGPU where there is any and on the CPU where there is none.
// The types of everything stand in index.d.ts, the rest in README.md.

import init, * as wasm from "./cross_attention_web.js";
import { INTERNAL, Ledger } from "./ledger.js";

/** Every error that the package gives. `kind` tells programs what `message` tells people. */
export class AttentionError extends Error {
  constructor(kind, message, options) {
    super(message, options);
    this.name = "AttentionError";
    this.kind = kind;
  }
}

const DATA = [
  "query", "key", "value", "keyScale", "valueScale", "blockTable", "bias", "mask", "qLens", "kvLens", "rowStart", "rowEnd", "alibiSlopes", "sinks",
];
const GRADIENTS = ["dQuery", "dKey", "dValue", "dBias", "dAlibiSlopes", "dSinks", "dScale"];
const TENSOR_USAGE = 0x80 | 0x08 | 0x04; // STORAGE, COPY_DST, COPY_SRC
const SIZES = { f32: 4, f16: 2, bf16: 2, i8: 1, u32: 4, i32: 4, u8: 1 };
/** What is read back; bits where there is no array of such numbers. */
const ARRAYS = { f32: Float32Array, f16: Uint16Array, bf16: Uint16Array, i8: Int8Array, u32: Uint32Array, i32: Int32Array, u8: Uint8Array };
/** Tensors that are of one type always. */
const ALWAYS = {
  mask: "u8", qLens: "u32", kvLens: "u32", rowStart: "i32", rowEnd: "i32", blockTable: "i32", alibiSlopes: "f32", sinks: "f32", lse: "f32", scores: "f32",
  rowState: "f32", dLse: "f32", dWeights: "f32", dAlibiSlopes: "f32", dSinks: "f32", dScale: "f32",
};

let loading;
/** Why wasm can no longer be used, if so. */
let broken;
/** Calls that wait: should wasm stop, each is told. */
const waiting = new Set();

function load(source) {
  const module_or_path = source ?? new URL("./cross_attention_web_bg.wasm", import.meta.url);
  loading ??= init({ module_or_path }).then(
    () => {
      wasm.on_panic((message) => stop(message));
      // memory that cannot be had ends wasm without a panic
      globalThis.addEventListener?.("error", ({ error }) => {
        const inside = error instanceof WebAssembly.RuntimeError || (error instanceof RangeError && /wasm/.test(error.stack));
        if (inside && waiting.size > 0) stop(error.message);
      });
    },
    (error) => {
      loading = undefined;
      throw new AttentionError("load", `the WebAssembly of cross-attention could not be loaded: ${error.message}`, { cause: error });
    },
  );
  return loading;
}

function stop(message) {
  broken = new AttentionError("internal", `cross-attention stopped inside: ${message}; the page must be loaded again`);
  for (const call of waiting) call.fail(broken);
  waiting.clear();
}

/** The error of the package that an error from wasm or the browser is. */
function translated(error) {
  if (error instanceof AttentionError) return error;
  if (error instanceof WebAssembly.RuntimeError) {
    if (!broken) stop(error.message);
    return broken;
  }
  if (error instanceof RangeError) {
    return new AttentionError("memory", `the browser has no room for this: ${error.message}`, { cause: error });
  }
  if (error?.kind !== undefined) {
    const kind = error.message.includes(INTERNAL) ? "internal" : error.kind;
    return new AttentionError(kind, error.message);
  }
  return new AttentionError("other", String(error?.message ?? error), { cause: error });
}

function guarded(work) {
  if (broken) throw broken;
  try {
    return work();
  } catch (error) {
    throw translated(error);
  }
}

function only(options, what, known) {
  if (typeof options !== "object" || options === null || Array.isArray(options)) {
    throw new AttentionError("option", `${what} must be an object`);
  }
  for (const name of Object.keys(options)) {
    if (!known.includes(name)) {
      throw new AttentionError("option", `${what} has no field ${JSON.stringify(name)}; possible: ${known.join(", ")}`);
    }
  }
}

function oneOf(value, what, possible) {
  if (!possible.includes(value)) {
    throw new AttentionError("option", `${what} must be one of ${possible.join(", ")}, found ${JSON.stringify(value) ?? String(value)}`);
  }
}

/** Opens a device. */
export async function open(options = {}) {
  only(options, "the options of open", ["prefer", "powerPreference", "required", "wasm"]);
  const { prefer = "gpu", powerPreference, required = false, wasm: source } = options;
  oneOf(prefer, "prefer", ["gpu", "auto", "cpu", "oracle"]);
  if (powerPreference !== undefined) oneOf(powerPreference, "powerPreference", ["low-power", "high-performance"]);
  oneOf(required, "required", [true, false]);
  await load(source);
  if (broken) throw broken;
  if (prefer === "cpu" || prefer === "oracle") return Device.host(prefer, "asked for by name");

  const instead = (why) => {
    if (required) throw new AttentionError("noAdapter", `${why}; needs a GPU, as required says`);
    return Device.host("cpu", why);
  };
  const gpu = globalThis.navigator?.gpu;
  if (!gpu) {
    const insecure = globalThis.isSecureContext === false ? " (the page is not a secure context: https or localhost)" : "";
    return instead(`this browser has no WebGPU${insecure}`);
  }
  const adapter = await gpu.requestAdapter({ powerPreference });
  if (!adapter) return instead("this browser has WebGPU, and no adapter for it");
  const info = adapterInfo(adapter.info, adapter.isFallbackAdapter);
  if (prefer === "auto" && info.isFallbackAdapter) {
    return instead(`the only adapter is ${info.description}, a software driver, which is slower than the CPU path`);
  }
  const limits = {};
  for (const name of [
    "maxBufferSize", "maxStorageBufferBindingSize", "maxStorageBuffersPerShaderStage", "maxComputeWorkgroupStorageSize",
    "maxComputeInvocationsPerWorkgroup", "maxComputeWorkgroupSizeX", "maxComputeWorkgroupSizeY", "maxComputeWorkgroupsPerDimension",
  ]) {
    if (adapter.limits[name] !== undefined) limits[name] = adapter.limits[name];
  }
  const features = ["shader-f16", "timestamp-query"].filter((feature) => adapter.features.has(feature));
  let device;
  try {
    device = await adapter.requestDevice({ label: "cross-attention", requiredFeatures: features, requiredLimits: limits });
  } catch (error) {
    return instead(`the adapter ${info.description} gave no device: ${error.message}`);
  }
  const preferred = powerPreference ? `, preferring ${powerPreference}` : "";
  const reason = info.isFallbackAdapter
    ? "the browser's fallback adapter, a software driver: its times say nothing about a GPU"
    : `the adapter that the browser gave${preferred}`;
  return Device.gpu(device, info, reason, true);
}

/** Computes on a device of the caller's, between the caller's own work on the same queue. */
export async function fromDevice(gpuDevice, options = {}) {
  only(options, "the options of fromDevice", ["wasm"]);
  if (typeof GPUDevice === "undefined" || !(gpuDevice instanceof GPUDevice)) {
    throw new AttentionError("option", "fromDevice needs a GPUDevice");
  }
  await load(options.wasm);
  if (broken) throw broken;
  const info = adapterInfo(gpuDevice.adapterInfo, false);
  return Device.gpu(gpuDevice, info, "a device of the caller's", false);
}

/** What is known of an adapter; browsers keep most of it to themselves. */
function adapterInfo(info, fallback) {
  const { vendor = "", architecture = "", device = "", description = "" } = info ?? {};
  const words = [vendor, architecture, device].filter((word) => word !== "").join(" ");
  return {
    vendor,
    architecture,
    device,
    description: description || words || "an adapter without a name",
    isFallbackAdapter: info?.isFallbackAdapter ?? fallback ?? false,
    subgroupMinSize: info?.subgroupMinSize ?? 0,
    subgroupMaxSize: info?.subgroupMaxSize ?? 0,
  };
}

/** wgpu takes no GPUDevice, but asks `navigator.gpu` for one: while it looks there, that is what it finds. */
function begin(ledger, device, info) {
  const facade = ledger.facade(device, info);
  const adapter = { features: device.features, limits: device.limits, info, requestDevice: async () => facade };
  const languages = globalThis.navigator.gpu?.wgslLanguageFeatures ?? new Set();
  const gpu = { requestAdapter: async () => adapter, wgslLanguageFeatures: languages };
  const before = Object.getOwnPropertyDescriptor(globalThis.navigator, "gpu");
  Object.defineProperty(globalThis.navigator, "gpu", { value: gpu, configurable: true });
  let opening;
  try {
    opening = wasm.begin(ledger);
    return opening.open(ledger.deviceOwner);
  } finally {
    if (before) Object.defineProperty(globalThis.navigator, "gpu", before);
    else delete globalThis.navigator.gpu;
  }
}

/** What everything that is made on a device shares. */
class Shared {
  constructor(kind, ledger, gpuDevice) {
    this.kind = kind;
    this.ledger = ledger;
    this.gpuDevice = gpuDevice;
    this.lost = undefined;
    this.freed = false;
    this.calls = new Set();
    gpuDevice?.lost.then((info) => {
      const reason = info.message || info.reason;
      this.lost = `the device was lost: ${reason}; open a new one, its buffers are gone`;
      for (const call of this.calls) call.fail(this.gone());
    });
  }

  gone() {
    if (this.freed) return new AttentionError("freed", "the device was freed");
    if (this.lost) return new AttentionError("deviceLost", this.lost);
    return broken;
  }

  check() {
    const gone = this.gone();
    if (gone) throw gone;
  }

  /** Runs a call with its own buffers. It ends with the device, if not before. */
  async call(work, parent = 0, keep = false) {
    this.check();
    const owner = this.ledger?.open(parent) ?? 0;
    let call;
    const ended = new Promise((_, reject) => (call = { fail: reject }));
    ended.catch(() => {});
    this.calls.add(call);
    waiting.add(call);
    let kept = false;
    try {
      const value = await Promise.race([guarded(() => work(owner)), ended]);
      kept = keep;
      // a lost device takes everything and does nothing
      this.check();
      return { value, owner };
    } catch (error) {
      kept = false;
      // the browser tells of a loss and of what failed by it in any order
      if (this.gpuDevice && !this.gone()) await new Promise((later) => setTimeout(later));
      throw this.gone() ?? translated(error);
    } finally {
      this.calls.delete(call);
      waiting.delete(call);
      if (!kept && !this.lost) this.ledger?.close(owner);
    }
  }
}

class Device {
  #engine;
  #shared;
  #ours;

  constructor(engine, shared, info, reason, ours) {
    this.#engine = engine;
    this.#shared = shared;
    this.#ours = ours;
    const described = engine.describe();
    /** "gpu", "cpu" or "oracle". */
    this.kind = shared.kind;
    this.reason = reason;
    this.name = info?.description ?? described.name;
    this.adapter = info;
    this.software = info?.isFallbackAdapter ?? false;
    this.caps = described;
  }

  static host(kind, reason) {
    const engine = kind === "cpu" ? wasm.Engine.cpu() : wasm.Engine.oracle();
    return new Device(engine, new Shared(kind), undefined, reason, false);
  }

  static async gpu(gpuDevice, info, reason, ours) {
    const ledger = new Ledger();
    ledger.deviceOwner = ledger.open();
    const shared = new Shared("gpu", ledger, gpuDevice);
    try {
      const { value: engine } = await shared.call(() => begin(ledger, gpuDevice, info));
      return new Device(engine, shared, info, reason, ours);
    } catch (error) {
      ledger.closeAll();
      if (ours) gpuDevice.destroy();
      throw error;
    }
  }

  /** The device of WebGPU, where it is one. */
  get gpuDevice() {
    return this.#shared.gpuDevice;
  }

  /** Whether calls can still be made. */
  get alive() {
    return !this.#shared.gone();
  }

  /** Buffers on the GPU that the package holds now. */
  memory() {
    return this.#shared.ledger?.count() ?? { buffers: 0, bytes: 0 };
  }

  /** Pipelines made so far. */
  pipelines() {
    this.#shared.check();
    return this.#engine.describe().pipelines ?? 0;
  }

  explain(options) {
    this.#shared.check();
    return guarded(() => this.#engine.explain(options));
  }

  explainBackward(options) {
    this.#shared.check();
    return guarded(() => this.#engine.explain_backward(options));
  }

  async attention(options) {
    return (await this.#shared.call((owner) => this.#engine.attention(options, owner))).value;
  }

  async prepare(options) {
    const { value, owner } = await this.#shared.call((owner) => this.#engine.prepare(options, owner), 0, true);
    return new Prepared(value, this.#shared, owner, [], ["output", "lse", "scores"]);
  }

  /** Gradients, from arrays to arrays. */
  async backward(options) {
    return (await this.#shared.call((owner) => this.#engine.backward(options, owner))).value;
  }

  async prepareBackward(options) {
    const { value, owner } = await this.#shared.call((owner) => this.#engine.prepare_backward(options, owner), 0, true);
    return new Prepared(value, this.#shared, owner, ["output", "rowState", "dOutput", "dLse", "dWeights"], GRADIENTS);
  }

  async context(options) {
    const { value, owner } = await this.#shared.call((owner) => this.#engine.context(options, owner), 0, true);
    return new Context(value, this.#shared, owner);
  }

  /** A tensor on the GPU: a copy of an array, or zeros. */
  tensor(data, options = {}) {
    this.#shared.check();
    const gpuDevice = this.#needGpu("tensor");
    const array = ArrayBuffer.isView(data);
    if (!array) only(data, "a tensor without data", ["element", "length"]);
    only(options, "the options of tensor", array ? ["element"] : []);
    const possible = array ? elementsOf(data) : Object.keys(SIZES);
    const element = (array ? options : data).element ?? possible[0];
    oneOf(element, "element", Object.keys(SIZES));
    if (!possible.includes(element)) {
      throw new AttentionError("input", `the array holds ${possible.join(" or ")}, element says ${element}`);
    }
    const length = whole(data.length, "length");
    const bytes = length * SIZES[element];
    const size = Math.max(4, Math.ceil(bytes / 4) * 4);
    const most = Math.min(gpuDevice.limits.maxBufferSize, gpuDevice.limits.maxStorageBufferBindingSize);
    if (size > most) {
      throw new AttentionError("buffer", `a tensor of ${bytes} bytes is more than the ${most} that a buffer of this device may have`);
    }
    const buffer = gpuDevice.createBuffer({ size, usage: TENSOR_USAGE, label: "tensor" });
    const { ledger } = this.#shared;
    ledger.add(ledger.deviceOwner, buffer);
    const tensor = new Tensor(this.#shared, buffer, element, length, 0, true);
    if (array) tensor.write(data);
    return tensor;
  }

  /** A buffer of the caller's as a tensor. It stays the caller's. */
  tensorFrom(buffer, options) {
    this.#shared.check();
    this.#needGpu("tensorFrom");
    only(options, "the options of tensorFrom", ["element", "length", "offset"]);
    if (!(buffer instanceof GPUBuffer)) throw new AttentionError("option", "tensorFrom needs a GPUBuffer");
    const { element = "f32", offset = 0 } = options;
    oneOf(element, "element", Object.keys(SIZES));
    const length = whole(options.length ?? Math.floor((buffer.size - whole(offset, "offset")) / SIZES[element]), "length");
    if (offset % 4 !== 0 || offset + 4 > buffer.size) {
      throw new AttentionError("buffer", `offset must be a multiple of 4 and below the ${buffer.size} bytes of the buffer, found ${offset}`);
    }
    const end = offset + length * SIZES[element];
    if (end > buffer.size) {
      throw new AttentionError("buffer", `the tensor ends at byte ${end} of a buffer of ${buffer.size}`);
    }
    return new Tensor(this.#shared, buffer, element, length, offset, false);
  }

  #needGpu(what) {
    const { gpuDevice, kind } = this.#shared;
    if (!gpuDevice) throw new AttentionError("input", `${what} needs a GPU, this device is the ${kind}; call with arrays`);
    return gpuDevice;
  }

  /** Gives everything back. Calls that run end with an error; a device of the caller's stays. */
  free() {
    const shared = this.#shared;
    if (shared.freed) return;
    shared.freed = true;
    for (const call of shared.calls) call.fail(shared.gone());
    shared.ledger?.closeAll();
    this.#engine.free();
    if (this.#ours) shared.gpuDevice.destroy();
  }
}

function whole(value, what) {
  if (!Number.isSafeInteger(value) || value < 0) {
    throw new AttentionError("option", `${what} must be a whole number from 0 on, found ${String(value)}`);
  }
  return value;
}

/** What an array may hold, the usual first. */
function elementsOf(array) {
  if (array instanceof Float32Array) return ["f32"];
  if (array instanceof Uint16Array) return ["f16", "bf16"];
  if (typeof Float16Array !== "undefined" && array instanceof Float16Array) return ["f16"];
  if (array instanceof Int8Array) return ["i8"];
  if (array instanceof Uint32Array) return ["u32"];
  if (array instanceof Int32Array) return ["i32"];
  if (array instanceof Uint8Array) return ["u8"];
  const name = array?.constructor?.name;
  throw new AttentionError(
    "input",
    `no tensor is made of a ${name}; needs a Float32Array, Float16Array, Uint16Array (f16 or bf16), Int8Array, Uint32Array, Int32Array or Uint8Array`,
  );
}

/** Elements on the GPU. */
class Tensor {
  #shared;
  #ours;

  constructor(shared, buffer, element, length, offset, ours) {
    this.#shared = shared;
    this.#ours = ours;
    this.buffer = buffer;
    this.element = element;
    this.length = length;
    this.offset = offset;
    this.freed = false;
  }

  /** Bytes, a multiple of 4. */
  get bytes() {
    return Math.min(Math.max(4, Math.ceil((this.length * SIZES[this.element]) / 4) * 4), this.buffer.size - this.offset);
  }

  #check() {
    this.#shared.check();
    if (this.freed) throw new AttentionError("freed", "the tensor was freed");
  }

  /** Part, offset and size, for wasm; only of the same device. */
  slice(shared, name) {
    this.#check();
    if (shared !== this.#shared) throw new AttentionError("input", `${name} is a tensor of another device`);
    return [this.buffer, this.offset, this.bytes];
  }

  write(array) {
    this.#check();
    const possible = elementsOf(array);
    if (!possible.includes(this.element)) {
      throw new AttentionError("input", `the array holds ${possible.join(" or ")}, the tensor ${this.element}`);
    }
    if (array.length !== this.length) {
      throw new AttentionError("input", `the array has ${array.length} elements, the tensor ${this.length}`);
    }
    let bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
    if (bytes.length % 4 !== 0) {
      const padded = new Uint8Array(Math.ceil(bytes.length / 4) * 4);
      padded.set(bytes);
      bytes = padded;
    }
    this.#shared.gpuDevice.queue.writeBuffer(this.buffer, this.offset, bytes);
  }

  async read() {
    this.#check();
    const { gpuDevice } = this.#shared;
    const size = this.bytes;
    const { value } = await this.#shared.call(async (owner) => {
      const staging = gpuDevice.createBuffer({ size, usage: 0x01 | 0x08, label: "read-back" });
      this.#shared.ledger.add(owner, staging);
      const encoder = gpuDevice.createCommandEncoder();
      encoder.copyBufferToBuffer(this.buffer, this.offset, staging, 0, size);
      gpuDevice.queue.submit([encoder.finish()]);
      try {
        await staging.mapAsync(0x01);
      } catch (error) {
        throw new AttentionError("readBack", `a tensor could not be read: ${error.message}`, { cause: error });
      }
      const bytes = staging.getMappedRange().slice(0);
      return new ARRAYS[this.element](bytes, 0, this.length);
    });
    return value;
  }

  free() {
    if (this.freed) return;
    this.freed = true;
    const { ledger } = this.#shared;
    if (this.#ours) {
      ledger.remove(ledger.deviceOwner, this.buffer);
      this.buffer.destroy();
    }
  }
}

/** Something of wasm's with buffers of its own. */
class Held {
  constructor(inner, shared, owner) {
    this.inner = inner;
    this.shared = shared;
    this.owner = owner;
    this.freed = false;
  }

  check() {
    this.shared.check();
    if (this.freed) throw new AttentionError("freed", "this was freed");
    return this.inner;
  }

  free() {
    if (this.freed) return;
    this.freed = true;
    if (!this.shared.freed && !this.shared.lost) this.shared.ledger?.close(this.owner);
    this.inner.free();
  }
}

/** An attention, or its gradients, with plan, pipelines and workspace. */
class Prepared {
  #held;
  #read;
  #written;

  /** Tensors that it reads beside the inputs of an attention, and those that it writes. */
  constructor(inner, shared, owner, read, written) {
    this.#held = new Held(inner, shared, owner);
    this.#read = read;
    this.#written = written;
    this.plan = inner.plan();
    this.kernel = inner.kernel();
  }

  async run(arrays) {
    const inner = this.#held.check();
    const { value } = await this.#held.shared.call((owner) => inner.run(arrays, owner));
    return { ...value, plan: this.plan, kernel: this.kernel };
  }

  /** Binds tensors; those that are written and not given are made. */
  bind(tensors) {
    const inner = this.#held.check();
    const { shared } = this.#held;
    only(tensors, "the tensors", [...DATA, ...this.#read, ...this.#written]);
    if (!shared.gpuDevice) {
      throw new AttentionError("input", `tensors are bound on a GPU only, this device is the ${shared.kind}; call run() with arrays`);
    }
    const all = {};
    const elements = { ...ALWAYS, ...inner.elements() };
    for (const [name, tensor] of Object.entries(tensors)) {
      if (tensor === undefined) continue;
      if (!(tensor instanceof Tensor)) throw new AttentionError("input", `${name} must be a tensor; make one with device.tensor()`);
      // of what is not asked for wasm tells
      if (elements[name] !== undefined && tensor.element !== elements[name]) {
        throw new AttentionError("input", `${name} is a tensor of ${tensor.element}, this attention was prepared for ${elements[name]}`);
      }
      all[name] = tensor;
    }
    const made = [];
    try {
      for (const [name, length] of Object.entries(inner.written())) {
        if (all[name]) continue;
        const element = elements[name];
        const size = Math.max(4, Math.ceil((length * SIZES[element]) / 4) * 4);
        const buffer = shared.gpuDevice.createBuffer({ size, usage: TENSOR_USAGE, label: name });
        shared.ledger.add(shared.ledger.deviceOwner, buffer);
        all[name] = new Tensor(shared, buffer, element, length, 0, true);
        made.push(all[name]);
      }
      const slices = Object.fromEntries(Object.entries(all).map(([name, tensor]) => [name, tensor.slice(shared, name)]));
      const results = Object.fromEntries(this.#written.map((name) => [name, all[name]]));
      return new Bound(guarded(() => inner.bind(slices)), shared, results, made);
    } catch (error) {
      for (const tensor of made) tensor.free();
      throw error;
    }
  }

  free() {
    this.#held.free();
  }
}

class Bound {
  #inner;
  #shared;
  #made;
  #freed = false;

  /** The tensors that it writes are fields of it. */
  constructor(inner, shared, results, made) {
    this.#inner = inner;
    this.#shared = shared;
    this.#made = made;
    Object.assign(this, results);
  }

  #check() {
    this.#shared.check();
    if (this.#freed) throw new AttentionError("freed", "this was freed");
  }

  /** Submits it once; ends when it is on the queue. */
  async run() {
    this.#check();
    await this.#shared.call((owner) => this.#inner.submit(owner));
  }

  /** Records it into an encoder of the caller's; nothing is submitted. */
  encode(encoder) {
    this.#check();
    if (!(encoder instanceof GPUCommandEncoder)) throw new AttentionError("option", "encode needs a GPUCommandEncoder");
    guarded(() => this.#inner.encode(encoder));
  }

  /** Gives back what was made for it; tensors that were given stay. */
  free() {
    if (this.#freed) return;
    this.#freed = true;
    for (const tensor of this.#made) tensor.free();
    this.#inner.free();
  }
}

class Context {
  #held;

  constructor(inner, shared, owner) {
    this.#held = new Held(inner, shared, owner);
    this.bytes = inner.bytes();
  }

  async attend(options) {
    const inner = this.#held.check();
    return (await this.#held.shared.call((owner) => inner.attend(options, owner), this.#held.owner)).value;
  }

  free() {
    this.#held.free();
  }
}

/** The named workloads of the crate's benchmarks. */
export async function workloads(options = {}) {
  only(options, "the options of workloads", ["wasm"]);
  await load(options.wasm);
  return guarded(() => wasm.workloads());
}

/** Inputs of a workload, and its floating point operations. */
export async function workloadInputs(name) {
  await load();
  return guarded(() => wasm.workload_inputs(String(name)));
}

/** Compares a result with the oracle on so many rows (default 64). */
export async function verify(options, result, rows = 64) {
  await load();
  return guarded(() => wasm.verify_rows(options, result, whole(rows, "rows")));
}

/** Compares gradients with the oracle, element by element. */
export async function verifyBackward(options, gradients) {
  await load();
  return guarded(() => wasm.verify_gradients(options, gradients));
}

/** The version of the crate inside. */
export async function version() {
  await load();
  return wasm.version();
}

/** WGSL that measures arithmetic and memory; for the benchmark of the page. */
export async function roofShaders(steps, vectors) {
  await load();
  return guarded(() => wasm.roof_shaders(steps, vectors));
}

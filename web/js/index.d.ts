/// <reference types="@webgpu/types" />

/** `[batch, heads, length, width]`. */
export type Shape = readonly [number, number, number, number];

/** What a query, a bias and an output may be stored as. */
export type FloatElement = "f32" | "f16" | "bf16";

/** What keys and values may be stored as: signed bytes too, each times the scale of its block of the row. */
export type Element = FloatElement | "i8";

export type ScaleElement = "f32" | "f16";

/**
 * f16 and bf16 as their bits. A `Uint16Array` is f16 unless `element` says bf16; a `Float16Array` is taken too, where the browser
 * has it.
 */
export type Numbers = Float32Array | Uint16Array;

/** Numbers, or signed bytes beside their scales. */
export type Stored = Numbers | Int8Array;

/** What tells errors apart. `message` says what was asked, what was found and what would do. */
export type ErrorKind =
  | "option"
  | "problem"
  | "input"
  | "plan"
  | "weights"
  | "context"
  | "backward"
  | "kernel"
  | "memory"
  | "buffer"
  | "outOfMemory"
  | "deviceLost"
  | "validation"
  | "internal"
  | "readBack"
  | "noAdapter"
  | "load"
  | "freed"
  | "other";

export class AttentionError extends Error {
  constructor(kind: ErrorKind, message: string, options?: ErrorOptions);
  readonly name: "AttentionError";
  readonly kind: ErrorKind;
}

export interface OpenOptions {
  /**
   * - `"gpu"` (default): whatever adapter the browser gives, else the CPU;
   * - `"auto"`: the same, but the CPU where the adapter is a software driver;
   * - `"cpu"`; `"oracle"`: f64, slow, exact as far as f64 goes.
   *
   * `Device.reason` says what became of it.
   */
  prefer?: "gpu" | "auto" | "cpu" | "oracle";
  powerPreference?: "low-power" | "high-performance";
  /** An error of the kind `noAdapter` in the place of the CPU. */
  required?: boolean;
  /** Where the WebAssembly is; beside index.js if left out. */
  wasm?: WasmSource;
}

export type WasmSource = string | URL | Request | Response | BufferSource | WebAssembly.Module;

export function open(options?: OpenOptions): Promise<Device>;

/** Computes on a device of yours, on its queue. It stays yours: `free()` gives back only what the package made. */
export function fromDevice(gpuDevice: GPUDevice, options?: { wasm?: WasmSource }): Promise<Device>;

/** How elements lie in memory: axes in this order, or strides and an offset in elements. */
export type Layout = "bhld" | "blhd" | { strides?: Shape; offset?: number };

/** Which key the first row stands on, for causal masks, windows and ALiBi; a number is an offset in tokens. */
export type Diagonal = "topLeft" | "bottomRight" | "endOfKeys" | number;

export interface Elements {
  query?: FloatElement;
  key?: Element;
  value?: Element;
  keyScale?: ScaleElement;
  valueScale?: ScaleElement;
  bias?: FloatElement;
}

interface Terms {
  shape: {
    query: Shape;
    /** Beside a `blockTable`, `[pages, heads, page length, width]`; so the value's. */
    key: Shape;
    /** As the key's where left out. */
    value?: Shape;
    /**
     * `[batch, heads, keys, blocks]`, of pages as the key: a scale for each block of neighbouring columns of a row. Where left out
     * as many blocks as the array has for each row; a prepared call needs it.
     */
    keyScale?: Shape;
    valueScale?: Shape;
    /** `[batch, pages of each entry]`; found in the array where there is one. A prepared call needs it, or `keys`. */
    blockTable?: readonly [number, number];
    /** Keys of each entry of the batch, beside a `blockTable`; all that the table reaches over where left out. */
    keys?: number;
    /** `[batch, heads, queries, keys]` where left out; each axis may be 1. */
    bias?: Shape;
    mask?: Shape;
  };
  layout?:
    | "bhld"
    | "blhd"
    | Partial<Record<"query" | "key" | "value" | "output" | "bias" | "mask" | "keyScale" | "valueScale", Layout>>;
  /**
   * One name for query, key and value, or one for each tensor. Found in the arrays where there are any, but for bf16: a
   * `Uint16Array` is f16 where nothing is said. A prepared call is one of f32 where nothing is said.
   */
  element?: FloatElement | Elements;
  /** As the query's where left out. */
  outputElement?: FloatElement;
  /** `1 / sqrt(width)` where left out. */
  scale?: number;
  softcap?: number;
  /** `false` is as left out; `true` is refused, for it does not say which diagonal. */
  causal?: Diagonal | false;
  /** Keys before and behind the diagonal that a row sees; all where left out. */
  windowLeft?: number;
  windowRight?: number;
  /** The diagonal of windows and ALiBi where `causal` is left out. */
  diagonal?: Diagonal;
  /** Whether to return the log-sum-exp of each row; true where left out. */
  lse?: boolean;
  /** Whether to return maximum and sum of each row's softmax. */
  rowState?: boolean;
  /** A matrix of scores to return as well. */
  scores?: "scaled" | "capped" | "masked" | "probs";
  /** A kernel by name, in the place of the plan's choice. It runs, or the call fails. */
  kernel?: string;
}

export interface Arrays {
  query: Numbers;
  key: Stored;
  value: Stored;
  /** What the bytes of an `Int8Array` are to be multiplied by, f32 or f16; needed beside one, and refused without. */
  keyScale?: Numbers;
  valueScale?: Numbers;
  /** `[batch, pages of each entry]`: which of the pages that `key` and `value` are hold the keys of each entry, in order. */
  blockTable?: Int32Array;
  /** Added to the scores; -Infinity forbids a key. */
  bias?: Numbers;
  /** 0: not allowed. */
  mask?: Uint8Array;
  /** `[batch]`: rows of each entry that are there; those behind give zeros and an `lse` of -Infinity. */
  qLens?: Uint32Array | readonly number[];
  /** Keys of each entry of the batch. */
  kvLens?: Uint32Array | readonly number[];
  /** `[batch, queries]`: the first key a row may see, and one past the last. */
  rowStart?: Int32Array;
  rowEnd?: Int32Array;
  /** `[heads]`, or `[batch, heads]` where each entry of the batch has its own; a prepared call takes the former. */
  alibiSlopes?: Float32Array;
  /** `[heads]`: a logit that takes part in the softmax and has no value. */
  sinks?: Float32Array;
}

export type Select = readonly number[] | Uint32Array | { from: number; to: number };

export interface WeightsOptions {
  heads?: Select;
  reduce?: "each" | "mean" | "sum";
  rows?: Select;
  keys?: Select;
  /** Sums over ranges of keys, `[first, end]`, in the place of `keys`. */
  segments?: readonly (readonly [number, number])[];
}

export interface AttentionOptions extends Arrays, Terms {
  /** Weights to return as well, without ever holding all of them. `true`: all. */
  weights?: WeightsOptions | true;
}

/** The same without data: each field says that it will be there, bias and scales also in which type. */
export interface PrepareOptions extends Terms {
  keyScale?: ScaleElement;
  valueScale?: ScaleElement;
  blockTable?: boolean;
  bias?: FloatElement;
  mask?: boolean;
  qLens?: boolean;
  kvLens?: boolean;
  rowStart?: boolean;
  rowEnd?: boolean;
  alibiSlopes?: boolean;
  sinks?: boolean;
}

export interface Result {
  /** `[batch, heads, queries, value width]`; f16 and bf16 as their bits. */
  output: Numbers;
  /** `[batch, heads, queries]`, natural logarithm; -Infinity where a row sees no key. */
  lse?: Float32Array;
  rowMax?: Float32Array;
  rowSum?: Float32Array;
  scores?: Float32Array;
  weights?: Float32Array;
  weightsShape?: [number, number, number, number];
  /** What ran, and why. */
  plan: string;
  kernel?: string;
}

/** What there may be a gradient of; each has the name of its input. */
export type Gradient = "dQuery" | "dKey" | "dValue" | "dBias" | "dAlibiSlopes" | "dSinks" | "dScale";

interface BackwardTerms extends Omit<Terms, "layout" | "element" | "scores" | "kernel"> {
  /** As in an attention. One name is also that of `dOutput` and of all gradients but `dBias`; those are `"bhld"` where left out. */
  layout?:
    | Extract<Terms["layout"], string>
    | (Extract<Terms["layout"], object> & Partial<Record<"dOutput" | "dQuery" | "dKey" | "dValue" | "dBias", Layout>>);
  /** As in an attention. Bits of `dOutput` are of the output's type where nothing is said, else of f16. */
  element?: FloatElement | (Elements & { dOutput?: FloatElement });
  /** Gradients that are asked for; those of query, key and value where left out. Keys and values in bytes or pages have none. */
  wants?: readonly Gradient[];
  /** What gradients of tensors are stored as, all of them or each; f32 where left out. */
  gradientElement?: FloatElement | Partial<Record<"dQuery" | "dKey" | "dValue" | "dBias", FloatElement>>;
  /** Weights that `dWeights` is the gradient of. `true`: all. */
  weights?: WeightsOptions | true;
}

/** Data of one call of gradients. */
export interface BackwardArrays extends Arrays {
  /** What `attention()` gave for the same options with `rowState: true`: its output, maximum and sum of each row. */
  forward: Pick<Result, "output" | "rowMax" | "rowSum"> & Partial<Result>;
  /** The gradient of a loss by the output, in its shape; zeros where nothing is wanted of it. */
  dOutput: Numbers;
  /** That by the log-sum-exp, `[batch, heads, queries]`. */
  dLse?: Float32Array;
  /** That by the weights that `weights` names, in the shape of `weightsShape`. */
  dWeights?: Float32Array;
}

export interface BackwardOptions extends BackwardArrays, BackwardTerms {}

/** The same without data. `weights` says that `dWeights` will be there; a prepared `dOutput` is of the output's type where nothing is said. */
export interface PrepareBackwardOptions extends BackwardTerms, Omit<PrepareOptions, keyof Terms> {
  dLse?: boolean;
}

/** Those that were asked for, each in the shape of its input: where the batch shares keys or a bias, the sum over it. */
export interface Gradients {
  dQuery?: Numbers;
  dKey?: Numbers;
  dValue?: Numbers;
  dBias?: Numbers;
  /** As many as there are slopes. */
  dAlibiSlopes?: Float32Array;
  /** `[heads]`. */
  dSinks?: Float32Array;
  dScale?: number;
  /** What ran, and why. */
  plan: string;
  kernel: string;
}

export interface AdapterInfo {
  readonly vendor: string;
  readonly architecture: string;
  readonly device: string;
  readonly description: string;
  readonly isFallbackAdapter: boolean;
  readonly subgroupMinSize: number;
  readonly subgroupMaxSize: number;
}

export interface Device {
  readonly kind: "gpu" | "cpu" | "oracle";
  readonly name: string;
  /** Why this one. */
  readonly reason: string;
  /** Whether a CPU plays GPU. */
  readonly software: boolean;
  readonly adapter?: AdapterInfo;
  /** What planning knows of it. */
  readonly caps: {
    name: string;
    backend: string;
    class?: string;
    shaderF16?: boolean;
    timestamps?: boolean;
    subgroups?: boolean;
    maxBindingBytes?: number;
    pipelines?: number;
  };
  /** To share buffers with, and its queue. */
  readonly gpuDevice?: GPUDevice;
  /** False once it is lost or freed. */
  readonly alive: boolean;
  memory(): { buffers: number; bytes: number };
  pipelines(): number;
  /** What would run, and why; nothing is made. */
  explain(options: PrepareOptions): string;
  attention(options: AttentionOptions): Promise<Result>;
  prepare(options: PrepareOptions): Promise<Prepared>;
  /** What would run for gradients, and why; nothing is made. */
  explainBackward(options: PrepareBackwardOptions): string;
  /** Gradients of an attention, behind a call of `attention()`. The same inputs give the same bits. */
  backward(options: BackwardOptions): Promise<Gradients>;
  prepareBackward(options: PrepareBackwardOptions): Promise<PreparedBackward>;
  context(options: ContextOptions): Promise<Context>;
  /** A copy of an array; a `Uint16Array` is f16 where `element` does not say bf16. */
  tensor(data: TensorArray, options?: { element?: TensorElement }): Tensor;
  /** Zeros. */
  tensor(data: { element?: TensorElement; length: number }): Tensor;
  tensorFrom(buffer: GPUBuffer, options: { element?: TensorElement; length?: number; offset?: number }): Tensor;
  free(): void;
}

export type TensorElement = Element | "u32" | "i32" | "u8";
export type TensorArray = Float32Array | Uint16Array | Int8Array | Uint32Array | Int32Array | Uint8Array;

/** Elements on the GPU. */
export interface Tensor {
  readonly buffer: GPUBuffer;
  readonly element: TensorElement;
  readonly length: number;
  /** In bytes. */
  readonly offset: number;
  readonly bytes: number;
  write(array: TensorArray): void;
  read(): Promise<TensorArray>;
  free(): void;
}

export interface Tensors extends Partial<Record<Exclude<keyof Arrays, "query" | "key" | "value">, Tensor>> {
  query: Tensor;
  key: Tensor;
  value: Tensor;
  output?: Tensor;
  lse?: Tensor;
  scores?: Tensor;
}

/** An attention with its plan, pipelines and workspace, for any number of calls. */
export interface Prepared {
  readonly plan: string;
  readonly kernel: string;
  run(arrays: Arrays): Promise<Result>;
  bind(tensors: Tensors): Bound;
  free(): void;
}

/** A prepared attention over tensors on the GPU. */
export interface Bound {
  readonly output: Tensor;
  readonly lse?: Tensor;
  readonly scores?: Tensor;
  /** Submits it; ends when it is on the queue, not when it is done. */
  run(): Promise<void>;
  /** Records it into an encoder of yours. */
  encode(encoder: GPUCommandEncoder): void;
  free(): void;
}

export interface BackwardTensors extends Partial<Record<Exclude<keyof Arrays, "query" | "key" | "value">, Tensor>> {
  query: Tensor;
  key: Tensor;
  value: Tensor;
  /** What the attention wrote. */
  output: Tensor;
  /** Maximum and sum of each row: what `lse` is of an attention that was prepared with `rowState: true`. */
  rowState: Tensor;
  dOutput: Tensor;
  dLse?: Tensor;
  dWeights?: Tensor;
  /** Where gradients go; made where left out. No two of them, and none of what is read, may be parts of one buffer. */
  dQuery?: Tensor;
  dKey?: Tensor;
  dValue?: Tensor;
  dBias?: Tensor;
  dAlibiSlopes?: Tensor;
  dSinks?: Tensor;
  dScale?: Tensor;
}

/** Gradients with their plan, pipelines and workspace, for any number of calls. */
export interface PreparedBackward {
  readonly plan: string;
  readonly kernel: string;
  run(arrays: BackwardArrays): Promise<Gradients>;
  bind(tensors: BackwardTensors): BoundBackward;
  free(): void;
}

/** Prepared gradients over tensors on the GPU. */
export interface BoundBackward extends Readonly<Partial<Record<Gradient, Tensor>>> {
  /** Submits it; ends when it is on the queue, not when it is done. */
  run(): Promise<void>;
  /** Records it into an encoder of yours, behind the attention that it belongs to or alone. */
  encode(encoder: GPUCommandEncoder): void;
  /** Gives back the gradients that were made for it. */
  free(): void;
}

export interface ContextOptions {
  key: Numbers;
  value: Numbers;
  /** Of the arrays, as in a call. */
  element?: FloatElement | { key?: FloatElement; value?: FloatElement };
  /** `[contexts, heads, length, width]`. */
  shape: Shape;
  valueWidth?: number;
  /**
   * `"q8_0"`: signed bytes with a scale in f16 for 32 columns, of widths that are multiples of 32. `"int8"`: signed bytes with a
   * scale in f32 for each row, of any width. f32 where left out.
   */
  storage?: "f32" | "f16" | "bf16" | "q8_0" | "int8";
  kvLens?: Uint32Array | readonly number[];
}

/** Keys and values that are stored once and attended to by many calls. */
export interface Context {
  readonly bytes: number;
  attend(options: {
    query: Numbers;
    element?: FloatElement | { query?: FloatElement };
    /** As the query's where left out. */
    outputElement?: FloatElement;
    shape: Shape;
    /** The context of each entry of the batch. */
    contextIndex?: Uint32Array | readonly number[];
    scale?: number;
    softcap?: number;
    lse?: boolean;
    rowState?: boolean;
  }): Promise<Omit<Result, "plan"> & { contextBytes: number }>;
  free(): void;
}

export interface Workload {
  name: string;
  about: string;
  shape: { query: Shape; key: Shape; value: Shape };
  scale?: number;
  bytes: number;
}

export function workloads(options?: { wasm?: WasmSource }): Promise<Workload[]>;
export function workloadInputs(name: string): Promise<{ query: Float32Array; key: Float32Array; value: Float32Array; flops: number }>;

export interface Report {
  passed: boolean;
  rows: number;
  allRows: number;
  maxAbsError: number;
  maxLseError: number;
  /** The largest ratio of an error to what is allowed there. */
  worstRatio: number;
  text: string;
}

/** Compares a result with the oracle in f64, on so many rows (64 where left out). */
export function verify(options: AttentionOptions, result: Result, rows?: number): Promise<Report>;

export interface BackwardReport {
  passed: boolean;
  /** Elements of gradients that were compared, and those out of tolerance. */
  elements: number;
  failures: number;
  maxAbsError: number;
  /** The largest ratio of an error to what is allowed there. */
  worstRatio: number;
  text: string;
}

/** Compares every element of gradients with the oracle in f64, whose bounds are derived for each. */
export function verifyBackward(options: BackwardOptions, gradients: Gradients): Promise<BackwardReport>;

export function version(): Promise<string>;

/** WGSL that measures arithmetic and memory traffic. */
export function roofShaders(steps: number, vectors: number): Promise<[string, string]>;

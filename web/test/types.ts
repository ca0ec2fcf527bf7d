// Never run: what the types must allow, and what they must not.
import { AttentionError, fromDevice, open, verify, verifyBackward, version, workloadInputs, workloads } from "cross-attention";
import type { AttentionOptions, BackwardOptions, Device, ErrorKind, Gradients, PrepareOptions, Result } from "cross-attention";

export async function allowed(): Promise<void> {
  const device: Device = await open({ prefer: "gpu", powerPreference: "high-performance", required: false });
  const options: AttentionOptions = {
    shape: { query: [1, 8, 64, 40], key: [1, 8, 77, 40] },
    query: new Float32Array(1), key: new Uint16Array(1), value: new Float32Array(1),
    mask: new Uint8Array(1), kvLens: [77], causal: "bottomRight", windowLeft: 3, scale: 1, lse: true, scores: "probs",
    layout: { key: { strides: [1, 2, 3, 4], offset: 5 }, value: "blhd" },
    weights: { heads: [0, 1], reduce: "mean", rows: { from: 0, to: 3 }, segments: [[0, 4]] },
  };
  const result: Result = await device.attention(options);
  const lse: Float32Array | undefined = result.lse;
  const prepared = await device.prepare({ shape: options.shape, element: "f16", mask: true, bias: "f32", kvLens: true });
  await prepared.run({ query: new Float32Array(1), key: new Float32Array(1), value: new Float32Array(1) });
  const tensor = device.tensor(new Float32Array(4));
  const bound = prepared.bind({ query: tensor, key: tensor, value: tensor, output: device.tensor({ element: "f32", length: 4 }) });
  await bound.run();
  bound.encode(device.gpuDevice!.createCommandEncoder());
  const read = await bound.output.read();
  const context = await device.context({ key: new Float32Array(1), value: new Float32Array(1), shape: [1, 1, 1, 1], storage: "q8_0" });
  await context.attend({ query: new Float32Array(1), shape: [1, 1, 1, 1], contextIndex: [0] });
  const stored: AttentionOptions = {
    shape: { query: [2, 8, 1, 64], key: [9, 8, 16, 64], keyScale: [9, 8, 16, 2], keys: 40, blockTable: [2, 3] },
    element: { query: "bf16", key: "i8", value: "bf16", keyScale: "f16" }, outputElement: "bf16", layout: { keyScale: "blhd" },
    query: new Uint16Array(1), key: new Int8Array(1), value: new Uint16Array(1), keyScale: new Uint16Array(1), blockTable: new Int32Array(6),
  };
  await device.attention(stored);
  const announced: PrepareOptions = {
    shape: stored.shape, element: { key: "i8", value: "i8" }, keyScale: "f32", valueScale: "f16", blockTable: true, bias: "bf16",
  };
  const bytes = device.tensor(new Int8Array(4));
  const bits = device.tensor(new Uint16Array(4), { element: "bf16" });
  (await device.prepare(announced)).bind({ query: tensor, key: bytes, value: bytes, keyScale: tensor, valueScale: bits, blockTable: tensor });
  const halves = await device.context({ key: new Uint16Array(1), value: new Uint16Array(1), element: "bf16", shape: [1, 1, 1, 1], storage: "int8" });
  await halves.attend({ query: new Uint16Array(1), element: "bf16", outputElement: "f32", shape: [1, 1, 1, 1] });
  const forward = await device.attention({ ...options, rowState: true, weights: undefined });
  const call: BackwardOptions = {
    shape: options.shape, query: new Float32Array(1), key: new Uint16Array(1), value: new Float32Array(1), kvLens: [77], causal: "bottomRight",
    forward, dOutput: new Uint16Array(1), dLse: new Float32Array(1), weights: { heads: [0] }, dWeights: new Float32Array(1),
    wants: ["dQuery", "dScale"], gradientElement: { dQuery: "bf16" }, element: { dOutput: "bf16" }, layout: { dOutput: "blhd", query: "blhd" },
  };
  const gradients: Gradients = await device.backward(call);
  const scale: number | undefined = gradients.dScale;
  const learning = await device.prepareBackward({ shape: options.shape, mask: true, dLse: true, wants: ["dKey"], weights: true, gradientElement: "f16" });
  await learning.run({ query: call.query, key: call.key, value: call.value, forward: { output: forward.output, rowMax: forward.rowMax, rowSum: forward.rowSum }, dOutput: call.dOutput });
  const gradient = learning.bind({ query: tensor, key: tensor, value: tensor, output: bound.output, rowState: bound.lse!, dOutput: tensor, dKey: tensor });
  await gradient.run();
  const comparison: boolean = (await verifyBackward(call, gradients)).passed && device.explainBackward({ shape: options.shape }).length === scale;
  void [await gradient.dKey?.read(), comparison];
  const shared = await fromDevice(device.gpuDevice!);
  shared.tensorFrom(tensor.buffer, { length: 4, offset: 0 }).free();
  const report = await verify(options, result, 10);
  const numbers: number[] = [report.worstRatio, (await workloads()).length, (await workloadInputs("detr")).flops, read.length];
  const text: string = device.explain({ shape: options.shape }) + (await version()) + numbers + lse;
  try {
    throw new AttentionError("option", text);
  } catch (error) {
    const kind: ErrorKind | undefined = error instanceof AttentionError ? error.kind : undefined;
    void kind;
  }
  for (const each of [prepared, bound, context, tensor, learning, gradient, device, shared]) each.free();
}

export async function refused(device: Device, options: AttentionOptions): Promise<void> {
  // @ts-expect-error no such device
  await open({ prefer: "tpu" });
  // @ts-expect-error a shape has four numbers
  await device.attention({ ...options, shape: { query: [1, 2, 3], key: [1, 2, 3, 4] } });
  // @ts-expect-error true does not say which diagonal
  await device.attention({ ...options, causal: true });
  // @ts-expect-error a name that there is not
  await device.attention({ ...options, casual: "topLeft" });
  // @ts-expect-error data of another type
  await device.attention({ ...options, query: new Float64Array(4) });
  // @ts-expect-error a query has no scales
  await device.attention({ ...options, query: new Int8Array(4) });
  // @ts-expect-error nor has an output
  await device.attention({ ...options, outputElement: "i8" });
  // @ts-expect-error scales are f32 or f16
  await device.prepare({ shape: options.shape, keyScale: "bf16" });
  // @ts-expect-error a prepared call has no data yet
  await device.prepare({ shape: options.shape, mask: new Uint8Array(4) });
  // @ts-expect-error what the attention gave is missing
  await device.backward({ ...options, dOutput: new Float32Array(4) });
  // @ts-expect-error a gradient that there is not
  await device.prepareBackward({ shape: options.shape, wants: ["dMask"] });
  // @ts-expect-error nor of scores
  await device.prepareBackward({ shape: options.shape, scores: "probs" });
  // @ts-expect-error arrays are no tensors
  (await device.prepare({ shape: options.shape })).bind({ query: options.query, key: options.key, value: options.value });
}

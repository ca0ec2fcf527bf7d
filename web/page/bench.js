// Named workloads, verified, timed, and compared with what the device can do at most.

import { roofShaders, verify, version, workloadInputs, workloads } from "./pkg/index.js";
import { quantile, spread, warmUp } from "./stats.js";

const $ = (id) => document.getElementById(id);
const COLUMNS = ["workload", "shape", "kernel", "median ms", "p10", "p90", "GFLOP/s", "GB/s", "of roof", "max error"];
/** Taken where nothing else was chosen: a phone can do them. */
const USUAL = ["sd15_64", "whisper_decode", "whisper_prefill", "sam_token_to_image", "detr", "qformer"];
const MIN_ROUNDS = 5;
/** Timed together where one ends faster than a clock of a browser ticks. */
const ROUND_MS = 5;

/** Three digits. */
const few = (number) => (number >= 100 ? number.toFixed(0) : number.toPrecision(3));
const pause = () => new Promise((resolve) => setTimeout(resolve));

export function benchmark() {
  let device;
  let deviceMs;
  let stop = false;
  let running = false;
  let all;
  let built;
  let rows = [];

  async function run(opened, ms) {
    [device, deviceMs] = [opened, ms];
    stop = true;
    all ??= await list();
    built ??= await fetch("built.json").then((response) => response.json());
    return {};
  }

  async function list() {
    const found = await workloads();
    $("workloads").replaceChildren(
      ...found.map(({ name, about, shape }) => {
        const label = document.createElement("label");
        const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: USUAL.includes(name) });
        label.title = `${about}; query [${shape.query.join(", ")}], key [${shape.key.join(", ")}]`;
        label.append(box, ` ${name}`);
        return label;
      }),
    );
    $("bench-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!running) measureAll();
    });
    $("bench-stop").addEventListener("click", () => (stop = true));
    $("bench-copy").addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText($("bench-json").value);
        $("bench-status").textContent = "Copied.";
      } catch (error) {
        $("bench-status").textContent = `The browser does not let this page copy (${error.message}); the text stands below.`;
      }
    });
    return found;
  }

  async function measureAll() {
    const chosen = all.filter(({ name }) => $("workloads").querySelector(`input[value="${name}"]`).checked);
    const status = $("bench-status");
    if (chosen.length === 0) {
      status.textContent = "No workload is chosen.";
      return;
    }
    const current = device;
    const budget = 1000 * Math.min(Math.max(Number($("seconds").value) || 1, 0.1), 60);
    [running, stop, rows] = [true, false, []];
    for (const [id, off] of [["bench-run", true], ["bench-stop", false], ["bench-copy", true]]) $(id).disabled = off;
    const progress = $("bench-progress");
    [progress.max, progress.value] = [chosen.length + 1, 0];
    const outcome = { failed: 0, rows, roof: undefined };
    globalThis.page.sections.benchmark = { working: true };
    try {
      status.textContent = "Measuring what the device can do at most …";
      await pause();
      outcome.roof = current.kind === "gpu" ? await roofs(current, Math.min(500, budget)) : undefined;
      for (const [n, workload] of chosen.entries()) {
        progress.value = n + 1;
        status.textContent = `${workload.name}, ${n + 1} of ${chosen.length} …`;
        await pause();
        if (stop) break;
        try {
          rows.push(await measure(current, workload, budget, outcome.roof, n === 0));
        } catch (error) {
          outcome.failed += 1;
          rows.push({ ...(await opening(current, workload, outcome.roof, n === 0)), error: error.message });
          if (!current.alive) break;
        }
        show(outcome.roof);
      }
      const told = stop ? "Stopped." : "Done.";
      const wrong = outcome.failed > 0 ? ` ${outcome.failed} failed.` : "";
      const software = current.software ? " A software driver computed: these times say nothing about a GPU." : "";
      status.textContent = `${told} ${rows.length} of ${chosen.length} workloads.${wrong}${software}`;
      progress.value = progress.max;
    } catch (error) {
      status.textContent = `Failed: ${error.message}`;
      outcome.failed += 1;
    }
    running = false;
    for (const [id, off] of [["bench-run", false], ["bench-stop", true], ["bench-copy", rows.length === 0]]) $(id).disabled = off;
    globalThis.page.sections.benchmark = outcome;
  }

  /** What a row of the program's `bench --json` says before anything is measured. */
  async function opening(current, { name, shape, scale }, roof, cold) {
    const [batch, qHeads, qLen, width] = shape.query;
    const [, kvHeads, kvLen] = shape.key;
    const { vendor = "", architecture = "" } = current.adapter ?? {};
    return {
      workload: name,
      version: await version(),
      commit: built.commit,
      rustc: built.rustc,
      // a browser does not tell
      cpu: null,
      cores: null,
      threads: 1,
      device: current.kind,
      adapter: current.name,
      driver: current.kind === "gpu" ? `${vendor} ${architecture}`.trim() : `cross-attention ${await version()}`,
      backend: current.kind === "gpu" ? "webgpu" : "cpu",
      software: current.software,
      browser: navigator.userAgent,
      kernel_choice: "auto",
      backward: false,
      element: "f32",
      kv: "f32",
      page_len: null,
      output: "f32",
      layout: "bhld",
      batch,
      q_heads: qHeads,
      kv_heads: kvHeads,
      q_len: qLen,
      kv_len: kvLen,
      head_dim: width,
      v_head_dim: shape.value[3],
      scale: scale ?? null,
      terms: [],
      peak_gflops: roof?.gflops ?? null,
      peak_gbps: roof?.gbps ?? null,
      peak_timing: roof ? "wall" : null,
      device_ms: deviceMs,
      run: 1,
      cold,
    };
  }

  async function measure(current, workload, budget, roof, cold) {
    const { name, shape, scale, bytes } = workload;
    const { flops, ...arrays } = await workloadInputs(name);
    const made = current.pipelines();
    const started = performance.now();
    const prepared = await current.prepare({ shape, scale });
    const prepareMs = performance.now() - started;
    const tensors = [];
    let bound;
    try {
      const first = performance.now();
      const result = await prepared.run(arrays);
      const firstRunMs = performance.now() - first;
      const report = await verify({ ...arrays, shape, scale }, result, 64);
      if (!report.passed) throw new Error(`not what the oracle says: ${report.text}`);
      const planned = performance.now();
      for (let n = 0; n < 20; n += 1) current.explain({ shape, scale });
      const planUs = ((performance.now() - planned) / 20) * 1000;
      const goesOn = () => !stop && current.alive;
      let [encodeUs, timing] = [null, "cpu"];
      let round = async () => {
        const start = performance.now();
        await prepared.run(arrays);
        const ms = performance.now() - start;
        await pause();
        return ms;
      };
      if (current.kind === "gpu") {
        timing = "wall";
        for (const array of [arrays.query, arrays.key, arrays.value]) tensors.push(current.tensor(array));
        const [query, key, value] = tensors;
        bound = prepared.bind({ query, key, value });
        const encode = [];
        const { gpuDevice } = current;
        const submit = async (calls) => {
          const start = performance.now();
          for (let n = 0; n < calls; n += 1) {
            const encoder = gpuDevice.createCommandEncoder();
            const began = performance.now();
            bound.encode(encoder);
            encode.push(performance.now() - began);
            gpuDevice.queue.submit([encoder.finish()]);
          }
          await gpuDevice.queue.onSubmittedWorkDone();
          return (performance.now() - start) / calls;
        };
        const once = await submit(1);
        const calls = Math.max(1, Math.min(200, Math.ceil(ROUND_MS / Math.max(once, 0.01))));
        round = () => submit(calls);
        encodeUs = () => (encode.reduce((a, b) => a + b, 0) / encode.length) * 1000;
      }
      const warm = await warmUp(round, budget, goesOn);
      const times = [];
      const end = performance.now() + budget;
      while ((times.length < MIN_ROUNDS || performance.now() < end) && goesOn()) times.push(await round());
      if (times.length === 0) throw new Error("stopped before anything was timed");
      const median = quantile(times, 0.5);
      const [compute, memory] = roof ? [flops / (roof.gflops * 1e6), bytes / (roof.gbps * 1e6)] : [];
      return {
        ...(await opening(current, workload, roof, cold)),
        kernel: prepared.kernel,
        gradients: null,
        ...spread(times),
        ...warm,
        timing,
        gflops: flops / (median * 1e6),
        gbps: bytes / (median * 1e6),
        flops_per_byte: flops / bytes,
        roof: roof ? (compute >= memory ? "compute" : "memory") : null,
        roof_share: roof ? Math.max(compute, memory) / median : null,
        max_abs_error: report.maxAbsError,
        first_ms: prepareMs + firstRunMs,
        prepare_ms: prepareMs,
        pipelines: current.pipelines() - made,
        first_run_ms: firstRunMs,
        plan_us: planUs,
        bind_us: null,
        bind_wgpu_us: null,
        encode_us: encodeUs?.() ?? null,
        encode_wgpu_us: null,
        kernels: null,
      };
    } finally {
      bound?.free();
      for (const tensor of tensors) tensor.free();
      prepared.free();
    }
  }

  function show(roof) {
    const cell = (text, tag = "td") => Object.assign(document.createElement(tag), { textContent: text });
    const line = (cells) => {
      const line = document.createElement("tr");
      line.append(...cells);
      return line;
    };
    const head = line(COLUMNS.map((text) => cell(text, "th")));
    head.childNodes.forEach((each) => each.setAttribute("scope", "col"));
    const pair = (a, b) => (a === b ? `${a}` : `${a}/${b}`);
    const body = rows.map((row) => {
      const shape = `${row.batch} x ${pair(row.q_heads, row.kv_heads)} x ${row.q_len} x ${row.kv_len} x ${pair(row.head_dim, row.v_head_dim)}`;
      if (row.error) return line([cell(row.workload), cell(shape), cell(`failed: ${row.error}`)]);
      const share = row.roof_share === null ? "" : `${few(100 * row.roof_share)} % ${row.roof}`;
      const numbers = [row.median_ms.toFixed(3), row.p10_ms.toFixed(3), row.p90_ms.toFixed(3), few(row.gflops), few(row.gbps), share, row.max_abs_error.toExponential(1)];
      return line([cell(row.workload), cell(shape), cell(row.kernel), ...numbers.map((text) => cell(text))]);
    });
    const caption = document.createElement("caption");
    caption.textContent = roof
      ? `Roofs: ${few(roof.gflops)} GFLOP/s, ${few(roof.gbps)} GB/s, measured here by the wall clock.`
      : "No roofs: they are measured by shaders.";
    $("bench-table").replaceChildren(caption, head, ...body);
    $("bench-json").value = rows.map((row) => JSON.stringify(row)).join("\n");
  }

  return { name: "benchmark", run, failed: (error) => ($("bench-status").textContent = `Failed: ${error.message}`) };
}

/** The two roofs of a device: multiply-adds in f32, and bytes to and from memory. */
async function roofs({ gpuDevice }, budget) {
  const [STEPS, VECTORS, COPY] = [16, 4, Math.min(64 << 20, gpuDevice.limits.maxStorageBufferBindingSize, gpuDevice.limits.maxBufferSize)];
  const [fma, copy] = await roofShaders(STEPS, VECTORS);
  const storage = GPUBufferUsage.STORAGE;
  const params = gpuDevice.createBuffer({ size: 16, usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST });
  const buffers = [params, ...[16, COPY, COPY].map((size) => gpuDevice.createBuffer({ size, usage: storage }))];
  const [, sink, from, to] = buffers;
  const make = async (code, bound) => {
    const entries = bound.map(({ buffer, type }, binding) => ({ binding, visibility: GPUShaderStage.COMPUTE, buffer: { type } }));
    const layout = gpuDevice.createBindGroupLayout({ entries });
    const module = gpuDevice.createShaderModule({ code });
    const pipeline = await gpuDevice.createComputePipelineAsync({ layout: gpuDevice.createPipelineLayout({ bindGroupLayouts: [layout] }), compute: { module, entryPoint: "main" } });
    const group = gpuDevice.createBindGroup({ layout, entries: bound.map(({ buffer }, binding) => ({ binding, resource: { buffer } })) });
    return async (workgroups) => {
      const start = performance.now();
      const encoder = gpuDevice.createCommandEncoder();
      const pass = encoder.beginComputePass();
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(workgroups);
      pass.end();
      gpuDevice.queue.submit([encoder.finish()]);
      await gpuDevice.queue.onSubmittedWorkDone();
      return performance.now() - start;
    };
  };
  try {
    const uniform = { buffer: params, type: "uniform" };
    const multiply = await make(fma, [uniform, { buffer: sink, type: "storage" }]);
    const move = await make(copy, [uniform, { buffer: from, type: "read-only-storage" }, { buffer: to, type: "storage" }]);
    let rounds = 4;
    const groups = 1024;
    const set = (rounds) => {
      const bytes = new ArrayBuffer(16);
      new Float32Array(bytes).set([0.999, 0.001]);
      new Uint32Array(bytes)[2] = rounds;
      new Float32Array(bytes)[3] = -1e30;
      gpuDevice.queue.writeBuffer(params, 0, bytes);
    };
    const flops = () => groups * 256 * rounds * STEPS * 12 * 2;
    set(rounds);
    let ms = await multiply(groups);
    // long enough that the clock and the way to the GPU do not count
    while (ms < 30 && rounds < 1 << 16) {
      rounds *= Math.min(8, Math.max(2, Math.ceil(40 / Math.max(ms, 1))));
      set(rounds);
      ms = await multiply(groups);
    }
    const workgroups = Math.floor(COPY / 16 / (256 * VECTORS));
    await move(workgroups);
    const best = async (run) => {
      let least = Infinity;
      const end = performance.now() + budget;
      for (let n = 0; n < 3 || performance.now() < end; n += 1) least = Math.min(least, await run());
      return least;
    };
    const gflops = flops() / ((await best(() => multiply(groups))) * 1e6);
    const gbps = (2 * workgroups * 256 * VECTORS * 16) / ((await best(() => move(workgroups))) * 1e6);
    return { gflops, gbps };
  } finally {
    for (const buffer of buffers) buffer.destroy();
  }
}

#!/usr/bin/env python3
"""cpu_grid.py BINARY [ROUNDS] [NAME ...]: a grid of shapes on the CPU beside PyTorch and ONNX Runtime, in turn.

BINARY is `target/release/examples/time_shapes` (cargo build --release --example time_shapes). Needs numpy, torch, onnx and
onnxruntime. A line for each shape: the best of the rounds' medians of each, and the ratio of the better peer to ours, prepared
and as one call. Prints a table in Markdown with the geometric mean, worst shapes last.
"""
import json, math, os, statistics, subprocess, sys, time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import numpy as np, torch, onnx, onnxruntime as ort
import torch.nn.functional as F
from onnx import TensorProto as T, helper as h

THREADS = os.cpu_count()
torch.set_num_threads(THREADS)
# batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim
GRID = {}
for keys in (1, 2, 4, 8, 16):
    GRID[f"handful_{keys}"] = (1, 8, 8, 4096, keys, 40, 40)
GRID["handful_4_wide"] = (1, 8, 8, 1024, 4, 160, 160)
GRID["handful_16_of_64"] = (2, 10, 10, 4096, 16, 64, 64)
for rows, keys in ((4, 2048), (8, 4096), (1, 8192), (16, 1500)):
    GRID[f"narrow_{rows}x{keys}"] = (1, 8, 8, rows, keys, 16, 16)
GRID["rows_100_of_32"] = (1, 8, 8, 100, 100, 32, 32)
GRID["rows_100x950_of_32"] = (1, 8, 8, 100, 950, 32, 32)
GRID["single_rows_100"] = (32, 8, 8, 1, 100, 64, 64)
GRID["single_rows_128"] = (16, 12, 12, 1, 128, 64, 64)
GRID["narrow_keys_wide_values"] = (1, 8, 8, 256, 512, 32, 160)
GRID["wide_64x77"] = (1, 8, 8, 64, 77, 160, 160)
GRID["wide_256x77"] = (1, 8, 8, 256, 77, 160, 160)
GRID["sd15"] = (1, 8, 8, 4096, 77, 40, 40)
GRID["sdxl"] = (1, 20, 20, 1024, 77, 64, 64)
GRID["whisper_decode"] = (1, 8, 8, 1, 1500, 64, 64)
GRID["whisper_prefill"] = (1, 8, 8, 224, 1500, 64, 64)
GRID["square_512"] = (1, 8, 8, 512, 512, 64, 64)
GRID["gqa"] = (1, 32, 8, 128, 2048, 128, 128)
GRID["small"] = (1, 4, 4, 32, 32, 32, 32)


def timed(call, budget):
    call(), call()
    millis, begin = [], time.time()
    while time.time() - begin < budget or len(millis) < 5:
        start = time.perf_counter()
        call()
        millis.append((time.perf_counter() - start) * 1e3)
    return statistics.median(millis)


def peers(shape):
    b, hq, hk, lq, lk, d, dv = shape
    shapes = [(b, hq, lq, d), (b, hk, lk, d), (b, hk, lk, dv)]
    q, k, v = (np.random.default_rng(i).standard_normal(s, np.float32) for i, s in enumerate(shapes))
    tq, tk, tv = map(torch.from_numpy, (q, k, v))
    info = lambda n, s: h.make_tensor_value_info(n, T.FLOAT, s)
    graph = h.make_graph([h.make_node("Attention", ["q", "k", "v"], ["o"])], "a",
                         [info(n, s) for n, s in zip("qkv", shapes)], [info("o", (b, hq, lq, dv))])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"q": q, "k": k, "v": v}
    return {"torch": lambda: F.scaled_dot_product_attention(tq, tk, tv, enable_gqa=hq != hk), "ort": lambda: session.run(None, feed)}


def main():
    binary, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    chosen = {n: s for n, s in GRID.items() if not sys.argv[3:] or any(n.startswith(x) for x in sys.argv[3:])}
    rows = []
    for name, shape in chosen.items():
        calls, best = peers(shape), {}
        keep = lambda n, x: best.__setitem__(n, min(best.get(n, math.inf), x))
        for _ in range(rounds):
            out = subprocess.run([binary, "--seconds=0.2", ",".join(map(str, shape))], capture_output=True, text=True, check=True).stdout
            ours = json.loads(out)
            keep("ours", ours["median_ms"]), keep("call", ours["call_ms"])
            for peer, call in calls.items():
                keep(peer, timed(call, 0.2))
        peer = min(best["torch"], best["ort"])
        rows.append((peer / best["ours"], peer / best["call"], name, shape, best))
        print(name, {n: round(x, 4) for n, x in best.items()}, f"{rows[-1][0]:.2f} {rows[-1][1]:.2f}", file=sys.stderr, flush=True)
    print(f"| shape | batch, heads, rows x keys, widths | PyTorch {torch.__version__} | ONNX Runtime {ort.__version__} | ours | one call | better peer / ours | / one call |")
    print("|---|---|---|---|---|---|---|---|")
    for ratio, call, name, (b, hq, hk, lq, lk, d, dv), best in sorted(rows, key=lambda row: -row[0]):
        heads, widths = (hq if hq == hk else f"{hq} of {hk}"), (d if d == dv else f"{d}, {dv}")
        print(f"| {name} | {b}, {heads}, {lq} x {lk}, {widths} | {best['torch']:.3f} | {best['ort']:.3f} | {best['ours']:.3f} | {best['call']:.3f} | {ratio:.2f} | {call:.2f} |")
    mean = lambda of: math.exp(sum(math.log(row[of]) for row in rows) / len(rows))
    print(f"\ngeometric mean {mean(0):.2f}, one call {mean(1):.2f}; {THREADS} threads")


main()

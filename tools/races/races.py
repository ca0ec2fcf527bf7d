#!/usr/bin/env python3
"""Races, barriers and bounds of the shaders, found by the Khronos validation layer on a software driver.

    races.py check   --chroot DIR --program PROGRAM [--kernel NAME ...] [--case NAME ...]
    races.py bounds  --chroot DIR --program PROGRAM [--kernel NAME ...] [--case NAME ...]
    races.py planted --chroot DIR --program PROGRAM --shader FILE --kernel NAME --case NAME [--case NAME ...]

`check` runs small inputs through each kernel under the layer's detector of races in workgroup memory. `bounds` does the
same with the driver's own bounds checks switched off, and the layer's on: it tells every access to a storage buffer behind
its binding. `planted` takes each barrier of a shader away in turn, in a copy of the program, and says whether that is seen.
The status is 1 where something was found, or where a case could not be looked at. README.md says how to make DIR.
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SHADERS = os.path.join(HERE, "..", "..", "shaders")
# the last is not a kernel's name: the shaders of gradients, with the forward's before them
KERNELS = ["fused", "split", "rows", "plain", "tiled", "cooperative", "backward"]
# the layer's counters take as much workgroup memory again as a shader, of the driver's 32 KiB
MEMORY = {"cooperative": 11000}
MEMORY_OF_OTHERS = 16000


def numbers(rng, shape):
    count = 1
    for n in shape:
        count *= n
    return [rng.gauss(0.0, 1.0) for _ in range(count)]


def packed(dtype, values):
    form = {"F32": "f", "F16": "e", "I32": "i", "BOOL": "?"}[dtype]
    return struct.pack(f"<{len(values)}{form}", *values)


def save(path, tensors, options):
    """A safetensors file: name -> (dtype, shape, values)."""
    head, blobs, at = {"__metadata__": options}, [], 0
    for name, (dtype, shape, values) in tensors.items():
        data = packed(dtype, values)
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
        blobs.append(data)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def inputs(batch=1, heads=2, kv_heads=None, rows=40, keys=150, dim=8, v_dim=None, half=False, options=None, wild=False, terms=()):
    """One problem with the terms that are named, and infinite and NaN values that a mask hides from all rows but one."""
    rng = random.Random(7)
    kv_heads, v_dim, dtype = kv_heads or heads, v_dim or dim, "F16" if half else "F32"
    tensor = lambda *shape: (dtype, shape, numbers(rng, shape))
    tensors = {
        "query": tensor(batch, heads, rows, dim),
        "key": tensor(batch, kv_heads, keys, dim),
        "value": tensor(batch, kv_heads, keys, v_dim),
    }
    if "mask" in terms:
        # a block of keys that no row sees, and later rows that see fewer
        mask = []
        for _ in range(batch):
            for row in range(rows):
                share = 0.6 if row < rows // 2 else 0.3
                mask += [rng.random() < share and not 64 <= key < 128 for key in range(keys)]
        if wild:
            values = tensors["value"][2]
            for plane in range(batch * kv_heads):
                for key, column, value in [(5, None, float("inf")), (keys - 3, 1, float("nan"))]:
                    start = (plane * keys + key) * v_dim
                    for d in range(v_dim):
                        if column in (None, d):
                            values[start + d] = value
            for entry in range(batch):
                for row in range(rows):
                    start = (entry * rows + row) * keys
                    mask[start + 5] = row == 0
                    mask[start + keys - 3] = False
        tensors["mask"] = ("BOOL", (batch, 1, rows, keys), mask)
    if "bias" in terms:
        shape = (1, heads, rows, keys)
        tensors["bias"] = ("F32", shape, numbers(rng, shape))
    if "kv_lens" in terms:
        tensors["kv_lens"] = ("I32", (batch,), [keys - 11] + [keys // 2] * (batch - 1))
    if "ranges" in terms:
        ends = lambda low, high: [rng.randrange(low, high) for _ in range(batch * rows)]
        tensors["row_start"] = ("I32", (batch, rows), ends(0, keys // 3))
        tensors["row_end"] = ("I32", (batch, rows), ends(keys // 2, keys))
    if "alibi" in terms:
        tensors["alibi_slopes"] = ("F32", (heads,), [rng.random() for _ in range(heads)])
    if "sinks" in terms:
        tensors["sinks"] = ("F32", (heads,), numbers(rng, (heads,)))
    return tensors, options or {}


def cases():
    """Small ones: the layer slows a driver a hundredfold. Lengths are no multiples of any block."""
    every = ["kv_lens", "ranges", "alibi", "sinks"]
    return {
        "plain": inputs(),
        "mask_wild": inputs(batch=2, terms=["mask"], wild=True),
        "bias_causal": inputs(heads=4, kv_heads=2, terms=["bias"], options={"causal": "bottom_right"}),
        "terms_f16": inputs(batch=2, half=True, terms=every, options={"softcap": "5.0", "offset": "bottom_right"}),
        "ragged": inputs(rows=19, keys=133, dim=10, v_dim=6),
        "few": inputs(batch=2, heads=4, kv_heads=2, rows=1, keys=700, terms=["kv_lens"]),
        "few_mask": inputs(batch=2, rows=3, keys=600, terms=["mask"], wild=True),
        "wide": inputs(rows=9, keys=140, dim=72, v_dim=80),
        # the last row and key of bias and mask are the last of their buffers
        "few_bias": inputs(rows=1, keys=601, terms=["bias"]),
        "few_mask_odd": inputs(rows=2, keys=603, terms=["mask"]),
        "bias_many": inputs(rows=33, keys=77, terms=["bias"]),
        "mask_f16": inputs(rows=33, keys=77, half=True, terms=["mask"]),
        "mask_bias_f16": inputs(rows=45, keys=91, half=True, terms=["mask", "bias"]),
    }


def with_gradients(tensors):
    """The same, with the gradients of output and log-sum-exp."""
    rng = random.Random(8)
    batch, heads, rows, _ = tensors["query"][1]
    shape = (batch, heads, rows, tensors["value"][1][3])
    gradients = {"d_output": shape, "d_lse": shape[:3]}
    return {**tensors, **{name: ("F32", of, numbers(rng, of)) for name, of in gradients.items()}}


class Chroot:
    def __init__(self, root, program):
        self.root = root
        self.folder = os.path.join(root, "in")
        os.makedirs(self.folder, exist_ok=True)
        self.program = self.bring(program, "program")
        for name, (tensors, options) in cases().items():
            save(os.path.join(self.folder, name + ".safetensors"), tensors, options)
            save(os.path.join(self.folder, name + ".backward.safetensors"), with_gradients(tensors), options)
        # layer.c, put where the loader of the chroot looks
        library = os.path.join(self.folder, "libchecks.so")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, os.path.join(HERE, "layer.c")], check=True)
        layers = os.path.join(root, "usr/share/vulkan/explicit_layer.d")
        os.makedirs(layers, exist_ok=True)
        shutil.copy2(os.path.join(HERE, "layer.json"), layers)

    def bring(self, path, name):
        shutil.copy2(path, os.path.join(self.folder, name))
        return "/in/" + name

    def run(self, program, case, kernel, settings):
        """What the program and the layer print, and for how long they did."""
        environment = {
            "HOME": "/tmp",
            "XDG_RUNTIME_DIR": "/tmp",
            "PATH": "/usr/bin:/bin",
            "WGPU_BACKEND": "vulkan",
            "VK_ICD_FILENAMES": "/usr/share/vulkan/icd.d/lvp_icd.json",
            "MESA_SHADER_CACHE_DISABLE": "true",
            "VK_LAYER_VALIDATE_CORE": "0",
            "VK_LAYER_REPORT_FLAGS": "error,warn",
            "VK_LAYER_DUPLICATE_MESSAGE_LIMIT": "3",
            "VK_LAYER_GPUAV_ENABLE": "1",
            # the first stands between the program and the second
            "VK_INSTANCE_LAYERS": "VK_LAYER_CROSS_ATTENTION_checks:VK_LAYER_KHRONOS_validation",
            "WORKGROUP_MEMORY": str(MEMORY.get(kernel, MEMORY_OF_OTHERS)),
            **{name: value for name, value in os.environ.items() if name == "LP_NATIVE_VECTOR_WIDTH"},
            **settings,
        }
        words = [f"{name}={value}" for name, value in environment.items()]
        file, choice = (f"{case}.backward", ["--backward"]) if kernel == "backward" else (case, ["--kernel", kernel])
        arguments = ["run", f"/in/{file}.safetensors", "-o", "/tmp/races_out.safetensors", "--device", "llvmpipe"]
        arguments += [*choice, "--verify"]
        command = ["chroot", self.root, "env", "-i", *words, program, *arguments]
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=3600)
        return done.stdout + done.stderr, done.returncode, time.time() - start


DETECTOR = {"VK_LAYER_GPUAV_DEBUG_PRINT_INSTRUMENTATION_INFO": "1"}
# its descriptor post-processing falls over on this driver without robustness, and says nothing of bounds
UNCHECKED = {"UNCHECKED": "1", "VK_LAYER_GPUAV_POST_PROCESS_DESCRIPTOR_INDEXING": "0", **DETECTOR}


def skipped(text):
    """Why a kernel does not take a case, where it says so."""
    found = re.search(r"no kernel can compute this: (.*)|needs [^\n]*the device[^\n]*|is stored as [^\n]*", text)
    return found.group(0)[:100] if found else None


def races(text):
    counts = [int(n) for n in re.findall(r"SharedMemoryDataRacePass instrumentation count: (\d+)", text)]
    return counts, collections.Counter(re.findall(r'shared memory variable "([^"]*)"', text))


def check(chroot, kernels, names):
    bad = 0
    for kernel in kernels:
        for name in names:
            text, status, seconds = chroot.run(chroot.program, name, kernel, DETECTOR)
            why_not = skipped(text) if status else None
            if why_not:
                print(f"{kernel:12} {name:14} not run: {why_not}", flush=True)
                continue
            counts, found = races(text)
            # a pipeline whose workgroup memory does not fit with the layer's own is left out without a word
            looked_at = max(counts, default=0) > 0
            problem = found or status or not looked_at
            bad += bool(problem)
            verdict = f"races {dict(found)}" if found else ("no race" if looked_at else "NOT LOOKED AT")
            print(f"{kernel:12} {name:14} {seconds:6.1f} s  {verdict}, {sum(counts)} places, status {status}", flush=True)
    return bad


def bounds(chroot, kernels, names):
    bad = 0
    for kernel in kernels:
        for name in names:
            text, status, seconds = chroot.run(chroot.program, name, kernel, UNCHECKED)
            why_not = skipped(text) if status else None
            if why_not:
                print(f"{kernel:12} {name:14} not run: {why_not}", flush=True)
                continue
            errors = re.findall(r"Validation Error: \[ ([^\]]*) \]", text)
            found = collections.Counter(re.findall(r"binding = (\d+), index 0\)\s+access out of bounds", text))
            # reads and writes of storage buffers that were instrumented
            places = sum(int(n) for n in re.findall(r"DescriptorClassGeneralBufferPass instrumentation count: (\d+)", text))
            bad += bool(errors or status or not places)
            other = f", other errors {dict(collections.Counter(errors))}" if errors and not found else ""
            verdict = f"behind bindings {dict(found)}" if found else ("within bounds" if places else "NOT LOOKED AT")
            print(f"{kernel:12} {name:14} {seconds:6.1f} s  {verdict}{other}, {places} places, status {status}", flush=True)
    return bad


def barriers(program, shader):
    """Barriers of a shader's text in the program: line, place, text."""
    paths = [os.path.join(folder, shader) for folder in (SHADERS, os.path.join(SHADERS, "common"))]
    path = next(path for path in paths if os.path.exists(path))
    with open(path, "rb") as file:
        text = file.read()
    base = program.find(text)
    if base < 0 or program.find(text, base + 1) >= 0:
        sys.exit(f"{shader} is not once in the program: build it from these shaders")
    found = re.finditer(rb"workgroupBarrier\(\);|workgroupUniformLoad\(&(\w+)\)", text)
    return [(text.count(b"\n", 0, one.start()) + 1, base + one.start(), one.group(0)) for one in found]


def planted(chroot, program, shader, kernel, names):
    with open(program, "rb") as file:
        whole = file.read()
    missed = 0
    for line, at, text in barriers(whole, shader):
        if text.startswith(b"workgroupBarrier"):
            instead = b" " * len(text)
        else:
            # a plain load, no barrier
            instead = text.replace(b"workgroupUniformLoad(&", b"(").ljust(len(text))
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.write(whole[:at] + instead + whole[at + len(text) :])
        os.chmod(file.name, 0o755)
        inside = chroot.bring(file.name, "planted")
        os.remove(file.name)
        verdict = "NOT CAUGHT"
        for name in names:
            output, status, _ = chroot.run(inside, name, kernel, DETECTOR)
            _, found = races(output)
            if found:
                verdict = f"caught by {name}: {dict(found)}, result {'off' if status else 'right'}"
                break
        missed += verdict == "NOT CAUGHT"
        print(f"{shader}:{line} {text.decode()[:24]:24} {verdict}", flush=True)
    return missed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "bounds", "planted"])
    parser.add_argument("--chroot", required=True, help="folder of the Debian sid")
    parser.add_argument("--program", required=True, help="the program, built with --features cli")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="may be repeated; all otherwise")
    parser.add_argument("--case", action="append", choices=sorted(cases()), help="may be repeated; all otherwise")
    parser.add_argument("--shader", help="file in shaders/ or shaders/common/, for planted")
    given = parser.parse_args()
    chroot = Chroot(given.chroot, given.program)
    names = given.case or list(cases())
    kernels = given.kernel or [kernel for kernel in KERNELS if kernel != "cooperative"]
    if given.what == "planted":
        if not given.shader or not given.kernel or len(given.kernel) != 1:
            parser.error("planted needs --shader and one --kernel")
        found = planted(chroot, given.program, given.shader, given.kernel[0], names)
    else:
        found = {"check": check, "bounds": bounds}[given.what](chroot, kernels, names)
    print(f"{found} found" if found else "nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

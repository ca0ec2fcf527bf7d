#!/usr/bin/env python3
"""Writes the tables of KERNELS.md: what the compilers of real GPU drivers make of the kernels. No GPU is needed.

    tools/kernel_table.py --chroot DIR [--check]

The program's `shaders` gives SPIR-V for each kernel, head_dim and class of device; tools/shader_stats compiles it with a
driver; loops and FMAs are counted in the driver's assembly text. tools/README.md says which drivers are needed and how
DIR is made. `--check` writes nothing and fails if the tables are not what they would be.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "KERNELS.md"
BEGIN, END = "<!-- begin of tables by tools/kernel_table.py -->\n", "<!-- end of tables -->\n"
HEAD_DIMS = [40, 64, 128]
# title, kernel, class of device, query length, key length
KERNELS = [
    ("`tiled` for discrete GPUs, 4096 x 77", "tiled", "discrete", 4096, 77),
    ("`tiled` for integrated GPUs, 4096 x 77", "tiled", "integrated", 4096, 77),
    ("`split` for discrete GPUs, 1 x 1500", "split", "discrete", 1, 1500),
    ("`fused`, 4096 x 77", "fused", "discrete", 4096, 77),
]
# the two passes of a backward, by whether keys are owned; head_dim 64 and 128, discrete and integrated
BACKWARD = [("queries", False), ("keys and values", True)]
# how keys and values are stored, and the GPUs whose code for `split` is read for it: 1 x 1500, head_dim 64
STORED, STORED_GPUS, STORED_DIM = ["f32", "f16", "bf16", "int8", "int8_32"], ["navi31", "ada", "apple-m1"], 64
LIB = "/usr/lib/x86_64-linux-gnu"
ICD = "/usr/share/vulkan/icd.d"


class Gpu:
    """A GPU that a driver compiles for: on the host or in the chroot, with this environment."""

    def __init__(self, name, in_chroot, icd, env, subgroup=None):
        self.name, self.in_chroot, self.subgroup = name, in_chroot, subgroup
        # the loader's name of today goes before the one of old, which is all that old loaders know
        files = dict.fromkeys(["VK_DRIVER_FILES", "VK_ICD_FILENAMES"], f"{ICD}/{icd}")
        self.env = {**env, **files, "MESA_SHADER_CACHE_DISABLE": "true"}

    def compile(self, args, spirv):
        """What tools/shader_stats says of a file."""
        program, file = str(args.stats), str(spirv)
        command = []
        if self.in_chroot:
            # the chroot has no mounts: what is run and read is copied in, under names of its own
            folder = tempfile.mkdtemp(prefix="kernel_table.", dir=args.chroot / "tmp")
            shutil.copy(program, folder)
            shutil.copy(file, folder)
            inside = Path("/tmp") / Path(folder).name
            program, file = str(inside / Path(program).name), str(inside / Path(file).name)
            command = ["chroot", str(args.chroot)]
        command += ["env", *(f"{name}={value}" for name, value in self.env.items()), program, file]
        command += [str(self.subgroup)] if self.subgroup else []
        done = subprocess.run(command, capture_output=True, text=True)
        if self.in_chroot:
            shutil.rmtree(folder)
        if done.returncode != 0:
            raise SystemExit(f"{self.name}, {spirv.name}: {done.stderr.strip() or done.returncode}")
        # in front of it a driver may print its code; the first program of two is the shader, the second what runs once before it
        at = done.stdout.index('{"device"')
        stats = json.loads(done.stdout[at : done.stdout.index("\n", at)])
        if lines := re.findall(r"^ *[0-9a-f]+: .*", done.stdout, re.MULTILINE):
            first = next(n for n, line in enumerate(lines) if line.split()[2] == "stop")
            stats["texts"]["AGX assembly"] = "\n".join(lines[:first])
        return stats


def shim(driver):
    return {"LD_PRELOAD": f"{LIB}/lib{driver}_noop_drm_shim.so"}


GPUS = [
    Gpu("navi21", False, "radeon_icd.x86_64.json", {"RADV_FORCE_FAMILY": "navi21"}),
    Gpu("gfx1100", False, "radeon_icd.x86_64.json", {"RADV_FORCE_FAMILY": "gfx1100"}),
    Gpu("navi31", True, "radeon_icd.json", {"AMDGPU_GPU_ID": "navi31", **shim("amdgpu")}, 32),
    Gpu("gfx1201", True, "radeon_icd.json", {"AMDGPU_GPU_ID": "gfx1201", **shim("amdgpu")}),
    Gpu("turing", True, "nouveau_icd.json", {"NOUVEAU_CHIPSET": "0x164", **shim("nouveau")}),
    Gpu("ada", True, "nouveau_icd.json", {"NOUVEAU_CHIPSET": "0x192", **shim("nouveau")}),
    Gpu("adreno740", True, "freedreno_icd.json", {"FD_GPU_ID": "740", **shim("freedreno")}),
    Gpu("apple-m1", True, "asahi_icd.json", {"AGX_MESA_DEBUG": "shaders", **shim("asahi")}),
]


# ---- assembly: blocks, loops, FMAs


class Block:
    def __init__(self, label):
        self.label, self.fmas, self.instructions, self.targets = label, 0, 0, []
        # whether it may run on into the next block
        self.falls_through = True


def blocks(texts):
    """The blocks of the main program in their order; none where the driver gives no assembly."""
    for name, label, jump, count in [
        ("NAK assembly", r"block(?:\.u)? (\d+) L\d+", r"^\} -> \[(.*)\]", count_nak),
        ("IR3 Assembly", r"(l\d+):$", r"#(l\d+)", count_ir3),
        ("Assembly", r"(BB\d+):", r"\b(BB\d+)\b", count_aco),
    ]:
        if name in texts:
            break
    else:
        return []
    found = [Block("entry")]
    for line in texts[name].splitlines():
        if start := re.match(label, line):
            found.append(Block(start[1]))
            continue
        code = re.split(r"//|;", line)[0].strip()
        if re.match(r"\} -> |s_branch|s_endpgm|(\(.*\))?(jump|end\b)", code):
            found[-1].falls_through = False
        for targets in re.findall(jump, code):
            found[-1].targets += [target.strip() for target in targets.split(",") if target.strip()]
        if code and not code.startswith(("}", "@")):
            fmas, instructions = count(code)
            found[-1].fmas += fmas
            found[-1].instructions += instructions
    return found


def count_aco(code):
    """AMD. A dual instruction with two FMAs counts as two of them, and as one instruction."""
    if code.startswith("v_dual"):
        return len(re.findall(r"v_dual_(?:fma|fmac|fmamk|fmaak)_f32", code)), 1
    if re.match(r"v_pk_fma_f32", code):
        return 2, 1
    return int(bool(re.match(r"v_(?:fma|fmac|fmamk|fmaak|fma_mix)_f32", code))), 1


def count_nak(code):
    return int(bool(re.search(r"= ffma", code))), 1


def count_ir3(code):
    """Adreno. (rpt2) repeats an instruction twice more."""
    repeats = sum(int(n) for n in re.findall(r"\(rpt(\d)\)", code)) + 1
    return repeats * int("mad.f32" in code), repeats


def loops(found):
    """Natural loops: sets of blocks' places."""
    place = {block.label: n for n, block in enumerate(found)}
    after = [{place[target] for target in block.targets if target in place} for block in found]
    for n, block in enumerate(found[:-1]):
        if block.falls_through:
            after[n].add(n + 1)
    before = [{m for m in range(len(found)) if n in after[m]} for n in range(len(found))]
    # a loop is closed by an edge to a block that is on every way to where the edge comes from
    dominators = [set(range(len(found))) if before[n] else {n} for n in range(len(found))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for n in range(1, len(found)):
            if before[n]:
                new = set.intersection(*(dominators[m] for m in before[n])) | {n}
                changed |= new != dominators[n]
                dominators[n] = new
    bodies = {}
    for n, targets in enumerate(after):
        for head in targets & dominators[n]:
            body, left = bodies.setdefault(head, {head}), [n]
            while left:
                if (m := left.pop()) not in body:
                    body.add(m)
                    left += before[m]
    return list(bodies.values())


def share_of_fmas(found, shader):
    """Share of FMAs among the instructions of the loop over keys, as text."""
    every_loop = loops(found)
    fmas = lambda loop: sum(found[n].fmas for n in loop)
    if shader["shader"] == "backward":
        return share_of_backward(found, every_loop, shader)
    if shader["shader"] != "tiled":
        # loops over the width of a row and over keys, whose trips are not known here: each by itself
        inner = [loop for loop in every_loop if fmas(loop) and not any(other < loop for other in every_loop)]
        inner.sort(key=min)
        if not inner and every_loop:
            # the compiler wrote the inner loops out: all of the loop with the most FMAs
            inner = [max(every_loop, key=lambda loop: (fmas(loop), -len(loop)))]
        return " and ".join(percent(fmas(loop), sum(found[n].instructions for n in loop)) for loop in inner)
    over_keys = max(every_loop, key=lambda loop: (fmas(loop), -len(loop)))
    inner = [loop for loop in every_loop if loop < over_keys]
    constants = shader["constants"]
    wanted = fmas_of_tiled(constants)
    most = {constants[name] for name in ["KEY_CHUNKS", "LANE_PASSES", "VALUE_TURNS"]}
    choices = sorted({n for trips in most for n in range(1, trips + 1) if trips % n == 0})
    best = None
    # a compiler may unroll a loop, in part or in full: the trips are those that give the number of FMAs there must be
    for trips in itertools.product(choices, repeat=len(inner)):
        weight = {n: 1 for n in over_keys}
        for loop, times in zip(inner, trips):
            for n in loop:
                weight[n] *= times
        counted = sum(found[n].fmas * weight[n] for n in over_keys)
        everything = sum(found[n].instructions * weight[n] for n in over_keys)
        # loops without FMAs count once: they do not change the number
        key = (abs(counted - wanted), everything)
        if best is None or key < best[0]:
            best = (key, counted, everything)
    _, counted, everything = best
    if abs(counted - wanted) > 0.05 * wanted:
        raise SystemExit(f"tiled: {counted} FMAs counted in the loop over keys, there must be {wanted}")
    return percent(counted, everything)


def share_of_backward(found, every_loop, shader):
    """Of the loop over tiles of pairs: the loops over a row's width weighted by their trips, those that ask again pair by pair, which
    only infinite or NaN elements make run, left out."""
    fmas = lambda loop: sum(found[n].fmas for n in loop)
    over_tiles = max(every_loop, key=lambda loop: (fmas(loop), -len(loop)))
    c, dims = shader["constants"], shader["overrides"]
    pairs, chunk = c["ROW_REG"] * c["KEY_REG"], 4 * c["CHUNK"]
    weight = {n: 1 for n in over_tiles}
    for loop in (loop for loop in every_loop if loop < over_tiles):
        # the first product of a chunk may be a multiplication, and a loop may be unrolled in part
        chunks = -(-fmas(loop) // (pairs * chunk))
        alone = c["OWN_REG"] * 4 * c["COLUMNS"] >= fmas(loop) > 0
        for n in loop:
            weight[n] = 0 if alone else -(-dims["HEAD_DIM"] // chunk) // chunks if fmas(loop) else 1
    counted = sum(found[n].fmas * weight[n] for n in over_tiles)
    everything = sum(found[n].instructions * weight[n] for n in over_tiles)
    others = c["STEP"] * c["GROUPS"] * c["LANES"]
    products = (c["DOT_PRODUCTS"] + c["WEIGHT_PRODUCTS"]) * c["OWN_REG"] * 4 * c["COLUMNS"] * others
    wanted = (1 + c["VALUE_TURNS"]) * pairs * -(-dims["HEAD_DIM"] // chunk) * chunk + products
    if abs(counted - wanted) > 0.1 * wanted:
        raise SystemExit(f"backward: {counted} FMAs counted in the loop over tiles, there must be {wanted}")
    return percent(counted, everything)


def fmas_of_tiled(c):
    """FMAs of an invocation in a block of keys: scores, weighted sums, and the rescaling of the output."""
    scores = c["ROWS"] * c["KEYS"] * 4 * c["KEY_CHUNK"] * c["KEY_CHUNKS"]
    columns = c["ROWS"] * 4 * c["COLUMNS"] * c["VALUE_CHUNKS"]
    return scores + columns * c["KEYS"] * c["KEY_LANES"] + columns


# ---- assembly of `split`: what is loaded of a key, instructions for it


class Dialect:
    """How lines of a driver's assembly are read. `load` has the bits of a load from buffers at an address of its own in its
    first group, `label` and `back` name the target of a jump."""

    def __init__(self, text, barrier, load, bits, fmas, label, back):
        self.text, self.barrier, self.load, self.bits, self.fmas, self.label, self.back = text, barrier, load, bits, fmas, label, back


DIALECTS = [
    Dialect("NAK assembly", r"\bbar\.sync", r"ld\.global\S*\.b(\d+)", int, lambda code: count_nak(code)[0], r"block(?:\.u)? (\d+) ", r"^\} -> \[(.*)\]"),
    Dialect("Assembly", r"\bs_barrier\b", r"(?<!s_)buffer_load_[a-z]*(\d+)", int, lambda code: count_aco(code)[0], r"(BB\d+):", r"\b(BB\d+)\b"),
    # an address in uniform registers, du, alone is one of the parameters
    Dialect("AGX assembly", r"\bbarrier$", r"load +\S+ du\d+, \$?r\d+, .*(i(?:8|16|32)(?:, [xyzw]+)?),", lambda form: int(re.match(r"i(\d+)", form)[1]) * len((form.split(", ") + ["x"])[1]), lambda code: int("ffma" in code), None, None),
]  # fmt: skip


class Part:
    """Of the code between two barriers: FMAs, instructions, and the bits of each load, inner loops by their trips."""

    def __init__(self, lines, dialect):
        self.lines, self.dialect = lines, dialect
        self.inner = self.inner_loop()

    def inner_loop(self):
        """First and last line of the innermost loop with the most FMAs, if there is one."""
        place, found = {}, []
        for n, line in enumerate(self.lines):
            if self.dialect.label is None:
                place[line.split(":")[0].strip()] = n
                if jump := re.search(r"jmp_any +(-\d+)", line):
                    target = int(line.split(":")[0], 16) + int(jump[1])
                    found.append((place.get(f"{target:x}"), n))
            elif label := re.match(self.dialect.label, line):
                place[label[1]] = n
            else:
                targets = [target.strip() for jump in re.findall(self.dialect.back, line) for target in jump.split(",")]
                found += [(place.get(target), n) for target in targets]
        found = [(a, b) for a, b in found if a is not None and self.fmas(a, b)]
        inner = [one for one in found if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in found)]
        return max(inner, key=lambda one: self.fmas(*one), default=None)

    def code(self, start, end):
        for line in self.lines[start : end + 1]:
            code = re.split(r"//|;", line)[0].strip()
            if code and not code.startswith(("}", "@", "block")) and not code.endswith(":"):
                yield code

    def fmas(self, start, end):
        return sum(self.dialect.fmas(code) for code in self.code(start, end))

    def instructions(self, start, end):
        return sum(1 for _ in self.code(start, end))

    def loads(self, start, end):
        return [self.dialect.bits(load[1]) for code in self.code(start, end) if (load := re.search(self.dialect.load, code))]

    def whole(self):
        return 0, len(self.lines) - 1

    def weighted(self, count, trips):
        """Of all lines, the inner loop so many times."""
        outside = count(*self.whole())
        return outside + count(*self.inner) * (trips - 1) if self.inner else outside


def split_by_format(stats, shader):
    """A row's cells: loads of a key for the scores, instructions for them, and the same of a value's vec4."""
    dialect = next(dialect for dialect in DIALECTS if dialect.text in stats["texts"])
    parts, lines = [], []
    for line in stats["texts"][dialect.text].splitlines() + ["end"]:
        if re.search(dialect.barrier, re.split(r"//|;", line)[0].strip()) or line == "end":
            parts.append(Part(lines, dialect))
            lines = []
        else:
            lines.append(line)
    parts.sort(key=lambda part: len(part.loads(*part.whole())) and part.fmas(*part.whole()), reverse=True)
    scores, values = parts[:2] if shader["constants"]["KEYS"] * STORED_DIM > 8 else parts[1::-1]
    keys, wanted = shader["constants"]["KEYS"], shader["constants"]["KEYS"] * STORED_DIM
    # the first product of a chain has nothing to be added to
    trips = 1
    if scores.inner and scores.fmas(*scores.whole()) < 0.8 * wanted:
        outside = scores.fmas(*scores.whole()) - scores.fmas(*scores.inner)
        trips = round((wanted - outside) / scores.fmas(*scores.inner))
    counted = scores.weighted(scores.fmas, trips)
    if not 0.8 * wanted <= counted <= 1.1 * wanted:
        raise SystemExit(f"split: {counted} FMAs counted for scores, there must be {wanted}")
    key_loads = scores.weighted(scores.loads, 1) + (trips - 1) * (scores.loads(*scores.inner) if scores.inner else [])
    instructions = round(scores.weighted(scores.instructions, trips) / keys)
    # an invocation of the second product goes over keys with one vec4 of each; a compiler may take several at once
    at_once = max(1, values.fmas(*values.inner) // 4)
    value_loads = values.loads(*values.inner)
    return [
        loads_in_words(key_loads, keys),
        str(instructions),
        loads_in_words(value_loads, at_once),
        str(round(values.instructions(*values.inner) / at_once)),
    ]


def loads_in_words(loads, keys):
    """As 4 x 128 + 1 x 32 bits, 68 bytes; of each of so many keys."""
    words = [f"{loads.count(bits) / keys:g} x {bits}" for bits in sorted(set(loads), reverse=True)]
    return f"{' + '.join(words)} bits, {sum(loads) / 8 / keys:g} bytes"


def resources(stats):
    """Registers and spills."""
    s = stats["statistics"]
    spilled = [s[name] for name in ["Spilled VGPRs", "Spills to memory", "Spills"] if name in s]
    registers = next(f"{s[name]} {unit}" for name, unit in [("VGPRs", "VGPRs"), ("Number of GPRs", "GPRs"), ("GPRs", "GPRs")] if name in s)
    return registers, str(sum(spilled))


def stored_table(args, folder):
    head = ["GPU", "stored", "loads of a key", "instructions", "loads of a value's vec4", "instructions", "registers", "spills"]
    lines = ["", f"**`split` by how keys and values are stored, 1 x 1500, head_dim {STORED_DIM}**", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    shaders = {}
    for kv in STORED:
        shaders[kv] = shader_of(args, "split", "discrete", STORED_DIM, 1, 1500, folder / f"stored-{kv}", ["--kv", kv])
    for gpu in (gpu for gpu in GPUS if gpu.name in STORED_GPUS):
        for kv, (shader, spirv) in shaders.items():
            stats = gpu.compile(args, spirv)
            lines.append("| " + " | ".join([gpu.name, kv, *split_by_format(stats, shader), *resources(stats)]) + " |")
    return lines


def percent(part, whole):
    return f"{round(100 * part / whole)} %"


# ---- tables


def cell(stats, shader):
    """Registers, occupancy, share of FMAs, cycles; spills to memory in bold, where there are any."""
    s = stats["statistics"]
    if "VGPRs" in s:
        words = [f"{s['VGPRs']} VGPRs", f"{s['Subgroups per SIMD']} waves"]
        spills, cycles = s["Spilled VGPRs"], s["Inverse Throughput"]
        if s["Spilled SGPRs"]:
            words.append(f"{s['Spilled SGPRs']} SGPR spills")
    elif "Number of GPRs" in s:
        words = [f"{s['Number of GPRs']} GPRs", f"{s['Max warps/SM']} warps"]
        spills, cycles = s["Spills to memory"], s["Static cycle count"]
    elif "Max Waves Per Core" in s:
        words = [f"{s['Registers used']} x 4 registers", f"{s['Max Waves Per Core']} waves"]
        spills, cycles = s["STP Count"], None
    else:
        words = [f"{s['GPRs']} GPRs", f"{s['Threads']} threads"]
        spills, cycles = s["Spills"], s["ALU"]
    if spills:
        words.append(f"**{spills} spills**")
    found = blocks(stats["texts"])
    if found:
        words.append(share_of_fmas(found, shader))
    if cycles is not None:
        words.append(f"{cycles:,} cycles".replace(",", "\u202f"))
    return ", ".join(words)


def backward_table(args, folder):
    jobs, rows = [], []
    for device_class in ["discrete", "integrated"]:
        for head_dim in HEAD_DIMS:
            where = folder / f"backward-{device_class}-{head_dim}"
            for title, own_keys in BACKWARD:
                wanted = lambda shader: (shader["constants"] or {}).get("OWN_KEYS") == own_keys
                found = shader_of(args, "backward", device_class, head_dim, 1024, 1024, where, ["--force"], wanted)
                rows.append((title, device_class, head_dim, found))
    lines = []
    for title, _ in BACKWARD:
        for device_class in ["discrete", "integrated"]:
            of = [(head_dim, found) for name, kind, head_dim, found in rows if (name, kind) == (title, device_class)]
            heads = [f"head_dim {d}, {shader['workgroup_bytes'] / 1024:.1f} KiB" for d, (shader, _) in of]
            lines += ["", f"**`backward`, gradients of {title}, for {device_class} GPUs, 1024 x 1024**", ""]
            lines += ["| GPU | " + " | ".join(heads) + " |", "|---|" + "---|" * len(of)]
            for gpu in GPUS:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    stats = list(pool.map(lambda found: gpu.compile(args, found[1][1]), of))
                cells = [cell(found, shader) for found, (_, (shader, _)) in zip(stats, of)]
                lines.append(f"| {gpu.name} | " + " | ".join(cells) + " |")
    return lines


def shader_of(args, kernel, device_class, head_dim, q_len, kv_len, folder, more=(), wanted=lambda shader: True):
    """The list's entry and the file of a kernel's first shader that is wanted."""
    choice = ["--backward"] if kernel == "backward" else ["--kernel", kernel]
    command = [
        args.program, "shaders", *choice, "--device-class", device_class, "--workgroup-memory", "32768",
        "--q-heads", "8", "--q-len", q_len, "--kv-len", kv_len, "--head-dim", head_dim, "--target", "spirv", "-o", folder, *more,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    listed = json.loads((folder / "manifest.json").read_text())["shaders"]
    shader = next(shader for shader in listed if shader["shader"] == kernel and wanted(shader))
    return shader, folder / shader["files"][0]["file"]


def tables(args, folder):
    shaders = {}
    for title, kernel, device_class, q_len, kv_len in KERNELS:
        for head_dim in HEAD_DIMS:
            where = folder / f"{kernel}-{device_class}-{head_dim}"
            shaders[title, head_dim] = shader_of(args, kernel, device_class, head_dim, q_len, kv_len, where)
    jobs = [(gpu, key) for gpu in GPUS for key in shaders]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip([(gpu.name, key) for gpu, key in jobs], pool.map(lambda job: job[0].compile(args, shaders[job[1]][1]), jobs)))
    lines = ["| GPU | driver | subgroup |", "|---|---|---|"]
    first = next(iter(shaders))
    for gpu in GPUS:
        stats = found[gpu.name, first]
        lines.append(f"| {gpu.name} | {stats['driver']} | {stats['subgroup_size']} |")
    for title, *_ in KERNELS:
        memory = [shaders[title, head_dim][0]["workgroup_bytes"] for head_dim in HEAD_DIMS]
        heads = [f"head_dim {d}, {bytes / 1024:.1f} KiB" for d, bytes in zip(HEAD_DIMS, memory)]
        lines += ["", f"**{title}**", "", "| GPU | " + " | ".join(heads) + " |", "|---|" + "---|" * len(HEAD_DIMS)]
        for gpu in GPUS:
            cells = [cell(found[gpu.name, (title, d)], shaders[title, d][0]) for d in HEAD_DIMS]
            lines.append(f"| {gpu.name} | " + " | ".join(cells) + " |")
    lines += stored_table(args, folder)
    lines += backward_table(args, folder)
    return "\n".join(["", *lines, "", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chroot", type=Path, required=True, help="a Debian sid with mesa-vulkan-drivers and mesa-drm-shim")
    parser.add_argument("--program", type=Path, help="the program cross-attention; built if not given")
    parser.add_argument("--stats", type=Path, help="the program tools/shader_stats; built if not given")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the tables are out of date")
    args = parser.parse_args()
    if not args.program:
        args.program = build(["--features", "cli", "--bin", "cross-attention"])
    if not args.stats:
        args.stats = build(["--manifest-path", ROOT / "tools/shader_stats/Cargo.toml"])
    text = DOCUMENT.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{DOCUMENT} needs one line {BEGIN.strip()} and one line {END.strip()}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    with tempfile.TemporaryDirectory() as folder:
        new = before + BEGIN + tables(args, Path(folder)) + END + after
    if args.check:
        sys.exit(0 if new == text else f"the tables of {DOCUMENT} are out of date; run tools/kernel_table.py")
    DOCUMENT.write_text(new)
    print(f"{DOCUMENT}: {len(KERNELS)} tables")


def build(flags):
    """Builds a program in release mode; its path."""
    command = ["cargo", "build", "--release", "--message-format", "json", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Path([message["executable"] for message in messages if message.get("executable")][-1])


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Plants small faults in the shaders of a test binary, and says which of them its trials see.

    cargo test --features cli --test gpu --no-run          # prints where the binary is
    tools/mutate_shaders.py BINARY [--shader rows.wgsl] [--sample 40] [--seed 1] [--adapter llvmpipe] [--minutes 60]

The text of a shader stands in the binary as it is in shaders/, so a fault of the same length is planted without building
anything: one character sequence, by the list below. A fault counts as caught when a trial fails, the run ends in another
way than by itself, or takes longer than it may. The survivors are printed with file and line: each is a test that is
missing, or changes nothing that a result depends on.
"""
import argparse
import os
import random
import re
import selectors
import subprocess
import sys
import tempfile
import time

# what is replaced, by what of the same length
OPERATORS = [
    (r"(?<= )\+(?= )", "-"), (r"(?<= )-(?= )", "+"), (r"(?<= )\*(?= )", "+"), (r"(?<= )/(?= )", "*"),
    (r"(?<= )<(?= )", ">"), (r"(?<= )>(?= )", "<"), (r"(?<= )<=(?= )", ">="), (r"(?<= )>=(?= )", "<="),
    (r"(?<= )<(?= )", "<="), (r"(?<= )==(?= )", "!="), (r"(?<= )!=(?= )", "=="), (r"(?<= )&(?= )", "|"),
    (r"(?<= )&&(?= )", "||"), (r"(?<= )\|\|(?= )", "&&"), (r"\bmin\(", "max("), (r"\bmax\(", "min("),
    (r"\b0u\b", "1u"), (r"\b1u\b", "0u"), (r"\b0\.0\b", "1.0"), (r"\b1\.0\b", "0.0"), (r"\bexp\(", "abs("),
    (r"\.x\b", ".y"), (r"\.y\b", ".x"), (r"\.z\b", ".y"), (r"\bif (?=[a-z])", "if !"), (r"\btrue\b", "!1u>0"),
]

# the trials that a shader's faults are looked for with, the likeliest first
TRIALS = {
    "rows.wgsl": ["rows/"], "tiled.wgsl": ["tiled/"], "fused.wgsl": ["fused/"], "split.wgsl": ["split/"],
    "scores.wgsl": ["plain/"], "softmax.wgsl": ["plain/"], "weighted_sum.wgsl": ["plain/"], "weights.wgsl": ["weights/"],
    "combine.wgsl": ["split/", "rows/"], "merge.wgsl": ["sources/", "merging/", "tiled/cut_keys"],
    "linear.wgsl": ["linear/", "layer/"], "linear_few.wgsl": ["linear/", "layer/"], "head_norm.wgsl": ["layer/"], "combine_sources.wgsl": ["sources/"],
}
OTHERS = ["fused/", "tiled/", "rows/"]


def sites(binary, wanted):
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "shaders")
    found = []
    for folder, _, files in os.walk(root):
        for name in sorted(files):
            path = os.path.join(folder, name)
            text = open(path, "rb").read()
            at = binary.find(text)
            if name == "cooperative.wgsl" or at < 0 or (wanted and name != wanted):
                continue
            for match in (m for pattern, new in OPERATORS for m in patched(text.decode(), pattern, new)):
                found.append((os.path.relpath(path, root), at) + match)
    return found


def patched(text, pattern, new):
    offset = 0
    for number, line in enumerate(text.split("\n"), 1):
        code = line.split("//")[0]
        for match in re.finditer(pattern, code):
            old = match.group(0)
            # a longer replacement takes the space behind
            end = match.end()
            while end - match.start() < len(new) and code[end:end + 1] == " ":
                end += 1
            if end - match.start() >= len(new):
                put = new.ljust(end - match.start())
                start = offset + len(line[:match.start()].encode())
                yield start, put.encode(), number, line.strip(), old + " -> " + new
        offset += len(line.encode()) + 1


def run(binary, adapter, trials, seconds, skipped):
    """Whether a fault is seen, and by what."""
    for group in trials:
        command = [binary, f"{adapter}/{group}", "--test-threads", "1", *(f"--skip={name}" for name in skipped)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        end, seen, rest = time.monotonic() + seconds, None, b""
        poll = selectors.DefaultSelector()
        poll.register(process.stdout, selectors.EVENT_READ)
        while seen is None:
            if time.monotonic() > end:
                # a loop that never ends is a fault that is seen; a slow machine is not, so the time is long
                seen = "took too long"
            elif poll.select(timeout=1):
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                rest += data
                for line in rest.split(b"\n")[:-1]:
                    if line.startswith(b"test ") and line.endswith(b"FAILED"):
                        seen = line.split()[1].decode()
                        break
                rest = rest.split(b"\n")[-1]
        if seen:
            process.kill()
        process.wait()
        if seen or process.returncode != 0:
            return seen or f"exit {process.returncode}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--shader")
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--adapter", default="llvmpipe")
    parser.add_argument("--skip", action="append", default=[], help="a trial that fails without a fault")
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    binary = open(arguments.binary, "rb").read()
    every = sites(binary, arguments.shader)
    chosen = random.Random(arguments.seed).sample(every, min(arguments.sample, len(every)))
    print(f"{len(every)} places, {len(chosen)} of them tried", flush=True)
    end, caught, survivors = time.monotonic() + arguments.minutes * 60, 0, []
    os.environ.setdefault("CARGO_MANIFEST_DIR", os.getcwd())
    for shader, base, start, put, line, text, what in chosen:
        if time.monotonic() > end:
            break
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.write(binary[:base + start] + put + binary[base + start + len(put):])
        os.chmod(file.name, 0o755)
        began = time.monotonic()
        seen = run(file.name, arguments.adapter, TRIALS.get(os.path.basename(shader), OTHERS), 900,
                   arguments.skip)
        os.remove(file.name)
        print(f"{shader}:{line} {what}: {seen or 'SURVIVES'} ({time.monotonic() - began:.0f} s)  {text}", flush=True)
        caught += seen is not None
        if seen is None:
            survivors.append((shader, line, what, text))
    print(f"{caught + len(survivors)} planted, {caught} caught, {len(survivors)} survive")
    for survivor in survivors:
        print("  ", *survivor)


if __name__ == "__main__":
    sys.exit(main())

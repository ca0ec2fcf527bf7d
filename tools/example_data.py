#!/usr/bin/env python3
"""example_data.py REAL OUT: makes examples/data out of captures of trained models (numpy only).

REAL holds whisper-tiny-en, annalog and lightglue-aliked; origins and licences are in examples/data/README.md.
Large Whisper matrices are stored in blocks of 32 columns, 4 bits an element: `NAME.q4` U8 [rows, columns / 2], the even
column in the low half, minus 8; `NAME.scale` F16 [rows, columns / 32]. The encoder's output likewise with 8 bits, `NAME.q8`.
"""
import json, pathlib, shutil, struct, sys
import numpy as np

TYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8}


def load(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    head, body = json.loads(raw[8 : 8 + n]), raw[8 + n :]
    head.pop("__metadata__", None)
    return {k: np.frombuffer(body[v["data_offsets"][0] : v["data_offsets"][1]], TYPES[v["dtype"]]).reshape(v["shape"]) for k, v in head.items()}


def save(tensors, path):
    names, head, parts, at = {np.dtype(v): k for k, v in TYPES.items()}, {}, [], 0
    for key, value in sorted(tensors.items()):
        raw = np.ascontiguousarray(value).tobytes()
        head[key] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        parts.append(raw)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def blocks(x, most):
    b = x.astype(np.float64).reshape(x.shape[0], -1, 32)
    scale = (np.abs(b).max(-1) / most).astype(np.float16)
    step = scale.astype(np.float64)[..., None]
    q = np.round(np.divide(b, step, where=step > 0, out=np.zeros_like(b))).clip(-most - 1, most).astype(np.int8)
    return q.reshape(x.shape), scale


def q4(x):
    q, scale = blocks(x, 7)
    u = (q + 8).astype(np.uint8)
    return u[:, 0::2] | (u[:, 1::2] << 4), scale


def whisper(real, out):
    decoder, cross = load(real / "decoder.safetensors"), load(real / "cross_attention.safetensors")
    tensors = {}
    for key, value in decoder.items():
        if key.startswith("expected/") and not key.endswith("logits_of_rows"):
            continue
        if key.endswith("weight") and key.startswith("decoder/"):
            tensors[key + ".q4"], tensors[key + ".scale"] = q4(value)
        else:
            tensors[key] = value
    tensors["encoder_output.q8"], tensors["encoder_output.scale"] = blocks(cross["encoder_output"][0], 127)
    save(tensors, out / "model.safetensors")
    shutil.copyfile(real / "transcript.json", out / "transcript.json")


def annalog(real, out):
    cross = load(real / "cross_attention.safetensors")
    save({key: cross[key] for key in ("src", "trg", "key_keep", "logits")}, out / "batch.safetensors")
    for name in ("model.safetensors", "batch.json"):
        shutil.copyfile(real / name, out / name)


def lightglue(real, out):
    cross = load(real / "cross_attention.safetensors")
    save({key: cross[key] for key in ("keypoints0", "keypoints1")}, out / "keypoints.safetensors")
    for name in ("left.jpg", "right.jpg", "matches.json", "LICENSE"):
        shutil.copyfile(real / name, out / name)


if __name__ == "__main__":
    real, out = map(pathlib.Path, sys.argv[1:3])
    for name, folder, make in [("whisper-tiny-en",) * 2 + (whisper,), ("annalog",) * 2 + (annalog,), ("lightglue-aliked", "lightglue", lightglue)]:
        (out / folder).mkdir(parents=True, exist_ok=True)
        make(real / name, out / folder)

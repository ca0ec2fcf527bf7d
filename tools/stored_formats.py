#!/usr/bin/env python3
"""stored_formats.py DATA: what it costs to store keys and values of attention in fewer bits, in three trained models.

DATA is the folder of captures, with whisper-tiny-en, lightglue-aliked and annalog in it. Needs numpy; takes some minutes.

Keys and values are rounded to each format as they leave their projection, a row of a head at a time, and used in float64. All
else (projections, queries, softmax, the rest of the model) is float64, from the weights and inputs that the captures hold.
Keys and values of Whisper and LightGlue are projected anew: the captured ones are rounded to f16 already.

Prints Markdown: a table for each model with the errors of the outputs of cross-attention and what becomes of the model's
results, and one with the error of each layer. An error is in units of the rms of a layer's outputs: all layers count alike.

* Whisper writes a text greedily, but only among the 19 tokens whose embeddings the capture has. Words are timed on the true
  text.
* LightGlue's captured layers do not suffice for its own matches. Pairs are found as examples/lightglue_match.rs does: each is
  the other's best in the weights of layer 4 (and of layer 8), times those of the other direction. Both directions are rounded.
  How values are stored does not show in these pairs, only in the errors.
* ANNalog writes an analogue of each of the five molecules captured, and of the further ones below.

"changed" counts what differs from the same run without rounding: for texts, tokens to replace, insert or remove.
"""
import json, math, pathlib, re, sys
import numpy as np

# further molecules for ANNalog to read: drugs and other well-known substances
SMILES = """CCO CC(C)O CC(=O)C c1ccccc1 Oc1ccccc1 Nc1ccccc1 Cc1ccccc1 OC(=O)c1ccccc1 OC(=O)c1ccccc1O COc1cc(C=O)ccc1O
CN1CCCC1c1cccnc1 CC(N)Cc1ccccc1 NCCc1ccc(O)c(O)c1 NCCc1c[nH]c2ccc(O)cc12 COc1ccc2[nH]cc(CCNC(C)=O)c2c1 CCOC(=O)c1ccc(N)cc1
CCN(CC)CC(=O)Nc1c(C)cccc1C CCN(CC)CCOC(=O)c1ccc(N)cc1 CC(C)NCC(O)COc1cccc2ccccc12 CC(C)NCC(O)COc1ccc(CC(N)=O)cc1
CNCCC(Oc1ccc(C(F)(F)F)cc1)c1ccccc1 CN(C)CCOC(c1ccccc1)c1ccccc1 COc1ccc2cc(C(C)C(=O)O)ccc2c1 OC(=O)Cc1ccccc1Nc1c(Cl)cccc1Cl
CC(=O)CC(c1ccccc1)c1c(O)c2ccccc2oc1=O Nc1ccc(S(N)(=O)=O)cc1 NC(=O)c1cnccn1 NNC(=O)c1ccncc1 NC(N)=NC(=O)c1nc(Cl)c(N)nc1N
CN(C)C(=N)NC(N)=N Cn1c(=O)c2[nH]cnc2n(C)c1=O O=c1[nH]cnc2[nH]ncc12 CCC1(c2ccccc2)C(=O)NC(=O)NC1=O
O=C1NC(=O)C(c2ccccc2)(c2ccccc2)N1
NC(=O)N1c2ccccc2C=Cc2ccccc21 Nc1nnc(c2cccc(Cl)c2Cl)c(N)n1 CC(C)(C)NCC(O)c1ccc(O)c(CO)c1 CNCC(O)c1ccc(O)c(O)c1
CN1CCC(=C2c3ccccc3CCc3ccccc32)CC1 Clc1ccc(C(c2ccccc2)N2CCNCC2)cc1 CCCC(CCC)C(=O)O NCC1(CC(=O)O)CCCCC1
Cc1ncc([N+](=O)[O-])n1CCO OCC(O)CO""".split()
BLOCK = 32
erf = np.vectorize(math.erf, otypes=[float])


def tensors(path):
    """All of a safetensors file; numbers with a point as float64."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "BOOL": "?"}
    found = {}
    for name, of in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = of["data_offsets"]
            x = np.frombuffer(data[start + begin : start + end], kinds[of["dtype"]]).reshape(of["shape"])
            found[name] = x.astype(np.float64) if of["dtype"].startswith("F") else x
    return found


def half(x):
    return x.astype(np.float16).astype(np.float64)


def bf16(x):
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits += 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))
    return (bits & np.uint64(0xFFFF0000)).astype(np.uint32).view(np.float32).astype(np.float64)


def ratio(x, scale):
    return np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)


def int8_row(x):
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.clip(np.rint(ratio(x, scale)), -127, 127) * scale.astype(np.float32)


def int8_block(x):
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.clip(np.rint(ratio(blocks, scale)), -127, 127) * half(scale)).reshape(x.shape)


def int4_block(x):
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scale = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1) / -8
    return ((np.clip(np.floor(ratio(blocks, scale) + 8.5), 0, 15) - 8) * half(scale)).reshape(x.shape)


def less_mean(stored):
    """Keys less their mean over all keys: every logit of a query falls by the same, which its softmax does not see."""
    return lambda keys: stored(keys - keys.mean(-2, keepdims=True))


def same(x):
    return x


# name: (how keys are stored, how values are)
FORMATS = {
    "bf16": (bf16, bf16),
    "f16": (half, half),
    "int8, f32 scale a row": (int8_row, int8_row),
    "int8, f16 scale of 32 columns": (int8_block, int8_block),
    "int4, f16 scale of 32 columns": (int4_block, int4_block),
    "int4 keys, exact values": (int4_block, same),
    "exact keys, int4 values": (same, int4_block),
    "int8 a row keys, int4 values": (int8_row, int4_block),
    "int8, f32 scale a row, keys less their mean": (less_mean(int8_row), int8_row),
    "int4, f16 scale of 32 columns, keys less their mean": (less_mean(int4_block), int4_block),
}
EXACT = (same, same)


def attend(q, k, v, stored, keep=True):
    """Outputs and weights; `keep` tells which keys a query may see."""
    k, v = stored[0](k), stored[1](v)
    logits = np.where(keep, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights @ v, weights


def split(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)


def join(x):
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)


def norm(x, gain, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain + bias


def check_close(x, captured):
    """What is projected anew is what was captured, but for rounding to f16 there."""
    assert np.abs(x - captured).max() < 1e-3 * np.abs(captured).max()


def distance(a, b):
    """Tokens to replace, insert or remove."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def output_errors(layers, stored):
    """Of each layer, in units of the rms of its outputs: rms and largest error. A layer: [(q, k, v, keys kept, rows that
    count)]."""
    found = []
    for calls in layers:
        exact, near = (
            np.concatenate([attend(q, k, v, how, keep)[0][rows].ravel() for q, k, v, keep, rows in calls])
            for how in (EXACT, stored)
        )
        off, unit = near - exact, np.sqrt((exact**2).mean())
        found.append((np.sqrt((off**2).mean()) / unit, np.abs(off).max() / unit))
    return found


class Whisper:
    name, prompt = "Whisper", 2

    def __init__(self, folder):
        self.w = tensors(folder / "decoder.safetensors")
        captured = tensors(folder / "cross_attention.safetensors")
        self.sound = captured["encoder_output"][0]
        self.info = json.loads((folder / "transcript.json").read_text())
        self.ids = self.w["embedding_rows/ids"]
        self.context = []
        for n in range(4):
            k, v = (split(x, 6) for x in np.split(self.linear(self.sound, f"layer_{n}/attention/linear_1"), 2, -1))
            for x, name in ((k, "k"), (v, "v")):
                check_close(x, captured[f"layer{n}.{name}"][0])
            self.context.append((k, v))
        self.layers = [[(captured[f"layer{n}.q"][0], *self.context[n], True, ...)] for n in range(4)]
        self.tokens = self.info["tokens"]
        logits = self.decode(self.tokens, self.context, EXACT)[0]
        ordered = np.sort(logits[self.prompt - 1 : -1], -1)
        self.logits, self.margin = logits, (ordered[:, -1] - ordered[:, -2]).min()
        self.base, self.base_words = self.write(EXACT, EXACT), self.words(EXACT)
        assert self.base == self.tokens
        assert np.allclose(self.base_words, [(word["start"], word["end"]) for word in self.info["words"]])

    def linear(self, x, name):
        return x @ self.w[f"decoder/{name}/weight"].T + self.w[f"decoder/{name}/bias"]

    def norm(self, x, name):
        return norm(x, self.w[f"decoder/{name}layer_norm/gamma"], self.w[f"decoder/{name}layer_norm/beta"])

    def decode(self, tokens, cross, own):
        """Logits of each place and the weights of every layer's cross-attention."""
        rows = [int(np.flatnonzero(self.ids == token)[0]) for token in tokens]
        x = self.w["embedding_rows/weight"][rows] + self.w["decoder/position_encodings/encodings"][: len(rows)]
        causal, seen = np.tri(len(rows), dtype=bool), []
        for n in range(4):
            at = f"layer_{n}/self_attention/"
            q, k, v = (split(y, 6) for y in np.split(self.linear(self.norm(x, at), at + "linear_0"), 3, -1))
            x = x + self.linear(join(attend(q, k, v, own, causal)[0]), at + "linear_1")
            at = f"layer_{n}/attention/"
            out, weights = attend(split(self.linear(self.norm(x, at), at + "linear_0"), 6), *cross[n], EXACT)
            x = x + self.linear(join(out), at + "linear_2")
            seen.append(weights)
            at = f"layer_{n}/ffn/"
            inner = self.linear(self.norm(x, at), at + "linear_0")
            x = x + self.linear(inner * (1 + erf(inner / math.sqrt(2))) / 2, at + "linear_1")
        return self.norm(x, "") @ self.w["embedding_rows/weight"].T, seen

    def stored(self, how):
        return [(how[0](k), how[1](v)) for k, v in self.context]

    def write(self, cross, own):
        """Greedily. The true text is tried first: it stands up to the first token that would have been another."""
        tokens, context, end, known = self.tokens, self.stored(cross), self.tokens[-1], self.prompt
        while True:
            told = self.ids[self.decode(tokens, context, own)[0].argmax(-1)].tolist()
            while known < len(tokens) and tokens[known] == told[known - 1]:
                known += 1
            if known == len(tokens) and (tokens[-1] == end or known == len(self.tokens)):
                return tokens
            tokens, known = [*tokens[:known], told[known - 1]], known + 1

    def words(self, how):
        """Start and end of each word in seconds."""
        _, seen = self.decode(self.tokens, self.stored(how), EXACT)
        frames = self.info["frames_with_speech"]
        x = np.stack([seen[layer][head][:, :frames] for layer, head in self.info["alignment_heads"]])
        x /= x.sum(-1, keepdims=True)
        x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        near = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (3, 3)), "reflect"), 7, -1)
        matrix = np.median(near, -1).mean(0)[self.prompt - 1 : -1]
        starts, at, words = self.warp(matrix), 0, []
        for word in self.info["words"]:
            behind = at + len(word["tokens"])
            words.append([starts[at] * self.info["seconds_per_frame"], starts[behind] * self.info["seconds_per_frame"]])
            at = behind
        return np.array(words)

    @staticmethod
    def warp(matrix):
        rows, frames = matrix.shape
        cost = np.full((rows + 1, frames + 1), np.inf)
        cost[0, 0], step = 0, np.zeros((rows + 1, frames + 1), int)
        for i in range(1, rows + 1):
            for j in range(1, frames + 1):
                before = cost[i - 1, j - 1], cost[i - 1, j], cost[i, j - 1]
                first = before[0] < min(before[1:])
                step[i, j] = best = 0 if first else 1 if before[1] < min(before[0], before[2]) else 2
                cost[i, j] = before[best] - matrix[i - 1, j - 1]
        i, j, starts = rows, frames, [0] * rows
        while i and j:
            starts[i - 1] = j - 1
            i, j = i - (step[i, j] != 2), j - (step[i, j] != 1)
        return starts

    def results(self, how):
        moved = np.abs(self.words(how) - self.base_words).max(1)
        logits = self.decode(self.tokens, self.stored(how), EXACT)[0]
        return {
            f"logits off by at most (smallest lead {self.margin:.2f})": f"{np.abs(logits - self.logits).max():.2g}",
            f"tokens changed (of {len(self.base) - self.prompt})": distance(self.base, self.write(how, EXACT)),
            "the same, own attention rounded too": distance(self.base, self.write(how, how)),
            f"words moved (of {len(moved)}), ms at most": f"{(moved > 1e-9).sum()}, {1000 * moved.max():.0f}",
        }


class LightGlue:
    name = "LightGlue"

    def __init__(self, folder):
        file = tensors(folder / "cross_attention.safetensors")
        info = json.loads((folder / "matches.json").read_text())
        self.published = {(pair["left"], pair["right"]) for pair in info["matches"]}
        place = np.c_[file["keypoints0"], np.ones(len(file["keypoints0"]))] @ np.array(info["homography_left_to_right"]).T
        self.off = np.linalg.norm((place[:, :2] / place[:, 2:])[:, None] - file["keypoints1"], axis=-1)
        self.layers = []
        for n in (0, 4, 8):
            made = {}
            for name, side in ((name, side) for name in ("qk", "v") for side in (0, 1)):
                at = f"layer{n}.to_{name}."
                made[f"{name}{side}"] = x = split(file[f"layer{n}.x{side}"][0] @ file[at + "weight"].T + file[at + "bias"], 4)
                check_close(x, file[f"layer{n}.{name}{side}"][0])
            there, back = (made["qk0"], made["qk1"], made["v1"], True, ...), (made["qk1"], made["qk0"], made["v0"], True, ...)
            self.layers.append([there, back])
        self.base = [self.pairs(layer, EXACT) for layer in self.layers]

    def pairs(self, layer, stored):
        there, back = (attend(*call[:3], stored)[1].mean(0) for call in layer)
        both = there * back.T
        right, left = both.argmax(1), both.argmax(0)
        return {(i, int(j)) for i, j in enumerate(right) if left[j] == i and both[i, j] > 0.1}

    def results(self, stored):
        found = {}
        for n, layer, base in list(zip((0, 4, 8), self.layers, self.base))[1:]:
            now = self.pairs(layer, stored)
            wrong = [sum(self.off[pair] >= 3 for pair in pairs) for pairs in (base, now)]
            known = [len(pairs & self.published) for pairs in (base, now)]
            found[f"layer {n}: pairs lost and new (of {len(base)})"] = f"{len(base - now)}, {len(now - base)}"
            found[f"layer {n}: pairs off by 3 px ({wrong[0]})"] = wrong[1]
            found[f"layer {n}: the model's {len(self.published)} found ({known[0]})"] = known[1]
        return found


class Annalog:
    name = "ANNalog"

    def __init__(self, folder):
        self.w = tensors(folder / "model.safetensors")
        captured = tensors(folder / "cross_attention.safetensors")
        info = json.loads((folder / "batch.json").read_text())
        self.words, self.pad, self.sos, self.eos = info["vocabulary"], info["pad"], info["sos"], info["eos"]
        keep = captured["key_keep"][:, None, None, :]
        rows = np.cumsum(captured["trg"] == self.eos, 1) == 0
        rows = np.broadcast_to(rows[:, None], captured["layer0.q"].shape[:3])
        self.layers = [[(*(captured[f"layer{n}.{x}"] for x in "qkv"), keep, rows)] for n in range(3)]
        smiles = [molecule["source"] for molecule in info["molecules"]] + SMILES
        self.first = len(info["molecules"])
        pieces = re.compile("|".join(map(re.escape, sorted(self.words, key=len, reverse=True))))
        texts = [[self.sos, *map(self.words.index, pieces.findall(text)), self.eos] for text in smiles]
        width = max(map(len, texts))
        self.source = np.array([text + [self.pad] * (width - len(text)) for text in texts])
        assert ["".join(self.words[t] for t in text[1:-1]) for text in texts] == smiles
        self.base = self.write(EXACT, EXACT)
        written = ["".join(self.words[t] for t in text) for text in self.base]
        assert written[: self.first] == [molecule["greedy_output"] for molecule in info["molecules"]]

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def block(self, x, context, at, name, of_norm, stored, keep):
        q, k, v = (split(self.linear(y, f"{at}.{name}.fc_{part}"), 8) for part, y in (("q", x), ("k", context), ("v", context)))
        return self.norm(x + self.linear(join(attend(q, k, v, stored, keep)[0]), f"{at}.{name}.fc_o"), f"{at}.{of_norm}")

    def norm(self, x, name):
        return norm(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def forward(self, x, at):
        inner = np.maximum(self.linear(x, f"{at}.positionwise_feedforward.fc_1"), 0)
        return self.norm(x + self.linear(inner, f"{at}.positionwise_feedforward.fc_2"), f"{at}.ff_layer_norm")

    def embed(self, tokens, side):
        return 16 * self.w[f"{side}.tok_embedding.weight"][tokens] + self.w[f"{side}.pos_embedding.weight"][: tokens.shape[1]]

    def write(self, cross, own):
        keep = (self.source != self.pad)[:, None, None, :]
        states = self.embed(self.source, "encoder")
        for n in range(3):
            at = f"encoder.layers.{n}"
            states = self.forward(self.block(states, states, at, "self_attention", "self_attn_layer_norm", own, keep), at)
        tokens, live = np.full((len(states), 64), self.eos), np.arange(len(states))
        tokens[:, 0] = self.sos
        for length in range(1, 64):
            x, causal = self.embed(tokens[live, :length], "decoder"), np.tri(length, dtype=bool)
            for n in range(3):
                at = f"decoder.layers.{n}"
                x = self.block(x, x, at, "self_attention", "self_attn_layer_norm", own, causal)
                x = self.block(x, states[live], at, "encoder_attention", "enc_attn_layer_norm", cross, keep[live])
                x = self.forward(x, at)
            tokens[live, length] = self.linear(x[:, -1], "decoder.fc_out").argmax(-1)
            live = live[tokens[live, length] != self.eos]
            if not len(live):
                break
        return [text[: text.index(self.eos)] if self.eos in text else text for text in tokens[:, 1:].tolist()]

    def results(self, stored):
        found = {}
        count = sum(map(len, self.base))
        for own, name in ((EXACT, "cross-attention only"), (stored, "every attention")):
            off = [distance(a, b) for a, b in zip(self.base, self.write(stored, own))]
            bad = np.array(off) > 0
            title = f"{name}: molecules changed (of {self.first} captured, of {len(off)} in all)"
            found[title] = f"{bad[: self.first].sum()}, {bad.sum()}"
            found[f"{name}: tokens changed (of {count})"] = sum(off)
        return found


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def percent(x):
    return f"{100 * x:.2g} %" if x < 1 else f"{100 * x:.0f} %"


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    root = pathlib.Path(sys.argv[1])
    models = [Whisper(root / "whisper-tiny-en"), LightGlue(root / "lightglue-aliked"), Annalog(root / "annalog")]
    by_layer = {name: [] for name in FORMATS}
    for model in models:
        rows = []
        for name, stored in FORMATS.items():
            errors = output_errors(model.layers, stored)
            by_layer[name] += errors
            results = model.results(stored)
            rms = math.sqrt(sum(rms**2 for rms, _ in errors) / len(errors))
            rows.append([name, percent(rms), percent(max(most for _, most in errors)), *results.values()])
        print(f"### {model.name}\n")
        table(["stored as", "rms error", "largest error", *results], rows)
    numbers = {"Whisper": range(4), "LightGlue": (0, 4, 8), "ANNalog": range(3)}
    print("### rms error of each layer's outputs\n")
    head = [f"{name} {n}" for name, layers in numbers.items() for n in layers]
    table(["stored as", *head], [[name, *(percent(rms) for rms, _ in errors)] for name, errors in by_layer.items()])


if __name__ == "__main__":
    main()

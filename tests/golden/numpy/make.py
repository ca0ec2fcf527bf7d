"""Writes small.npz with NumPy: every array in another type and order; element n of each is ((7 n) % 11 - 5) / 4."""
import numpy as np


def numbers(*shape):
    return ((7 * np.arange(np.prod(shape)) % 11 - 5) / 4).reshape(shape)


np.savez_compressed(
    "small.npz",
    query=numbers(1, 2, 3, 4),  # float64
    key=np.asfortranarray(numbers(1, 1, 5, 4).astype(">f4")),
    value=numbers(1, 1, 5, 6).astype("f2"),
    mask=np.arange(15).reshape(3, 5) % 4 != 3,
    kv_lens=np.array([4], dtype="u2"),
    scale=0.25,
    causal="bottom_right",
    window_left=np.int32(3),
)

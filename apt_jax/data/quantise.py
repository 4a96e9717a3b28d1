"""Text states as they are stored: int8 with one scale a token (a quarter of float32, error at most
scale / 2), or bfloat16."""

from __future__ import annotations

import ml_dtypes
import numpy as np

TEXT_DTYPES = ("int8", "bfloat16")


def store(states: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """states float [L, D] -> (values of `dtype` [L, D], scales float32 [L], None for bfloat16)."""
    if dtype == "int8":
        return quantise(states)
    return np.asarray(states, np.float32).astype(ml_dtypes.bfloat16), None


def quantise(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """states float [L, D] -> (values int8 [L, D], scales float32 [L]); states ~ values * scale."""
    states = np.asarray(states, np.float32)
    peak = np.abs(states).max(axis=-1, initial=0.0)
    scales = np.where(peak > 0, peak / 127.0, 1.0).astype(np.float32)
    return np.rint(states / scales[:, None]).astype(np.int8), scales


def dequantise(values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """The float32 [L, D] that `quantise` or `store` stored; scales None: bfloat16 values."""
    if scales is None:
        return values.astype(np.float32)
    return values.astype(np.float32) * scales.astype(np.float32)[:, None]


def pad_states(states: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """states [l, D] -> (text float32 [length, D] zero padded, mask bool [length]); more is cut."""
    kept = min(len(states), length)
    text = np.zeros((length, states.shape[1]), np.float32)
    text[:kept] = states[:kept]
    return text, np.arange(length) < kept

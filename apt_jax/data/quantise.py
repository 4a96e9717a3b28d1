"""Text states as int8 with one scale a token: a quarter of float32, error at most scale / 2."""

from __future__ import annotations

import numpy as np


def quantise(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """states float [L, D] -> (values int8 [L, D], scales float32 [L]); states ~ values * scale."""
    states = np.asarray(states, np.float32)
    peak = np.abs(states).max(axis=-1, initial=0.0)
    scales = np.where(peak > 0, peak / 127.0, 1.0).astype(np.float32)
    return np.rint(states / scales[:, None]).astype(np.int8), scales


def dequantise(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 [L, D] that `quantise` stored."""
    return values.astype(np.float32) * scales.astype(np.float32)[:, None]


def pad_states(states: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """states [l, D] -> (text float32 [length, D] zero padded, mask bool [length]); more is cut."""
    kept = min(len(states), length)
    text = np.zeros((length, states.shape[1]), np.float32)
    text[:kept] = states[:kept]
    return text, np.arange(length) < kept

"""Small numpy helpers that several formats share."""

from __future__ import annotations

import numpy as np

_EDGE = 1e-7  # keeps the logit of an opacity of 0 or 1 finite


def logit(opacity: np.ndarray) -> np.ndarray:
    """Inverse of the sigmoid, float32; the argument is clipped to 1e-7 .. 1 - 1e-7."""
    clipped = np.clip(opacity.astype(np.float64), _EDGE, 1 - _EDGE)
    return np.log(clipped / (1 - clipped)).astype(np.float32)


def sigmoid(value: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow, float32."""
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-value.astype(np.float64)))).astype(np.float32)

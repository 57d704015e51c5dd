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
    with np.errstate(over="ignore", invalid="ignore"):
        return (1 / (1 + np.exp(-value.astype(np.float64)))).astype(np.float32)


def unit_quaternions(quaternions: np.ndarray) -> np.ndarray:
    """[N, 4] of unit length, float32; zero stays zero."""
    length = np.linalg.norm(quaternions, axis=1, keepdims=True)
    return quaternions / np.maximum(length, np.finfo(np.float32).tiny)


def pack_rotation(quaternions: np.ndarray) -> np.ndarray:
    """uint32 of [N, 4] wxyz: 2 bits for which component is largest, 3 x 10 bits for the others."""
    largest, others = smallest_three(quaternions)
    steps = np.rint((others * np.float32(np.sqrt(0.5)) + 0.5).clip(0, 1) * 1023).astype(np.uint32)
    return largest.astype(np.uint32) << 30 | steps[:, 0] << 20 | steps[:, 1] << 10 | steps[:, 2]


def unpack_rotation(words: np.ndarray) -> np.ndarray:
    """[N, 4] wxyz of `pack_rotation`."""
    steps = np.stack([(words >> shift) & 1023 for shift in (20, 10, 0)], axis=1)
    others = (steps / np.float32(1023) - np.float32(0.5)) * np.float32(np.sqrt(2))
    return from_smallest_three((words >> 30).astype(np.int64), others)


def smallest_three(quaternions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the largest component [N], the others in order [N, 3]), signs such that the largest is positive."""
    unit = unit_quaternions(quaternions)
    largest = np.abs(unit).argmax(axis=1)
    rows = np.arange(len(unit))
    unit = unit * np.where(unit[rows, largest] < 0, -1, 1)[:, None]
    return largest, unit[np.arange(4) != largest[:, None]].reshape(-1, 3)


def from_smallest_three(largest: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N, 4] unit quaternions of `smallest_three`."""
    quaternions = np.empty((len(others), 4), np.float32)
    quaternions[np.arange(4) != largest[:, None]] = others.reshape(-1)
    quaternions[np.arange(len(others)), largest] = np.sqrt(np.maximum(1 - (others**2).sum(axis=1), 0))
    return quaternions


def morton_order(points: np.ndarray) -> np.ndarray:
    """Indices that sort [N, 3] points along a Morton curve of 2^10 cells a side."""
    if not len(points):
        return np.zeros(0, np.int64)
    low = points.min(axis=0)
    extent = np.maximum(points.max(axis=0) - low, 1e-30)
    cells = ((points - low) / extent * 1023).astype(np.uint32)
    code = np.zeros(len(points), np.uint32)
    for bit in range(10):
        for axis in range(3):
            code |= ((cells[:, axis] >> np.uint32(bit)) & np.uint32(1)) << np.uint32(3 * bit + axis)
    return np.argsort(code, kind="stable")

"""Rotary position embedding for mixed 2D/3D tokens (MARoPE).

`MARoPE` places image patches on virtual planes just outside a voxel volume and rotates queries and keys of both in one
3D space (Diff2to3, section 3.2). `AxialRoPE` and the pure functions below it know nothing of images or volumes and take
any number of axes.
"""

from marope._axial import AxialRoPE
from marope._backend import kernel_backend, kernel_backends, use_triton
from marope._frequencies import RotaryTable, equal_axes, ntk_theta, rotary_table
from marope._fused import norm_rotary
from marope._marope import MARoPE
from marope._rotate import apply_rotary

__all__ = [
    "AxialRoPE",
    "MARoPE",
    "RotaryTable",
    "apply_rotary",
    "equal_axes",
    "kernel_backend",
    "kernel_backends",
    "norm_rotary",
    "ntk_theta",
    "rotary_table",
    "use_triton",
]
__version__ = "0.1.0"

"""Where the models run."""

from __future__ import annotations

import ctypes
import os

import torch

from diff2to3._errors import InputError


def default_device() -> torch.device:
    """CUDA where there is one, else the GPU of an Apple computer (MPS), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of a name, None is `default_device`.

    Raises:
        InputError: unknown, absent, or not what this build of PyTorch was made for.
    """
    if device is None:
        return default_device()
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # how torch reports unknown, absent and not compiled-in devices
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"device {str(device)!r} cannot be used ({reason}); expected for example {str(default_device())!r}"
        ) from error
    return chosen


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def release_memory(device: torch.device) -> None:
    """Give the memory back that an object needed for a while, where the models run on the CPU (with glibc).

    glibc keeps the gaps between blocks in use. As each object has another number of voxels the gaps differ from object
    to object and change for ever: by up to a hundred megabytes with the embedded pipeline.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" and os.name == "posix" else None
    if trim is not None:
        trim(0)

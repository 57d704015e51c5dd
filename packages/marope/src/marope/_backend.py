"""The one place where fused Triton kernels or plain PyTorch is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_preferred: ContextVar[str | None] = ContextVar("kernel_backend", default=None)


@contextmanager
def kernel_backend(name: str | None) -> Iterator[None]:
    """Prefer "triton" or "torch" for every fused operation inside the block that names no backend itself.

    Fused operations are `norm_rotary`, and those of packages that ask `use_triton`.
    """
    _check(name)
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def kernel_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """All backends, and for each None if it can be used on the device or the reason why not."""
    return {"triton": _triton_reason(torch.device(device)), "torch": None}


def use_triton(*tensors: Tensor, backend: str | None = None) -> bool:
    """Whether a fused operation on `tensors` shall run its Triton kernel instead of the plain expression.

    Args:
        tensors: what the kernel would read; the first one's device counts.
        backend: "triton" or "torch"; by default that of the enclosing `kernel_backend` context, else "triton" where it
            works. While PyTorch compiles or exports it is False: a compiler fuses the plain expression itself.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: "triton" was asked for and cannot be used; the message says why.
    """
    if torch.compiler.is_compiling():  # which cannot follow what comes here
        return False
    name = backend or _preferred.get()
    if name is not None:
        _check(name)
    if name == "torch":
        return False
    first = tensors[0]
    if not first.is_cuda and name is None:
        return False
    reason = _triton_reason(first.device)
    if reason is None:
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                reason = f"it takes bfloat16, float16 or float32, got {tensor.dtype}"
    if reason is not None and name == "triton":
        raise RuntimeError(f"backend 'triton' is not available: {reason}")
    return reason is None


def _check(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"no backend {name!r}: choose one of {', '.join(BACKENDS)}")


def _triton_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA, got {device.type}"
    return _failure(device)


@cache
def _failure(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels, None if it can.

    Triton's driver is started to find out: it needs the compiler and headers that every kernel needs, and unlike a
    kernel it has to be built anyway.
    """
    try:
        from triton.runtime import driver
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton"
    try:
        with torch.cuda.device(device):
            driver.active.get_current_target()
    except Exception as error:  # no compiler, no headers, no libcuda: each is a reason, not a fault
        return f"Triton's driver does not start ({type(error).__name__}: {error})"
    return None

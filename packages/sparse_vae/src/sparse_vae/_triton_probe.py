"""Whether Triton's kernels can run on a device."""

from __future__ import annotations

from functools import cache

import torch


@cache
def triton_failure(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels of this package, None if it can.

    Triton's driver is started to find out: it needs the compiler and headers that every kernel needs, and unlike a
    kernel it has to be built anyway.
    """
    try:
        from triton.runtime import driver
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda and capability < (8, 0):
        return f"it needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    try:
        with torch.cuda.device(device):
            driver.active.get_current_target()
    except Exception as error:  # no compiler, no headers, no libcuda: each is a reason, not a fault
        return f"Triton's driver does not start ({type(error).__name__}: {error})"
    return None

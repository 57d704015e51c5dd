"""Whether Triton's kernels can run on a device."""

from __future__ import annotations

from functools import cache

import torch


@cache
def triton_failure(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels of this package, None if it can; launches a small one to find out."""
    try:
        from sparse_vae import _triton_conv
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda and capability < (8, 0):
        return f"it needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    values = torch.ones(2, device=device)
    try:
        _triton_conv.add_up(values[:, None], values[:1])
    except Exception as error:  # no compiler, no headers, an unknown GPU: each is a reason, not a fault
        return f"Triton cannot build a kernel ({type(error).__name__}: {error})"
    return None

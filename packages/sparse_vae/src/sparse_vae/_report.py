"""Which backends this machine can use."""

from __future__ import annotations

import torch

from sparse_vae._attention import attention_backends
from sparse_vae._conv import convolution_backends


def backend_report() -> dict[str, dict[str, str | None]]:
    """Kind -> backend -> None if it can be used here, else the reason why not.

    Asked for the first GPU in bfloat16 where there is one, for the CPU in float32 otherwise.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda:0", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    return {"attention": attention_backends(device, dtype), "sparse_conv": convolution_backends(device)}

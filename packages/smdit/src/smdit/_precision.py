"""Training in half precision with weights in single precision, cast once a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


class _CastAll(torch.autograd.Function):
    """All parameters in another dtype, by one operation forward and one backward."""

    @staticmethod
    def forward(ctx, dtype, *parameters):
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        copies = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
        torch._foreach_copy_(copies, list(parameters))
        return tuple(copies)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        present = [(grad, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True) if grad is not None]
        wide = [torch.empty_like(grad, dtype=dtype) for grad, dtype in present]
        if wide:
            torch._foreach_copy_(wide, [grad for grad, _ in present])
        remaining = iter(wide)
        return None, *(None if grad is None else next(remaining) for grad in grads)


def half_weights(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Callable[..., Any]:
    """`model` as a function of the same arguments that runs with copies of its weights in `dtype`.

    For one training step: gradients arrive at the model's own weights, in their dtype. Autocast would cast every weight
    by an operation of its own, in the forward and again in the backward, which takes a host longer than the casts take
    the device; it also keeps the residual stream in float32, which is in `dtype` here. Norms, rotations, times and the
    loss are float32 inside all the same.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = dict(zip(names, _CastAll.apply(dtype, *parameters), strict=True))

    def run(*arguments: Any) -> Any:
        with torch.autocast(parameters[0].device.type, enabled=False):
            return functional_call(model, weights, arguments)

    return run

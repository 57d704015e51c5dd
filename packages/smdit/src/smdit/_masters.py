"""Float32 masters of weights in half precision, for training without autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterWeights:
    """What an optimizer steps instead of a model's half-precision weights, whose rounding would swallow small steps.

    A step then casts all weights and all gradients at once, where autocast casts each at every use: on a large GPU
    that is several hundred launches less. `benchmarks/smdit.py` has figures.

        model = SMDiT(config).cuda()
        masters = MasterWeights(model, torch.bfloat16)
        optimizer = torch.optim.AdamW(masters.parameters, lr=1e-4, fused=True)
        ...
        loss.backward()
        masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
        masters.give_weights()

    Args:
        model: whose float32 weights become the masters; its own become `dtype`, in place. Buffers stay as they are.
        dtype: of the model's weights from now on.

    Attributes:
        parameters: the masters, in the order of `model.parameters()`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._weights: list[Tensor] = list(model.parameters())
        self.parameters: list[Tensor] = [nn.Parameter(weight.detach().float().clone()) for weight in self._weights]
        for master, weight in zip(self.parameters, self._weights, strict=True):
            master.requires_grad_(weight.requires_grad)
            weight.data = weight.data.to(dtype)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the gradients of the model's weights to the masters' ones, in float32, and clear the former."""
        fresh: tuple[list[Tensor], list[Tensor]] = ([], [])
        for master, weight in zip(self.parameters, self._weights, strict=True):
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                fresh[0].append(master.grad)
                fresh[1].append(weight.grad)
            else:
                master.grad.add_(weight.grad)
            weight.grad = None
        if fresh[0]:
            torch._foreach_copy_(*fresh)

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the masters into the model's weights."""
        torch._foreach_copy_(self._weights, self.parameters)

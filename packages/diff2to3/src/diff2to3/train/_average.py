"""The exponential average of the weights, and clipping by what gradients are like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from diff2to3.train._learning import Learning
from diff2to3.train._parallel import local


class Average:
    """Exponential average of the parameters that learn; of split ones, of this process's parts.

    Args:
        learning: whose parameters.
        decay: share that stays; warmed up as (1 + step) / (10 + step).
    """

    def __init__(self, learning: Learning, decay: float) -> None:
        self.decay, self.count, self.learning = decay, 0, learning
        self.parameters = learning.parameters
        self.values = {name: local(p).detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After a step; the first one is copied."""
        warm = min(self.decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        torch._foreach_lerp_(list(self.values.values()), [local(p) for p in self.parameters.values()], 1 - warm)
        self.count += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights in the model, for as long as the block lasts."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the averaged weights and those in the model."""
        for name, parameter in self.parameters.items():
            own, value = local(parameter), self.values[name]
            kept = own.clone()
            own.copy_(value)
            value.copy_(kept)
        self.learning.give_weights()


class Clip:
    """Shortens gradients that are longer than ``longest``, or than a percentile of the lengths before (TRELLIS).

    All of it happens on the device: nothing waits for a length to reach the host.

    Args:
        parameters: whose gradients.
        longest: the longest that a gradient may be.
        percentile: of the last ``window`` lengths, once there are so many; None: no such limit.
    """

    def __init__(
        self, parameters: Sequence[Tensor], longest: float, percentile: float | None, window: int, device: torch.device
    ) -> None:
        self.parameters, self.longest, self.percentile = list(parameters), longest, percentile
        self.lengths = torch.zeros(window if percentile is not None else 0, device=device)
        self.count = 0

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Clips; returns the length before."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        parts = [local(gradient) for gradient in gradients]
        length = torch.nn.utils.get_total_norm(parts)
        if any(isinstance(gradient, DTensor) for gradient in gradients):
            square = length.square()
            dist.all_reduce(square)
            length = square.sqrt()
        limit = torch.full_like(length, self.longest)
        if self.percentile is not None:
            if self.count >= len(self.lengths):
                limit = torch.minimum(limit, torch.quantile(self.lengths, self.percentile / 100))
            # One that is not finite would make every later limit so.
            self.lengths[self.count % len(self.lengths)] = torch.nan_to_num(length, posinf=self.longest)
            self.count += 1
        torch._foreach_mul_(parts, (limit / (length + 1e-6)).clamp(max=1.0))
        return length

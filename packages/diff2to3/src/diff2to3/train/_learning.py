"""What learns: a model's parameters as the optimizer, the average and checkpoints see them, float32 by name."""

from __future__ import annotations

import torch
from smdit import MasterWeights
from torch import Tensor, nn


class Learning:
    """The parameters of a model that learn, or float32 masters of them while it computes in bfloat16.

    Args:
        model: whose parameters; with `half` its weights become bfloat16, in place.
        half: keep masters (``precision: bf16-weights``).

    Attributes:
        parameters: what is stepped, averaged and kept, by the names of the model's parameters.
    """

    def __init__(self, model: nn.Module, half: bool = False) -> None:
        self.model = model
        self.masters = MasterWeights(model, torch.bfloat16) if half else None
        stepped = self.masters.parameters if self.masters is not None else list(model.parameters())
        own = model.named_parameters()
        self.parameters = {name: p for (name, _), p in zip(own, stepped, strict=True) if p.requires_grad}
        if self.masters is not None:
            _leave_autocast(model)

    def state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers as they are, not copies."""
        return self.whole(self.model.state_dict(keep_vars=True))

    def whole(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the model's names, masters in the place of what was rounded."""
        if self.masters is None:
            return weights
        return {name: self.parameters.get(name, value) for name, value in weights.items()}

    def take_gradients(self) -> None:
        """Moves the model's gradients to what is stepped; called after every backward."""
        if self.masters is not None:
            self.masters.take_gradients()

    def give_weights(self) -> None:
        """Moves what was stepped, averaged or loaded to the model."""
        if self.masters is not None:
            self.masters.give_weights()


def _leave_autocast(model: nn.Module) -> None:
    """Lets a model compute in its weights' dtype, under autocast too: that would cast what needs no cast."""
    plain = model.forward

    def forward(*arguments, **options):
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            return plain(*arguments, **options)

    model.forward = forward  # type: ignore[method-assign]

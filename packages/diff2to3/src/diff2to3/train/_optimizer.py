"""Optimizers: AdamW, or Muon for the matrices inside the blocks with AdamW for everything else."""

from __future__ import annotations

import torch
from torch import nn

from diff2to3._errors import InputError
from diff2to3.train._config import TrainConfig
from diff2to3.train._learning import Learning


def make_optimizers(learning: Learning, config: TrainConfig, fused: bool) -> list[torch.optim.Optimizer]:
    """What updates the parameters that learn; all share the learning rate and the weight decay.

    Muon is scaled to the size of AdamW's updates (Moonlight, section 2.2), so one learning rate serves both.

    Args:
        fused: AdamW as one kernel, on CUDA.

    Raises:
        InputError: this torch has no Muon.
    """
    matrices = hidden_matrices(learning.model) if config.optimizer == "muon" else set()
    hidden = [p for name, p in learning.parameters.items() if name in matrices]
    others = [p for name, p in learning.parameters.items() if name not in matrices]
    rate, decay = config.learning_rate, config.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"optimizer: muon needs torch 2.9 or newer, this is {torch.__version__}; or take adamw")
        optimizers.append(torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=fused))
    return optimizers


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the linear layers' weights inside repeated blocks, which first and last layers of a model are not."""
    return {
        f"{outer}.{inner}.weight" if outer else f"{inner}.weight"
        for outer, blocks in model.named_modules()
        if isinstance(blocks, nn.ModuleList)
        for inner, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear)
    }

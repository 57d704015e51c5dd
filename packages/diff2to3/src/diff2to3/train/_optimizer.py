"""Optimizers: AdamW, or Muon for the matrices inside the blocks with AdamW for everything else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diff2to3._errors import InputError
from diff2to3.train._config import TrainConfig


def make_optimizers(model: nn.Module, config: TrainConfig, fused: bool) -> list[torch.optim.Optimizer]:
    """What updates the parameters of ``model`` that learn; all share the learning rate and the weight decay.

    Muon is scaled to the size of AdamW's updates (Moonlight, section 2.2), so one learning rate serves both.

    Args:
        fused: AdamW as one kernel, on CUDA.

    Raises:
        InputError: this torch has no Muon.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = {id(p) for p in hidden_matrices(model)} if config.optimizer == "muon" else set()
    hidden = [p for p in learning if id(p) in matrices]
    others = [p for p in learning if id(p) not in matrices]
    rate, decay = config.learning_rate, config.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"optimizer: muon needs torch 2.9 or newer, this is {torch.__version__}; or take adamw")
        optimizers.append(torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=fused))
    return optimizers


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers inside repeated blocks; the first and last layers of a model are not among them."""
    linears = {
        id(layer): layer
        for blocks in model.modules()
        if isinstance(blocks, nn.ModuleList)
        for layer in blocks.modules()
        if isinstance(layer, nn.Linear)
    }
    return [layer.weight for layer in linears.values() if layer.weight.requires_grad]

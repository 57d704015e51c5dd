"""One thing to train a file; the command line builds the stage of its name."""

from __future__ import annotations

from importlib import import_module

import torch

from diff2to3.train._config import TrainConfig
from diff2to3.train._stage import Stage

STAGES = {
    "autoencoder": "autoencoder:AutoencoderStage",
    "vae": "vae:VAEStage",
    "structure-vae": "structure_vae:StructureVAEStage",
    "structure-flow": "flow:StructureFlowStage",
    "flow": "flow:FlowStage",
}


def build_stage(name: str, config: TrainConfig) -> Stage:
    """The stage that ``diff2to3 train NAME`` trains; its initial weights follow from the config's seed."""
    module, attribute = STAGES[name].split(":")
    stage_class = getattr(import_module(f"diff2to3.train.stages.{module}"), attribute)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return stage_class(config)

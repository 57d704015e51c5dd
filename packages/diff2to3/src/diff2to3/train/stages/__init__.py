"""One thing to train a file; the command line builds the stage of its name."""

from __future__ import annotations

from importlib import import_module

from diff2to3.train._engine import Stage

STAGES = {
    "autoencoder": "autoencoder:AutoencoderStage",
    "vae": "vae:VAEStage",
    "structure-vae": "structure_vae:StructureVAEStage",
    "structure-flow": "flow:StructureFlowStage",
    "flow": "flow:FlowStage",
}


def stage_class(name: str) -> type[Stage]:
    """The stage that ``diff2to3 train NAME`` trains."""
    module, attribute = STAGES[name].split(":")
    return getattr(import_module(f"diff2to3.train.stages.{module}"), attribute)

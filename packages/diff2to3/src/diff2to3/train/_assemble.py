"""Trained stages -> a pipeline directory, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from flux_features import FluxFeatures, FluxFeaturesConfig
from pydantic import BaseModel, Field, RootModel
from smdit import SamplerConfig, SMDiT, SMDiTConfig, StructureDiTConfig, StructureFlow, StructureFlowConfig
from sparse_vae import SparseVAE, SparseVAEConfig, StructureVAE, StructureVAEConfig
from torch import nn

from diff2to3._assemble import from_plugin
from diff2to3._errors import InputError
from diff2to3._pipeline import Pipeline
from diff2to3._pipeline_config import ComponentConfig, PipelineConfig
from diff2to3._plugins import BACKBONE, FEATURE_EXTRACTOR, build, load_config_model, registry
from diff2to3._store import ENCODER, save_pipeline
from diff2to3.eval._vae import pipeline_models
from diff2to3.train._checkpoint import load_model, read_config, read_weights, save_model
from diff2to3.train._config import TrainConfig
from diff2to3.train.stages._base import Options


class _StructureModel(RootModel[Annotated[SMDiTConfig | StructureDiTConfig, Field(discriminator="kind")]]):
    """The config of either model of stage ``structure-flow``."""


def assemble(
    runs: Path,
    out: Path,
    name: str,
    threshold: float,
    structure_sampler: SamplerConfig,
    sampler: SamplerConfig,
    flow: TrainConfig | None = None,
) -> int:
    """Writes ``out`` from the stages' ``model`` folders under ``runs``; returns the number of parameters.

    Weights are stored in fp16, statistics as fp32 numbers in ``pipeline.json``. The 2to3-VAE's encoder, which
    generating does not need, lies beside them as ``latent_encoder.safetensors``.

    Args:
        threshold: occupancy logit above which a voxel is active.
        structure_sampler: how stage 1 samples unless told otherwise.
        sampler: how stage 2 does.
        flow: settings that stage ``flow`` was trained with. They name the backbone (``model.name``), the extractor
            (``options.extractor``) and the frame where these are not SMDiT, the stage ``autoencoder`` and the default.

    Raises:
        ValueError: a stage is missing or does not fit the others.
    """
    options = Options(**flow.options) if flow else Options()
    extractor, features = _extractor(runs, options.extractor)
    velocity = flow.model.get("name", "smdit") if flow else "smdit"
    backbone = load_backbone(runs / "flow/model", velocity)

    structure_vae = load_model(runs / "structure_vae/model", StructureVAEConfig, StructureVAE)
    structure = StructureFlow(
        StructureFlowConfig(
            flow=read_config(runs / "structure_flow/model", _StructureModel).root,
            decoder=structure_vae.config.model_copy(update={"threshold": threshold}),
            sampler=structure_sampler,
        )
    )
    structure.flow.load_state_dict(read_weights(runs / "structure_flow/model"))
    structure.decoder.load_state_dict(structure_vae.decoder.state_dict())

    vae = load_model(runs / "vae/model", SparseVAEConfig, SparseVAE)
    gaussians = vae.config.gaussians
    grid = f"{vae.config.grid_size}^3 voxels, {gaussians.num_gaussians} Gaussians each"
    config = PipelineConfig(
        name=name,
        description=f"Diff2to3: {grid}, {extractor.image_size} px condition image.",
        frame=options.frame,
        roles={
            "feature_extractor": features,
            "structure": _component("structure-flow", structure.config),
            "backbone": _component(velocity, backbone.config),
            "latent_decoder": _component("gaussian", vae.config),
            "renderer": ComponentConfig(name="auto", config={"filter_2d": gaussians.filter_2d, "antialias": True}),
        },
        sampler=sampler,
    )
    modules = {"structure": structure, "backbone": backbone, "latent_decoder": vae.decoder, ENCODER: vae.encoder}
    if isinstance(extractor, nn.Module) and options.extractor is None:  # any other finds its weights itself
        modules["feature_extractor"] = extractor
    save_pipeline(out, config, modules, torch.float16)
    return sum(p.numel() for module in modules.values() for p in module.parameters())


def _extractor(runs: Path, choice: ComponentConfig | None) -> tuple[Any, ComponentConfig]:
    """The extractor of the condition and how a pipeline names it: a component, or what stage ``autoencoder`` made."""
    if choice is not None:
        return from_plugin(FEATURE_EXTRACTOR, choice), choice
    extractor = load_model(runs / "autoencoder/model", FluxFeaturesConfig, FluxFeatures)
    return extractor, _component("flux", extractor.config)


def load_backbone(folder: Path, name: str) -> Any:
    """The trained flow of a model folder, of whichever component."""
    config_class = load_config_model(registry().find(BACKBONE, name))
    return load_model(folder, config_class, lambda config: build(BACKBONE, name, config.model_dump()))


def _component(name: str, config: BaseModel) -> ComponentConfig:
    return ComponentConfig(name=name, config=config.model_dump(mode="json"))


def unpack(source: Path, runs: Path) -> list[str]:
    """Writes the parts of a pipeline as the stages' ``model`` folders under ``runs``; returns the stages' names.

    The structure VAE is not among them: a pipeline holds its decoder alone.

    Raises:
        InputError: the pipeline is of other components, or its encoder is missing.
    """
    pipeline = Pipeline.from_pretrained(source, device="cpu")
    extractor, vae = pipeline_models(source, "cpu")
    structure, backbone = pipeline.structure, pipeline.backbone
    if not isinstance(structure, StructureFlow) or not isinstance(backbone, SMDiT):
        raise InputError(f"{source}: expected the structure flow and SMDiT of this project")
    models: dict[str, tuple[BaseModel, nn.Module]] = {
        "autoencoder": (extractor.config, extractor),
        "vae": (vae.config, vae),
        "structure_flow": (structure.flow.config, structure.flow),
        "flow": (backbone.config, backbone),
    }
    for stage, (config, model) in models.items():
        save_model(runs / stage / "model", config, model.state_dict())
    return list(models)

"""Trained stages -> a pipeline directory, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from flux_features import FluxFeatures, FluxFeaturesConfig
from pydantic import BaseModel
from safetensors.torch import save
from smdit import SamplerConfig as StructureSamplerConfig
from smdit import SMDiT, SMDiTConfig, StructureFlow, StructureFlowConfig
from sparse_vae import SparseVAE, SparseVAEConfig, StructureVAE, StructureVAEConfig
from torch import Tensor, nn

from diff2to3._errors import InputError
from diff2to3._pipeline import Pipeline
from diff2to3._pipeline_config import ComponentConfig, PipelineConfig, SamplerConfig
from diff2to3._store import save_pipeline, weights_path
from diff2to3.eval._vae import ENCODER, pipeline_models
from diff2to3.train._checkpoint import read_config, read_weights, save_model


def assemble(
    runs: Path, out: Path, name: str, threshold: float, structure_guidance: float, guidance: float, steps: int = 25
) -> int:
    """Writes ``out`` from the stages' ``model`` folders under ``runs``; returns the number of parameters.

    Weights are stored in fp16, statistics as fp32 numbers in ``pipeline.json``. The 2to3-VAE's encoder, which
    generating does not need, lies beside them as ``latent_encoder.safetensors``.

    Raises:
        ValueError: a stage is missing or does not fit the others.
    """
    extractor = FluxFeatures(read_config(runs / "autoencoder/model", FluxFeaturesConfig))
    extractor.load_state_dict(read_weights(runs / "autoencoder/model"))

    structure_vae = StructureVAE(read_config(runs / "structure_vae/model", StructureVAEConfig))
    structure_vae.load_state_dict(read_weights(runs / "structure_vae/model"))
    structure = StructureFlow(
        StructureFlowConfig(
            flow=read_config(runs / "structure_flow/model", SMDiTConfig),
            decoder=structure_vae.config.model_copy(update={"threshold": threshold}),
            sampler=StructureSamplerConfig(steps=steps, guidance=structure_guidance),
        )
    )
    structure.flow.load_state_dict(read_weights(runs / "structure_flow/model"))
    structure.decoder.load_state_dict(structure_vae.decoder.state_dict())

    backbone = SMDiT(read_config(runs / "flow/model", SMDiTConfig))
    backbone.load_state_dict(read_weights(runs / "flow/model"))

    vae = SparseVAE(read_config(runs / "vae/model", SparseVAEConfig))
    vae.load_state_dict(read_weights(runs / "vae/model"))

    gaussians = vae.config.gaussians
    renderer = {"filter_2d": gaussians.filter_2d, "antialias": True}
    roles = {
        "feature_extractor": ("flux", extractor.config),
        "structure": ("structure-flow", structure.config),
        "backbone": ("smdit", backbone.config),
        "latent_decoder": ("gaussian", vae.config),
    }
    config = PipelineConfig(
        name=name,
        description="Diff2to3 at small size: 32^3 voxels, 8 Gaussians each, 256 px condition image.",
        frame="view-snapped",
        roles={role: ComponentConfig(name=n, config=c.model_dump(mode="json")) for role, (n, c) in roles.items()}
        | {"renderer": ComponentConfig(name="auto", config=renderer)},
        sampler=SamplerConfig(steps=steps, guidance=guidance),
    )
    modules = {
        "feature_extractor": extractor,
        "structure": structure,
        "backbone": backbone,
        "latent_decoder": vae.decoder,
    }
    save_pipeline(out, config, modules, torch.float16)
    encoder: dict[str, Tensor] = {k: v.half().contiguous() for k, v in vae.encoder.state_dict().items()}
    weights_path(out, ENCODER).write_bytes(save(encoder))  # unlike save_file, with the permissions of any new file
    return sum(p.numel() for module in (*modules.values(), vae.encoder) for p in module.parameters())


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

"""TRELLIS's published image-to-3D models -> a pipeline directory: what ``diff2to3 import-trellis`` does.

Its ``pipeline.json`` is read by ``_trellis_file.py``, its checkpoints by smdit and sparse_vae.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import smdit
import sparse_vae
import torch
from _gs_render_reading import read_json
from flux_features import DinoFeatures, DinoFeaturesConfig
from pydantic import ValidationError
from smdit import CrossDiT, SamplerConfig, StructureDiT, StructureFlow, StructureFlowConfig
from sparse_vae import GaussianDecoder, SparseVAEConfig, StructureDecoder, trellis_files
from torch import nn

from diff2to3._assemble import check_models_fit
from diff2to3._atomic import new_folder, writing
from diff2to3._errors import InputError
from diff2to3._locate import CONFIG_NAME, file_sha256, is_hub_id
from diff2to3._parameter_limit import no_larger_than
from diff2to3._pipeline_config import ComponentConfig, PipelineConfig
from diff2to3._store import save_pipeline, weights_path
from diff2to3._trellis_file import DINO, LEFT_OUT, MODELS, SAMPLERS, Arguments, Sampler, read_description, reason

#: What TRELLIS's code fixes: side of the condition image, and black behind the object (``image * alpha``).
IMAGE_SIZE, BACKGROUND = 518, 0.0
#: Where the import came from: a file beside ``pipeline.json``.
RECORD_NAME = "import.json"

_TYPES: dict[str, type[nn.Module]] = dict(
    zip(MODELS, (CrossDiT, StructureDiT, StructureDecoder, GaussianDecoder), strict=True)
)


@dataclass(frozen=True)
class Imported:
    """What an import made.

    Attributes:
        config: of the pipeline.
        num_parameters: of the imported models, DINOv2's not among them.
        left_out: models of the source that nothing here uses.
        missing: what generating needs and this machine lacks, in one line with what to do; None if nothing.
    """

    config: PipelineConfig
    num_parameters: int
    left_out: tuple[str, ...]
    missing: str | None


def import_trellis(
    source: Path, target: Path, dino: str | None = None, callback: Callable[[int, int], None] | None = None
) -> Imported:
    """Write a pipeline directory with the weights of TRELLIS's models; it appears whole or not at all.

    Tensors keep their values exactly: one that half precision holds without loss is stored so, any other as float32.

    Args:
        source: directory in the layout of microsoft/TRELLIS-image-large.
        target: directory to make.
        dino: directory (transformers' layout) or Hub id of the DINOv2 that makes the condition, which is referred to
            and not copied; None is the Hub id of the one that the source names.
        callback: called with (parts done, parts in all) as the work goes on.

    Raises:
        InputError: a source that is not such a directory or has something unknown; damaged, missing or pickled files;
            models that do not fit together; a target that exists or cannot be written.
    """
    described = read_description(source).args
    extractor, width, missing = _condition(described.image_cond_model, dino)
    left_out = tuple(name for name in LEFT_OUT if name in described.models)
    total = len(MODELS) + 2
    models: dict[str, Any] = {}
    report = callback or (lambda done, parts: None)
    with writing(target), new_folder(target) as folder:
        files = _checkpoints(source, described.models)
        for name, (config_file, _) in files.items():
            report(len(models), total)
            models[name] = _load(name, source / config_file, models)
        wanted = models["slat_flow_model"].config.condition_channels
        if width not in (None, wanted):
            raise InputError(f"{extractor.source} has {width} channels, but the flows take {wanted}; choose by --dino")
        config, modules = _assemble(source.resolve().name, described, models, extractor)
        report(len(models), total)
        try:
            save_pipeline(folder, config, modules, dtype=None)
        except ValueError as error:  # not finite
            raise InputError(f"{source}: {error}") from error
        report(total - 1, total)
        names = [CONFIG_NAME, *(name for pair in files.values() for name in pair)]
        record = {
            "source": {name: file_sha256(source / name) for name in names},
            "weights": {role: file_sha256(weights_path(folder, role)) for role in modules},
            "left_out": left_out,
        }
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    report(total, total)
    count = sum(p.numel() for module in modules.values() for p in module.parameters())
    return Imported(config, count, left_out, missing)


def _checkpoints(source: Path, models: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Model -> its two files, relative to the source."""
    found = {}
    for name in MODELS:
        relative = PurePosixPath(models[name])
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise InputError(f"{name}: {models[name]!r} is no path inside {source}, such as 'ckpts/{name}'")
        try:
            config_file, weights_file = trellis_files(source / relative)
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: {reason(error)}") from error
        found[name] = (str(config_file.relative_to(source)), str(weights_file.relative_to(source)))
    return found


def _load(name: str, path: Path, loaded: dict[str, Any]) -> nn.Module:
    try:
        # Fresh layers draw from the global generator, which must stay as it was.
        with torch.random.fork_rng(devices=[]), no_larger_than(path.with_suffix(".safetensors")):
            if name.endswith("flow_model"):
                model: nn.Module = smdit.load_trellis(path)
            else:
                # A structure decoder does not say how fine its grid is; it makes the voxels of the SLAT flow.
                model = sparse_vae.load_trellis(path, loaded["slat_flow_model"].config.grid_size)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {reason(error)}") from error
    if not isinstance(model, _TYPES[name]):
        found, wanted = type(model).__name__, _TYPES[name].__name__
        raise InputError(f"{name}: {path} describes a {found}, expected a {wanted}")
    return model


def _assemble(
    name: str, described: Arguments, models: dict[str, Any], extractor: DinoFeaturesConfig
) -> tuple[PipelineConfig, dict[str, nn.Module]]:
    """The pipeline's config, and its modules with weights by role."""
    backbone, flow, decoder = (models[n] for n in ("slat_flow_model", "sparse_structure_flow_model", "slat_decoder_gs"))
    statistics = {"latent_mean": described.slat_normalization.mean, "latent_std": described.slat_normalization.std}
    try:
        structure_config = StructureFlowConfig(
            flow=flow.config,
            decoder=models["sparse_structure_decoder"].config,
            sampler=_sampler(described.sparse_structure_sampler),
        )
        decoder_config = SparseVAEConfig.model_validate(decoder.config.model_dump() | statistics)
    except ValidationError as error:
        raise InputError(f"the models do not fit together: {reason(error)}") from error
    with torch.device("meta"):  # both halves are replaced
        structure = StructureFlow(structure_config)
    structure.flow, structure.decoder = flow, models["sparse_structure_decoder"]
    check_models_fit(structure, backbone.config, decoder_config)
    grid_size, gaussians = decoder_config.grid_size, decoder_config.gaussians
    roles = {
        "feature_extractor": ("dino", extractor),
        "structure": ("structure-flow", structure_config),
        "backbone": ("cross-dit", backbone.config),
        "latent_decoder": ("gaussian", decoder_config),
    }
    renderer = ComponentConfig(name="auto", config={"filter_2d": gaussians.filter_2d, "antialias": True})
    config = PipelineConfig(
        name=name,
        description=f"TRELLIS's image to 3D: {grid_size}^3 voxels, {gaussians.num_gaussians} Gaussians each.",
        frame="canonical",
        condition_background=BACKGROUND,
        roles={role: ComponentConfig(name=n, config=c.model_dump(mode="json")) for role, (n, c) in roles.items()}
        | {"renderer": renderer},
        sampler=_sampler(described.slat_sampler),
    )
    return config, {"structure": structure, "backbone": backbone, "latent_decoder": decoder}


def _sampler(described: Sampler) -> SamplerConfig:
    """TRELLIS's guidance is the convention of this project too: (1 + w) conditional - w unconditional."""
    guidance = SAMPLERS[described.name]
    params = described.params
    if unknown := sorted(params.model_fields_set - {"steps", "rescale_t", *guidance}):
        raise InputError(f"the sampler {described.name} takes no {', '.join(unknown)}")
    config = SamplerConfig(
        method="euler",
        steps=params.steps,
        guidance=params.cfg_strength if guidance else 0.0,
        interval=params.cfg_interval,
        shift=params.rescale_t,
    )
    try:
        smdit.make_sampler(config)
    except ValueError as error:
        raise InputError(f"the sampler {described.name}: {error}") from error
    return config


def _condition(name: str, dino: str | None) -> tuple[DinoFeaturesConfig, int | None, str | None]:
    """The extractor's config, the width of its tokens where that is known, and what of it this machine lacks."""
    hub, width = DINO[name]
    dino = dino or hub
    folder = Path(dino)
    if not folder.is_dir() and not is_hub_id(dino):
        raise InputError(f"--dino {dino}: no such directory, and not a Hub id such as {hub!r}")
    source = str(folder.resolve()) if folder.is_dir() else dino
    config = DinoFeaturesConfig(source=source, image_size=IMAGE_SIZE, extra_tokens=True)
    missing = DinoFeatures.is_available(config)
    if not folder.is_dir():
        return config, width if dino == hub else None, missing
    if missing is not None:
        raise InputError(f"--dino: {missing}")
    stated = read_json(folder / "config.json")
    return config, stated.get("hidden_size"), None

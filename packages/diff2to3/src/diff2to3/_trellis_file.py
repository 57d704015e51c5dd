"""TRELLIS's ``pipeline.json``: what an image-to-3D pipeline of TRELLIS says about itself. Imports no PyTorch.

Source: github.com/microsoft/TRELLIS, ``trellis/pipelines/trellis_image_to_3d.py`` and ``trellis/pipelines/samplers/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from _gs_render_reading import read_json
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from diff2to3._errors import InputError
from diff2to3._locate import CONFIG_NAME

#: torch.hub's name of a DINOv2 -> the Hub id of the same weights in transformers' layout, and the width of its tokens.
DINO = {
    "dinov2_vits14_reg": ("facebook/dinov2-with-registers-small", 384),
    "dinov2_vitb14_reg": ("facebook/dinov2-with-registers-base", 768),
    "dinov2_vitl14_reg": ("facebook/dinov2-with-registers-large", 1024),
    "dinov2_vitg14_reg": ("facebook/dinov2-with-registers-giant", 1536),
}
#: The models that a pipeline is made of.
MODELS = ("slat_flow_model", "sparse_structure_flow_model", "sparse_structure_decoder", "slat_decoder_gs")
#: Decoders to other things than Gaussians; they share the latents and nothing else.
LEFT_OUT = ("slat_decoder_mesh", "slat_decoder_rf")
#: Sampler -> its parameters besides steps and rescale_t.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "FlowEulerSampler": (),
    "FlowEulerCfgSampler": ("cfg_strength",),
    "FlowEulerGuidanceIntervalSampler": ("cfg_strength", "cfg_interval"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SamplerArguments(_Strict):
    sigma_min: float = 1e-5  # enters TRELLIS's estimate of the data only, never the path


class SamplerParameters(_Strict):
    """With the defaults of TRELLIS's ``sample`` methods."""

    steps: PositiveInt = 50
    cfg_strength: float = 3.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    rescale_t: PositiveFloat = 1.0


class Sampler(_Strict):
    name: str
    args: SamplerArguments = SamplerArguments()
    params: SamplerParameters = SamplerParameters()


class Normalization(_Strict):
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Arguments(_Strict):
    models: dict[str, str]
    sparse_structure_sampler: Sampler
    slat_sampler: Sampler
    slat_normalization: Normalization
    image_cond_model: str


class TrellisPipeline(_Strict):
    """Contents of TRELLIS's ``pipeline.json``; what it says and nobody here reads is an error."""

    name: Literal["TrellisImageTo3DPipeline"]
    args: Arguments


def read_description(source: Path) -> TrellisPipeline:
    """The checked ``pipeline.json`` of a directory in TRELLIS's layout.

    Raises:
        InputError: no such directory, no such file in it, or one that says something unknown.
    """
    expected = f"expected a directory like microsoft/TRELLIS-image-large, with {CONFIG_NAME} and ckpts/"
    path = source / CONFIG_NAME
    if not source.is_dir():
        raise InputError(f"{source}: {'a file' if source.exists() else 'no such directory'}; {expected}")
    if not path.is_file():
        raise InputError(f"{source} has no {CONFIG_NAME}; {expected}")
    try:
        described = TrellisPipeline.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"{path} is not TRELLIS's of an image-to-3D pipeline: {reason(error)}; {expected}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {reason(error)}; {expected}") from error
    names = described.args.models.keys()
    if lacking := sorted(set(MODELS) - names):
        raise InputError(f"{path} names no {', '.join(lacking)}; found models: {', '.join(sorted(names)) or 'none'}")
    if unknown := sorted(names - set(MODELS) - set(LEFT_OUT)):
        raise InputError(f"{path} names unknown models {', '.join(unknown)}; known: {', '.join((*MODELS, *LEFT_OUT))}")
    for name in (described.args.sparse_structure_sampler.name, described.args.slat_sampler.name):
        if name not in SAMPLERS:
            raise InputError(f"{path} names an unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    if described.args.image_cond_model not in DINO:
        model = described.args.image_cond_model
        raise InputError(f"{path} names an unknown image_cond_model {model!r}; known: {', '.join(DINO)}")
    return described


def reason(error: Exception) -> str:
    """One line, not longer than a person reads."""
    if isinstance(error, ValidationError):
        parts = (f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        text = "; ".join(parts)
    else:
        text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:397]}..."

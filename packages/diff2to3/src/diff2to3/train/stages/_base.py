"""What the stages share: options, the picture loss, frozen parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from gs_render.metrics import LPIPS, psnr
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sparse_vae import VAELossConfig, picture_loss
from torch import Tensor, nn

from diff2to3._errors import InputError
from diff2to3._pipeline_config import ComponentConfig
from diff2to3.train._config import TrainConfig
from diff2to3.train._photo import PhotoAugmentation
from diff2to3.train._stage import Batch, Stage

C = TypeVar("C", bound=BaseModel)
M = TypeVar("M", bound=nn.Module)

MEASURED_BATCHES = 32
"""Batches that the statistics of latents are taken from."""


class Options(BaseModel):
    """Loss weights, augmentation and condition; a stage uses those that concern it. Defaults: TRELLIS's, see docs.

    Without `volume_weight` it is TRELLIS's for the size of the model (`VAELossConfig.for_model`). `extractor` is the
    component that makes the flows' condition, with its config; without it, `parts.features` says which one.
    `condition_views`: a batch of the flows has one to so many pictures an object. `photo` makes them look photographed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lpips: Path | None = None
    lpips_backbone: Literal["vgg", "alex"] = "vgg"
    lpips_weight: float = 0.2
    ssim_weight: float = 0.2
    kl_weight: float = 1e-6
    volume_weight: float | None = None
    opacity_weight: float = 1e-3
    bce_weight: float = 1.0
    frame: Literal["canonical", "view-snapped"] = "view-snapped"
    time: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float = 1.0
    time_std: float = 1.0
    p_uncond: float = 0.1
    extractor: ComponentConfig | None = None
    condition_views: int = Field(default=1, ge=1)
    jitter: float = 0.04
    photo: PhotoAugmentation | None = None
    crop: int | None = None
    color_weight: float = 0.0
    l1_weight: float = 1.0
    mse_weight: float = 0.0


def build_config(config_class: type[C], values: dict[str, Any]) -> C:
    """A model config from ``{preset: name, field: value, ...}``; one without presets has fields alone."""
    values = dict(values)
    if (make := getattr(config_class, "preset", None)) is not None:
        values = make(values.pop("preset", "tiny")).model_dump() | values
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise InputError(f"model: {problems}") from error


class PictureStage(Stage):
    """A stage with :class:`Options`."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        try:
            self.options = Options(**config.options)
        except ValidationError as error:
            raise InputError(f"options: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
        self.lpips = LPIPS(self.options.lpips, self.options.lpips_backbone) if self.options.lpips else None
        given = self.options.model_dump(include=set(VAELossConfig.model_fields), exclude_none=True)
        self.weights = VAELossConfig(**given | ({} if self.lpips else {"lpips_weight": 0.0}))

    def picture_loss(self, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 + SSIM + LPIPS with their weights, in fp32; and the terms, with the PSNR."""
        loss, terms = picture_loss(image, target, self.weights, self.lpips)
        return loss, {"psnr": psnr(image.detach(), target).mean()} | terms


def generator_of(batch: Batch, stream: int = 0) -> torch.Generator:
    """Randomness of a step: a function of the batch's seed alone, so that a resumed run repeats it."""
    tensor = next(value for value in batch.values() if isinstance(value, Tensor))
    return torch.Generator(tensor.device).manual_seed((batch["seed"] + stream) % 2**63)


def measure(latents: Callable[[int], Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of latents [C, n] of the first `MEASURED_BATCHES` items."""
    moments = torch.stack(
        [
            torch.stack([values.mean(1), values.square().mean(1)])
            for values in (latents(item).double() for item in range(MEASURED_BATCHES))
        ]
    )
    mean, square = moments.mean(0)
    return tuple(mean.tolist()), tuple((square - mean**2).clamp_min(1e-8).sqrt().tolist())


def on_white(rgba: Tensor) -> Tensor:
    """Pictures [..., 4, H, W] uint8 with straight alpha -> [..., 3, H, W] in [0, 1] on white."""
    rgba = rgba.float() / 255
    return composite(rgba[..., :3, :, :], rgba[..., 3:, :, :], torch.ones((), device=rgba.device))


def composite(color: Tensor, alpha: Tensor, ground: Tensor) -> Tensor:
    """Straight colour over a ground."""
    return color * alpha + ground * (1 - alpha)


def part(config: TrainConfig, role: str) -> Path:
    """Model folder of a trained part."""
    if role not in config.parts:
        raise InputError(f"this stage builds on a trained {role}; give parts: {{{role}: FOLDER}}")
    return config.parts[role]


def frozen(module: M) -> M:
    """A trained part, which does not learn here."""
    return module.requires_grad_(False).eval()

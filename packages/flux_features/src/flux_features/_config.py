"""Configuration of the FLUX-shaped feature extractors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FluxFeaturesConfig(BaseModel):
    """Which autoencoder turns pictures into feature maps, and how its latents are normalised.

    Attributes:
        architecture: ``"tiny"`` is diffusers' ``AutoencoderTiny`` layout (images mapped to [0, 1] inside),
            ``"kl"`` is diffusers' ``AutoencoderKL`` as FLUX.1 ships it (16 channels, no quant convolutions).
        latent_channels: channels of the feature map.
        image_size: side in pixels of the square condition image the rest of a pipeline was trained with.
        shift: features are ``scale * (z - shift)``; FLUX.1 uses 0.1159 and 0.3611.
        scale: see ``shift``.
        encoder_blocks: residual blocks per resolution of the tiny encoder, full resolution first.
        decoder_blocks: residual blocks per resolution of the tiny decoder, coarsest first.
        channel_mean: per-channel mean of ``scale * (z - shift)`` over a data set; subtracted.
        channel_std: per-channel standard deviation over the same data set; divided by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["tiny", "kl"] = "tiny"
    latent_channels: int = Field(default=16, ge=1)
    image_size: int = Field(default=256, ge=16, multiple_of=16)
    shift: float = 0.0
    scale: float = Field(default=1.0, gt=0)
    encoder_blocks: tuple[int, ...] = (1, 1, 1, 2)
    decoder_blocks: tuple[int, ...] = (1, 1, 1, 1)
    channel_mean: tuple[float, ...] | None = None
    channel_std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _statistics_fit(self) -> FluxFeaturesConfig:
        for name in ("channel_mean", "channel_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise ValueError(f"{name} has {len(value)} values, expected latent_channels = {self.latent_channels}")
        if self.architecture == "tiny" and (len(self.encoder_blocks) != 4 or len(self.decoder_blocks) != 4):
            raise ValueError("encoder_blocks and decoder_blocks need 4 entries each: the feature map is at 1/8")
        return self

    @classmethod
    def preset(cls, name: str) -> FluxFeaturesConfig:
        """``tiny`` (embedded pipeline), ``small`` (TAEF1-sized autoencoder, 512 px) or ``paper`` (FLUX.1's own)."""
        if name not in _PRESETS:
            raise ValueError(f"no FluxFeaturesConfig preset {name!r}; expected one of {', '.join(_PRESETS)}")
        return _PRESETS[name]


_PRESETS = {
    "tiny": FluxFeaturesConfig(),
    "small": FluxFeaturesConfig(image_size=512, encoder_blocks=(1, 3, 3, 3), decoder_blocks=(3, 3, 3, 1)),
    "paper": FluxFeaturesConfig(architecture="kl", image_size=512, shift=0.1159, scale=0.3611),
}

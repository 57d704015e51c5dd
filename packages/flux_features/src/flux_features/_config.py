"""Configuration of the FLUX-shaped feature extractors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Blocks = Annotated[int, Field(ge=0, le=1024)]


class FluxFeaturesConfig(BaseModel):
    """Which autoencoder turns pictures into feature maps, and how its latents are normalised.

    Attributes:
        architecture: ``"tiny"`` is the layout of TAEF1, TAEF2 and diffusers' ``AutoencoderTiny``; ``"kl"`` is
            diffusers' ``AutoencoderKL`` as FLUX.1 ships it (no quant convolutions, attention in the middle); ``"kl2"``
            is FLUX.2's, with quant convolutions.
        latent_channels: channels of the feature map.
        image_size: side in pixels of the square condition image the rest of a pipeline was trained with.
        shift: features are ``scale * (z - shift)``; FLUX.1 uses 0.1159 and 0.3611.
        scale: see ``shift``.
        encoder_blocks: ``"tiny"``: residual blocks per resolution of the encoder, full resolution first.
        decoder_blocks: ``"tiny"``: residual blocks per resolution of the decoder, coarsest first.
        normalised_blocks: ``"tiny"``: the coarsest blocks have a branch with a group norm (TAEF2).
        block_channels: ``"kl"`` and ``"kl2"``: widths per resolution, full resolution first, multiples of 32.
        channel_mean: per-channel mean of ``scale * (z - shift)`` over a data set; subtracted. One value a channel, or
            one a channel of the 2x2 patches (channel, row, column), as FLUX.2's batch norm has.
        channel_std: per-channel standard deviation over the same data set; divided by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["tiny", "kl", "kl2"] = "tiny"
    latent_channels: int = Field(default=16, ge=1, le=1 << 16)
    image_size: int = Field(default=256, ge=16, le=4096, multiple_of=16)
    shift: float = Field(default=0.0, allow_inf_nan=False)
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    encoder_blocks: tuple[Blocks, ...] = (1, 1, 1, 2)
    decoder_blocks: tuple[Blocks, ...] = (1, 1, 1, 1)
    normalised_blocks: bool = False
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    channel_mean: tuple[float, ...] | None = None
    channel_std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> FluxFeaturesConfig:
        for name in ("channel_mean", "channel_std"):
            value = getattr(self, name)
            if value is not None and len(value) not in (self.latent_channels, 4 * self.latent_channels):
                raise ValueError(
                    f"{name} has {len(value)} values, expected latent_channels = {self.latent_channels}, "
                    "or 4 times as many for patches of 2x2"
                )
        if self.channel_std is not None and not all(0 < value < float("inf") for value in self.channel_std):
            raise ValueError(f"channel_std must be positive and finite, got {self.channel_std}")
        for name in ("encoder_blocks", "decoder_blocks", "block_channels"):
            if len(getattr(self, name)) != 4:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 4 entries, the feature map is at 1/8")
        if any(not 32 <= width <= 1 << 16 or width % 32 for width in self.block_channels):
            raise ValueError(
                f"block_channels = {self.block_channels}: expected multiples of 32, the norms' groups, up to 65536"
            )
        return self

    @classmethod
    def preset(cls, name: str) -> FluxFeaturesConfig:
        """A configuration by name.

        ``tiny``: the embedded pipeline's, 1.24 M parameters, 256 px. ``small``: the same layout in TAEF1's size,
        2.5 M, 512 px. ``paper``: FLUX.1's own, 83.8 M, 512 px. ``flux2``: FLUX.2's, 84.0 M, 32 channels; the statistics
        of its batch norm come with the weights, ``FluxFeatures.from_pretrained`` reads them. ``taef1`` and ``taef2``:
        the public tiny autoencoders of FLUX.1 (16 channels) and FLUX.2 (32 channels).
        """
        if name not in _PRESETS:
            raise ValueError(f"no FluxFeaturesConfig preset {name!r}; expected one of {', '.join(_PRESETS)}")
        return _PRESETS[name]


_TAEF1 = FluxFeaturesConfig(image_size=512, encoder_blocks=(1, 3, 3, 3), decoder_blocks=(3, 3, 3, 1))
_PRESETS = {
    "tiny": FluxFeaturesConfig(),
    "small": _TAEF1,
    "paper": FluxFeaturesConfig(architecture="kl", image_size=512, shift=0.1159, scale=0.3611),
    "flux2": FluxFeaturesConfig(architecture="kl2", latent_channels=32, image_size=512),
    "taef1": _TAEF1,
    "taef2": _TAEF1.model_copy(update={"latent_channels": 32, "normalised_blocks": True}),
}

"""Configurations of the autoencoders."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

Statistics = tuple[float, ...] | None
PresetName = Literal["tiny", "small", "paper"]


# A config may come from elsewhere: what it counts is bounded far beyond any model that trains, before it is built.
Count = Annotated[int, Field(gt=0, le=1 << 16)]  # channels, heads, Gaussians of a voxel
Blocks = Annotated[int, Field(gt=0, le=1024)]
GridSize = Annotated[int, Field(gt=0, le=512)]  # voxels along an axis; dense noise on 512^3 x 8 takes 4 GB
Ratio = Annotated[float, Field(gt=0, le=64)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GaussianConfig(_Config):
    """How decoder outputs become Gaussians (TRELLIS decoder_gs.py and gaussian_model.py).

    Lengths that depend on the voxel size are stated in units of the object's bounding cube, whose side is 1.

    Attributes:
        num_gaussians: Gaussians a voxel.
        offset_range: side, in voxels, of the cube around a voxel's centre that its Gaussians can reach.
        perturb_offset: spread the Gaussians of a voxel over a Hammersley set when the output is zero.
        scale_bias: scale of a Gaussian when the output is zero.
        min_scale: scales are sqrt(activation^2 + min_scale^2) ("3d filter").
        scale_activation: positive function of the raw scale.
        opacity_bias: opacity when the output is zero.
        means_multiplier, color_multiplier, scales_multiplier, rotation_multiplier, opacity_multiplier: factor on the
            raw output of each attribute ("lr" in TRELLIS).
        filter_2d: screen-space low-pass filter, in squared pixels, that the renderer must use with these Gaussians.
    """

    num_gaussians: Count = 32
    offset_range: PositiveFloat = 1.5
    perturb_offset: bool = True
    scale_bias: PositiveFloat = 0.004
    min_scale: PositiveFloat = 0.0009
    scale_activation: Literal["softplus", "exp"] = "softplus"
    opacity_bias: float = Field(default=0.1, gt=0, lt=1)
    means_multiplier: float = 1.0
    color_multiplier: float = 1.0
    scales_multiplier: float = 1.0
    rotation_multiplier: float = 0.1
    opacity_multiplier: float = 1.0
    filter_2d: float = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.perturb_offset and self.offset_range <= 1:
            raise ValueError(
                f"offset_range is {self.offset_range}: it must exceed 1 with perturb_offset, else the first Gaussian's "
                "starting point lies on the border that tanh never reaches"
            )
        return self


class SparseVAEConfig(_Config):
    """The 2to3-VAE: a windowed transformer over active voxels (paper section 3; TRELLIS structured_latent_vae/).

    Attributes:
        grid_size: voxels along each axis.
        in_channels: channels of the feature volume.
        latent_channels: channels of the latents.
        width: channels of the residual stream.
        num_blocks: transformer blocks in the encoder, and as many in the decoder.
        num_heads: attention heads; must divide the width.
        mlp_ratio: hidden width of the MLP over `width`.
        window_size: side of the attention windows in voxels, odd blocks shifted by half; None for full attention.
        qk_norm: normalise queries and keys of every head.
        gaussians: output of the decoder.
        gradient_checkpointing: recompute blocks in the backward instead of keeping their activations.
        attention_backend: see `attention`; None chooses by device and dtype.
        latent_mean, latent_std: statistics of the latents over a data set, one value a channel; None until
            measured, and then latents count as normalised.
    """

    grid_size: GridSize = 64
    in_channels: Count = 16
    latent_channels: Count = 8
    width: Count = 768
    num_blocks: Blocks = 12
    num_heads: Count = 12
    mlp_ratio: Ratio = 4.0
    window_size: Count | None = 8
    qk_norm: bool = False
    gaussians: GaussianConfig = GaussianConfig()
    gradient_checkpointing: bool = False
    attention_backend: str | None = None
    latent_mean: Statistics = None
    latent_std: Statistics = None

    @classmethod
    def preset(cls, name: PresetName) -> Self:
        """The configuration called "tiny" (embedded in diff2to3), "small" or "paper" (TRELLIS's B size)."""
        if name == "paper":
            return cls()
        if name == "small":
            gaussians = GaussianConfig(num_gaussians=16, scale_bias=0.0057)
            return cls(width=384, num_blocks=8, num_heads=6, gaussians=gaussians)
        if name == "tiny":
            # Voxels are twice as wide and hold a quarter of the Gaussians, so the spacing is about four times larger.
            gaussians = GaussianConfig(num_gaussians=8, scale_bias=0.016, min_scale=0.0018)
            return cls(grid_size=32, width=192, num_blocks=4, num_heads=3, gaussians=gaussians)
        raise ValueError(f"no preset {name!r}: choose 'tiny', 'small' or 'paper'")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        _check_statistics(self.latent_mean, self.latent_std, self.latent_channels)
        return self


class VAELossConfig(_Config):
    """Weights of the 2to3-VAE's training loss (paper section 3.3); the defaults are TRELLIS's, see `vae_loss`.

    Attributes:
        l1_weight: mean absolute difference of the pictures.
        mse_weight: mean squared difference (not in TRELLIS).
        ssim_weight: 1 - structural similarity.
        lpips_weight: learned perceptual distance; 0 where there are no weights for it.
        kl_weight: divergence of the latents from the standard normal.
        volume_weight: mean product of a Gaussian's scales. 1e4 belongs to 64^3 voxels of 32 Gaussians, see `for_model`.
        opacity_weight: mean of (1 - opacity)^2.
    """

    l1_weight: NonNegativeFloat = 1.0
    mse_weight: NonNegativeFloat = 0.0
    ssim_weight: NonNegativeFloat = 0.2
    lpips_weight: NonNegativeFloat = 0.2
    kl_weight: NonNegativeFloat = 1e-6
    volume_weight: NonNegativeFloat = 1e4
    opacity_weight: NonNegativeFloat = 1e-3

    @classmethod
    def preset(cls, name: PresetName) -> Self:
        """The weights for the `SparseVAEConfig` of the same name."""
        return cls.for_model(SparseVAEConfig.preset(name))

    @classmethod
    def for_model(cls, config: SparseVAEConfig) -> Self:
        """TRELLIS's weights for a model of any size.

        A Gaussian's volume grows with the cube of the spacing of Gaussians on a surface, 1 / (N sqrt(G)) for N^3 voxels
        of G each, and the volume weight falls with it: the term keeps its share of the loss.
        """
        density = (config.grid_size / 64) ** 2 * config.gaussians.num_gaussians / 32
        return cls(volume_weight=1e4 * density**1.5)


class StructureVAEConfig(_Config):
    """The structure VAE: dense convolutions over an occupancy grid (TRELLIS sparse_structure_vae.py).

    Attributes:
        grid_size: voxels along each axis.
        latent_channels: channels of the latents.
        encoder_channels: channels of the encoder's levels, fine to coarse; each level after the first halves the grid.
        decoder_channels: channels of the decoder's levels, coarse to fine; as many as the encoder's.
        num_res_blocks: residual blocks on every level.
        num_middle_blocks: residual blocks on the coarsest level between the levels and the latents.
        norm: normalisation before the output layer, "layer" over channels or "group" of 32 groups.
        threshold: a voxel is occupied where its logit exceeds this.
        gradient_checkpointing: recompute residual blocks in the backward.
        latent_mean, latent_std: statistics of the latents over a data set; None until measured, and then latents
            count as normalised.
    """

    grid_size: GridSize = 64
    latent_channels: Count = 8
    encoder_channels: tuple[Count, ...] = Field(default=(32, 128, 512), min_length=1, max_length=8)
    decoder_channels: tuple[Count, ...] = Field(default=(512, 128, 32), min_length=1, max_length=8)
    num_res_blocks: Blocks = 2
    num_middle_blocks: Blocks = 2
    norm: Literal["layer", "group"] = "layer"
    threshold: float = 0.0
    gradient_checkpointing: bool = False
    latent_mean: Statistics = None
    latent_std: Statistics = None

    @classmethod
    def preset(cls, name: PresetName) -> Self:
        """The configuration called "tiny" (embedded in diff2to3), "small" or "paper" (as in TRELLIS)."""
        if name == "paper":
            return cls()
        if name == "small":
            return cls(encoder_channels=(32, 96, 192), decoder_channels=(192, 96, 32), num_middle_blocks=1)
        if name == "tiny":
            return cls(
                grid_size=32,
                encoder_channels=(24, 48, 80),
                decoder_channels=(56, 32, 16),
                num_res_blocks=1,
                num_middle_blocks=1,
            )
        raise ValueError(f"no preset {name!r}: choose 'tiny', 'small' or 'paper'")

    @property
    def latent_size(self) -> int:
        """Voxels along each axis of the latent grid."""
        return self.grid_size >> (len(self.encoder_channels) - 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.encoder_channels) != len(self.decoder_channels):
            raise ValueError(
                f"{len(self.encoder_channels)} encoder levels but {len(self.decoder_channels)} decoder levels: "
                "both halves need the same number"
            )
        if self.grid_size % (1 << (len(self.encoder_channels) - 1)):
            raise ValueError(f"grid_size {self.grid_size} cannot be halved {len(self.encoder_channels) - 1} times")
        _check_statistics(self.latent_mean, self.latent_std, self.latent_channels)
        return self


def _check_statistics(mean: Statistics, std: Statistics, channels: int) -> None:
    if (mean is None) != (std is None):
        raise ValueError("latent_mean and latent_std go together: give both or neither")
    for name, values in (("latent_mean", mean), ("latent_std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, expected one for each of {channels} channels")
    if std is not None and min(std) <= 0:
        raise ValueError("latent_std must be positive in every channel")

"""The structure VAE: dense occupancy grid <-> small dense latents (TRELLIS models/sparse_structure_vae.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_vae._blocks import LayerNorm32
from sparse_vae._config import StructureVAEConfig
from sparse_vae._model import sample_normal


class StructureEncoder(nn.Module):
    """Occupancy -> distribution of the structure latents.

    Args:
        config: `StructureVAEConfig`.
    """

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        channels = config.encoder_channels
        self.input_layer = nn.Conv3d(1, channels[0], 3, padding=1)
        self.levels = nn.Sequential(
            *_levels(channels, config.num_res_blocks, lambda a, b: nn.Conv3d(a, b, 2, stride=2))
        )
        self.middle = nn.Sequential(*[ResBlock3d(channels[-1]) for _ in range(config.num_middle_blocks)])
        self.output_layer = _output_layer(channels[-1], 2 * config.latent_channels, config.norm)

    def forward(
        self, occupancy: Float[Tensor, "B 1 N N N"]
    ) -> tuple[Float[Tensor, "B C n n n"], Float[Tensor, "B C n n n"]]:
        """Occupancy in {0, 1} -> mean and log-variance in float32, n = `config.latent_size`."""
        _check_grid("occupancy", occupancy, 1, self.config.grid_size)
        dtype = self.input_layer.weight.dtype
        h = _run(self.levels, self.input_layer(occupancy.to(dtype)), self.config)
        mean, logvar = self.output_layer(_run(self.middle, h, self.config)).float().chunk(2, dim=1)
        return mean, logvar


class StructureDecoder(nn.Module):
    """Structure latents -> occupancy logits.

    Args:
        config: `StructureVAEConfig`.
    """

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        channels = config.decoder_channels
        self.input_layer = nn.Conv3d(config.latent_channels, channels[0], 3, padding=1)
        self.middle = nn.Sequential(*[ResBlock3d(channels[0]) for _ in range(config.num_middle_blocks)])
        self.levels = nn.Sequential(*_levels(channels, config.num_res_blocks, Upsample3d))
        self.output_layer = _output_layer(channels[-1], 1, config.norm)

    def forward(self, z: Float[Tensor, "B C n n n"]) -> Float[Tensor, "B 1 N N N"]:
        """Latents in their natural scale -> logits in float32; a voxel is occupied above `config.threshold`."""
        _check_grid("z", z, self.config.latent_channels, self.config.latent_size)
        h = _run(self.middle, self.input_layer(z.to(self.input_layer.weight.dtype)), self.config)
        return self.output_layer(_run(self.levels, h, self.config)).float()

    def occupied(self, z: Float[Tensor, "B C n n n"]) -> list[Int[Tensor, "L 3"]]:
        """Latents -> coordinates int32 [L, 3] of the occupied voxels of every object, sorted."""
        return [to_coords(grid) for grid in self(z)[:, 0] > self.config.threshold]

    def denormalise(self, z: Float[Tensor, "B C n n n"]) -> Float[Tensor, "B C n n n"]:
        """Latents normalised by the statistics in the config -> latents in their natural scale."""
        if self.config.latent_mean is None or self.config.latent_std is None:
            return z
        mean, std = (z.new_tensor(v)[:, None, None, None] for v in (self.config.latent_mean, self.config.latent_std))
        return z * std + mean


class StructureVAE(nn.Module):
    """Encoder and decoder of the structure VAE.

    Args:
        config: `StructureVAEConfig`.
    """

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = StructureEncoder(config)
        self.decoder = StructureDecoder(config)

    def encode(
        self, occupancy: Float[Tensor, "B 1 N N N"]
    ) -> tuple[Float[Tensor, "B C n n n"], Float[Tensor, "B C n n n"]]:
        """Occupancy in {0, 1} -> mean and log-variance of the latents."""
        return self.encoder(occupancy)

    def decode(self, z: Float[Tensor, "B C n n n"]) -> Float[Tensor, "B 1 N N N"]:
        """Latents -> occupancy logits."""
        return self.decoder(z)

    def forward(
        self, occupancy: Float[Tensor, "B 1 N N N"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "B 1 N N N"], Float[Tensor, "B C n n n"], Float[Tensor, "B C n n n"]]:
        """Occupancy -> logits of a sampled latent, mean, log-variance: what training needs."""
        mean, logvar = self.encoder(occupancy)
        return self.decoder(sample_normal(mean, logvar, generator)), mean, logvar


class ResBlock3d(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input; the second convolution starts at zero.

    Args:
        channels: channels of the input.
        out_channels: channels of the output, by default the same.
        norm: "layer" over channels or "group" of 32 groups, both affine with eps 1e-5.
    """

    def __init__(self, channels: int, out_channels: int | None = None, norm: Literal["layer", "group"] = "layer"):
        super().__init__()
        out_channels = out_channels or channels
        self.norm1 = _norm(channels, norm)
        self.conv1 = nn.Conv3d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, norm)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if out_channels == channels else nn.Conv3d(channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)
        if self.conv2.bias is not None:
            nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Float[Tensor, "B C X Y Z"]) -> Float[Tensor, "B D X Y Z"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.skip(x)


class Upsample3d(nn.Module):
    """Convolution to eight times the channels, spread over 2x2x2 voxels.

    Args:
        channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels * 8, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C X Y Z"]) -> Float[Tensor, "B D X2 Y2 Z2"]:
        return pixel_shuffle_3d(self.conv(x), 2)


class ChannelLayerNorm(LayerNorm32):
    """LayerNorm over the channels of a channel-first volume, in float32."""

    def forward(self, x: Float[Tensor, "B C X Y Z"]) -> Float[Tensor, "B C X Y Z"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm computed in float32 and returned in the dtype of its input."""

    def forward(self, x: Float[Tensor, "B C X Y Z"]) -> Float[Tensor, "B C X Y Z"]:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def pixel_shuffle_3d(x: Float[Tensor, "B CF X Y Z"], factor: int) -> Float[Tensor, "B C FX FY FZ"]:
    """Spread channels (c, i, j, k), k fastest, over cells of factor^3 voxels (TRELLIS modules/spatial.py)."""
    return rearrange(x, "b (c i j k) x y z -> b c (x i) (y j) (z k)", i=factor, j=factor, k=factor)


def patchify(x: Float[Tensor, "B C X Y Z"], size: int) -> Float[Tensor, "B CP x y z"]:
    """Gather cells of size^3 voxels into channels (c, i, j, k), k fastest; the inverse of `unpatchify`."""
    return rearrange(x, "b c (x i) (y j) (z k) -> b (c i j k) x y z", i=size, j=size, k=size)


def unpatchify(x: Float[Tensor, "B CP x y z"], size: int) -> Float[Tensor, "B C X Y Z"]:
    """Spread channels (c, i, j, k) over cells of size^3 voxels."""
    return pixel_shuffle_3d(x, size)


def to_occupancy(coords: Sequence[Int[Tensor, "L 3"]], grid_size: int) -> Float[Tensor, "B 1 N N N"]:
    """Active voxels of every object -> float32 grid of zeros and ones."""
    grids = []
    for voxels in coords:
        grid = torch.zeros(1, grid_size, grid_size, grid_size, device=voxels.device)
        x, y, z = voxels.long().unbind(dim=1)
        grid[0, x, y, z] = 1.0
        grids.append(grid)
    return torch.stack(grids)


def to_coords(occupied: Bool[Tensor, "N N N"]) -> Int[Tensor, "L 3"]:
    """Grid of booleans -> int32 coordinates of its true voxels, sorted by (x, y, z)."""
    return occupied.nonzero().int()


def _levels(channels: Sequence[int], num_res_blocks: int, resample) -> list[nn.Module]:
    """Residual blocks on every level with `resample(channels, next_channels)` between levels."""
    modules: list[nn.Module] = []
    for number, width in enumerate(channels):
        modules += [ResBlock3d(width) for _ in range(num_res_blocks)]
        if number + 1 < len(channels):
            modules.append(resample(width, channels[number + 1]))
    return modules


def _norm(channels: int, kind: Literal["layer", "group"]) -> nn.Module:
    return GroupNorm32(32, channels) if kind == "group" else ChannelLayerNorm(channels)


def _output_layer(channels: int, out_channels: int, norm: Literal["layer", "group"]) -> nn.Sequential:
    return nn.Sequential(_norm(channels, norm), nn.SiLU(), nn.Conv3d(channels, out_channels, 3, padding=1))


def _run(modules: nn.Sequential, h: Tensor, config: StructureVAEConfig) -> Tensor:
    for module in modules:
        if config.gradient_checkpointing and torch.is_grad_enabled() and isinstance(module, ResBlock3d):
            h = checkpoint(module, h, use_reentrant=False)
        else:
            h = module(h)
    return h


def _check_grid(name: str, x: Tensor, channels: int, size: int) -> None:
    if x.ndim != 5 or tuple(x.shape[1:]) != (channels, size, size, size):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [B, {channels}, {size}, {size}, {size}]")

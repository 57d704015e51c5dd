"""Encoding a large picture in tiles, with the features of the whole picture.

Tiles that go through a whole network on their own differ from the picture: its group norms then take their statistics
over a tile, and its attention sees one tile. So the network is cut where it halves the resolution. Each part before
the coarsest is run tile by tile, every tile with as many cells around it as the part can see, and every group norm
with the statistics of the whole picture, found beforehand in a pass of their own. The rest, at 1/8 of the resolution,
runs on the whole picture. Nothing is blended or approximated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flux_features._tiny_autoencoder import TinyAutoencoder

_SMALLEST = 16  # cells a side of a tile


class _Window(NamedTuple):
    """Where a tile is: what is cut out of the map, the tile inside of that, and its place in the halved output."""

    outside: tuple[slice, slice]
    inside: tuple[slice, slice]
    target: tuple[slice, slice]


def encode_tiled(autoencoder: Any, images: Float[Tensor, "B 3 H W"], tile: int) -> Float[Tensor, "B D h w"]:
    """Output of the encoder: latents of a ``TinyAutoencoder``, mean and log-variance of an ``AutoencoderKL``.

    Args:
        autoencoder: one of the two.
        images: in the range that the network takes, sides multiples of 16.
        tile: side of a tile in pixels, a multiple of 16.
    """
    fine, coarse = _split(autoencoder)
    maps = images
    for part in fine:
        maps = _run_tiled(part, maps, tile)
        tile = max(tile // 2, _SMALLEST)
    return coarse(maps)


def _split(autoencoder: Any) -> tuple[list[nn.Module], nn.Module]:
    """Parts that end with a halving of the resolution, and what follows the last of them."""
    encoder = autoencoder.encoder
    if isinstance(autoencoder, TinyAutoencoder):
        layers = list(encoder.layers)
        ends = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
        starts = [0, *ends]
        return [nn.Sequential(*layers[a:b]) for a, b in zip(starts, ends, strict=False)], nn.Sequential(
            *layers[ends[-1] :]
        )
    first, *middle, last = encoder.down_blocks
    rest = [last, encoder.mid_block, encoder.conv_norm_out, encoder.conv_act, encoder.conv_out]
    if autoencoder.quant_conv is not None:
        rest.append(autoencoder.quant_conv)
    return [nn.Sequential(encoder.conv_in, first), *middle], nn.Sequential(*rest)


def _run_tiled(part: nn.Module, maps: Tensor, tile: int) -> Tensor:
    """``part(maps)`` at half the resolution, computed tile by tile."""
    reach = sum(conv.kernel_size[0] // 2 for conv in part.modules() if isinstance(conv, nn.Conv2d))
    windows = list(_windows(maps.shape[-2], maps.shape[-1], tile, reach + reach % 2))
    handles = []
    try:
        for norm in (module for module in part.modules() if isinstance(module, nn.GroupNorm)):
            pooled = _PooledNorm()
            handles.append(norm.register_forward_hook(pooled))
            for window in windows:  # the norms before this one have their statistics already
                pooled.inside = window.inside
                part(maps[(..., *window.outside)])
            pooled.is_complete = True
        output: Tensor | None = None
        for window in windows:
            halved = tuple(slice(place.start // 2, place.stop // 2) for place in window.inside)
            piece = part(maps[(..., *window.outside)])[(..., *halved)]
            if output is None:
                output = piece.new_empty(*piece.shape[:2], maps.shape[-2] // 2, maps.shape[-1] // 2)
            output[(..., *window.target)] = piece
    finally:
        for handle in handles:
            handle.remove()
    assert output is not None  # the extractor refuses empty pictures
    return output


def _windows(height: int, width: int, tile: int, reach: int) -> Iterator[_Window]:
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            axes = []
            for start, size in ((top, height), (left, width)):
                stop = min(start + tile, size)
                first, last = max(start - reach, 0), min(stop + reach, size)
                axes.append((slice(first, last), slice(start - first, stop - first), slice(start // 2, stop // 2)))
            yield _Window(*zip(*axes, strict=True))  # type: ignore[arg-type]


class _PooledNorm:
    """Forward hook of a ``GroupNorm``: gathers the statistics of a whole map from its tiles, then normalises by them.

    Attributes:
        inside: the tile without what surrounds it, so that no cell counts twice.
        is_complete: whether every tile was seen.
    """

    def __init__(self) -> None:
        self.inside: tuple[slice, slice] = (slice(None), slice(None))
        self.is_complete = False
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def __call__(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        maps = inputs[0]
        wide = torch.float32 if maps.device.type == "mps" else torch.float64  # which MPS has not
        if not self.is_complete:
            grouped = maps[(..., *self.inside)].to(wide).reshape(len(maps), norm.num_groups, -1)
            self._count += grouped.shape[-1]
            self._sum = self._sum + grouped.sum(-1)
            self._squares = self._squares + grouped.square().sum(-1)
            return output
        mean = torch.as_tensor(self._sum) / self._count
        variance = torch.as_tensor(self._squares) / self._count - mean.square()
        factor = (variance.clamp_min(0) + norm.eps).rsqrt()
        each = maps.shape[1] // norm.num_groups
        weight, bias = norm.weight.to(wide), norm.bias.to(wide)
        scale = factor.repeat_interleave(each, 1) * weight
        shift = bias - mean.repeat_interleave(each, 1) * scale
        return (maps.float() * scale.float()[..., None, None] + shift.float()[..., None, None]).to(output.dtype)

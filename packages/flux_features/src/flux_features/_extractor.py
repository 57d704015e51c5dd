"""Images to FLUX latents: the feature maps that feed the 2to3-VAE and condition SMDiT (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flux_features._config import FluxFeaturesConfig
from flux_features._hub import Consent, hub_files
from flux_features._images import padded
from flux_features._tiling import encode_tiled
from flux_features._tiny_autoencoder import TinyAutoencoder
from flux_features._weights import (
    config_of,
    find_files,
    hub_names,
    load_strictly,
    own_config,
    published_config,
    published_numbers,
    read_tensors,
)


class FluxFeatures(nn.Module):
    """FLUX-shaped autoencoder as a feature extractor.

    ``features = (scale * (z - shift) - channel_mean) / channel_std`` with z the latent (of ``"kl"`` and ``"kl2"`` the
    mean, without noise). Statistics of 4C values are those of 2x2 patches; FLUX.2 has such, and ``tokens`` are then
    its own latents. The decoder is kept so that a feature map can be looked at and the autoencoder trained.

    Shapes: images ``[B, 3, H, W]`` float RGB in [0, 1]; feature map ``[B, C, h, w]``, h = 2 ceil(H / 16), likewise w;
    tokens ``[B, h/2, w/2, 4C]``.

    A picture whose sides are not multiples of 16 (stride 8, patches of 2 x 2) is padded at its right and bottom by
    repeating its last column and row: cell (i, j) always covers pixels [8i, 8i + 8) x [8j, 8j + 8).

    Pictures are cast to the dtype of the weights, which is the dtype of the features; the statistics stay float32.
    """

    stride = 8
    patch = 2
    channel_mean: Tensor
    channel_std: Tensor

    def __init__(self, config: FluxFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = _build(config)
        # Statistics live in the config as fp32 numbers, not in the weights file, so that fp16 weights keep them exact.
        for name, value in self._statistics().items():
            self.register_buffer(name, value, persistent=False)

    @property
    def channels(self) -> int:
        """Channels of the feature map."""
        return self.config.latent_channels

    @property
    def image_size(self) -> int:
        """Side in pixels of the condition image that pipelines built on this extractor use."""
        return self.config.image_size

    def forward(self, images: Float[Tensor, "B 3 H W"], *, tile: int | None = None) -> Float[Tensor, "B C h w"]:
        """Feature maps of images in [0, 1] of any size.

        Args:
            images: ``[B, 3, H, W]`` float RGB.
            tile: side in pixels, a multiple of 16, of the squares in which a larger picture is encoded, to need less
                memory; None encodes it whole. The features are the same up to rounding: each resolution is tiled on
                its own with as many cells of overlap as its convolutions reach, norms take their statistics over the
                whole picture, and the blocks at 1/8 (with ``"kl"`` and ``"kl2"`` the attention) run on all of it. Norms
                cost one pass each, so FLUX's own networks take about five times as long.
        """
        side = self.stride * self.patch
        images = padded(images, side)
        if tile is not None and (tile < side or tile % side):
            raise ValueError(f"tile = {tile}: expected a multiple of {side} px, or None")
        latent = self._latent(images.to(self._dtype), tile)
        latent = self.config.scale * (latent.float() - self.config.shift)
        mean, std = self._spread(self.channel_mean, latent), self._spread(self.channel_std, latent)
        return ((latent - mean) / std).to(self._dtype)

    def tokens(self, feature_map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B i j D"]:
        """2x2 patches of a feature map, row-major; D = 4C in the order FLUX packs: channel, row, column."""
        if feature_map.shape[-2] % self.patch or feature_map.shape[-1] % self.patch:
            raise ValueError(f"expected a feature map with even sides, got {tuple(feature_map.shape)}")
        return F.pixel_unshuffle(feature_map, self.patch).permute(0, 2, 3, 1).contiguous()

    def decode(
        self, feature_map: Float[Tensor, "B C h w"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Images in [0, 1] (not clamped) of feature maps: the inverse of calling the module, up to what it loses.

        Args:
            feature_map: ``[B, C, h, w]``.
            size: (height, width) of the picture before it was padded, to cut the padding off; None keeps 8h x 8w.
        """
        mean, std = self._spread(self.channel_mean, feature_map), self._spread(self.channel_std, feature_map)
        latent = (feature_map.float() * std + mean) / self.config.scale + self.config.shift
        latent = latent.to(self._dtype)
        if isinstance(self.autoencoder, TinyAutoencoder):
            images = self.autoencoder.decode(latent)
        else:
            images = self.autoencoder.decode(latent).sample.add(1).div(2)
        return images if size is None else images[..., : size[0], : size[1]]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def _latent(self, images: Tensor, tile: int | None) -> Tensor:
        is_tiny = isinstance(self.autoencoder, TinyAutoencoder)
        if not is_tiny:
            images = images * 2 - 1
        if tile is not None and max(images.shape[-2:]) > tile:
            return encode_tiled(self.autoencoder, images, tile)[:, : self.channels]  # the means come first
        return self.autoencoder.encode(images) if is_tiny else self.autoencoder.encode(images).latent_dist.mode()

    def _statistics(self, device: torch.device | None = None) -> dict[str, Tensor]:
        count = self.config.latent_channels
        mean, std = self.config.channel_mean or (0.0,) * count, self.config.channel_std or (1.0,) * count
        values = {"channel_mean": mean, "channel_std": std}
        shaped = {name: torch.tensor(value, device=device).view(1, -1, 1, 1) for name, value in values.items()}
        return {name: F.pixel_shuffle(v, self.patch) if v.shape[1] > count else v for name, v in shaped.items()}

    def _spread(self, statistic: Tensor, latent: Tensor) -> Tensor:
        """Statistics of 2x2 patches repeated over a map ``[B, C, h, w]``; those of whole channels as they are."""
        if statistic.shape[-1] == 1:
            return statistic
        rows, columns = latent.shape[-2:]
        if rows % self.patch or columns % self.patch:
            raise ValueError(f"expected a feature map with even sides, got {tuple(latent.shape)}")
        return statistic.repeat(1, 1, rows // self.patch, columns // self.patch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FluxFeatures:
        super()._apply(fn, recurse)
        for name, value in self._statistics(self.channel_mean.device).items():  # half() would have rounded them
            setattr(self, name, value)
        return self

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: FluxFeaturesConfig | None = None,
        *,
        revision: str | None = None,
        accept_licence: Consent = False,
    ) -> FluxFeatures:
        """An extractor with published weights, in float32 and eval mode.

        What the Hub's local cache has is used as it is. Anything else is downloaded with a line on the log
        ``flux_features`` that names the licence, and from a gated repository only on ``accept_licence``.

        Args:
            source: a file, a directory or a Hub id. For FLUX.1's and FLUX.2's autoencoders: ``ae.safetensors`` in the
                black-forest-labs layout, a diffusers directory (of the autoencoder, or of a pipeline with a ``vae``
                folder), or an id such as ``black-forest-labs/FLUX.1-schnell``. For the tiny ones: a file or directory
                in diffusers' layout, one of the pair ``*_encoder.safetensors`` and ``*_decoder.safetensors`` or the
                directory that has the pair, or ``madebyollin/taef1``, ``madebyollin/taef2``. For all: a model folder
                that diff2to3 trained, with ``model.safetensors`` and our ``config.json``, whose config is taken.
            config: the layout; None is the one that a well-known id has, or that the names of the tensors tell. Scale
                and shift that a ``config.json`` beside the weights states replace those of the layout; FLUX.2's
                statistics come with its weights.
            revision: Hub revision, for Hub ids.
            accept_licence: for gated Hub ids: you read the licence of the weights and agree to it, or a function that
                is asked then.

        Raises:
            ValueError: the weights are not of this layout (missing, unexpected or misshapen tensors are named), or a
                file cannot be read.
            FileNotFoundError: there is no such file, directory or Hub repository.
            PermissionError: the owner wants a licence accepted first: by ``accept_licence``, and on the Hub.
            ConnectionError: the Hub cannot be reached.
        """
        if Path(source).exists():
            files, config_file = find_files(source)
        else:
            config = config or published_config(source)
            names = hub_names(config or FluxFeaturesConfig.preset("paper"))
            weights, *rest = hub_files(str(source), names, revision, accept_licence)
            files, config_file = [weights], rest[0] if rest else None
        where = " and ".join(map(str, files))
        tensors = read_tensors(files)
        if (own := own_config(config_file)) is not None:
            model = cls(own)
            load_strictly(model, tensors, where)
            return model.eval()
        config = config or config_of(tensors, where)
        numbers = published_numbers(config.architecture, tensors, config_file, where)
        model = cls(FluxFeaturesConfig.model_validate(config.model_dump() | numbers))
        load_strictly(model.autoencoder, tensors, where)
        return model.eval()


def _build(config: FluxFeaturesConfig) -> Any:
    if config.architecture == "tiny":
        return TinyAutoencoder(
            config.latent_channels, config.encoder_blocks, config.decoder_blocks, config.normalised_blocks
        )
    from diffusers import AutoencoderKL

    # FLUX.1's: black-forest-labs/flux, util.py and modules/autoencoder.py. FLUX.2's (flux2, autoencoder.py, diffusers'
    # AutoencoderKLFlux2) is the same network with quant convolutions; its batch norm is in the config's statistics.
    return AutoencoderKL(
        latent_channels=config.latent_channels,
        block_out_channels=config.block_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=32,
        use_quant_conv=config.architecture == "kl2",
        use_post_quant_conv=config.architecture == "kl2",
        mid_block_add_attention=True,
    )

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
from flux_features._tiny_autoencoder import TinyAutoencoder
from flux_features._weights import find_files, load_strictly, published_scaling


class FluxFeatures(nn.Module):
    """FLUX-shaped autoencoder as a feature extractor.

    ``features = (scale * (z - shift) - channel_mean) / channel_std`` with z the latent (of ``"kl"`` the mean, without
    noise). The decoder is kept so that a feature map can be looked at and the autoencoder trained.

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

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Feature maps of images in [0, 1] of any size."""
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(f"expected float images [B, 3, H, W] in [0, 1], got {images.dtype} {tuple(images.shape)}")
        side = self.stride * self.patch
        bottom, right = -images.shape[-2] % side, -images.shape[-1] % side
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        latent = self.config.scale * (self._latent(images.to(self._dtype)).float() - self.config.shift)
        return ((latent - self.channel_mean) / self.channel_std).to(self._dtype)

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
        latent = (feature_map.float() * self.channel_std + self.channel_mean) / self.config.scale + self.config.shift
        latent = latent.to(self._dtype)
        if isinstance(self.autoencoder, TinyAutoencoder):
            images = self.autoencoder.decode(latent)
        else:
            images = self.autoencoder.decode(latent).sample.add(1).div(2)
        return images if size is None else images[..., : size[0], : size[1]]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def _latent(self, images: Tensor) -> Tensor:
        if isinstance(self.autoencoder, TinyAutoencoder):
            return self.autoencoder.encode(images)
        return self.autoencoder.encode(images * 2 - 1).latent_dist.mode()

    def _statistics(self, device: torch.device | None = None) -> dict[str, Tensor]:
        count = self.config.latent_channels
        mean, std = self.config.channel_mean or (0.0,) * count, self.config.channel_std or (1.0,) * count
        values = {"channel_mean": mean, "channel_std": std}
        return {name: torch.tensor(value, device=device).view(1, -1, 1, 1) for name, value in values.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FluxFeatures:
        super()._apply(fn, recurse)
        for name, value in self._statistics(self.channel_mean.device).items():  # half() would have rounded them
            setattr(self, name, value)
        return self

    @classmethod
    def from_pretrained(
        cls, source: str | Path, config: FluxFeaturesConfig | None = None, *, revision: str | None = None
    ) -> FluxFeatures:
        """An extractor with published weights, in float32 and eval mode.

        Args:
            source: a file, a directory or a Hub id. For FLUX.1's autoencoder: ``ae.safetensors`` in the
                black-forest-labs layout, a diffusers directory (of the autoencoder, or of a pipeline with a ``vae``
                folder), or an id such as ``black-forest-labs/FLUX.1-schnell``. For the tiny ones: a file or directory
                in diffusers' layout, one of the pair ``*_encoder.safetensors`` and ``*_decoder.safetensors`` or the
                directory that has the pair, or ``madebyollin/taef1``, ``madebyollin/taef2``.
            config: the layout; None is ``FluxFeaturesConfig.preset("paper")``. Scale and shift that a ``config.json``
                beside the weights states replace those of the layout.
            revision: Hub revision, for Hub ids.

        Raises:
            ValueError: the weights are not of this layout (missing, unexpected or misshapen tensors are named), or a
                file cannot be read.
            FileNotFoundError: there is no such file, directory or Hub repository.
            PermissionError: the Hub wants a licence accepted first.
            ConnectionError: the Hub cannot be reached.
        """
        config = FluxFeaturesConfig.preset("paper") if config is None else config
        is_tiny = config.architecture == "tiny"
        hub_file = "diffusion_pytorch_model.safetensors"
        if not is_tiny:
            hub_file = f"vae/{hub_file}"
        elif config.normalised_blocks:
            hub_file = "taef2.safetensors"
        files, config_file = find_files(source, is_tiny, hub_file, revision)
        model = cls(FluxFeaturesConfig.model_validate(config.model_dump() | published_scaling(config_file)))
        load_strictly(model.autoencoder, files)
        return model.eval()


def _build(config: FluxFeaturesConfig) -> Any:
    if config.architecture == "tiny":
        return TinyAutoencoder(
            config.latent_channels, config.encoder_blocks, config.decoder_blocks, config.normalised_blocks
        )
    from diffusers import AutoencoderKL

    return AutoencoderKL(  # FLUX.1's autoencoder: black-forest-labs/flux, util.py and modules/autoencoder.py
        latent_channels=config.latent_channels,
        block_out_channels=config.block_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )

"""Images to FLUX latents: the feature maps that feed the 2to3-VAE and condition SMDiT (paper, section 3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flux_features._config import FluxFeaturesConfig

_KL_LAYOUT: dict[str, Any] = {  # FLUX.1's autoencoder: black-forest-labs/flux, util.py and modules/autoencoder.py
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}


class FluxFeatures(nn.Module):
    """FLUX-shaped autoencoder as a feature extractor.

    ``features = (scale * (z - shift) - channel_mean) / channel_std`` with z the (mean) latent. The decoder is kept so
    that a feature map can be looked at and the autoencoder trained.

    Shapes: images ``[B, 3, H, W]`` float RGB in [0, 1]; feature map ``[B, C, H/8, W/8]``; tokens ``[B, h/2, w/2, 4C]``.
    """

    stride = 8
    patch = 2

    def __init__(self, config: FluxFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = _build(config)
        mean = torch.tensor(config.channel_mean or [0.0] * config.latent_channels)
        std = torch.tensor(config.channel_std or [1.0] * config.latent_channels)
        # Statistics live in the config as fp32 numbers, not in the weights file, so that fp16 weights keep them exact.
        self.register_buffer("channel_mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("channel_std", std.view(1, -1, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        """Channels of the feature map."""
        return self.config.latent_channels

    @property
    def image_size(self) -> int:
        """Side in pixels of the condition image that pipelines built on this extractor use."""
        return self.config.image_size

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Feature maps of images in [0, 1]; sides must be multiples of 16 (stride 8, 2x2 patches)."""
        height, width = images.shape[-2:]
        side = self.stride * self.patch
        if images.ndim != 4 or images.shape[1] != 3 or height % side or width % side:
            raise ValueError(
                f"expected images [B, 3, H, W] with H and W multiples of {side}, got {tuple(images.shape)}"
            )
        return (self._latent(images) - self.channel_mean) / self.channel_std

    def tokens(self, feature_map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B i j D"]:
        """2x2 patches of a feature map, row-major, D = 4C (channel, row, column order inside a patch)."""
        batch, channels, height, width = feature_map.shape
        p = self.patch
        patches = feature_map.reshape(batch, channels, height // p, p, width // p, p)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // p, width // p, channels * p * p)

    def decode(self, feature_map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [0, 1] (not clamped) of feature maps: the inverse of calling the module, up to what it loses."""
        latent = (feature_map * self.channel_std + self.channel_mean) / self.config.scale + self.config.shift
        return self.autoencoder.decode(latent).sample.add(1).div(2)

    def _latent(self, images: Tensor) -> Tensor:
        posterior = self.autoencoder.encode(images * 2 - 1)
        latent = posterior.latents if self.config.architecture == "tiny" else posterior.latent_dist.mode()
        return self.config.scale * (latent - self.config.shift)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> FluxFeatures:
        """Real FLUX.1 autoencoder weights.

        Args:
            source: a diffusers directory (``config.json`` + ``diffusion_pytorch_model.safetensors``), a single
                ``ae.safetensors`` in the black-forest-labs layout, or a Hub id such as ``black-forest-labs/FLUX.1-schnell``
                (its ``vae`` subfolder is fetched).
            revision: Hub revision, for Hub ids.

        Raises:
            ValueError: the file is not a FLUX autoencoder (missing, unexpected or misshapen tensors are named).
        """
        path = Path(source)
        model = cls(FluxFeaturesConfig.preset("paper"))
        if path.is_file():
            model.autoencoder.load_state_dict(_read_bfl(path, model.autoencoder))
            return model
        from diffusers import AutoencoderKL

        if path.is_dir():
            folder = path / "vae" if (path / "vae").is_dir() else path
            model.autoencoder = AutoencoderKL.from_pretrained(folder)
        else:
            model.autoencoder = AutoencoderKL.from_pretrained(str(source), subfolder="vae", revision=revision)
        found = model.autoencoder.config.latent_channels
        if found != model.config.latent_channels:
            raise ValueError(f"{source} has {found} latent channels, expected FLUX.1's {model.config.latent_channels}")
        return model


def _build(config: FluxFeaturesConfig) -> nn.Module:
    if config.architecture == "kl":
        from diffusers import AutoencoderKL

        return AutoencoderKL(latent_channels=config.latent_channels, **_KL_LAYOUT)
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        latent_channels=config.latent_channels,
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
    )


def _read_bfl(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """State dict of a black-forest-labs ``ae.safetensors`` in diffusers' names, checked against ``model``."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        source = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    converted = convert_ldm_vae_checkpoint(source, _KL_LAYOUT)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in converted.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path}: not a FLUX.1 autoencoder; {len(wrong)} tensors differ, first {wrong[0]}: "
            f"got {found.get(wrong[0], 'nothing')}, expected {expected.get(wrong[0], 'nothing')}"
        )
    return {name: value.float() for name, value in converted.items()}

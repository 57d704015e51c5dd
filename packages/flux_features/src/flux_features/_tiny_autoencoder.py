"""A small convolutional autoencoder with latents at 1/8: the layout of TAESD, TAEF1, TAEF2 and ``AutoencoderTiny``.

Source: Ollin Boer Bohan, "Tiny AutoEncoder for Stable Diffusion" (github.com/madebyollin/taesd). The names of the
parameters are those of diffusers' ``AutoencoderTiny``, so weights go both ways. It is built here because importing
diffusers takes longer than encoding a picture does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

_WIDTH = 64


class TinyAutoencoder(nn.Module):
    """Encoder and decoder of pictures in [0, 1], 64 channels wide at every resolution.

    Args:
        latent_channels: C of the latents ``[B, C, H/8, W/8]``.
        encoder_blocks: residual blocks at 1/1, 1/2, 1/4 and 1/8 of the resolution.
        decoder_blocks: residual blocks at 1/8, 1/4, 1/2 and 1/1.
        normalised: the blocks at 1/8 get a branch with a group norm over the whole picture (TAEF2).
    """

    def __init__(
        self,
        latent_channels: int,
        encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        normalised: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = _Encoder(latent_channels, encoder_blocks, normalised)
        self.decoder = _Decoder(latent_channels, decoder_blocks, normalised)
        self.apply(_initialise)

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of pictures in [0, 1] whose sides are multiples of 8."""
        return self.encoder(images)

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pictures in [0, 1], not clamped."""
        return self.decoder(latents)


class _Encoder(nn.Module):
    def __init__(self, latent_channels: int, blocks: tuple[int, ...], normalised: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level, count in enumerate(blocks):
            layers.append(_conv(_WIDTH, _WIDTH, stride=2, bias=False) if level else _conv(3, _WIDTH))
            layers += [_Block(normalised and level == len(blocks) - 1) for _ in range(count)]
        self.layers = nn.Sequential(*layers, _conv(_WIDTH, latent_channels))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class _Decoder(nn.Module):
    def __init__(self, latent_channels: int, blocks: tuple[int, ...], normalised: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(latent_channels, _WIDTH), nn.ReLU(inplace=True)]
        for level, count in enumerate(blocks):
            layers += [_Block(normalised and level == 0) for _ in range(count)]
            if level < len(blocks) - 1:
                layers += [nn.Upsample(scale_factor=2), _conv(_WIDTH, _WIDTH, bias=False)]
        self.layers = nn.Sequential(*layers, _conv(_WIDTH, 3))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(torch.tanh(latents / 3) * 3)  # soft limits: latents beyond +-3 are rare


class _Block(nn.Module):
    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(_WIDTH, _WIDTH),
            nn.ReLU(inplace=True),
            _conv(_WIDTH, _WIDTH),
            nn.ReLU(inplace=True),
            _conv(_WIDTH, _WIDTH),
        )
        self.pool = _normalised_branch() if normalised else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _initialise(module: nn.Module) -> None:
    """He initialisation with every block the identity at first.

    Nothing normalises these layers: under PyTorch's default the signal fades over the strided ones, and colour, a small
    share of a picture's variance, is not learned for thousands of steps.
    """
    if isinstance(module, nn.Conv2d):
        inner = module.out_channels >= _WIDTH  # latents and pictures are not followed by a ReLU
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if inner else "linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, _Block):  # visited after its convolutions
        nn.init.zeros_(module.conv.get_parameter("4.weight"))


def _normalised_branch() -> nn.Sequential:
    wide = 4 * _WIDTH
    return nn.Sequential(
        nn.Conv2d(_WIDTH, wide, 1, bias=False),
        nn.GroupNorm(4, wide),
        nn.ReLU(inplace=True),
        nn.Conv2d(wide, _WIDTH, 1, bias=False),
    )


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)

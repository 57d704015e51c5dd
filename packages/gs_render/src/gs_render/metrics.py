"""Image similarity: PSNR, SSIM and LPIPS, differentiable, for rendered pictures.

All take pictures ``[B, 3, H, W]`` float RGB in [0, 1] and return one value a picture, ``[B]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Images = Float[Tensor, "B 3 H W"]

# Backbones in the numbering of torchvision's `features`: convolutions (in, out, kernel, stride, padding), pools
# (kernel), taps (the ReLUs that LPIPS reads, with their widths). Every layer that is not named is a ReLU.
_BACKBONES: dict[str, Any] = {
    "vgg": {
        "convs": {
            index: (*widths, 3, 1, 1)
            for index, widths in {
                0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
                17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
            }.items()
        },
        "pools": {4: 2, 9: 2, 16: 2, 23: 2},
        "taps": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
    },
    "alex": {
        "convs": {
            0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1),
            10: (256, 256, 3, 1, 1),
        },
        "pools": {2: 3, 5: 3},
        "taps": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
    },
}  # fmt: skip


def psnr(image: Images, target: Images) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio in dB (peak 1); capped at 100 dB for identical pictures."""
    image, target = _wide(image, target)
    error = (image - target).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


def ssim(image: Images, target: Images, window: int = 11, sigma: float = 1.5) -> Float[Tensor, " B"]:
    """Structural similarity (Wang et al. 2004): Gaussian window, K1 = .01, K2 = .03, no padding.

    Computed in float32 or better, under autocast too: in half precision the variances cancel to noise.

    Args:
        image, target: [B, 3, H, W] in [0, 1], sides of at least `window`.
        window: taps of the Gaussian a side, odd.
        sigma: its standard deviation, pixels.
    """
    image, target = _wide(image, target)
    if min(image.shape[-2:]) < window:
        raise ValueError(f"ssim: got pictures of {tuple(image.shape)}, expected sides of at least window = {window}")
    with torch.autocast(image.device.type, enabled=False):
        return _ssim(image, target, window, sigma)


def _wide(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or better, after checking that they are comparable."""
    if image.shape != target.shape or image.ndim != 4 or image.shape[1] != 3:
        shapes = f"{tuple(image.shape)} and {tuple(target.shape)}"
        raise ValueError(f"expected two batches of pictures [B, 3, H, W] of one size, got {shapes}")
    dtype = torch.promote_types(torch.promote_types(image.dtype, target.dtype), torch.float32)
    return image.to(dtype), target.to(dtype)


def _ssim(image: Tensor, target: Tensor, window: int, sigma: float) -> Tensor:
    taps = torch.arange(window, dtype=image.dtype, device=image.device) - window // 2
    kernel = torch.exp(-(taps**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(15, 1, -1)
    stack = torch.cat([image, target, image * image, target * target, image * target], 1)
    blurred = F.conv2d(F.conv2d(stack, kernel[..., None], groups=15), kernel[:, :, None], groups=15)
    mu_x, mu_y, xx, yy, xy = blurred.split(3, dim=1)
    var_x, var_y, cov = xx - mu_x**2, yy - mu_y**2, xy - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return value.flatten(1).mean(1)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity v0.1 (Zhang et al. 2018) with weights from a local file.

    Args:
        weights: safetensors file in torchvision's layout: ``features.N.{weight,bias}`` of VGG16 or AlexNet and
            ``lin{0..4}.model.1.weight``. Nothing is downloaded.
        backbone: ``"vgg"`` or ``"alex"``.

    Raises:
        ValueError: the file does not hold exactly the tensors of that backbone.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path, backbone: Literal["vgg", "alex"] = "vgg") -> None:
        super().__init__()
        if backbone not in _BACKBONES:
            raise ValueError(f"no LPIPS backbone {backbone!r}; expected one of {', '.join(_BACKBONES)}")
        layout = _BACKBONES[backbone]
        self.features = _features(layout)
        self.taps = tuple(layout["taps"])
        for level, width in enumerate(layout["taps"].values()):
            head = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{level}", nn.ModuleDict({"model": head}))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self._load(weights, backbone)
        self.requires_grad_(False).eval()

    def _load(self, weights: str | Path, backbone: str) -> None:
        from _gs_render_reading import why_missing, why_unreadable
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(weights).is_file():
            reason = why_missing(Path(weights)) or f"{weights}: no such file"
            raise FileNotFoundError(f"{reason}; LPIPS needs the weights of {backbone}")
        try:
            self.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
        except SafetensorError as error:
            raise ValueError(why_unreadable(Path(weights), error)) from error
        except RuntimeError as error:
            raise ValueError(f"{weights}: not LPIPS {backbone} weights ({error})") from error

    def forward(self, image: Images, target: Images) -> Float[Tensor, " B"]:
        """Distance, 0 for identical pictures. Sides of at least 64 px (``"alex"``) or 16 px (``"vgg"``)."""
        x = (torch.cat([image, target]) * 2 - 1 - self.shift) / self.scale
        total, level = image.new_zeros(len(image), dtype=torch.promote_types(image.dtype, torch.float32)), 0
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                taps = x.to(total.dtype)  # half precision overflows in the squares
                first, second = (taps / (taps.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                head = getattr(self, f"lin{level}")["model"]
                total = total + head((first - second).square()).to(total.dtype).mean((1, 2, 3))
                level += 1
        return total


def _features(layout: dict[str, Any]) -> nn.Sequential:
    convs, pools = layout["convs"], layout["pools"]
    layers: list[nn.Module] = []
    for index in range(max(layout["taps"]) + 1):
        if index in convs:
            inputs, outputs, kernel, stride, padding = convs[index]
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding))
        else:
            layers.append(nn.MaxPool2d(pools[index], 2) if index in pools else nn.ReLU())
    return nn.Sequential(*layers)

"""Image similarity: PSNR, SSIM and LPIPS, differentiable, for rendered pictures.

All take pictures ``[B, 3, H, W]`` float RGB in [0, 1] and return one value a picture, ``[B]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Images = Float[Tensor, "B 3 H W"]

# Indices of the ReLUs that LPIPS taps, and the layers, in torchvision's `features` numbering: (index, in, out, kernel, stride, pad)
_VGG16 = {
    "convs": {
        0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
        17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
    },
    "pools": (4, 9, 16, 23),
    "taps": (3, 8, 15, 22, 29),
}  # fmt: skip
_ALEX_CONVS = {
    0: (3, 64, 11, 4, 2),
    3: (64, 192, 5, 1, 2),
    6: (192, 384, 3, 1, 1),
    8: (384, 256, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}
_ALEX_TAPS = (1, 4, 7, 9, 11)


def psnr(image: Images, target: Images) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio in dB (peak 1); capped at 100 dB for identical pictures."""
    error = (image - target).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


def ssim(image: Images, target: Images, window: int = 11, sigma: float = 1.5) -> Float[Tensor, " B"]:
    """Structural similarity (Wang et al. 2004): Gaussian window, K1 = .01, K2 = .03, no padding.

    Computed in float32 or better even under autocast: in half precision the variances cancel to noise.
    """
    if torch.is_autocast_enabled(image.device.type):
        with torch.autocast(image.device.type, enabled=False):
            return ssim(image.float(), target.float(), window, sigma)
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

    def __init__(self, weights: str | Path, backbone: Literal["vgg", "alex"] = "vgg") -> None:
        super().__init__()
        self.features = _vgg16() if backbone == "vgg" else _alexnet()
        self.taps = _VGG16["taps"] if backbone == "vgg" else _ALEX_TAPS
        widths = (64, 128, 256, 512, 512) if backbone == "vgg" else (64, 192, 384, 256, 256)
        for index, width in enumerate(widths):
            setattr(
                self,
                f"lin{index}",
                nn.ModuleDict({"model": nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))}),
            )
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        from safetensors.torch import load_file

        try:
            self.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
        except RuntimeError as error:
            raise ValueError(f"{weights}: not LPIPS {backbone} weights ({error})") from error
        self.requires_grad_(False).eval()

    def forward(self, image: Images, target: Images) -> Float[Tensor, " B"]:
        """Distance, 0 for identical pictures."""
        x = (torch.cat([image, target]) * 2 - 1 - self.shift) / self.scale
        total = torch.zeros(len(image), device=image.device)
        level = 0
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                unit = x.float() / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-10)
                first, second = unit.chunk(2)
                head = getattr(self, f"lin{level}")["model"]
                total = total + head((first - second).square()).float().mean((1, 2, 3))
                level += 1
        return total


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(30):
        if index in _VGG16["convs"]:
            layers.append(nn.Conv2d(*_VGG16["convs"][index], 3, padding=1))
        else:
            layers.append(nn.MaxPool2d(2) if index in _VGG16["pools"] else nn.ReLU())
    return nn.Sequential(*layers)


def _alexnet() -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(12):
        if index in _ALEX_CONVS:
            inputs, outputs, kernel, stride, padding = _ALEX_CONVS[index]
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding))
        else:
            layers.append(nn.MaxPool2d(3, 2) if index in (2, 5) else nn.ReLU())
    return nn.Sequential(*layers)

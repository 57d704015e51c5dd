"""Networks that see pictures for FD, KD and the CLIP score; their weights come from a local path or the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from _gs_render_reading import WHY_NO_PICKLE
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from diff2to3._errors import InputError

#: Of each network: the suffix of its figures, and what its weights are.
NETWORKS = {
    "inception": "the file of torch-fidelity's Inception-v3 (pt_inception-2015-12-05), as in FID",
    "dinov2": "directory or Hub id in transformers' layout, for example facebook/dinov2-large",
    "clip": "directory or Hub id in transformers' layout, for example openai/clip-vit-large-patch14",
    "vgg": "safetensors file of VGG16 as LPIPS has it; a stand-in that needs no download",
}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SIDE = 224  # of the picture that DINOv2 and CLIP see


class Network(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] -> one row of features each, float32 [B, D]."""

    def __init__(self, name: str, model: nn.Module, see: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.model, self._see = name, model.eval().requires_grad_(False), see

    @torch.inference_mode()
    def forward(self, pictures: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        place = next(self.model.parameters()).device
        return self._see(self.model, pictures.to(place, torch.float32)).float()


def open_networks(weights: Mapping[str, str | Path], device: torch.device | str = "cpu") -> dict[str, Network]:
    """The networks whose weights are named.

    Args:
        weights: by name of :data:`NETWORKS`, where its weights are.

    Raises:
        InputError: they are not there, of another network, or need a library that is not installed.
    """
    opened = {}
    for name, source in weights.items():
        try:
            opened[name] = Network(name, *_OPENERS[name](str(source))).to(device)
        except ImportError as error:
            raise InputError(f"{name} weights {source}: this network needs the module {error.name!r}") from error
        except (OSError, ValueError, RuntimeError, KeyError, UnpicklingError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{name} weights {source}: {reason}; expected {NETWORKS[name]}") from error
    return opened


def _vgg(source: str) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """Mean of relu5_3 over the picture, at the picture's own size."""
    from flux_features import VGGFeatures, VGGFeaturesConfig

    return VGGFeatures(VGGFeaturesConfig(source=Path(source))), lambda model, x: model(x).mean((2, 3))


def _inception(source: str) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """torch-fidelity's network; it resizes as TensorFlow did, from 8-bit pictures."""
    inception = import_module("torch_fidelity.feature_extractor_inceptionv3")
    # The one pickle that is read: these weights exist in no other form. PyTorch's restricted reader takes tensors alone
    # and refuses a file that could run code; so does the network's own loader with the PyTorch versions allowed here.
    torch.load(source, weights_only=True)
    model = inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=source
    )
    return model, lambda model, x: model(x.mul(255).round().byte())[0]


def _dinov2(source: str) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """The class token after the last norm, at 224 px (Stein et al. 2023)."""
    model = import_module("transformers").AutoModel.from_pretrained(_safe(source), use_safetensors=True)
    return model, lambda model, x: model(pixel_values=_resized(x, *_IMAGENET)).last_hidden_state[:, 0]


def _clip(source: str) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """The image embedding."""
    model = import_module("transformers").CLIPVisionModelWithProjection.from_pretrained(
        _safe(source), use_safetensors=True
    )
    return model, lambda model, x: model(pixel_values=_resized(x, *_CLIP)).image_embeds


def _safe(source: str) -> str:
    """The source; ValueError for a folder that has its weights as a pickle alone."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and (pickled := sorted(folder.glob("*.bin"))):
        raise ValueError(f"{pickled[0].name} {WHY_NO_PICKLE}")
    return source


_OPENERS: dict[str, Callable[[str], tuple[nn.Module, Callable[[Any, Tensor], Tensor]]]] = {
    "inception": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
    "vgg": _vgg,
}


def _resized(pictures: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    small = F.interpolate(pictures, (_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (small - small.new_tensor(mean).view(1, 3, 1, 1)) / small.new_tensor(std).view(1, 3, 1, 1)

"""DINOv2 patch features, as TRELLIS uses them: the baseline that FLUX features are compared with."""

from __future__ import annotations

import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from flux_features._hub import hub_files, in_cache

_FILES = ["config.json", "model.safetensors"]
_MODEL_TYPE = "dinov2_with_registers"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_INSTALL = "DinoFeatures needs transformers: pip install 'flux-features[dino]'"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoFeaturesConfig(BaseModel):
    """Which DINOv2, and for which pictures.

    Attributes:
        source: directory with ``config.json`` and weights in transformers' layout, or a Hub id. Default: DINOv2-L/14
            with 4 registers (304 M parameters, Apache-2.0).
        revision: Hub revision, for Hub ids.
        image_size: side in pixels of the square condition image; a multiple of the patch size.
        extra_tokens: the condition holds the class token and the registers too, as TRELLIS's flows were trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "facebook/dinov2-with-registers-large"
    revision: str | None = None
    image_size: int = Field(default=518, ge=1)
    extra_tokens: bool = False


class DinoFeatures(nn.Module):
    """DINOv2 with registers as a feature extractor, with the weights that its config names.

    The features are the patch tokens before the network's last norm (``x_prenorm``), as TRELLIS lifts them
    (``dataset_toolkits/extract_feature.py``); as condition it takes them with a norm over channels
    (``trellis/pipelines/trellis_image_to_3d.py``), the class and register tokens included: :meth:`sequence`, which
    :meth:`condition` gives when the config asks for ``extra_tokens``.

    Shapes: images ``[B, 3, H, W]`` float RGB in [0, 1]; feature map ``[B, C, ceil(H / 14), ceil(W / 14)]``, of the
    default network ``[B, 1024, 37, 37]`` at 518 px. Sides that are not multiples of the patch are padded at the right
    and bottom by repeating the edge. The position embedding is interpolated for other sizes than the network's own.

    Needs the extra ``flux-features[dino]``. Weights that neither a directory nor the Hub's local cache has are
    downloaded, with a line on the log ``flux_features`` that names their licence; gated ones are not.

    Raises:
        ValueError: the weights are incomplete or of another network, or do not go with ``image_size``.
        PermissionError: the weights are gated on the Hub and were not downloaded before.
        ConnectionError: the Hub cannot be asked for the licence of weights that are not well known.
        FileNotFoundError: no weights at that place, or the Hub cannot be reached.
        ImportError: transformers is not installed.
    """

    def __init__(self, config: DinoFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _load(config)
        self.stride: int = self.backbone.config.patch_size
        self.channels: int = self.backbone.config.hidden_size
        self.num_extra_tokens: int = 1 + self.backbone.config.num_register_tokens
        if config.image_size % self.stride:
            raise ValueError(f"image_size = {config.image_size}: expected a multiple of the patch, {self.stride} px")

    @staticmethod
    def is_available(config: DinoFeaturesConfig) -> str | None:
        """None when the weights are on this machine; else what is missing and what to do. Downloads nothing."""
        if find_spec("transformers") is None:
            return _INSTALL
        folder = Path(config.source)
        if not folder.is_dir():
            if not _HUB_ID.fullmatch(config.source):
                return f"{config.source}: no such directory, and not a Hub id such as 'owner/name'"
            if in_cache(config.source, _FILES, config.revision):
                return None
            return (
                f"{config.source} is not on this machine: run 'hf download {config.source}', or name a directory that "
                "has its files"
            )
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            return f"{folder}: no DINOv2 weights there: expected config.json and model.safetensors"
        try:
            stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{folder / 'config.json'}: not a JSON file ({error})"
        found = stated.get("model_type") if isinstance(stated, dict) else None
        return None if found == _MODEL_TYPE else f"{folder}: is a {found!r}, expected {_MODEL_TYPE!r}"

    @property
    def image_size(self) -> int:
        """Side in pixels of the condition image."""
        return self.config.image_size

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Feature maps of images in [0, 1], not normalised."""
        rows, columns = (-(-side // self.stride) for side in images.shape[-2:])
        patches = self._prenorm(images)[:, self.num_extra_tokens :]
        return patches.transpose(1, 2).unflatten(2, (rows, columns))

    def tokens(self, feature_map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B h w C"]:
        """Condition tokens, one a patch, normalised over their channels."""
        return _normalise(feature_map.permute(0, 2, 3, 1))

    def condition(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B rows columns C"]:
        """What the flow models see: the patches' tokens on their grid, or with ``extra_tokens`` one row of them all."""
        return self.sequence(images)[:, None] if self.config.extra_tokens else self.tokens(self(images))

    def sequence(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B T C"]:
        """TRELLIS's condition: class token, registers and patches (1374 at 518 px), normalised over their channels."""
        return _normalise(self._prenorm(images))

    def _prenorm(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(f"expected float images [B, 3, H, W] in [0, 1], got {images.dtype} {tuple(images.shape)}")
        bottom, right = -images.shape[-2] % self.stride, -images.shape[-1] % self.stride
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        mean, std = (images.new_tensor(value).view(1, 3, 1, 1) for value in (_IMAGENET_MEAN, _IMAGENET_STD))
        dtype = next(self.backbone.parameters()).dtype
        return self.backbone(((images - mean) / std).to(dtype)).last_hidden_state


def _normalise(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def _load(config: DinoFeaturesConfig) -> Any:
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    folder = _folder(config)
    try:
        stated, _ = transformers.PretrainedConfig.get_config_dict(folder)
        if not stated:
            raise FileNotFoundError("no config.json")
        if stated.get("model_type") != _MODEL_TYPE:
            raise ValueError(f"{config.source}: is a {stated.get('model_type')!r}, expected {_MODEL_TYPE!r}")
        model, report = transformers.Dinov2WithRegistersModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise FileNotFoundError(f"{config.source}: no DINOv2 weights there ({str(error).splitlines()[0]})") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{config.source}: {len(missing)} tensors are missing, first {missing[0]}")
    model.layernorm = nn.Identity()  # TRELLIS reads the tokens before it
    return model.eval()


def _folder(config: DinoFeaturesConfig) -> Path:
    """The directory of the weights; what neither a directory nor the Hub's cache has is downloaded, with a word."""
    if Path(config.source).is_dir():
        return Path(config.source)
    remedy = f"run 'hf download {config.source}'"
    return hub_files(config.source, _FILES, config.revision, accept_licence=False, remedy=remedy)[0].parent

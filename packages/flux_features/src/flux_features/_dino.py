"""DINOv2 patch features, as TRELLIS uses them: the baseline that FLUX features are compared with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from flux_features._dino_weights import (
    FILES,
    Library,
    build_network,
    layout_of,
    missing_library,
    read_weights,
)
from flux_features._hub import HUB_ID, Consent, cached_files, hub_files
from flux_features._images import padded
from flux_features._weights import read_json

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoFeaturesConfig(BaseModel):
    """Which DINOv2, and for which pictures.

    Attributes:
        source: directory with ``config.json`` and ``model.safetensors``, in transformers' layout or in timm's, or the
            id of such a repository that the Hub's local cache has. Default: DINOv2-L/14 with 4 registers (304 M
            parameters, Apache-2.0).
        library: whose network runs; either takes either layout, and the tokens are the same.
        revision: Hub revision, for Hub ids.
        image_size: side in pixels of the square condition image; a multiple of the patch size.
        extra_tokens: the condition holds the class token and the registers too, as TRELLIS's flows were trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "facebook/dinov2-with-registers-large"
    library: Library = "transformers"
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
    and bottom by repeating the edge. The position embedding is interpolated for other sizes than the network's own
    (bicubic with antialiasing, as DINOv2's own code does for its networks with registers).

    Needs the extra ``flux-features[dino]`` (transformers) or ``flux-features[timm]``, by ``config.library``. Reads
    directories and the Hub's local cache only; :meth:`from_pretrained` downloads.

    Raises:
        ValueError: the weights are incomplete or of another network, or do not go with ``image_size``.
        FileNotFoundError: no weights at that place.
        ImportError: the library is not installed.
    """

    patch = 1

    def __init__(self, config: DinoFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        weights = read_weights(_local_files(config), config.source)
        self.backbone: Any = build_network(weights, config.library, config.source)
        self.stride: int = weights.patch_size
        self.channels: int = weights.width
        self.num_extra_tokens: int = 1 + weights.num_registers
        if config.image_size % self.stride:
            raise ValueError(f"image_size = {config.image_size}: expected a multiple of the patch, {self.stride} px")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: DinoFeaturesConfig | None = None,
        *,
        revision: str | None = None,
        accept_licence: Consent = False,
    ) -> DinoFeatures:
        """An extractor with published weights; those that neither a directory nor the Hub's cache has are downloaded.

        A line on the log ``flux_features`` names the licence before a download.

        Args:
            source: see :class:`DinoFeaturesConfig`, for example ``timm/vit_large_patch14_reg4_dinov2.lvd142m``.
            config: library and picture size; None is the default of both.
            revision: Hub revision, for Hub ids.
            accept_licence: for gated Hub ids: you read the licence of the weights and agree to it, or a function that
                is asked then.

        Raises:
            PermissionError: the owner wants a licence accepted first.
            ConnectionError: the Hub cannot be reached.
        """
        config = (config or DinoFeaturesConfig()).model_copy(update={"source": str(source), "revision": revision})
        if not Path(source).exists():
            hub_files(str(source), FILES, revision, accept_licence)
        return cls(config).eval()

    @staticmethod
    def is_available(config: DinoFeaturesConfig) -> str | None:
        """None when library and weights are on this machine; else what is missing and what to do. Loads nothing."""
        if find_spec(config.library) is None:
            return missing_library(config.library)
        try:
            layout_of(read_json(_local_files(config)[0]), config.source)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return None

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
        images = padded(images, self.stride)
        mean, std = (images.new_tensor(value).view(1, 3, 1, 1) for value in (_IMAGENET_MEAN, _IMAGENET_STD))
        dtype = next(self.backbone.parameters()).dtype
        images = ((images - mean) / std).to(dtype)
        if self.config.library == "timm":
            return self.backbone.forward_features(images)
        return self.backbone(images).last_hidden_state


def _normalise(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def _local_files(config: DinoFeaturesConfig) -> list[Path]:
    """Config and tensors in a directory or in the Hub's cache.

    Raises:
        FileNotFoundError: they are in neither.
    """
    folder = Path(config.source)
    if folder.is_dir():
        files = [folder / name for name in FILES]
        if not all(file.is_file() for file in files):
            raise FileNotFoundError(f"{folder}: no DINOv2 weights there: expected {' and '.join(FILES)}")
        return files
    if files := cached_files(config.source, FILES, config.revision):
        return files
    if not HUB_ID.fullmatch(config.source):
        raise FileNotFoundError(f"{config.source}: no such directory, and not a Hub id such as 'owner/name'")
    raise FileNotFoundError(
        f"{config.source} is not on this machine: run 'hf download {config.source}', or name a directory that has its "
        "files"
    )

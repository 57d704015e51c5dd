"""Any extractor from wherever its weights are."""

from __future__ import annotations

from pathlib import Path

from _flux_features_weights import PUBLISHED

from flux_features._config import FluxFeaturesConfig
from flux_features._dino import DinoFeatures, DinoFeaturesConfig
from flux_features._dino_weights import Library, is_dino
from flux_features._extractor import FluxFeatures
from flux_features._hub import Consent
from flux_features._vgg import VGGFeatures, VGGFeaturesConfig, is_vgg


def load_extractor(
    source: str | Path,
    preset: str | None = None,
    *,
    library: Library = "transformers",
    revision: str | None = None,
    accept_licence: Consent = False,
) -> FluxFeatures | DinoFeatures | VGGFeatures:
    """The extractor whose weights are at a place, in float32 and eval mode.

    Args:
        source: a file, a directory or a Hub id, as :meth:`FluxFeatures.from_pretrained` and
            :meth:`DinoFeatures.from_pretrained` take them; or a file of VGG16, see :class:`VGGFeatures`.
        preset: of :class:`FluxFeaturesConfig`, or ``"dino"``; None: of files and directories what they tell, of
            well-known ids what they are. Other ids need it.
        library: whose network runs DINOv2's weights.
        revision: Hub revision, for Hub ids.
        accept_licence: consent to the licence of gated weights, or a function that is asked for it.

    Raises:
        ValueError: the weights are of no extractor or of another one, or ``preset`` is missing.
        FileNotFoundError, PermissionError, ConnectionError: they cannot be had, as those two say.
        ImportError: a library is not installed.
    """
    if preset is None and is_vgg(Path(source)):
        return VGGFeatures(VGGFeaturesConfig(source=Path(source)))
    preset = preset or preset_of(source)
    if preset == "dino":
        settings = DinoFeaturesConfig(library=library)
        return DinoFeatures.from_pretrained(source, settings, revision=revision, accept_licence=accept_licence)
    config = FluxFeaturesConfig.preset(preset) if preset else None
    return FluxFeatures.from_pretrained(source, config, revision=revision, accept_licence=accept_licence)


def preset_of(source: str | Path) -> str | None:
    """``"dino"``, the preset of a well-known id, or None for files and directories of autoencoders.

    Raises:
        ValueError: neither a local place nor a well-known id.
    """
    known = {entry.source: "dino" if entry.component == "dino" else entry.preset for entry in PUBLISHED}
    if Path(source).exists():
        return "dino" if is_dino(Path(source)) else None
    if str(source) not in known:
        raise ValueError(
            f"{source}: no such file or directory; of Hub ids known are {', '.join(known)}; for others say what "
            "they have by preset: paper, flux2, taef1, taef2 or dino"
        )
    return known[str(source)]

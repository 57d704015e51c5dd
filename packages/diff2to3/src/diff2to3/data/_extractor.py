"""The feature extractor of stage ``features``, from wherever its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from flux_features import ask_on_terminal, load_extractor
from pydantic import BaseModel, ConfigDict

from diff2to3._assemble import from_directory
from diff2to3._errors import InputError
from diff2to3._locate import CONFIG_NAME, embedded_names, locate
from diff2to3._plugins import FEATURE_EXTRACTOR, FeatureExtractor
from diff2to3._store import read_config


class ExtractorChoice(BaseModel):
    """Which extractor.

    Attributes:
        source: an embedded pipeline or a pipeline directory, whose extractor is meant; or a file, a directory (also a
            model folder of ``diff2to3 train autoencoder``) or a Hub id, as :func:`flux_features.load_extractor` takes.
        preset: what a Hub id has that is not well known.
        library: whose network runs DINOv2's weights.
        accept_licence: consent to the licence of gated weights; without it the terminal is asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    preset: str | None = None
    library: Literal["transformers", "timm"] = "transformers"
    accept_licence: bool = False


def open_extractor(choice: ExtractorChoice) -> FeatureExtractor:
    """The extractor, on the CPU and in eval mode.

    Raises:
        InputError: there is none, it cannot be read, or its licence was not agreed to.
    """
    source = choice.source
    try:
        if source in embedded_names() or (Path(source) / CONFIG_NAME).is_file():
            directory = locate(source)
            extractor: Any = from_directory(FEATURE_EXTRACTOR, read_config(directory), directory)[0]
        else:
            consent = choice.accept_licence or ask_on_terminal
            extractor = load_extractor(source, choice.preset, library=choice.library, accept_licence=consent)
    except (OSError, ValueError, ImportError) as error:  # files, permissions and connections are OSErrors
        raise InputError(f"extractor {source}: {' '.join(str(error).split())}") from error
    return extractor.eval() if hasattr(extractor, "eval") else extractor

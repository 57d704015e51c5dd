"""Where a pipeline is: in the package, in a directory, or on the Hub. Imports no PyTorch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from diff2to3._errors import PipelineFormatError

CONFIG_NAME = "pipeline.json"
EMBEDDED = Path(__file__).parent / "_weights"
DEFAULT_PIPELINE = "tiny"


def locate(source: str | os.PathLike[str] | None) -> Path:
    """The local directory of a pipeline.

    Args:
        source: None for the embedded default; an existing directory; the name of an embedded pipeline; or a Hub id
            ``"owner/name"``, which is downloaded into the Hub's cache.

    Raises:
        PipelineFormatError: nothing of that name, no pipeline in that directory, or the Hub does not give it.
    """
    if source is None:
        source = DEFAULT_PIPELINE
        if not (EMBEDDED / source / CONFIG_NAME).is_file():
            raise PipelineFormatError(
                f"this installation has no embedded pipeline {source!r} ({EMBEDDED / source} lacks {CONFIG_NAME}); "
                "give the directory or the Hub id of a pipeline"
            )
    if Path(source).is_dir():
        if not (Path(source) / CONFIG_NAME).is_file():
            raise PipelineFormatError(f"{source} is not a pipeline: it has no {CONFIG_NAME}")
        return Path(source)
    text = os.fspath(source)
    if (EMBEDDED / text / CONFIG_NAME).is_file() and "/" not in text:
        return EMBEDDED / text
    if is_hub_id(text):
        return _from_hub(text)
    raise PipelineFormatError(
        f"no pipeline {text!r}; expected a directory, a Hub id 'owner/name', or one of the embedded ones: "
        f"{', '.join(embedded_names()) or 'none in this installation'}"
    )


def embedded_names() -> list[str]:
    """Names of the pipelines inside this installation."""
    return sorted(path.parent.name for path in EMBEDDED.glob(f"*/{CONFIG_NAME}"))


def is_hub_id(text: str) -> bool:
    """Whether a text that is no directory here can be ``owner/name`` on the Hub."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.md", "LICENSE*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PipelineFormatError(
            f"{repository!r} is no directory here, and the Hub does not give it ({type(error).__name__}: {reason})"
        ) from error

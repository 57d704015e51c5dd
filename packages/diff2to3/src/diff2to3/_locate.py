"""Where a pipeline is: in the package, in a directory, or on the Hub. Imports no PyTorch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from diff2to3._errors import PipelineFormatError

CONFIG_NAME = "pipeline.json"
EMBEDDED = Path(__file__).parent / "_weights"
DEFAULT_PIPELINE = "tiny"


def locate(
    source: str | os.PathLike[str] | None, revision: str | None = None, *, local_files_only: bool = False
) -> Path:
    """The local directory of a pipeline.

    Args:
        source: None for the embedded default; an existing directory; the name of an embedded pipeline; or a Hub id
            ``"owner/name"``, which is downloaded into the Hub's cache.
        revision: branch, tag or commit of a Hub id; None is its main branch.
        local_files_only: of the Hub take only what its cache has.
            ``HF_HUB_OFFLINE=1`` in the environment says the same.

    Raises:
        PipelineFormatError: nothing of that name, no pipeline in that directory, the Hub does not give it, or a
            revision of something that has none.
    """
    text = None if source is None else os.fspath(source)
    if text is not None and is_hub_id(text) and not Path(text).is_dir():
        from diff2to3._hub import download

        return download(text, revision, local_files_only)
    if revision is not None:
        raise PipelineFormatError(
            f"revision {revision!r} was given, but {text or 'the embedded pipeline'} has none; "
            "expected a Hub id 'owner/name'"
        )
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
    if (EMBEDDED / source / CONFIG_NAME).is_file() and "/" not in os.fspath(source):
        return EMBEDDED / source
    raise PipelineFormatError(
        f"no pipeline {os.fspath(source)!r}; expected a directory, a Hub id 'owner/name', or one of the embedded ones: "
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

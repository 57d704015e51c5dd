"""What every package here does before it believes a file from elsewhere. Imports nothing heavy.

Descriptions (JSON) are bounded before they are parsed, and weights are safetensors or nothing: a pickle can run any
program when it is read.
"""

import json
import os
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 4 << 20  # of a description; those of the largest models have some kB
MAX_JSON_DEPTH = 32  # objects and lists inside each other
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
WHY_NO_PICKLE = "is a pickle, which can run any program when it is read: only safetensors files are"


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds.

    Args:
        path: a regular file, or a link to one.
        most: bytes that it may have.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: not UTF-8 or JSON, deeper than `MAX_JSON_DEPTH`, more than `most` bytes, or a pipe or device.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # `read` makes room for all that it is asked for
        data = file.read(min(size, most + 1))
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, which no description needs")
    try:
        contents = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    level = [contents]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return contents
    raise ValueError(f"{path} is nested deeper than {MAX_JSON_DEPTH} levels")


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def why_unreadable(path: Path, error: Exception) -> str:
    """Why safetensors refused a file, as one line that names it.

    Args:
        path: the file.
        error: what was raised.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        start = b""
    if start == b"PK" or start[:1] == b"\x80":  # a zip as torch.save writes it, or a bare pickle
        return f"{path} {WHY_NO_PICKLE}"
    return f"{path} is damaged or truncated, not a whole safetensors file: {' '.join(str(error).split())}"


def why_missing(path: Path) -> str | None:
    """A reason that names the pickle which lies where the safetensors file `path` is missing; None if there is none."""
    found = [other for suffix in PICKLES if (other := path.with_suffix(suffix)).is_file()]
    return f"{found[0]} {WHY_NO_PICKLE}" if found else None

"""The table of formats and `load` / `save`, which choose by suffix."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from gs_render._axes import Up, from_file_axes, to_file_axes
from gs_render._gaussians import Gaussians

PathLike = str | os.PathLike[str]


class LossWarning(UserWarning):
    """A file keeps less than the Gaussians hold."""


@dataclass(frozen=True)
class Format:
    """One file format.

    suffix: the end of the file name, lower case.
    module: module of this package with `read(path)` and/or `write(gaussians, path)`.
    up: the axis that points up in files as other programs write and expect them.
    keeps: what a round trip keeps, and how precisely.
    max_sh_degree: higher harmonics are dropped on saving.
    rgb_range, sh_limit, scale_range: what colours (`Gaussians.rgb`), harmonics of degree 1..3 (as magnitude) and scales
        are clipped to on saving; None if they are not.
    """

    suffix: str
    module: str
    up: Up
    keeps: str
    reads: bool = True
    writes: bool = True
    max_sh_degree: int = 3
    rgb_range: tuple[float, float] | None = None
    sh_limit: float | None = None
    scale_range: tuple[float, float] | None = None


FORMATS: tuple[Format, ...] = (
    Format(".ply", "_ply", "-y", "everything, float32; opacity clipped to 1e-7 .. 1 - 1e-7"),
    Format(
        ".compressed.ply",
        "_compressed_ply",
        "-y",
        "position and log-scale to 1/1000 of the extent of a chunk of 256, rotation to 0.2 degrees, colour and opacity "
        "to 1/255, harmonics to 1/32 clipped to -4..4; order is not kept",
        sh_limit=4.0,
    ),
    Format(
        ".splat",
        "_splat",
        "-y",
        "position and scale exactly, rotation to 0.9 degrees, colour and opacity to 1/255 clipped to 0..1, no "
        "harmonics; order is not kept",
        max_sh_degree=0,
        rgb_range=(0.0, 1.0),
    ),
    Format(
        ".spz",
        "_spz",
        "y",
        "position to 2^-20 (objects under one unit), scale to 3 % clipped to 4.54e-5..379, rotation to 0.2 degrees, "
        "colour to 1/135 clipped to -0.44..1.44, opacity to 1/255, harmonics to 1/128 clipped to -1..1",
        rgb_range=(-0.4403, 1.4403),
        sh_limit=1.0,
        scale_range=(4.53e-5, 379.1),
    ),
    Format(
        ".sog",
        "_sog",
        "-y",
        "position to 1/65535 of the extent, scale and colour to one of 256 levels, rotation to 0.8 degrees, opacity to "
        "1/255, no harmonics; order is not kept",
        max_sh_degree=0,
    ),
    Format(".glb", "_glb", "y", "everything, float32 (KHR_gaussian_splatting)"),
    Format(
        ".html",
        "_html",
        "z",
        "a page with its own viewer; position to 1/65535 of the extent, rotation to 0.2 degrees, colour and opacity to "
        "1/255, no harmonics",
        reads=False,
        max_sh_degree=0,
    ),
    Format(".obj", "_mesh_files", "z", "the surface as a triangle mesh with vertex colours, y up", reads=False),
    Format(".png", "_pictures", "z", "a contact sheet of 8 views", reads=False),
    Format(".mp4", "_pictures", "z", "a turntable of 48 frames, H.264", reads=False),
    Format(".gif", "_pictures", "z", "a turntable of 48 frames in 256 colours", reads=False),
    Format(".webp", "_pictures", "z", "a turntable of 48 frames", reads=False),
)


def find_format(path: PathLike) -> Format:
    """The format of a path, by the longest suffix that matches; ValueError lists the known ones."""
    name = Path(path).name.lower()
    matches = [known for known in FORMATS if name.endswith(known.suffix)]
    if not matches:
        known = ", ".join(sorted({known.suffix for known in FORMATS}))
        raise ValueError(f"{path}: unknown file type {Path(path).suffix!r}; known are {known}")
    return max(matches, key=lambda known: len(known.suffix))


def load(path: PathLike, up: Up | None = None) -> Gaussians:
    """Read Gaussians from a file, chosen by suffix, into the world frame (z up) on the CPU in float32.

    Args:
        path: .ply (3DGS or compressed), .splat, .spz, .sog, .glb (KHR_gaussian_splatting).
        up: axis of the file that points up, "z", "y" or "-y"; None takes the custom of the format
            (.ply and .splat "-y", .spz and .glb "y"). TRELLIS writes its .ply with "y" up.

    Raises:
        ValueError: the content is damaged, hostile or not of this format.
        FileNotFoundError, IsADirectoryError: there is no such file.
    """
    path = Path(path)
    file_format = find_format(path)
    if not file_format.reads:
        raise ValueError(f"{path}: {file_format.suffix} files can be written but not read")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    gaussians = _module(file_format).read(path)
    try:
        gaussians.validate()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return from_file_axes(gaussians, up or file_format.up)


def save(gaussians: Gaussians, path: PathLike, up: Up | None = None) -> Path:
    """Write a file of the type that the suffix names; an existing one is replaced only once the new one is complete.

    Args:
        gaussians: world frame (z up), any device and dtype; values must be finite.
        path: a suffix of `FORMATS`. Pictures show the object from default cameras; `save_video` and `contact_sheet`
            take others.
        up: as in `load`.

    Warns:
        LossWarning: the format drops or clips something that these Gaussians have. What each keeps, and how precisely:
            `FORMATS`.
    """
    path = Path(path)
    file_format = find_format(path)
    if not file_format.writes:
        raise ValueError(f"{path}: {file_format.suffix} files can be read but not written")
    gaussians = gaussians.detach().to("cpu", torch.float32).validate()
    if gaussians.sh_degree > file_format.max_sh_degree:
        kept = file_format.max_sh_degree
        message = f"{file_format.suffix} keeps harmonics up to degree {kept}; degree {gaussians.sh_degree} was cut"
        warnings.warn(message, LossWarning, stacklevel=2)
        gaussians = gaussians.with_sh_degree(kept)
    for message in _clipped(gaussians, file_format):
        warnings.warn(message, LossWarning, stacklevel=2)
    writer = _module(file_format)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        writer.write(to_file_axes(gaussians, up or file_format.up), partial)
        os.replace(partial, path)
    return path


def _clipped(gaussians: Gaussians, file_format: Format) -> list[str]:
    """What values lie outside of the ranges that the format keeps, by more than its precision; one message a field."""
    sh_range = None if file_format.sh_limit is None else (-file_format.sh_limit, file_format.sh_limit)
    checks = (
        ("colours", gaussians.rgb, file_format.rgb_range, 1 / 255),
        ("higher harmonics", gaussians.sh[:, 1:].flatten(1), sh_range, 1 / 32),
        ("scales", gaussians.scales, file_format.scale_range, 0.0),
    )
    messages = []
    for name, values, limits, margin in checks:
        if limits is None:
            continue
        low, high = limits
        count = int(((values < low - margin) | (values > high + margin)).any(dim=1).sum())
        if count:
            of = f"{count} of {len(gaussians)} Gaussians"
            messages.append(f"{file_format.suffix} keeps {name} of {low:.3g} .. {high:.3g}; {of} were clipped")
    return messages


def _module(file_format: Format):
    return importlib.import_module(f"gs_render._formats.{file_format.module}")

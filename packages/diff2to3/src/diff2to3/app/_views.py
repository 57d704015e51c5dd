"""What the page shows: pieces of HTML and pictures."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import torch
from gs_render import Gaussians, contact_sheet, save, turntable_cameras
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from diff2to3._asset import Asset
from diff2to3._errors import ImageInputError
from diff2to3._frame import splat_frame
from diff2to3._image import object_crop
from diff2to3._plugins import EXPORTER, registry
from diff2to3.app._work import STAGES, Progress

PREVIEW_SIZE = 384
_TITLES = {
    "image": "Picture",
    "features": "Features",
    "structure": "Structure",
    "latents": "Latents",
    "gaussians": "Splat",
    "turntable": "Turntable",
}
#: What the page does after the stages of the pipeline.
TURNTABLE, DONE = "turntable", "done"
#: What people take a format for; a third party's goes by its suffix.
_PURPOSES = {
    "ply": "viewers and editors of splats",
    "splat": "web viewers",
    "spz": "small, for phones and the web",
    "sog": "smallest, for the web",
    "glb": "glTF with Gaussian splatting",
    "html": "a page that works offline",
    "obj": "a triangle mesh (takes a while)",
    "png": "views from eight sides",
    "mp4": "turntable video",
    "gif": "turntable, animated",
    "webp": "turntable, animated, smaller",
}


def formats() -> list[tuple[str, str]]:
    """(label, suffix) of every format that an asset can be saved in, the most wanted first."""
    exporters = [c for c in registry().components if c.spec.role == EXPORTER.name and c.unavailable_reason() is None]
    names = {component.spec.name for component in exporters}
    order = [*(name for name in _PURPOSES if name in names), *sorted(names - _PURPOSES.keys())]
    return [(f".{name}: {_PURPOSES[name]}" if name in _PURPOSES else f".{name}", name) for name in order]


def preview(cut: Image.Image) -> Image.Image:
    """The square that the pipeline takes out of a picture, RGBA."""
    try:
        return Image.fromarray(np.rint(object_crop(cut, PREVIEW_SIZE) * 255).astype(np.uint8))
    except ValueError as error:
        raise ImageInputError(str(error)) from error


def thumbnail(asset: Asset) -> Image.Image:
    """The object from the front."""
    return contact_sheet(asset.gaussians, turntable_cameras(1, 192, gaussians=asset.gaussians), draw=asset.renderer)


def voxel_gaussians(coords: Int[Tensor, "l 3"], grid_size: int) -> Gaussians:
    """A ball for each voxel, so that whatever shows splats shows voxels; the higher the lighter."""
    means = (coords.cpu().float() + 0.5) / grid_size - 0.5
    low, high = torch.tensor([0.16, 0.22, 0.42]), torch.tensor([0.62, 0.78, 0.98])
    count = len(means)
    return Gaussians.from_rgb(
        means,
        torch.full((count, 3), 0.33 / grid_size),
        torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4),
        torch.full((count,), 0.95),
        low + (high - low) * (means[:, 2:] + 0.5),
    )


def viewer(page: Path, label: str) -> str:
    """The self-contained page of a splat as a frame."""
    return splat_frame(page, label, **{"class": "viewer"})


def voxel_viewer(coords: Int[Tensor, "l 3"], grid_size: int, folder: Path) -> str:
    """The occupied voxels in the same viewer."""
    return viewer(save(voxel_gaussians(coords, grid_size), folder / "voxels.html"), "occupied voxels, to turn and zoom")


def placeholder(text: str) -> str:
    """What stands where the viewer will be."""
    return f'<div class="viewer empty"><p>{html.escape(text)}</p></div>'


def progress(event: Progress | None, samples: int, seconds: dict[str, float]) -> str:
    """The stages in a row: what is over, what goes on and how far it is, what comes.

    Args:
        event: where the work is; None before it starts.
        samples: samples in all.
        seconds: of the stages that are over.
    """
    names = [*STAGES, TURNTABLE]
    at = -1 if event is None else len(names) if event.stage == DONE else names.index(event.stage)
    items = []
    for number, name in enumerate(names):
        state, note, share = "next", "", 0.0
        if number < at:
            state, note, share = "done", f"{seconds[name]:.1f} s" if name in seconds else "", 1.0
        elif event is not None and number == at:
            state = "now"
            note, share = ("", 0.5) if event.total == 1 else (f"{event.done} / {event.total}", event.done / event.total)
        bar = f'<i><u style="width: {share:.0%}"></u></i>'
        items.append(f'<li class="{state}"><b>{_TITLES[name]}</b>{bar}<small>{note}</small></li>')
    working = event is not None and at < len(names) - 1
    which = f"<p>Sample {event.sample + 1} of {samples}</p>" if event and working and samples > 1 else ""
    return f'<div class="stages" role="status">{which}<ol>{"".join(items)}</ol></div>'

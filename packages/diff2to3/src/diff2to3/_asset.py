"""What a pipeline makes: Gaussians, with what is needed to look at them, save them and make them again."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from gs_render import Camera, Gaussians, RenderOutput
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from diff2to3._atomic import replacing
from diff2to3._errors import InputError
from diff2to3._plugins import EXPORTER, Renderer, build, registry


def export(gaussians: Gaussians, path: Path) -> Path:
    """Write Gaussians through the exporter of the path's suffix; see `Asset.save`."""
    suffixes = [suffix[1:].lower() for suffix in path.suffixes]
    if not suffixes:
        raise InputError(f"{path} has no suffix that tells a format; expected for example {path}.ply")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; expected an existing one to write {path.name} into")
    announced = {component.spec.name for component in registry().components if component.spec.role == EXPORTER.name}
    endings = [".".join(suffixes[i:]) for i in range(len(suffixes))]  # "compressed.ply" comes before "ply"
    write = build(EXPORTER, next((ending for ending in endings if ending in announced), suffixes[-1]))
    with replacing(path) as temporary:
        write(gaussians, temporary)
    return path


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One generated object.

    Args:
        gaussians: activated values, world frame: right-handed, z up, inside [-0.5, 0.5]^3, front towards -y.
        voxels: int32 [L, 3], occupied voxels (x, y, z) of stage 1.
        pictures: the input pictures cut out of their background, RGBA.
        settings: seed, sample, steps and guidance that made it.
        timings: seconds of each stage.
        renderer: draws it.
    """

    gaussians: Gaussians
    voxels: Int[Tensor, "l 3"]
    pictures: tuple[Image.Image, ...]
    renderer: Renderer
    settings: dict[str, int | float | None] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it in the format of the path's suffix, through the exporter of that name (.ply .splat .spz .glb ...).

        An existing file is replaced at once; a failing write leaves it as it was.

        Returns:
            The path.

        Raises:
            ComponentNotFoundError: no exporter for that suffix.
            InputError: the path has no suffix, or its folder does not exist.
        """
        return export(self.gaussians, Path(path))

    def render(self, cameras: Camera, background: float | Tensor = 1.0) -> RenderOutput:
        """Draw it: V cameras -> color [V, H, W, 3], alpha and depth [V, H, W, 1]; background in [0, 1] or [3]."""
        return self.renderer(self.gaussians, cameras.to(self.gaussians.device), background)

    def turntable(self, path: str | os.PathLike[str]) -> Path:
        """Write a video (.mp4, .gif) of the object turning once around its vertical axis. See `save`."""
        return self.save(path)

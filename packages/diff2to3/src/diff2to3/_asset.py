"""What a pipeline makes: Gaussians, with what is needed to look at them, save them and make them again."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from gs_render import Camera, Gaussians, RenderOutput, contact_sheet, save_video, turntable_cameras
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from diff2to3._atomic import replacing
from diff2to3._errors import InputError
from diff2to3._frame import splat_frame
from diff2to3._plugins import EXPORTER, Renderer, build, registry

#: Suffixes of turntable videos.
VIDEOS = ("mp4", "gif", "webp")


def export(gaussians: Gaussians, path: Path) -> Path:
    """Write Gaussians through the exporter of the path's suffix; see `Asset.save`."""
    suffixes = _suffixes(path)
    announced = {component.spec.name for component in registry().components if component.spec.role == EXPORTER.name}
    endings = [".".join(suffixes[i:]) for i in range(len(suffixes))]  # "compressed.ply" comes before "ply"
    write = build(EXPORTER, next((ending for ending in endings if ending in announced), suffixes[-1]))
    with replacing(path) as temporary:
        write(gaussians, temporary)
    return path


def _suffixes(path: Path) -> list[str]:
    """Suffixes of a path that can be written to, lower case, without their dots."""
    if not path.suffix:
        raise InputError(f"{path} has no suffix that tells a format; expected for example {path}.ply")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; expected an existing one to write {path.name} into")
    return [suffix[1:].lower() for suffix in path.suffixes]


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
        """Write it in the format of the path's suffix.

        Pictures of it (.png: several views; .mp4, .gif, .webp: a turntable) are drawn by `renderer`; all else (.ply,
        .splat, .spz, .glb, .html ...) goes through the exporter of that name. An existing file is replaced at once; a
        failing write leaves it as it was.

        Returns:
            The path.

        Raises:
            ComponentNotFoundError: no exporter for that suffix.
            InputError: the path has no suffix, or its folder does not exist.
        """
        path = Path(path)
        suffix = _suffixes(path)[-1]
        if suffix in VIDEOS:
            return self.turntable(path)
        if suffix == "png":
            with replacing(path) as temporary:
                contact_sheet(self.gaussians, draw=self.renderer).save(temporary)
            return path
        return export(self.gaussians, path)

    def _repr_html_(self) -> str:
        """What a notebook shows: the splat itself, to turn and zoom, without anything from the network."""
        with tempfile.TemporaryDirectory() as folder:
            page = self.save(Path(folder) / "object.html")
            return splat_frame(page, "the object, to turn and zoom", style="width: 100%; height: 480px; border: 0")

    def render(self, cameras: Camera, background: float | Tensor = 1.0) -> RenderOutput:
        """Draw it: V cameras -> color [V, H, W, 3], alpha and depth [V, H, W, 1]; background in [0, 1] or [3]."""
        return self.renderer(self.gaussians, cameras.to(self.gaussians.device), background)

    def turntable(
        self,
        path: str | os.PathLike[str],
        *,
        num_frames: int = 48,
        size: int = 384,
        elevation_degrees: float = 20.0,
        frames_per_second: int = 24,
        background: float = 1.0,
    ) -> Path:
        """Write a video of it turning once around its vertical axis.

        Args:
            path: .mp4, .gif or .webp.
            num_frames: frames of the turn.
            size: side of the square frames in pixels; even for .mp4.
            elevation_degrees: height of the camera above the horizon.
            frames_per_second: speed.
            background: grey level in [0, 1].
        """
        path = Path(path)
        if (suffix := _suffixes(path)[-1]) not in VIDEOS:
            raise InputError(f"{path} is no video; expected one of .{', .'.join(VIDEOS)}, got .{suffix}")
        cameras = turntable_cameras(num_frames, size, elevation_degrees, gaussians=self.gaussians)
        with replacing(path) as temporary:
            save_video(self.gaussians, temporary, cameras, frames_per_second, background, draw=self.renderer)
        return path

"""Pictures of Gaussians for people: contact sheets and turntables, with cameras that frame the object."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gs_render._camera import Camera, Size
from gs_render._gaussians import Gaussians
from gs_render._render import RenderOutput, render

DrawFunction = Callable[[Gaussians, Camera, float | Tensor], RenderOutput]

FOV_DEGREES = 40.0
_VIEWS_AT_ONCE = 4  # shares the work that does not depend on the view, and keeps memory small
_UNIT_BALL = 0.65  # puts the camera 2 units away: objects in the unit box are framed alike, whatever their shape


def framing(gaussians: Gaussians) -> tuple[Float[Tensor, 3], float]:
    """Centre [3] and radius of the ball that cameras should show.

    An object inside the unit box around the origin gets the same ball as every other, so that pictures of several
    compare; anything else gets the ball around the middle 98 % of its Gaussians.
    """
    visible = gaussians.means[gaussians.opacities > 0.05].detach().cpu().double()
    if not len(visible) or bool((visible.abs() <= 0.55).all()):
        return torch.zeros(3), _UNIT_BALL
    low, high = (torch.stack([torch.quantile(axis, q) for axis in _sample(visible).T]) for q in (0.01, 0.99))
    return ((low + high) / 2).float(), max(float((high - low).norm()) / 2, 1e-6)


def viewing_distance(radius: float) -> float:
    """How far a camera of `FOV_DEGREES` stands from the middle of a ball that it shows whole, with a small margin."""
    return 1.05 * radius / math.sin(math.radians(FOV_DEGREES / 2))


def turntable_cameras(
    num_frames: int = 48,
    size: Size = 384,
    elevation_degrees: float = 20.0,
    gaussians: Gaussians | None = None,
) -> Camera:
    """One turn around the object, which `framing` measures; without Gaussians around the unit box."""
    centre, radius = (torch.zeros(3), _UNIT_BALL) if gaussians is None else framing(gaussians)
    return Camera.orbit(num_frames, viewing_distance(radius), FOV_DEGREES, size, elevation_degrees, target=centre)


def contact_sheet(
    gaussians: Gaussians,
    cameras: Camera | None = None,
    columns: int = 4,
    background: float | Float[Tensor, 3] = 1.0,
    draw: DrawFunction = render,
) -> Image.Image:
    """All views side by side in one picture, row by row.

    Args:
        gaussians: what to show.
        cameras: the views; None takes 8 around the object at 256 x 256 pixels.
        columns: views in a row.
        background: grey level or [3] colour in [0, 1].
        draw: `render` or a renderer component with options of its own.
    """
    cameras = turntable_cameras(8, 256, gaussians=gaussians) if cameras is None else cameras
    frames = list(_frames(gaussians, cameras, background, draw))
    columns = max(1, min(columns, len(frames)))
    rows = -(-len(frames) // columns)
    sheet = np.full((rows * cameras.height, columns * cameras.width, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * cameras.height, index % columns * cameras.width
        sheet[top : top + cameras.height, left : left + cameras.width] = frame
    return Image.fromarray(sheet)


def save_video(
    gaussians: Gaussians,
    path: str | os.PathLike[str],
    cameras: Camera | None = None,
    frames_per_second: int = 24,
    background: float | Float[Tensor, 3] = 1.0,
    draw: DrawFunction = render,
) -> Path:
    """Write the views as frames of a video: .mp4 (H.264, needs `gs-render[cpu]`), .gif or .webp, by suffix.

    Args:
        gaussians: what to show.
        path: file to write.
        cameras: one for each frame; None takes `turntable_cameras`. H.264 needs even width and height.
        frames_per_second: speed of the video.
        background, draw: as in `contact_sheet`.
    """
    path = Path(path)
    cameras = turntable_cameras(gaussians=gaussians) if cameras is None else cameras
    if not len(cameras):
        raise ValueError("save_video: expected at least one camera, got none")
    frames = _frames(gaussians, cameras, background, draw)
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        _write_mp4(path, frames, (cameras.width, cameras.height), frames_per_second)
    elif suffix == ".gif":
        # An octree finds the 256 colours 75 times faster than Pillow's median cut and costs 1.3 dB.
        octree = Image.Quantize.FASTOCTREE
        _write_pages(path, [Image.fromarray(frame).quantize(method=octree) for frame in frames], frames_per_second)
    elif suffix == ".webp":
        pages = [Image.fromarray(frame) for frame in frames]
        _write_pages(path, pages, frames_per_second, quality=85, method=2)
    else:
        raise ValueError(f"{path}: expected a video of type .mp4, .gif or .webp, got {suffix!r}")
    return path


def _frames(
    gaussians: Gaussians, cameras: Camera, background: float | Tensor, draw: DrawFunction
) -> Iterator[np.ndarray]:
    """8-bit pictures [H, W, 3], one at a time."""
    with torch.no_grad():
        gaussians = gaussians.detach()
        for start in range(0, len(cameras), _VIEWS_AT_ONCE):
            color = draw(gaussians, cameras[start : start + _VIEWS_AT_ONCE], background).color
            yield from (color * 255 + 0.5).clamp_(0, 255).to(torch.uint8).cpu().numpy()


def _write_pages(path: Path, pages: list[Image.Image], frames_per_second: int, **options: Any) -> None:
    duration = round(1000 / frames_per_second)
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=duration, loop=0, **options)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], size: tuple[int, int], frames_per_second: int) -> None:
    if size[0] % 2 or size[1] % 2:
        raise ValueError(f"H.264 needs an even width and height, got {size[0]} x {size[1]}")
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("writing .mp4 needs PyAV: pip install 'gs-render[cpu]'") from error
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container, ThreadPoolExecutor(1) as encoder:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], "yuv420p"
        stream.codec_context.thread_count = 1  # the renderer has the other cores

        def encode(frame: np.ndarray | None) -> None:
            picture = None if frame is None else av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))

        waiting = []
        for frame in frames:  # the encoder works on one frame while the next is drawn
            waiting.append(encoder.submit(encode, frame))
            if len(waiting) > 4:
                waiting.pop(0).result()
        for job in waiting:
            job.result()
        encode(None)


def _sample(points: Tensor, limit: int = 1 << 20) -> Tensor:
    """Every k-th point: torch.quantile refuses more than 2^24 values."""
    return points[:: max(1, len(points) // limit)]

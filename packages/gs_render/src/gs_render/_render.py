"""`render` and `render_batch`: choose a backend, draw, return colour, alpha and depth."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gs_render._backends import gsplat as _gsplat
from gs_render._camera import Camera
from gs_render._gaussians import Gaussians

Backend = Literal["auto", "gsplat", "cpu", "torch"]
BACKENDS: tuple[str, ...] = ("gsplat", "cpu", "torch")

_preferred: contextvars.ContextVar[str] = contextvars.ContextVar("gs_render_backend", default="auto")


@dataclass(frozen=True)
class RenderOutput:
    """Pictures of V views.

    color: [V, H, W, 3] blended over the background, sRGB as displayed; 0..1 unless the harmonics exceed it.
    alpha: [V, H, W, 1] coverage in 0..1.
    depth: [V, H, W, 1] mean distance along the camera's z axis, weighted like the colour; 0 where nothing is drawn.
    """

    color: Float[Tensor, "v h w 3"]
    alpha: Float[Tensor, "v h w 1"]
    depth: Float[Tensor, "v h w 1"]


def backend_status() -> dict[str, str | None]:
    """For every backend None if it can run here, else the reason why not."""
    return {name: _module(name).is_available() for name in BACKENDS}


def backend_report() -> dict[str, dict[str, str | None]]:
    """`backend_status` under the name of what these are backends of, for a report over several packages."""
    return {"render": backend_status()}


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within the block, `backend="auto"` means this backend."""
    _check_name(name)
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will draw: the argument, else `use_backend`, else the first that suits device and dtype."""
    _check_name(name)
    name = _preferred.get() if name == "auto" else name
    if name == "auto":
        suited = dtype == torch.float32
        first = {"cuda": "gsplat", "cpu": "cpu", "mps": "cpu"}.get(device.type, "torch")
        return first if suited and _module(first).is_available() is None else "torch"
    reason = _module(name).is_available()
    if reason is not None:
        raise RuntimeError(f"render: backend {name!r} cannot run here: {reason}")
    return name


def render(
    gaussians: Gaussians,
    cameras: Camera,
    background: float | Sequence[float] | Float[Tensor, ...] = 1.0,
    backend: Backend = "auto",
    *,
    filter_2d: float = 0.3,
    antialias: bool = False,
) -> RenderOutput:
    """Draw the Gaussians from every camera; differentiable in every field of both (not in the intrinsics on gsplat).

    Args:
        gaussians: N Gaussians; none at all gives the background.
        cameras: V cameras; moved to the Gaussians' device.
        background: grey level, [3] colour or [V, 3], in 0..1.
        backend: "gsplat" (CUDA), "cpu" (numba, float32 inside), "torch" (plain, any dtype; the oracle) or "auto".
        filter_2d: variance in pixels^2 added to every projected Gaussian (3DGS: 0.3, TRELLIS: 0.1).
        antialias: scale opacities so that the filter adds no energy (Mip-Splatting, Yu et al. 2024; TRELLIS: True).
    """
    cameras = cameras.to(gaussians.device, gaussians.dtype)
    ground = _background(background, len(cameras), gaussians)
    name = choose_backend(backend, gaussians.device, gaussians.dtype)
    size = (cameras.width, cameras.height)
    if name == "gsplat" and len(gaussians) and len(cameras):
        _check_gsplat(gaussians)
        poses, intrinsics = cameras.world_to_camera, cameras.intrinsics
        image, alpha = _gsplat.rasterize(gaussians, poses, intrinsics, ground, size, filter_2d, antialias)
        return RenderOutput(image[..., :3], alpha, image[..., 3:])
    module = _module("torch" if name == "gsplat" else name)
    sums, alphas = [], []
    for pose, intrinsics in zip(cameras.world_to_camera, cameras.intrinsics, strict=True):
        seen = module.project(gaussians, pose, intrinsics, size, filter_2d, antialias)
        image, alpha = module.rasterize(seen, *size)
        sums.append(image)
        alphas.append(alpha)
    if not sums:
        empty = ground.new_zeros(0, size[1], size[0], 4)
        return RenderOutput(empty[..., :3], empty[..., 3:], empty[..., 3:])
    return _compose(torch.stack(sums), torch.stack(alphas)[..., None], ground)


def render_batch(
    objects: Sequence[Gaussians],
    cameras: Camera,
    background: float | Sequence[float] | Float[Tensor, ...] = 1.0,
    backend: Backend = "auto",
    *,
    filter_2d: float = 0.3,
    antialias: bool = False,
) -> RenderOutput:
    """Draw B objects, each from its own cameras; for training.

    Args:
        objects: B Gaussians of any sizes.
        cameras: B * views cameras, object-major: the first `views` belong to the first object.
        background, backend, filter_2d, antialias: as in `render`; a [B * views, 3] background is object-major too.

    Returns:
        RenderOutput of B * views pictures. One kernel call for all on gsplat, a loop elsewhere.
    """
    if not objects or len(cameras) % len(objects):
        raise ValueError(
            f"render_batch: expected the same number of cameras for each object, got {len(cameras)} for {len(objects)}"
        )
    views = len(cameras) // len(objects)
    first = objects[0]
    cameras = cameras.to(first.device, first.dtype)
    ground = _background(background, len(cameras), first)
    name = choose_backend(backend, first.device, first.dtype)
    if name == "gsplat" and views and any(len(item) for item in objects):
        _check_gsplat(first)
        poses = cameras.world_to_camera.unflatten(0, (-1, views))
        intrinsics = cameras.intrinsics.unflatten(0, (-1, views))
        image, alpha = _gsplat.rasterize(
            _gsplat.stack_padded(list(objects)),
            poses,
            intrinsics,
            ground.unflatten(0, (-1, views)),
            (cameras.width, cameras.height),
            filter_2d,
            antialias,
        )
        image, alpha = image.flatten(0, 1), alpha.flatten(0, 1)
        return RenderOutput(image[..., :3], alpha, image[..., 3:])
    parts = []
    for index, item in enumerate(objects):
        own = slice(index * views, (index + 1) * views)
        part = render(item, cameras[own], ground[own], name, filter_2d=filter_2d, antialias=antialias)  # type: ignore[arg-type]
        parts.append(part)
    return RenderOutput(*(torch.cat([getattr(part, key) for part in parts]) for key in ("color", "alpha", "depth")))


def _compose(sums: Tensor, alpha: Tensor, ground: Tensor) -> RenderOutput:
    """Put the background behind the blended colours and turn the depth sum into a mean."""
    color = sums[..., :3] + (1 - alpha) * ground[:, None, None, :]
    return RenderOutput(color, alpha, sums[..., 3:] / alpha.clamp_min(1e-10))


def _background(value: float | Sequence[float] | Tensor, views: int, like: Gaussians) -> Float[Tensor, "v 3"]:
    if isinstance(value, int | float):
        return torch.full((views, 3), float(value), device=like.device, dtype=like.dtype)
    ground = torch.as_tensor(value, device=like.device, dtype=like.dtype)
    if tuple(ground.shape) not in {(), (3,), (views, 3)}:
        shape = tuple(ground.shape)
        raise ValueError(f"render: background must be a number, [3] or [{views}, 3] (one a view), got shape {shape}")
    return ground.expand(views, 3)


def _check_gsplat(gaussians: Gaussians) -> None:
    if gaussians.device.type != "cuda" or gaussians.dtype != torch.float32:
        raise ValueError(
            f"render: backend 'gsplat' draws float32 on CUDA, got {gaussians.dtype} on {gaussians.device}; "
            'use gaussians.to("cuda", torch.float32), or backend="torch"'
        )


def _check_name(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"render: unknown backend {name!r}; expected one of auto, {', '.join(BACKENDS)}")


def _module(name: str):
    return importlib.import_module(f"gs_render._backends.{name}")

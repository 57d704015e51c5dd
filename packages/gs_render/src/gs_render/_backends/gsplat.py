"""gsplat's CUDA kernels (extra `gsplat`); one call draws all views, and all objects of a batch."""

from __future__ import annotations

import importlib.util

import torch
from jaxtyping import Float
from torch import Tensor

from gs_render._gaussians import Gaussians


def is_available() -> str | None:
    """None if gsplat is installed and CUDA is there, else what is missing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("gsplat") is None:
        return "gsplat is not installed: pip install 'gs-render[gsplat]'"
    return None


def rasterize(
    fields: Gaussians | dict[str, Tensor],
    world_to_camera: Float[Tensor, "*b v 4 4"],
    intrinsics: Float[Tensor, "*b v 3 3"],
    background: Float[Tensor, "*b v 3"],
    size: tuple[int, int],
    filter_2d: float,
    antialias: bool,
) -> tuple[Tensor, Tensor]:
    """(color and depth [*b, V, H, W, 4], alpha [*b, V, H, W, 1]). `fields` may be stacked: tensors [*b, N, ...]."""
    from gsplat import rasterization

    get = fields.__getitem__ if isinstance(fields, dict) else fields.__getattribute__
    sh = get("sh")
    image, alpha, _ = rasterization(
        means=get("means"),
        quats=get("quaternions"),
        scales=get("scales"),
        opacities=get("opacities"),
        colors=sh,
        viewmats=world_to_camera,
        Ks=intrinsics,
        width=size[0],
        height=size[1],
        eps2d=filter_2d,
        sh_degree=round(sh.shape[-2] ** 0.5) - 1,
        packed=False,
        backgrounds=background,
        render_mode="RGB+ED",
        rasterize_mode="antialiased" if antialias else "classic",
    )
    return image, alpha


def stack_padded(objects: list[Gaussians]) -> dict[str, Tensor]:
    """Fields [B, N, ...] of B objects; the shorter ones end in Gaussians of opacity 0, which gsplat skips."""
    degree = max(item.sh_degree for item in objects)
    objects = [item.with_sh_degree(degree) for item in objects]
    lengths = [len(item) for item in objects]
    longest, device = max(lengths), objects[0].device
    # One copy a field whatever the number of objects, and no copy of an array of rows from the host.
    counts = torch.tensor(lengths, device=device)
    gap = longest * torch.arange(len(objects), device=device) - (counts.cumsum(0) - counts)
    rows = torch.arange(sum(lengths), device=device) + gap.repeat_interleave(counts, output_size=sum(lengths))
    filler = {"means": 0.0, "scales": 1.0, "quaternions": 1.0, "opacities": 0.0, "sh": 0.0}
    stacked = {}
    for name, value in filler.items():
        packed = torch.cat([getattr(item, name) for item in objects])
        padded = packed.new_full((len(objects) * longest, *packed.shape[1:]), value)
        stacked[name] = padded.index_copy(0, rows, packed).unflatten(0, (len(objects), longest))
    return stacked

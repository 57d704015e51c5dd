"""Figures of merit for pictures and voxel sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gs_render.metrics import psnr, ssim
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Scores:
    """What an evaluation found.

    Attributes:
        objects: a row of figures an object.
        sets: figures of all pictures together (FD, KD, CLIP).
        pictures: of the first objects by id: what they show, uint8 [H, W, 3] each.
    """

    objects: list[dict[str, Any]] = field(default_factory=list)
    sets: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def on_white(
    rgba: np.ndarray | Tensor, size: int | None = None
) -> tuple[Float[Tensor, "V 3 H W"], Float[Tensor, "V 1 H W"]]:
    """Straight-alpha uint8 pictures [V, H, W, 4] -> RGB on white, and alpha; shrunk to ``size`` by area if given."""
    pictures = torch.as_tensor(np.array(rgba)).float().permute(0, 3, 1, 2) / 255
    alpha = pictures[:, 3:]
    color = pictures[:, :3] * alpha + 1 - alpha
    if size is not None and color.shape[-1] != size:
        color, alpha = (torch.nn.functional.interpolate(x, size=(size, size), mode="area") for x in (color, alpha))
    return color, alpha


def foreground_psnr(image: Tensor, target: Tensor, alpha: Tensor) -> Float[Tensor, " V"]:
    """PSNR over the pixels that the object covers in the target, which a white background cannot flatter."""
    weight = (alpha > 0.5).float()
    error = ((image - target).square() * weight).sum((1, 2, 3)) / (3 * weight.sum((1, 2, 3))).clamp_min(1)
    return -10 * error.clamp_min(1e-10).log10()


def silhouette_iou(alpha: Tensor, target: Tensor) -> Float[Tensor, " V"]:
    """Intersection over union of the pixels with alpha above one half."""
    found, true = alpha > 0.5, target > 0.5
    return (found & true).flatten(1).sum(1) / (found | true).flatten(1).sum(1).clamp_min(1)


def voxel_f_score(found: Int[Tensor, "L 3"], true: Int[Tensor, "M 3"], distance: float = 1.5) -> float:
    """Harmonic mean of precision and recall; a match is a voxel of the other set within ``distance`` voxels."""
    if not len(found) or not len(true):
        return 0.0
    gaps = torch.cdist(found.float(), true.float())
    precision = (gaps.amin(1) <= distance).float().mean().item()
    recall = (gaps.amin(0) <= distance).float().mean().item()
    return 2 * precision * recall / max(precision + recall, 1e-9)


def voxel_iou(found: Int[Tensor, "L 3"], true: Int[Tensor, "M 3"]) -> float:
    """Intersection over union of two voxel sets."""
    a, b = ({tuple(v) for v in voxels.tolist()} for voxels in (found, true))
    return len(a & b) / max(1, len(a | b))


def picture_scores(
    image: Tensor, target: Tensor, alpha: Tensor, lpips: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, float]:
    """Means over the views [V, 3, H, W] of one object."""
    scores = {
        "psnr": psnr(image, target).mean().item(),
        "psnr_foreground": foreground_psnr(image, target, alpha).mean().item(),
        "ssim": ssim(image, target).mean().item(),
    }
    return scores if lpips is None else scores | {"lpips": lpips(image, target).mean().item()}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and median of every figure over the objects that have it."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, float))
    columns = {key: np.array([row[key] for row in rows if key in row]) for key in keys}
    return {key: {"mean": float(v.mean()), "median": float(np.median(v)), "n": len(v)} for key, v in columns.items()}


def table(rows: Sequence[Mapping[str, Any]], subsets: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: a line a figure, mean (median) over all objects and over each subset."""
    groups = {"all": rows, **subsets}
    found = {name: summary(group) for name, group in groups.items()}
    lines = ["| figure | " + " | ".join(f"{name} ({len(group)})" for name, group in groups.items()) + " |"]
    lines.append("|---" * (len(groups) + 1) + "|")
    for key in found["all"]:
        cells = [f"{s[key]['mean']:.4g} ({s[key]['median']:.4g})" if key in s else "" for s in found.values()]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_strip(pictures: Float[Tensor, "V 3 H W"]) -> np.ndarray:
    """Pictures side by side, uint8 [H, V * W, 3]."""
    return torch.cat([*pictures.cpu()], -1).mul(255).round().byte().permute(1, 2, 0).numpy()

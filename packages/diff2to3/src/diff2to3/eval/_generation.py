"""How well assets made from one picture are the object that it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gs_render import Camera, Gaussians, render
from jaxtyping import Int
from torch import Tensor

from diff2to3._progress import track
from diff2to3.data._augment import snap_quarter_turns, turn_cameras, yaw_coords
from diff2to3.data._store import Store
from diff2to3.eval._distances import frechet_distance, kernel_distance, similarity
from diff2to3.eval._networks import Network
from diff2to3.eval._protocol import Protocol
from diff2to3.eval._scores import (
    Scores,
    as_strip,
    on_white,
    picture_scores,
    silhouette_iou,
    voxel_f_score,
    voxel_iou,
)
from diff2to3.eval._truth import Truth, read_truth

if TYPE_CHECKING:
    from diff2to3._pipeline import Pipeline

_BATCH = 8  # objects made at once
LPIPS = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Made:
    """An asset that some method made of an object.

    Attributes:
        draw: poses [V, 4, 4] and intrinsics [V, 3, 3] of cameras about the true object, and the pictures' side ->
            colour on white [V, 3, S, S] and alpha [V, 1, S, S], on the CPU.
        coords: voxels of the asset in the true object's frame, where the method has them, and their grid.
    """

    draw: Callable[[np.ndarray, np.ndarray, int], tuple[Tensor, Tensor]]
    coords: Int[Tensor, "L 3"] | None = None
    grid_size: int = 0


Make = Callable[[Sequence[Truth]], Sequence[Made]]


def evaluate_generation(
    make: Make,
    store: Store,
    protocol: Protocol,
    *,
    lpips: LPIPS | None = None,
    networks: Mapping[str, Network] | None = None,
    shown: int = 0,
) -> Scores:
    """Scores of every object of a protocol; the stage ``truth`` has been drawn.

    Figures of the input's own camera have plain names and their controls: ``white`` an empty picture; ``turned`` the
    true object turned by 90 degrees; ``other`` the asset of the object before it in the list; ``f-score turned`` the
    found voxels turned by 90 degrees. Those of the protocol's cameras begin with ``novel``.

    Args:
        make: the method.
        networks: whose FD and KD, and for ``clip`` the similarity to the input, are to be found.
        shown: objects whose pictures are kept.
    """
    result, before = Scores(), None
    rows = {row["id"]: row for row in store.objects()}
    features: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in networks or {}}
    starts = range(0, len(protocol.objects), _BATCH)
    for start in track(starts, "generation"):
        truths = [
            read_truth(store, protocol, entry, rows[entry.id]) for entry in protocol.objects[start : start + _BATCH]
        ]
        for truth, made in zip(truths, make(truths), strict=True):
            own, novel = _draw(made, truth, protocol)
            entry = _object_scores(truth, made, own, novel, before, protocol.size, lpips)
            result.objects.append(entry)
            seen = truth.seen(protocol.size)
            seen_pixels = torch.from_numpy(seen).permute(2, 0, 1)[None] / 255
            for name, network in (networks or {}).items():
                features[name].append((network(truth.views), network(novel[0]), network(seen_pixels)))
            if len(result.pictures) < shown:
                result.pictures[truth.condition.id] = {
                    "input": seen,
                    "truth": as_strip(truth.views),
                    "made": as_strip(novel[0]),
                }
            before = own[0]
    for name, parts in features.items():
        result.sets |= _set_scores(name, *(torch.cat(column) for column in zip(*parts, strict=True)))
    return result


def pipeline_maker(
    pipeline: Pipeline, *, seed: int = 0, sampling: Mapping[str, Any] | None = None, known_voxels: Any = None
) -> Make:
    """Assets of a pipeline.

    Args:
        sampling: ``steps`` and ``guidance`` of the pipeline.
        known_voxels: a structure that is told the voxels of each batch instead of finding them.
    """
    config: Any = pipeline.latent_decoder.config
    filters = {"filter_2d": config.gaussians.filter_2d, "antialias": True}
    grid_size = pipeline.structure.grid_size

    def make(truths: Sequence[Truth]) -> list[Made]:
        snapped = pipeline.config.frame == "view-snapped"
        turns = [snap_quarter_turns(truth.condition.azimuth) if snapped else 0 for truth in truths]
        if known_voxels is not None:
            known_voxels.tell([yaw_coords(t.coords, n, grid_size) for t, n in zip(truths, turns, strict=True)])
        assets = pipeline.batch([truth.picture for truth in truths], seed=seed, **(sampling or {}))
        return [
            Made(
                gaussian_drawing(asset.gaussians, turn, **filters),
                yaw_coords(asset.voxels.cpu(), -turn, grid_size),
                grid_size,
            )
            for asset, turn in zip(assets, turns, strict=True)
        ]

    return make


def gaussian_drawing(
    gaussians: Gaussians, quarter_turns: int = 0, **filters: Any
) -> Callable[[np.ndarray, np.ndarray, int], tuple[Tensor, Tensor]]:
    """`Made.draw` of Gaussians that lie in the true object's frame turned by some quarter turns."""

    def draw(poses: np.ndarray, intrinsics: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
        cameras = Camera(turn_cameras(torch.from_numpy(poses), quarter_turns), torch.from_numpy(intrinsics), size, size)
        with torch.inference_mode():
            output = render(gaussians, cameras, 1.0, **filters)
        return output.color.permute(0, 3, 1, 2).clamp(0, 1).cpu(), output.alpha.permute(0, 3, 1, 2).cpu()

    return draw


def _draw(made: Made, truth: Truth, protocol: Protocol) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The asset from the input's camera and from the protocol's."""
    condition, size = truth.condition, protocol.size
    scale = size / condition.frame
    intrinsics = np.array(condition.intrinsics, np.float32) * np.array([[scale], [scale], [1]], np.float32)
    pose = np.array(condition.world_to_camera, np.float32)
    views = protocol.cameras(size)
    return made.draw(pose[None], intrinsics[None], size), made.draw(views.world_to_camera, views.intrinsics, size)


def _object_scores(
    truth: Truth,
    made: Made,
    own: tuple[Tensor, Tensor],
    novel: tuple[Tensor, Tensor],
    before: Tensor | None,
    size: int,
    lpips: LPIPS | None,
) -> dict[str, Any]:
    target, alpha = on_white(np.asarray(truth.picture)[None], size)
    entry: dict[str, Any] = {"id": truth.condition.id, "has_texture": truth.row.get("has_texture", "")}
    if made.coords is not None:
        entry["voxels"] = float(len(made.coords))
    entry |= picture_scores(own[0], target, alpha, lpips)
    entry["silhouette iou"] = silhouette_iou(own[1], alpha).item()
    controls = {"white": torch.ones_like(target), "turned": on_white(truth.turned[None], size)[0], "other": before}
    for name, control in controls.items():
        if control is not None:
            entry[f"psnr {name}"] = picture_scores(control, target, alpha, None)["psnr"]
    found = picture_scores(novel[0], truth.views, truth.alpha, lpips)
    entry |= {f"novel {name}": value for name, value in found.items()}
    entry["novel silhouette iou"] = silhouette_iou(novel[1], truth.alpha).mean().item()
    if made.coords is not None and made.grid_size == truth.grid_size:
        entry["f-score"] = voxel_f_score(made.coords, truth.coords)
        entry["f-score turned"] = voxel_f_score(yaw_coords(made.coords, 1, made.grid_size), truth.coords)
        entry["voxel iou"] = voxel_iou(made.coords, truth.coords)
    return entry


def _set_scores(name: str, real: Tensor, made: Tensor, inputs: Tensor) -> dict[str, float]:
    """CLIP score, or FD and KD (in percent, as the paper has it) under a network's name."""
    if name == "clip":
        return {"CLIP": float(similarity(made, inputs.repeat_interleave(len(made) // len(inputs), 0)).mean())}
    suffix = "incep" if name == "inception" else name
    scores = {f"FD_{suffix}": frechet_distance(real, made), f"KD_{suffix}": 100 * kernel_distance(real, made)}
    if name == "vgg":  # beside FD_vgg what CLIP would be asked, under its own name
        scores["cos_vgg"] = float(similarity(made, inputs.repeat_interleave(len(made) // len(inputs), 0)).mean())
    return scores

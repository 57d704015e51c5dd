"""How well a pipeline turns one picture into the object it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gs_render import Camera, render
from PIL import Image
from torch import Tensor

from diff2to3._plugins import MeshRenderer
from diff2to3._progress import track
from diff2to3.data._augment import snap_quarter_turns, turn_cameras, yaw_coords
from diff2to3.data._mesh import load_mesh
from diff2to3.data._render_stage import asset_path
from diff2to3.data._renderers import open_renderer
from diff2to3.data._store import Store
from diff2to3.eval._scores import on_white, picture_scores, silhouette_iou, voxel_f_score, voxel_iou

if TYPE_CHECKING:
    from diff2to3._pipeline import Pipeline

_BATCH = 8  # objects generated at once


def evaluate_generation(
    pipeline: Pipeline,
    store: Store,
    source: Path,
    rows: list[dict[str, str]],
    *,
    size: int = 256,
    seed: int = 0,
    view: int | None = None,
    sampling: dict[str, Any] | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    gallery: Path | None = None,
    renderer: str = "auto",
) -> list[dict[str, Any]]:
    """Scores of every object: one stored condition view is the input, and the asset is drawn from that view's camera.

    Controls: ``white`` an empty picture; ``turned`` the true object turned by 90 degrees; ``other`` the asset of the
    next object in the list, scored against this object's picture; ``f-score turned`` the found voxels turned by 90
    degrees.

    Args:
        source: folder of the assets (the input picture is rendered again, uncropped, as a user would have it).
        view: which stored condition view; None takes a different one for every object.
        sampling: ``steps`` and ``guidance`` of the pipeline.
        gallery: PNG to write, a row an object: input, the asset from the same camera, and from four sides.
        renderer: component of the role ``mesh_renderer`` that draws the input.
    """
    draw, inputs = open_renderer(renderer), []
    for number, row in enumerate(rows):
        inputs.append(_input(draw, store, source, row, view if view is not None else number % 12))
    assets = []
    for start in track(range(0, len(inputs), _BATCH), "generation"):
        pictures = [Image.fromarray(item["frame"]) for item in inputs[start : start + _BATCH]]
        assets += pipeline.batch(pictures, seed=seed, **(sampling or {}))
    scores, pages = [], []
    frame = pipeline.config.frame
    filters = {"filter_2d": pipeline.latent_decoder.config.gaussians.filter_2d, "antialias": True}  # type: ignore[attr-defined]
    drawn = []
    for item, asset in zip(inputs, assets, strict=True):
        turn = snap_quarter_turns(item["azimuth"]) if frame == "view-snapped" else 0
        scale = size / len(item["frame"])
        intrinsics = torch.from_numpy(item["intrinsics"] * np.array([[scale], [scale], [1]], np.float32))[None]
        camera = Camera(turn_cameras(torch.from_numpy(item["pose"])[None], turn), intrinsics, size, size)
        with torch.inference_mode():
            drawn.append((render(asset.gaussians, camera, 1.0, **filters), turn))
    for number, (row, item, asset, (picture, turn)) in enumerate(zip(rows, inputs, assets, drawn, strict=True)):
        target, alpha = on_white(item["frame"][None], size)
        image = _picture(picture)
        found = asset.voxels.cpu()
        true = yaw_coords(item["coords"], turn, pipeline.structure.grid_size)
        entry: dict[str, Any] = {
            "id": row["id"],
            "has_texture": row.get("has_texture", ""),
            "voxels": float(len(found)),
        }
        entry |= picture_scores(image, target, alpha, lpips)
        entry["silhouette iou"] = silhouette_iou(picture.alpha.permute(0, 3, 1, 2).cpu(), alpha).item()
        other = _picture(drawn[(number + 1) % len(drawn)][0])
        for name, control in (
            ("white", torch.ones_like(target)),
            ("turned", on_white(item["turned"][None], size)[0]),
            ("other", other),
        ):
            entry[f"psnr {name}"] = picture_scores(control, target, alpha, None)["psnr"]
        entry["f-score"] = voxel_f_score(found, true)
        entry["f-score turned"] = voxel_f_score(yaw_coords(found, 1, pipeline.structure.grid_size), true)
        entry["voxel iou"] = voxel_iou(found, true)
        scores.append(entry)
        if gallery is not None:
            pages.append(_row(target, image, asset, size, filters))
    if gallery is not None:
        gallery.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(pages)).save(gallery)
    return scores


def _input(draw: MeshRenderer, store: Store, source: Path, row: dict[str, str], view: int) -> dict[str, Any]:
    object_id = row["id"]
    rendered = store.read("render", object_id)
    view %= len(rendered["condition_pose"])
    pose, intrinsics = rendered["condition_pose"][view], rendered["condition_intrinsics"][view]
    turned = turn_cameras(torch.from_numpy(pose)[None], 1)[0].numpy()
    mesh = load_mesh(asset_path(source, object_id, row.get("path")))
    side = round(2 * float(intrinsics[0, 2]))  # of the frame that the stored view was cut from
    frames, _ = draw(mesh, np.stack([pose, turned]), np.stack([intrinsics, intrinsics]), side)
    coords = torch.from_numpy(store.read("voxels", object_id)["coords"].astype(np.int64))
    azimuth = float(rendered["condition_azimuth"][view])
    return {
        "frame": frames[0],
        "turned": frames[1],
        "pose": pose,
        "intrinsics": intrinsics,
        "azimuth": azimuth,
        "coords": coords,
    }


def _picture(output: Any) -> Tensor:
    return output.color.permute(0, 3, 1, 2).clamp(0, 1).cpu()


def _row(target: Tensor, image: Tensor, asset: Any, size: int, filters: dict[str, Any]) -> np.ndarray:
    cameras = Camera.orbit(num_views=4, size=size)
    with torch.inference_mode():
        around = _picture(render(asset.gaussians, cameras, 1.0, **filters))
    strip = torch.cat([target, image, around]).permute(0, 2, 3, 1).mul(255).round().byte()
    return np.concatenate(list(strip.numpy()), axis=1)

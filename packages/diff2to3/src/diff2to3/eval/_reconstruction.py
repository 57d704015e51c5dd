"""How well the 2to3-VAE keeps an object: encode from its rendered views, decode, compare at views it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flux_features import lift_features, voxel_centres
from gs_render import Camera, Gaussians, render
from sparse_vae import SparseTensor, SparseVAE, Topology
from torch import Tensor

from diff2to3._plugins import FeatureExtractor
from diff2to3._progress import track
from diff2to3.data._feature_stage import fitting
from diff2to3.data._store import Store, decode_png
from diff2to3.eval._scores import Scores, as_strip, on_white, picture_scores


@torch.inference_mode()
def reconstruct(
    extractor: FeatureExtractor,
    vae: SparseVAE,
    rendered: dict[str, np.ndarray],
    coords: Tensor,
    num_views: int,
    visibility: str,
) -> Gaussians:
    """The object after encoding and decoding, from the first ``num_views`` of its stored views."""
    device = next(vae.parameters()).device
    views = np.stack([decode_png(rendered["view_png"], rendered["view_bounds"], v) for v in range(num_views)])
    color, _ = on_white(views)
    size = color.shape[-1]
    cameras = Camera(
        torch.from_numpy(rendered["view_pose"][:num_views]).to(device),
        torch.from_numpy(rendered["view_intrinsics"][:num_views]).to(device),
        size,
        size,
    )
    depth = torch.from_numpy(rendered["view_depth"][:num_views]).to(device).float()
    maps = torch.cat([extractor(fitting(extractor, part.to(device))) for part in color.split(8)])
    grid_size = vae.config.grid_size
    features = lift_features(maps, cameras, voxel_centres(coords.to(device), grid_size), visibility, depth=depth)  # type: ignore[arg-type]
    topology, order = Topology.from_coords([coords.to(device)], grid_size)
    mean, _ = vae.encoder(SparseTensor(features[order], topology))
    return vae.decoder(mean)[0]


def evaluate_reconstruction(
    extractor: FeatureExtractor,
    vae: SparseVAE,
    store: Store,
    rows: list[dict[str, str]],
    *,
    num_views: int = 32,
    visibility: str = "depth",
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    shown: int = 0,
) -> Scores:
    """Scores of every object at its stored views past ``num_views``, on white, beside their controls.

    Of the first ``shown`` objects up to four pictures are kept.

    Controls: ``white`` is an empty picture; ``other`` the reconstruction of the object before it in the list.
    """
    device, scores, before = next(vae.parameters()).device, Scores(), None
    for row in track(rows, "reconstruction", total=len(rows)):
        rendered = store.read("render", row["id"])
        coords = torch.from_numpy(store.read("voxels", row["id"])["coords"].astype(np.int64))
        gaussians = reconstruct(extractor, vae, rendered, coords, num_views, visibility)
        unseen = range(num_views, len(rendered["view_pose"]))
        pictures = np.stack([decode_png(rendered["view_png"], rendered["view_bounds"], v) for v in unseen])
        target, alpha = (x.to(device) for x in on_white(pictures))
        size = target.shape[-1]
        cameras = Camera(
            torch.from_numpy(rendered["view_pose"][num_views:]),
            torch.from_numpy(rendered["view_intrinsics"][num_views:]),
            size,
            size,
        )

        def draw(asset: Gaussians, cameras: Camera = cameras) -> Tensor:
            with torch.inference_mode():
                return (
                    render(asset, cameras, 1.0, filter_2d=vae.config.gaussians.filter_2d, antialias=True)
                    .color.permute(0, 3, 1, 2)
                    .clamp(0, 1)
                )

        entry: dict[str, Any] = {"id": row["id"], "has_texture": row.get("has_texture", "")}
        image = draw(gaussians)
        entry |= picture_scores(image, target, alpha, lpips)
        entry["psnr white"] = picture_scores(torch.ones_like(target), target, alpha, None)["psnr"]
        if before is not None:
            entry["psnr other"] = picture_scores(draw(before), target, alpha, None)["psnr"]
        scores.objects.append(entry)
        if len(scores.pictures) < shown:
            scores.pictures[row["id"]] = {"truth": as_strip(target[:4]), "decoded": as_strip(image[:4])}
        before = gaussians
    return scores

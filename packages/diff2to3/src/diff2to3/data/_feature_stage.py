"""Stages ``features`` (pictures -> features lifted onto voxels) and ``latents`` (features -> 2to3-VAE latents)."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from flux_features import FluxFeatures, lift_features, voxel_centres
from gs_render import Camera
from pydantic import BaseModel, ConfigDict, Field
from sparse_vae import SparseTensor, SparseVAE, Topology
from torch import Tensor

from diff2to3._errors import InputError
from diff2to3.data._augment import hue_matrix, mirror_cameras, mirror_coords, shift_hue, yaw_coords
from diff2to3.data._run import run_stage
from diff2to3.data._store import Store, decode_png


class FeatureSettings(BaseModel):
    """How features are lifted, and how many colour variants of an object there are.

    Variant 0 is the object as it is; every other one has its own hue, odd ones are mirrored in x.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_views: int = Field(default=32, ge=1)
    num_variants: int = Field(default=4, ge=1)
    visibility: Literal["all", "depth"] = "depth"
    seed: int = 0


@torch.inference_mode()
def lift_objects(
    extractor: FluxFeatures, store: Store, ids: list[str], settings: FeatureSettings, fingerprint: str, grid_size: int
) -> dict[str, str]:
    """Writes ``features`` fp16 [K, L, C], ``hue`` degrees [K] and ``mirrored`` [K] an object; returns the failures.

    Args:
        fingerprint: hash of the extractor's weights; part of the stage's settings.
    """
    device = next(extractor.parameters()).device
    half = device.type == "cuda"

    def work(object_id: str) -> Mapping[str, np.ndarray]:
        rendered = store.read("render", object_id)
        if len(rendered["view_pose"]) < settings.num_views:
            raise ValueError(f"{len(rendered['view_pose'])} views were rendered, expected {settings.num_views}")
        if not store.finished("voxels", {"grid_size": grid_size}, [object_id]):
            raise ValueError(f"its voxels are missing or not of grid size {grid_size}; run `diff2to3 data voxelize`")
        coords = torch.from_numpy(store.read("voxels", object_id)["coords"].astype(np.int64)).to(device)
        png, bounds = rendered["view_png"], rendered["view_bounds"]
        views = list(decoder.map(lambda v: decode_png(png, bounds, v), range(settings.num_views)))
        rgba = torch.from_numpy(np.stack(views)).to(device).permute(0, 3, 1, 2).float() / 255
        pose = torch.from_numpy(rendered["view_pose"][: settings.num_views]).to(device)
        intrinsics = torch.from_numpy(rendered["view_intrinsics"][: settings.num_views]).to(device)
        depth = torch.from_numpy(rendered["view_depth"][: settings.num_views]).to(device).float()
        size = rgba.shape[-1]
        hues, mirrored = variants(object_id, settings)
        lifted = []
        for hue, mirror in zip(hues, mirrored, strict=True):
            images = shift_hue(rgba[:, :3], hue_matrix(float(hue)).to(device)) * rgba[:, 3:] + 1 - rgba[:, 3:]
            points, cameras, surface = coords, Camera(pose, intrinsics, size, size), depth
            if mirror:
                images, surface = images.flip(-1), depth.flip(-1)
                points, cameras = mirror_coords(coords, grid_size), Camera(mirror_cameras(pose), intrinsics, size, size)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                maps = extractor(images)
            lifted.append(
                lift_features(
                    maps.float(), cameras, voxel_centres(points, grid_size), settings.visibility, depth=surface
                )
            )
        return {
            "features": torch.stack(lifted).half().cpu().numpy(),
            "hue": hues,
            "mirrored": mirrored,
        }

    stage = settings.model_dump() | {"extractor": fingerprint, "grid_size": grid_size}
    with ThreadPoolExecutor() as decoder:
        return run_stage(store, "features", ids, work, stage)


def variants(object_id: str, settings: FeatureSettings) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees [K] and mirroring [K] of an object's variants."""
    from zlib import crc32

    rng = np.random.default_rng([settings.seed, crc32(object_id.encode()), 1])
    hue = rng.uniform(15, 345, settings.num_variants).astype(np.float32)
    hue[0] = 0.0
    return hue, (np.arange(settings.num_variants) % 2).astype(np.uint8)


def variant_coords(coords: Tensor, mirrored: bool, quarter_turns: int, grid_size: int) -> Tensor:
    """Voxels of a variant of an object, in the row order of its features and latents."""
    if mirrored:
        coords = mirror_coords(coords, grid_size)
    return yaw_coords(coords, quarter_turns, grid_size)


@torch.inference_mode()
def encode_objects(vae: SparseVAE, store: Store, ids: list[str], fingerprint: str) -> dict[str, str]:
    """Writes ``latents`` fp16 [K, 4, L, C] an object: mean latents of every variant at every quarter turn."""
    device = next(vae.parameters()).device
    grid_size = vae.config.grid_size

    def work(object_id: str) -> Mapping[str, np.ndarray]:
        coords = torch.from_numpy(store.read("voxels", object_id)["coords"].astype(np.int64))
        stored = store.read("features", object_id)
        features = torch.from_numpy(stored["features"])
        placed = [
            variant_coords(coords, bool(mirror), turn, grid_size) for mirror in stored["mirrored"] for turn in range(4)
        ]
        topology, order = Topology.from_coords([p.to(device) for p in placed], grid_size)
        rows = features.repeat_interleave(4, dim=0).flatten(0, 1).to(device).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, _ = vae.encoder(SparseTensor(rows[order], topology))
        latents = torch.empty_like(mean.features, dtype=torch.float16)
        latents[order] = mean.features.half()
        return {"latents": latents.view(len(features), 4, len(coords), -1).cpu().numpy()}

    return run_stage(store, "latents", ids, work, {"vae": fingerprint})


def latent_statistics(store: Store, ids: list[str]) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the stored latents of unchanged colours, at every turn, in float64."""
    total, squares, count = 0.0, 0.0, 0
    for object_id in ids:
        latents: Any = store.read("latents", object_id)["latents"][0].astype(np.float64)
        latents = latents.reshape(-1, latents.shape[-1])
        total, squares, count = total + latents.sum(0), squares + (latents**2).sum(0), count + len(latents)
    if not count:
        raise InputError(f"{store.root}: no latents found; run `diff2to3 data latents` first")
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0))
    if not (std > 0).all():
        raise InputError(f"{store.root}: latent channels {np.flatnonzero(std == 0).tolist()} never vary; train the VAE")
    return mean.tolist(), std.tolist()

"""Stages ``features`` (pictures -> features lifted onto voxels) and ``latents`` (features -> 2to3-VAE latents)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from flux_features import lift_features, voxel_centres
from gs_render import Camera
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from sparse_vae import SparseTensor, SparseVAE, Topology
from torch import Tensor

from diff2to3._engines import Workers
from diff2to3._errors import InputError
from diff2to3._plugins import FeatureExtractor
from diff2to3.data._augment import hue_matrix, mirror_cameras, mirror_coords, shift_hue, yaw_coords
from diff2to3.data._run import run_stage
from diff2to3.data._store import Store, decode_png

_VIEWS_AT_ONCE = 8  # bounds the memory; what docs/scale.md counts with


class FeatureSettings(BaseModel):
    """How features are lifted, and how many colour variants of an object there are.

    Variant 0 is the object as it is; every other one has its own hue, odd ones are mirrored in x.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_views: int = Field(default=32, ge=1)
    num_variants: int = Field(default=4, ge=1)
    visibility: Literal["all", "depth"] = "depth"
    seed: int = 0


class Lifting:
    """The work of stage ``features``: tensors of an object from its pictures and voxels."""

    def __init__(
        self, extractor: FeatureExtractor, store: Store, settings: FeatureSettings, grid_size: int, device: torch.device
    ) -> None:
        self.device, self.extractor, self.store = device, extractor, store
        self.settings, self.grid_size = settings, grid_size
        self.decoder = ThreadPoolExecutor()

    @torch.inference_mode()
    def __call__(self, object_id: str) -> Mapping[str, np.ndarray]:
        """``features`` fp16 [K, L, C], ``hue`` degrees [K] and ``mirrored`` [K]."""
        settings, grid_size, device = self.settings, self.grid_size, self.device
        rendered = self.store.read("render", object_id)
        if len(rendered["view_pose"]) < settings.num_views:
            raise ValueError(f"{len(rendered['view_pose'])} views were rendered, expected {settings.num_views}")
        if not self.store.finished("voxels", {"grid_size": grid_size}, [object_id]):
            raise ValueError(f"its voxels are missing or not of grid size {grid_size}; run `diff2to3 data voxelize`")
        coords = torch.from_numpy(self.store.read("voxels", object_id)["coords"].astype(np.int64)).to(device)
        png, bounds = rendered["view_png"], rendered["view_bounds"]
        views = list(self.decoder.map(lambda v: decode_png(png, bounds, v), range(settings.num_views)))
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
            centres, maps = voxel_centres(points, grid_size), self.maps(images)
            lifted.append(lift_features(maps, cameras, centres, settings.visibility, depth=surface))
        return {"features": torch.stack(lifted).half().cpu().numpy(), "hue": hues, "mirrored": mirrored}

    def maps(self, images: Float[Tensor, "V 3 S S"]) -> Float[Tensor, "V C h w"]:
        """Feature maps, float32, that tile their pictures."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            parts = fitting(self.extractor, images).split(_VIEWS_AT_ONCE)
            return torch.cat([self.extractor(part).float() for part in parts])


def fitting(extractor: FeatureExtractor, images: Float[Tensor, "V 3 S S"]) -> Float[Tensor, "V 3 T T"]:
    """The pictures, of a side that the extractor's cells tile.

    Cells of a network that pads (DINOv2: 14 px) would reach beyond pictures whose side is no multiple of them; such
    pictures are resized to the side that the network was made for, as TRELLIS does with its renders.
    """
    if images.shape[-1] % (extractor.stride * getattr(extractor, "patch", 1)):
        side = extractor.image_size
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return images


def lift_objects(
    work: Callable[[str], Mapping[str, np.ndarray]],
    store: Store,
    ids: list[str],
    settings: FeatureSettings,
    fingerprint: str,
    grid_size: int,
    workers: Workers | None = None,
) -> dict[str, str]:
    """Writes the features of every object; returns the failures.

    Args:
        work: a :class:`Lifting`, or :func:`model_work` for workers that start with one.
        fingerprint: hash of the extractor's weights; part of the stage's settings.
    """
    stage = settings.model_dump() | {"extractor": fingerprint, "grid_size": grid_size}
    return run_stage(store, "features", ids, work, stage, workers)


_worker: dict[str, Any] = {}  # of a worker process: the work of its stage, with the model


def start_model_work(load: Callable[..., tuple[Any, str]], *arguments: Any) -> None:
    """What a worker process of a model's stage begins with; ``load`` gives the work and the hash of its weights."""
    _worker["work"], _ = load(*arguments)


def model_work(object_id: str) -> Mapping[str, np.ndarray]:
    """The work that :func:`start_model_work` made, in a worker process."""
    return _worker["work"](object_id)


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


class Encoding:
    """The work of stage ``latents``: mean latents of every variant of an object at every quarter turn."""

    def __init__(self, vae: SparseVAE, store: Store) -> None:
        self.vae, self.store = vae, store

    @torch.inference_mode()
    def __call__(self, object_id: str) -> Mapping[str, np.ndarray]:
        """``latents`` fp16 [K, 4, L, C]."""
        device, grid_size = next(self.vae.parameters()).device, self.vae.config.grid_size
        coords = torch.from_numpy(self.store.read("voxels", object_id)["coords"].astype(np.int64))
        stored = self.store.read("features", object_id)
        features = torch.from_numpy(stored["features"])
        placed = [
            variant_coords(coords, bool(mirror), turn, grid_size) for mirror in stored["mirrored"] for turn in range(4)
        ]
        topology, order = Topology.from_coords([p.to(device) for p in placed], grid_size)
        rows = features.repeat_interleave(4, dim=0).flatten(0, 1).to(device).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, _ = self.vae.encoder(SparseTensor(rows[order], topology))
        latents = torch.empty_like(mean.features, dtype=torch.float16)
        latents[order] = mean.features.half()
        return {"latents": latents.view(len(features), 4, len(coords), -1).cpu().numpy()}


def encode_objects(
    work: Callable[[str], Mapping[str, np.ndarray]],
    store: Store,
    ids: list[str],
    fingerprint: str,
    workers: Workers | None = None,
) -> dict[str, str]:
    """Writes the latents of every object; returns the failures.

    Args:
        work: an :class:`Encoding`, or :func:`model_work` for workers that start with one.
    """
    return run_stage(store, "latents", ids, work, {"vae": fingerprint}, workers)


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

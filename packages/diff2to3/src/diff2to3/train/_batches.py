"""What the stages read: every item is a whole batch, a function of (seed, step) alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from diff2to3.data._augment import mirror_cameras, snap_quarter_turns, turn_cameras
from diff2to3.data._feature_stage import variant_coords
from diff2to3.data._store import Store, decode_png
from diff2to3.train._config import TrainConfig

Batch = dict[str, Any]
_RAGGED = ("coords", "features", "latents")  # one row a voxel


class ObjectBatches(Dataset[Batch]):
    """Draws ``batch_size`` objects a step; subclasses say what they read of each, and which stage of the data that needs.

    Raises:
        LookupError: the split is empty.
    """

    needs = "render"

    def __init__(self, config: TrainConfig, split: str) -> None:
        self.store = Store(Path(config.data))
        rows = self.store.objects(split)
        self.ids = [row["id"] for row in rows if self.store.path(self.needs, row["id"]).is_file()][: config.max_objects]
        if not self.ids:
            raise LookupError(f"{config.data}: split {split!r} has no object with stage {self.needs!r}")
        self.config, self.split = config, split

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.config.seed, step, len(self.split)])
        # Whole passes over the split, each in its own order, so that every object is seen equally often.
        size, count = self.config.batch_size, len(self.ids)
        places = range(step * size, step * size + size)
        chosen = [self._order(place // count)[place % count] for place in places]
        items = [self.item(self.ids[i], rng) for i in chosen]
        batch = {key: _collate([item[key] for item in items], key in _RAGGED) for key in items[0]}
        return batch | {"seed": int(rng.integers(2**62))}

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, epoch, 7]).permutation(len(self.ids))

    def item(self, object_id: str, rng: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError("abstract: a stage says what it reads of an object")

    def open(self, stage: str, object_id: str) -> Any:
        """The safetensors file of an object, opened lazily."""
        return safe_open(self.store.path(stage, object_id), "numpy")

    def coords(self, object_id: str) -> Tensor:
        """Surface voxels [L, 3] int64."""
        with self.open("voxels", object_id) as file:
            return torch.from_numpy(file.get_tensor("coords").astype(np.int64))


class PictureBatches(ObjectBatches):
    """RGBA pictures ``image`` [B, 4, H, W] uint8: random views and condition crops."""

    def item(self, object_id: str, rng: np.random.Generator) -> dict[str, Any]:
        kind = "condition" if rng.random() < 0.5 else "view"
        with self.open("render", object_id) as file:
            return {"image": _picture(file, kind, int(rng.integers(len(file.get_tensor(f"{kind}_bounds")) - 1)))}


class OccupancyBatches(ObjectBatches):
    """Surface voxels ``coords``, list of [L, 3], at a random quarter turn, mirrored half of the time."""

    needs = "voxels"

    def __init__(self, config: TrainConfig, split: str, grid_size: int) -> None:
        super().__init__(config, split)
        self.grid_size = grid_size

    def item(self, object_id: str, rng: np.random.Generator) -> dict[str, Any]:
        return {"coords": variant_coords(self.coords(object_id), bool(rng.integers(2)), int(rng.integers(4)), self.grid_size)}


class ViewBatches(ObjectBatches):
    """Lifted features with one view to compare a rendering with.

    ``coords`` and ``features``: lists of [L, 3] and [L, C]; ``image`` [B, 4, H, W] uint8 RGBA; ``pose`` [B, 4, 4] and
    ``intrinsics`` [B, 3, 3]; ``hue`` [B] degrees that the target is to be turned by.
    """

    needs = "features"

    def __init__(self, config: TrainConfig, split: str, grid_size: int) -> None:
        super().__init__(config, split)
        self.grid_size = grid_size

    def item(self, object_id: str, rng: np.random.Generator) -> dict[str, Any]:
        with self.open("features", object_id) as file:
            hues, mirrors = file.get_tensor("hue"), file.get_tensor("mirrored")
            variant = int(rng.integers(len(hues)))
            features = torch.from_numpy(file.get_slice("features")[variant].astype(np.float32))
        mirror, turn = bool(mirrors[variant]), int(rng.integers(4))
        with self.open("render", object_id) as file:
            poses = torch.from_numpy(file.get_tensor("view_pose"))
            view = int(rng.integers(len(poses)))
            image = _picture(file, "view", view)
            intrinsics = torch.from_numpy(file.get_tensor("view_intrinsics")[view])
        pose = poses[view : view + 1]
        if mirror:
            image, pose = image.flip(-1), mirror_cameras(pose)
        return {
            "coords": variant_coords(self.coords(object_id), mirror, turn, self.grid_size),
            "features": features,
            "image": image,
            "pose": turn_cameras(pose, turn)[0],
            "intrinsics": intrinsics,
            "hue": torch.tensor(float(hues[variant])),
        }


class ConditionBatches(ObjectBatches):
    """Condition crops with the voxels (and latents) in the frame the crop asks for.

    ``condition`` [B, 4, H, W] uint8 RGBA, ``hue`` [B], ``coords`` list of [L, 3]; with ``latents`` also that list of [L, C].
    """

    def __init__(self, config: TrainConfig, split: str, grid_size: int, frame: str, latents: bool) -> None:
        self.needs = "latents" if latents else "voxels"
        super().__init__(config, split)
        self.grid_size, self.frame, self.latents = grid_size, frame, latents

    def item(self, object_id: str, rng: np.random.Generator) -> dict[str, Any]:
        with self.open("render", object_id) as file:
            azimuths = file.get_tensor("condition_azimuth")
            view = int(rng.integers(len(azimuths)))
            image = _picture(file, "condition", view)
        mirror, hue, result = bool(rng.integers(2)), float(rng.uniform(0, 360)), {}
        if self.latents:
            with self.open("features", object_id) as file:
                hues, mirrors = file.get_tensor("hue"), file.get_tensor("mirrored")
            variant = int(rng.integers(len(hues)))
            mirror, hue = bool(mirrors[variant]), float(hues[variant])
        azimuth = -float(azimuths[view]) if mirror else float(azimuths[view])
        turn = snap_quarter_turns(azimuth) if self.frame == "view-snapped" else 0
        if self.latents:
            with self.open("latents", object_id) as file:
                latents = file.get_slice("latents")[variant : variant + 1, turn : turn + 1][0, 0]
            result["latents"] = torch.from_numpy(latents.astype(np.float32))
        return result | {
            "condition": image.flip(-1) if mirror else image,
            "hue": torch.tensor(hue),
            "coords": variant_coords(self.coords(object_id), mirror, turn, self.grid_size),
        }


def _picture(file: Any, kind: str, index: int) -> Tensor:
    """RGBA picture ``index`` of an object, uint8 [4, H, W], without reading the others."""
    bounds = file.get_tensor(f"{kind}_bounds")
    data = file.get_slice(f"{kind}_png")[int(bounds[index]) : int(bounds[index + 1])]
    return torch.from_numpy(decode_png(data, np.array([0, len(data)]), 0).copy()).permute(2, 0, 1)


def _collate(values: list[Tensor], ragged: bool) -> Any:
    """Stacks tensors of one shape; what varies from object to object becomes ``{rows, lengths}``."""
    return {"rows": torch.cat(values), "lengths": [len(v) for v in values]} if ragged else torch.stack(values)


def split_rows(ragged: dict[str, Any]) -> list[Tensor]:
    """The list that :func:`_collate` joined."""
    return list(ragged["rows"].split(ragged["lengths"]))

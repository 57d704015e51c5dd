"""Stage ``truth/<protocol>``: the pictures that a protocol compares with, drawn from the objects' own meshes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from diff2to3._atomic import replacing
from diff2to3._errors import InputError
from diff2to3._image import condition_image
from diff2to3._plugins import MeshRenderer
from diff2to3.data._augment import turn_cameras
from diff2to3.data._mesh import load_mesh
from diff2to3.data._render_stage import asset_path, listed_paths
from diff2to3.data._renderers import open_renderer
from diff2to3.data._run import run_stage
from diff2to3.data._store import Store, decode_png, encode_pngs
from diff2to3.eval._protocol import Condition, Protocol, refuse_unknown_objects
from diff2to3.eval._scores import on_white


def truth_stage(protocol: Protocol) -> str:
    """Name of the stage that holds the pictures of a protocol; protocols of one data set do not share it."""
    return f"truth/{protocol.digest}"


@dataclass(frozen=True)
class Truth:
    """An object of a protocol.

    Attributes:
        condition: its place in the protocol.
        picture: the input, RGBA, uncropped.
        turned: the object turned by 90 degrees from the same camera, uint8 [F, F, 4]; a control.
        views, alpha: what is compared, on white.
        coords: its surface voxels, on a grid of ``grid_size``.
        row: of the data set's table.
    """

    condition: Condition
    picture: Image.Image
    turned: np.ndarray
    views: Float[Tensor, "V 3 S S"]
    alpha: Float[Tensor, "V 1 S S"]
    coords: Int[Tensor, "L 3"]
    grid_size: int
    row: dict[str, str]

    def seen(self, size: int) -> np.ndarray:
        """The input as the models see it, cropped on white: uint8 [size, size, 3]."""
        return np.rint(condition_image(self.picture, size) * 255).astype(np.uint8)


def draw_truth(store: Store, source: Path | None, protocol: Protocol, renderer: str = "auto") -> None:
    """Draws what is missing of the stage; what was drawn for the same protocol stays.

    Args:
        source: folder of the meshes; None when all is drawn already.
        renderer: component of the role ``mesh_renderer``.

    Raises:
        InputError: objects are unknown, something is missing and there is no source, or an object cannot be drawn.
    """
    refuse_unknown_objects(store, protocol)
    stage, settings = truth_stage(protocol), {"protocol": protocol.digest}
    done = store.finished(stage, settings, protocol.ids)
    if len(done) == len(protocol.ids):
        return
    if source is None:
        raise InputError(
            f"{store.root}: {len(protocol.ids) - len(done)} objects are not drawn for this protocol yet; expected the"
            " folder of their meshes: --source DIR"
        )
    work = _Drawing(open_renderer(renderer), source, listed_paths(store), protocol)
    try:
        failures = run_stage(store, stage, protocol.ids, work, settings)
    finally:
        work.renderer.close()
    if failures:
        name, reason = next(iter(failures.items()))
        raise InputError(f"{len(failures)} objects of the protocol cannot be drawn; {name}: {reason}")


def read_truth(store: Store, protocol: Protocol, condition: Condition, row: dict[str, str]) -> Truth:
    """An object of a protocol, after :func:`draw_truth`."""
    tensors = store.read(truth_stage(protocol), condition.id)
    views, frames = (_pictures(tensors, kind) for kind in ("view", "condition"))
    color, alpha = on_white(views)
    coords = torch.from_numpy(store.read("voxels", condition.id)["coords"].astype(np.int64))
    grid_size = int(store.settings("voxels", condition.id).get("grid_size", 0))
    return Truth(condition, Image.fromarray(frames[0]), frames[1], color, alpha, coords, grid_size, row)


def write_inputs(store: Store, protocol: Protocol, folder: Path) -> int:
    """Writes the input pictures as ``<id>.png``, RGBA, slashes of an id as ``__``; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in protocol.objects:
        frame = _pictures(store.read(truth_stage(protocol), entry.id), "condition")[0]
        with replacing(folder / f"{entry.id.replace('/', '__')}.png") as path:
            Image.fromarray(frame).save(path, "PNG")
    return len(protocol.objects)


class _Drawing:
    """The work of the stage."""

    def __init__(self, renderer: MeshRenderer, source: Path, paths: dict[str, str], protocol: Protocol) -> None:
        self.renderer, self.source, self.paths, self.protocol = renderer, source, paths, protocol
        self.conditions = {entry.id: entry for entry in protocol.objects}

    def __call__(self, object_id: str) -> dict[str, np.ndarray]:
        mesh = load_mesh(asset_path(self.source, object_id, self.paths.get(object_id)))
        protocol, condition = self.protocol, self.conditions[object_id]
        large = protocol.cameras(protocol.size * protocol.supersampling)
        views, _ = self.renderer(mesh, large.world_to_camera, large.intrinsics, large.size)
        pose = np.array(condition.world_to_camera, np.float32)
        turned = turn_cameras(torch.from_numpy(pose)[None], 1)[0].numpy()
        intrinsics = np.array(condition.intrinsics, np.float32)
        frames, _ = self.renderer(mesh, np.stack([pose, turned]), np.stack([intrinsics, intrinsics]), condition.frame)
        tensors: dict[str, Any] = {}
        for kind, pictures in (("view", shrink(views, protocol.supersampling)), ("condition", frames)):
            tensors[f"{kind}_png"], tensors[f"{kind}_bounds"] = encode_pngs(pictures)
        return tensors


def shrink(rgba: np.ndarray, factor: int) -> np.ndarray:
    """Straight-alpha pictures [V, H, W, 4] uint8, averaged over squares of pixels; colour is weighted by alpha."""
    count, height, width, _ = rgba.shape
    cells = rgba.reshape(count, height // factor, factor, width // factor, factor, 4).astype(np.float32) / 255
    alpha = cells[..., 3:].mean((2, 4))
    color = (cells[..., :3] * cells[..., 3:]).mean((2, 4)) / np.where(alpha > 0, alpha, 1)
    return np.rint(np.concatenate([color, alpha], -1) * 255).astype(np.uint8)


def _pictures(tensors: dict[str, np.ndarray], kind: str) -> np.ndarray:
    png, bounds = tensors[f"{kind}_png"], tensors[f"{kind}_bounds"]
    return np.stack([decode_png(png, bounds, index) for index in range(len(bounds) - 1)])

"""Assets that other methods made, brought into the frame of the true object by the table ``methods.yaml``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gs_render import load
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator
from torch import Tensor

from diff2to3._errors import InputError
from diff2to3._plugins import MeshRenderer
from diff2to3.data._augment import snap_quarter_turns
from diff2to3.data._mesh import Mesh, MeshPart, load_mesh_parts
from diff2to3.eval._generation import Made, gaussian_drawing
from diff2to3.eval._protocol import Condition, Protocol
from diff2to3.eval._scores import on_white
from diff2to3.eval._truth import Truth, shrink

Axis = Literal["+x", "-x", "+y", "-y", "+z", "-z"]
_LONGEST_SIDE = 0.95  # of a true object
_VISIBLE = 0.1  # opacity from which a Gaussian counts for the bounding box
_GAUSSIAN_SUFFIXES = (".splat", ".spz")


class Axes(BaseModel):
    """Which axes of a file point up and to the front."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    up: Axis
    front: Axis

    @model_validator(mode="after")
    def _differ(self) -> Axes:
        if self.up[1] == self.front[1]:
            raise ValueError(f"up {self.up} and front {self.front} lie on one axis")
        return self

    def rotation(self) -> Float[np.ndarray, "3 3"]:
        """File -> world (z up, front -y)."""
        up, front = _axis(self.up), _axis(self.front)
        return np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1]]) @ np.stack([np.cross(up, front), front, up])


class Method(BaseModel):
    """How a method's files are to be read; see ``methods.yaml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    checked: bool = True
    frame: Literal["canonical", "view", "camera", "view-snapped"]
    scale: PositiveFloat | Literal["fit"]
    filter_2d: float = Field(default=0.3, ge=0)
    antialias: bool = False
    files: dict[str, Axes] = Field(min_length=1)

    def rotation(self, suffix: str, condition: Condition) -> Float[np.ndarray, "3 3"]:
        """File -> frame of the true object."""
        return _frame_rotation(self.frame, condition) @ self.files[suffix].rotation()


@cache
def methods() -> dict[str, Method]:
    """The table by name."""
    import yaml

    table = yaml.safe_load((Path(__file__).parent / "methods.yaml").read_text())
    return {name: Method.model_validate(entry) for name, entry in table.items()}


def find_method(name: str, convention: Sequence[str] = ()) -> Method:
    """A method by name, whatever its capitals.

    Args:
        convention: ``key=value`` that replaces an entry: ``frame``, ``scale``, ``up`` or ``front`` (of all files).

    Raises:
        InputError: no such method, or a convention that cannot be.
    """
    known = {key.lower(): value for key, value in methods().items()}
    if name.lower() not in known:
        raise InputError(f"--method {name}: expected one of {', '.join(methods())}")
    method = known[name.lower()].model_dump()
    for text in convention:
        key, _, value = text.partition("=")
        if key in ("up", "front"):
            method["files"] = {suffix: axes | {key: value} for suffix, axes in method["files"].items()}
        elif key in ("frame", "scale"):
            method[key] = value
        else:
            raise InputError(f"--convention {text}: expected frame=, scale=, up= or front=")
    try:
        return Method.model_validate(method)
    except ValidationError as error:
        raise InputError(f"--convention {' '.join(convention)}: {error.errors()[0]['msg']}") from error


def asset_maker(folder: Path, method: Method, protocol: Protocol, renderer: Callable[[], MeshRenderer]) -> Any:
    """`Make` that reads assets ``<id>.<suffix>`` (slashes of an id are folders, or ``__``).

    Args:
        renderer: opens what draws meshes; called when the first one is met.

    Raises:
        InputError: assets are missing, or a file cannot be read.
    """
    files = {entry.id: _asset_file(folder, entry.id, method) for entry in protocol.objects}
    if missing := [name for name, file in files.items() if file is None]:
        raise InputError(
            f"{folder}: no asset for {len(missing)} of {len(files)} objects, first {missing[0]}; expected"
            f" <id> with {' or '.join(method.files)}"
        )
    opened: list[MeshRenderer] = []

    def draw_mesh() -> MeshRenderer:
        if not opened:
            opened.append(renderer())
        return opened[0]

    def make(truths: Sequence[Truth]) -> list[Made]:
        return [_made(files[t.condition.id], method, t.condition, protocol, draw_mesh) for t in truths]  # type: ignore[arg-type]

    return make


def _asset_file(folder: Path, object_id: str, method: Method) -> Path | None:
    names = [f"{name}{suffix}" for suffix in method.files for name in (object_id, object_id.replace("/", "__"))]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _made(
    file: Path, method: Method, condition: Condition, protocol: Protocol, draw_mesh: Callable[[], MeshRenderer]
) -> Made:
    rotation = method.rotation(file.suffix, condition)
    try:
        if file.suffix in _GAUSSIAN_SUFFIXES or (file.suffix == ".ply" and is_gaussian_ply(file)):
            gaussians = load(file, up="z").transform(rotation.tolist())
            visible = gaussians.means[gaussians.opacities >= _VISIBLE]
            scale, shift = _size(method, visible if len(visible) else gaussians.means)
            moved = gaussians.transform(None, shift, scale)
            return Made(gaussian_drawing(moved, filter_2d=method.filter_2d, antialias=method.antialias))
        parts = [_turned(part, rotation) for part in load_mesh_parts(file)]
        scale, shift = _size(method, torch.from_numpy(np.concatenate([p.vertices[np.unique(p.faces)] for p in parts])))
        return Made(_mesh_drawing(Mesh(tuple(_moved(p, scale, shift) for p in parts)), draw_mesh(), protocol))
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise InputError(text if str(file) in text else f"{file}: {text}") from error


def is_gaussian_ply(file: Path) -> bool:
    """Whether a .ply holds Gaussians: its header names their rotation."""
    with file.open("rb") as stream:
        head = stream.read(65536)
    return b"property float rot_0" in head or b"packed_rotation" in head


def _frame_rotation(frame: str, condition: Condition) -> np.ndarray:
    """Frame of the asset, upright and front -y -> frame of the true object."""
    if frame == "canonical":
        return np.eye(3)
    if frame == "view-snapped":
        return _about_z(-90.0 * snap_quarter_turns(condition.azimuth))
    turn = _about_z(condition.azimuth)
    if frame == "view":
        return turn
    c, s = np.cos(np.radians(condition.elevation)), np.sin(np.radians(condition.elevation))
    return turn @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]])


def _about_z(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _size(method: Method, points: Tensor) -> tuple[float, list[float]]:
    """Scale and shift of turned points."""
    if method.scale != "fit":
        return float(method.scale), [0.0, 0.0, 0.0]
    low, high = points.amin(0), points.amax(0)
    extent = float((high - low).amax())
    if not extent > 0 or not np.isfinite(extent):
        raise ValueError(f"its bounding box has side {extent}, expected an object of some size")
    scale = _LONGEST_SIDE / extent
    return scale, (-scale * (low + high) / 2).tolist()


def _turned(part: MeshPart, rotation: np.ndarray) -> MeshPart:
    return MeshPart((part.vertices @ rotation.T).astype(np.float32), part.faces, part.uv, part.texture, part.colors)


def _moved(part: MeshPart, scale: float, shift: list[float]) -> MeshPart:
    vertices = (part.vertices * scale + np.array(shift)).astype(np.float32)
    return MeshPart(vertices, part.faces, part.uv, part.texture, part.colors)


def _mesh_drawing(
    mesh: Mesh, renderer: MeshRenderer, protocol: Protocol
) -> Callable[[np.ndarray, np.ndarray, int], tuple[Tensor, Tensor]]:
    """`Made.draw` of a mesh, drawn as the truth is."""
    factor = protocol.supersampling

    def draw(poses: np.ndarray, intrinsics: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
        larger = (intrinsics * np.array([[factor], [factor], [1]])).astype(np.float32)
        pictures, _ = renderer(mesh, poses.astype(np.float32), larger, size * factor)
        return on_white(shrink(pictures, factor))

    return draw


def _axis(name: str) -> np.ndarray:
    vector = np.zeros(3)
    vector["xyz".index(name[1])] = 1.0 if name[0] == "+" else -1.0
    return vector

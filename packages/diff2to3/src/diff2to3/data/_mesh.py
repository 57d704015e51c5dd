"""Loading textured meshes into the project's world frame (right-handed, z up, inside [-0.5, 0.5]^3)."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diff2to3.data._limits import MAX_DRAWN_PIXELS, RefusedAsset, check_size, read_asset

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
_Z_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)  # y up -> z up; glTF's front +z -> -y
_LONGEST_SIDE = 0.95  # of the unit cube; leaves a margin so that no surface voxel touches the border
_SMALLEST_EXTENT = 1e-30  # below it, or above its inverse, scaling in float32 loses the shape
_MAX_EDGES_SQUARED = 2e4  # in sides of the cube squared: 12 s to voxelize at 64^3; real assets stay below 500


@dataclass(frozen=True)
class MeshPart:
    """Triangles that share one base-colour texture.

    vertices [V, 3] float32, faces [F, 3] int32, uv [V, 2] float32 (origin at the image's bottom left),
    texture [h, w, 4] uint8 RGBA (a flat colour is a 1x1 texture), colors [V, 4] uint8 multiplied with the texture.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    texture: np.ndarray
    colors: np.ndarray


@dataclass(frozen=True)
class Mesh:
    """A whole asset: parts in world coordinates, longest side 0.95, bounding box centred on the origin."""

    parts: tuple[MeshPart, ...]

    @property
    def triangles(self) -> np.ndarray:
        """All triangles, ``[F, 3, 3]`` float32."""
        return np.concatenate([part.vertices[part.faces] for part in self.parts])


def load_mesh(path: str | Path) -> Mesh:
    """Loads a ``.glb``/``.gltf`` (y up, turned to z up), ``.obj`` or ``.ply`` (taken as y up too) asset.

    Only files in the asset's folder and below are read, whatever the asset names; `_limits` says how large it may be.

    Raises:
        ValueError: unreadable file, a limit passed, a base-colour texture that is missing or unreadable, no triangles,
            or coordinates that are not finite; one line that starts with the path.
    """
    try:
        parts = _load_parts(Path(path))
    except RefusedAsset as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    except Exception as error:  # trimesh and Pillow raise whatever their parsers meet in a broken file
        raise ValueError(f"{path}: not a readable mesh ({type(error).__name__}: {_one_line(error)})") from error
    if not parts:
        raise ValueError(f"{path}: no triangles found")
    if any(part.faces.min() < 0 or part.faces.max() >= len(part.vertices) for part in parts):
        raise ValueError(f"{path}: faces name vertices that do not exist")
    vertices = np.concatenate([part.vertices[np.unique(part.faces)] for part in parts])
    if not np.isfinite(vertices).all():
        raise ValueError(f"{path}: vertex coordinates are not finite")
    low, high = vertices.min(0), vertices.max(0)
    with np.errstate(over="ignore"):
        extent = float((high - low).max())
    if extent <= 0:
        raise ValueError(f"{path}: all vertices coincide")
    if not _SMALLEST_EXTENT < extent < 1 / _SMALLEST_EXTENT:
        raise ValueError(f"{path}: its longest side is {extent:.3g}, which float32 cannot scale to {_LONGEST_SIDE}")
    mesh = Mesh(tuple(_normalised(part, (low + high) / 2, _LONGEST_SIDE / extent) for part in parts))
    work = sum(_longest_edges_squared(part) for part in mesh.parts)
    if work > _MAX_EDGES_SQUARED:
        raise ValueError(
            f"{path}: too many large triangles ({work:.3g} squared sides, at most {_MAX_EDGES_SQUARED:.3g})"
        )
    return mesh


def load_mesh_parts(path: str | Path) -> list[MeshPart]:
    """The parts of an asset in the axes and units of its file, neither turned nor scaled.

    Raises:
        ValueError: as :func:`load_mesh`.
    """
    try:
        parts = [replace(part, vertices=part.vertices @ _Z_UP) for part in _load_parts(Path(path))]
    except RefusedAsset as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    except Exception as error:  # as above
        raise ValueError(f"{path}: not a readable mesh ({type(error).__name__}: {_one_line(error)})") from error
    if not parts or not all(np.isfinite(part.vertices).all() for part in parts):
        raise ValueError(f"{path}: expected triangles with finite coordinates")
    return parts


def _load_parts(path: Path) -> list[MeshPart]:
    import trimesh

    data, files = read_asset(path)
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # what is wrong with an asset is said by its error
        warnings.simplefilter("ignore")
        resolver: Any = files  # trimesh calls its get and [] alone
        kind = path.suffix[1:].lower()
        scene = trimesh.load_scene(io.BytesIO(data), file_type=kind, resolver=resolver, process=False)
        if files.refusal:
            raise RefusedAsset(files.refusal)
        found = []
        for node in scene.graph.nodes_geometry:
            transform, name = scene.graph[node]
            geometry = scene.geometry[name]
            if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces):
                found.append((geometry, np.asarray(transform)))
        check_size(sum(len(g.faces) for g, _ in found), sum(len(g.vertices) for g, _ in found))
        textures = _Textures()
        return [_part(geometry, transform, textures) for geometry, transform in found]


class _Textures:
    """Decoded base-colour textures of an asset, each decoded once however many parts show it."""

    def __init__(self) -> None:
        self._decoded: dict[tuple[int, float], tuple[Any, np.ndarray]] = {}  # by identity, with the picture itself
        self._drawn = 0

    def decode(self, picture: Any, alpha_scale: float = 1.0) -> np.ndarray:
        """RGBA uint8 ``[h, w, 4]`` of a Pillow picture, its alpha multiplied with ``alpha_scale``."""
        width, height = picture.size
        self._drawn += width * height  # the renderer uploads the texture of every part
        if self._drawn > MAX_DRAWN_PIXELS:
            raise RefusedAsset(f"the textures of its parts have more than {MAX_DRAWN_PIXELS:,} pixels together")
        key = (id(picture), alpha_scale)
        if key not in self._decoded:
            texels = np.array(picture.convert("RGBA"))
            if np.isinf(alpha_scale):
                texels[..., 3] = 255
            elif alpha_scale != 1:
                texels[..., 3] = np.minimum(np.rint(np.arange(256) * alpha_scale), 255).astype(np.uint8)[texels[..., 3]]
            self._decoded[key] = (picture, texels)
        return self._decoded[key][1]


def _part(geometry: Any, transform: np.ndarray, textures: _Textures) -> MeshPart:
    from trimesh.visual.color import to_rgba

    vertices = geometry.vertices @ transform[:3, :3].T + transform[:3, 3]
    vertices = vertices @ _Z_UP.T
    visual = geometry.visual
    uv = getattr(visual, "uv", None)
    texture = np.full((1, 1, 4), 255, np.uint8)
    colors = np.full((len(vertices), 4), 255, np.uint8)
    if visual.kind == "texture":
        material = visual.material.to_pbr() if hasattr(visual.material, "to_pbr") else visual.material
        if material.baseColorFactor is not None:
            colors[:] = np.asarray(material.baseColorFactor, np.uint8)
        scale = 1.0
        if material is visual.material:  # glTF's: others have neither colours of vertices besides nor an alpha mode
            painted = visual.vertex_attributes.get("color")
            if painted is not None and len(painted) == len(colors):
                colors = np.rint(colors * (to_rgba(painted) / 255)).astype(np.uint8)
            scale = _alpha_scale(material, colors)
        if material.baseColorTexture is not None:
            texture = textures.decode(material.baseColorTexture, scale)
        elif scale < 1:
            texture[..., 3] = np.rint(255 * scale)
    elif visual.kind in ("vertex", "face"):
        colors = np.asarray(
            visual.to_color().vertex_colors if visual.kind == "face" else visual.vertex_colors, np.uint8
        )
        if colors.shape != (len(vertices), 4):
            raise RefusedAsset(f"colours of shape {colors.shape} for {len(vertices)} vertices")
    if uv is None or np.shape(uv) != (len(vertices), 2):
        uv = np.zeros((len(vertices), 2))
    return MeshPart(
        vertices.astype(np.float32), np.asarray(geometry.faces, np.int32), np.asarray(uv, np.float32), texture, colors
    )


def _alpha_scale(material: Any, colors: np.ndarray) -> float:
    """What a texture's alpha is multiplied with, so that glTF's holes are where its product with ``colors`` is below
    one half. Infinite for opaque materials: their alpha means nothing, and files use the channel for other things.

    Changes the alpha of ``colors`` to a largest value of one, unless the cutoff is one half anyway.
    """
    cutoff = {"MASK": material.alphaCutoff, "BLEND": None}.get(material.alphaMode, 0.0)
    cutoff, most = 0.5 if cutoff is None else cutoff, int(colors[:, 3].max())
    if cutoff <= 0:
        colors[:, 3] = 255
        return np.inf
    if cutoff == 0.5 or most == 0:
        return 1.0
    colors[:, 3] = np.rint(colors[:, 3] * (255 / most))
    return most / 255 * 0.5 / cutoff


def _normalised(part: MeshPart, centre: np.ndarray, scale: float) -> MeshPart:
    vertices = ((part.vertices - centre) * scale).astype(np.float32)
    return MeshPart(vertices, part.faces, part.uv, part.texture, part.colors)


def _longest_edges_squared(part: MeshPart) -> float:
    """Sum over triangles of the longest edge squared; the voxelizer's work grows with it."""
    longest = np.zeros(len(part.faces), np.float32)
    for first, second in ((0, 1), (1, 2), (2, 0)):
        edge = part.vertices[part.faces[:, first]] - part.vertices[part.faces[:, second]]
        longest = np.maximum(longest, np.einsum("fk,fk->f", edge, edge))
    return float(longest.sum(dtype=np.float64))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

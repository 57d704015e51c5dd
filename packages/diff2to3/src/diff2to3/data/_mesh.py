"""Loading textured meshes into the project's world frame (right-handed, z up, inside [-0.5, 0.5]^3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
_LONGEST_SIDE = 0.95  # of the unit cube; leaves a margin so that no surface voxel touches the border


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

    Raises:
        ValueError: unreadable file, no triangles, or coordinates that are not finite.
    """
    import trimesh

    try:
        scene = trimesh.load_scene(path, process=False)
        parts = []
        for node in scene.graph.nodes_geometry:
            transform, name = scene.graph[node]
            geometry = scene.geometry[name]
            if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces):
                parts.append(_part(geometry, np.asarray(transform)))
    except Exception as error:  # trimesh and Pillow raise whatever their parsers meet in a broken file
        raise ValueError(f"{path}: not a readable mesh ({type(error).__name__}: {error})") from error
    if not parts:
        raise ValueError(f"{path}: no triangles found")
    if any(part.faces.min() < 0 or part.faces.max() >= len(part.vertices) for part in parts):
        raise ValueError(f"{path}: faces name vertices that do not exist")
    vertices = np.concatenate([part.vertices[np.unique(part.faces)] for part in parts])
    if not np.isfinite(vertices).all():
        raise ValueError(f"{path}: vertex coordinates are not finite")
    low, high = vertices.min(0), vertices.max(0)
    extent = float((high - low).max())
    if extent <= 0:
        raise ValueError(f"{path}: all vertices coincide")
    return Mesh(tuple(_normalised(part, (low + high) / 2, _LONGEST_SIDE / extent) for part in parts))


def _part(geometry: Any, transform: np.ndarray) -> MeshPart:
    vertices = geometry.vertices @ transform[:3, :3].T + transform[:3, 3]
    vertices = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], 1)  # y up -> z up; glTF's front +z -> -y
    visual = geometry.visual
    uv = getattr(visual, "uv", None)
    texture = np.full((1, 1, 4), 255, np.uint8)
    colors = np.full((len(vertices), 4), 255, np.uint8)
    if visual.kind == "texture":
        material = visual.material.to_pbr() if hasattr(visual.material, "to_pbr") else visual.material
        if material.baseColorTexture is not None:
            texture = np.asarray(material.baseColorTexture.convert("RGBA"))
        if material.baseColorFactor is not None:
            colors[:] = np.asarray(material.baseColorFactor, np.uint8)
    elif visual.kind in ("vertex", "face"):
        colors = np.asarray(
            visual.to_color().vertex_colors if visual.kind == "face" else visual.vertex_colors, np.uint8
        )
    if uv is None or len(uv) != len(vertices):
        uv = np.zeros((len(vertices), 2))
    return MeshPart(
        vertices.astype(np.float32), np.asarray(geometry.faces, np.int32), np.asarray(uv, np.float32), texture, colors
    )


def _normalised(part: MeshPart, centre: np.ndarray, scale: float) -> MeshPart:
    vertices = ((part.vertices - centre) * scale).astype(np.float32)
    return MeshPart(vertices, part.faces, part.uv, part.texture, part.colors)

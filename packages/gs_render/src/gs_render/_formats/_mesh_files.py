"""Writers of triangle meshes with vertex colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gs_render._formats._glb import join_glb
from gs_render._gaussians import Gaussians


def write(gaussians: Gaussians, path: Path) -> None:
    """The surface of Gaussians of the world frame as .obj, y up, at the default resolution."""
    from gs_render._mesh import extract_mesh

    extract_mesh(gaussians).save(path)


def write_obj(path: Path, vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray) -> None:
    """Wavefront: "v x y z r g b" and "f a b c", counted from 1."""
    with path.open("w", encoding="ascii") as file:
        np.savetxt(file, np.concatenate([vertices, colors], axis=1), fmt="v %.6g %.6g %.6g %.4f %.4f %.4f")
        np.savetxt(file, faces + 1, fmt="f %d %d %d")


def write_glb(path: Path, vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray) -> None:
    """Binary glTF, smooth normals, unlit: the colours of a splat contain its light already."""
    # glTF vertex colours are linear.
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    arrays = {
        "POSITION": vertices.astype("<f4"),
        "NORMAL": _vertex_normals(vertices, faces).astype("<f4"),
        "COLOR_0": linear.astype("<f4"),
        "indices": faces.reshape(-1, 1).astype("<u4"),
    }
    views, accessors, offset = [], [], 0
    for index, (name, array) in enumerate(arrays.items()):
        view: dict[str, Any] = {"buffer": 0, "byteOffset": offset, "byteLength": array.nbytes}
        accessor: dict[str, Any] = {"bufferView": index, "count": len(array), "componentType": 5126, "type": "VEC3"}
        if name == "indices":
            accessor |= {"componentType": 5125, "type": "SCALAR"}
        if name == "POSITION":
            accessor |= {"min": array.min(axis=0).tolist(), "max": array.max(axis=0).tolist()}
        views.append(view)
        accessors.append(accessor)
        offset += array.nbytes
    primitive = {"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}, "indices": 3, "material": 0}
    document = {
        "asset": {"version": "2.0", "generator": "gs-render"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "materials": [{"extensions": {"KHR_materials_unlit": {}}}],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": offset}],
    }
    path.write_bytes(join_glb(document, b"".join(array.tobytes() for array in arrays.values())))


def _vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[V, 3] unit normals, faces weighted by area."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], np.cross(b - a, c - a))
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)

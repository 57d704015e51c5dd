"""Binary glTF with KHR_gaussian_splatting: one POINTS primitive, all attributes float32, nothing is lost.

Other attributes of the file (a coloured point cloud for readers that do not know the extension) are written, not read.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gs_render._gaussians import Gaussians
from gs_render._rotation import matrix_to_quaternion

_EXTENSION = "KHR_gaussian_splatting"
_JSON, _BIN = 0x4E4F534A, 0x004E4942
# Nodes may show one mesh many times: a small file could ask for any number of Gaussians.
_FREE_COUNT = 1 << 18  # Gaussians that any file may place; beyond, it needs 8 bytes for each
_MAX_PRIMITIVES = 4096
_WIDTH = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}
# glTF component types; integers are normalised as the extension allows for rotation, scale and opacity.
_COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5126: "<f4"}


def read(path: Path) -> Gaussians:
    """Gaussians of all splat primitives of the default scene, each placed by its node."""
    document, binary = _split(path.read_bytes(), path)
    try:
        placed = _placed_primitives(document, path)
        _check_total(document, placed, len(binary), path)
        parts = [_read_primitive(document, binary, *place, path) for place in placed]
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged glTF: {type(error).__name__}: {error}") from error
    used = document.get("extensionsUsed")
    if not parts and isinstance(used, list) and _EXTENSION in used:
        return Gaussians.empty()
    if not parts:
        raise ValueError(f"{path}: glTF without a primitive of {_EXTENSION}")
    return Gaussians.concatenate(parts)


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians that are in the frame of the file already."""
    color = torch.cat([gaussians.rgb, gaussians.opacities[:, None]], dim=1).clamp(0, 1)
    unit = torch.nn.functional.normalize(gaussians.quaternions, dim=-1)
    attributes: dict[str, np.ndarray] = {
        "POSITION": gaussians.means.numpy(),
        "COLOR_0": (color * 255).round().to(torch.uint8).numpy(),
        f"{_EXTENSION}:ROTATION": unit.roll(-1, dims=1).numpy(),
        f"{_EXTENSION}:SCALE": gaussians.scales.numpy(),
        f"{_EXTENSION}:OPACITY": gaussians.opacities[:, None].numpy(),
    }
    for index, (degree, order) in enumerate(_coefficients(gaussians.sh_degree)):
        attributes[f"{_EXTENSION}:SH_DEGREE_{degree}_COEF_{order}"] = gaussians.sh[:, index].numpy()
    views: list[dict[str, Any]] = []
    accessors: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    offset = 0
    for name, values in attributes.items():
        data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": len(data)})
        accessors.append(_accessor(name, values, len(views) - 1))
        chunks.append(data)
        offset += len(data)  # every row is a multiple of 4 bytes long
    extension = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display", "sortingMethod": "cameraDistance"}
    primitive = {
        "mode": 0,
        "attributes": {name: index for index, name in enumerate(attributes)},
        "extensions": {_EXTENSION: {**extension, "projection": "perspective"}},
    }
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "gs-render"},
        "extensionsUsed": [_EXTENSION],
        "scene": 0,
        "scenes": [{"nodes": [0]} if len(gaussians) else {}],
    }
    if len(gaussians):  # glTF forbids empty accessors: no Gaussians are an empty scene
        document |= {
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [primitive]}],
            "accessors": accessors,
            "bufferViews": views,
            "buffers": [{"byteLength": offset}],
        }
    path.write_bytes(join_glb(document, b"".join(chunks)))


def _coefficients(degree: int) -> list[tuple[int, int]]:
    """(degree, order) of each coefficient in the order of `Gaussians.sh`."""
    return [(band, order) for band in range(degree + 1) for order in range(2 * band + 1)]


def _accessor(name: str, values: np.ndarray, view: int) -> dict[str, Any]:
    kinds = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}
    accessor: dict[str, Any] = {
        "bufferView": view,
        "componentType": 5121 if values.dtype == np.uint8 else 5126,
        "count": len(values),
        "type": kinds[values.shape[1]],
    }
    if values.dtype == np.uint8:
        accessor["normalized"] = True
    if name == "POSITION" and len(values):
        accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
    return accessor


def join_glb(document: dict[str, Any], binary: bytes) -> bytes:
    """A binary glTF of its JSON document and its one buffer."""
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), _JSON) + text
    if binary:
        chunks += struct.pack("<II", len(binary), _BIN) + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _split(data: bytes, path: Path) -> tuple[dict[str, Any], bytes]:
    """(JSON document, binary chunk)."""
    if len(data) < 20 or data[:4] != b"glTF":
        raise ValueError(f"{path}: not a binary glTF: it starts with {data[:4]!r}, expected b'glTF'")
    version, _, length, kind = struct.unpack("<IIII", data[4:20])
    if version != 2 or kind != _JSON or 20 + length > len(data):
        raise ValueError(f"{path}: damaged glTF: version {version}, first chunk of {length} bytes, {len(data)} in all")
    try:
        document = json.loads(data[20 : 20 + length])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged glTF: the JSON chunk does not parse: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: damaged glTF: the JSON chunk is a {type(document).__name__}, expected an object")
    start = 20 + length
    if start + 8 > len(data):
        return document, b""
    size, kind = struct.unpack("<II", data[start : start + 8])
    if kind != _BIN or start + 8 + size > len(data):
        raise ValueError(f"{path}: damaged glTF: binary chunk of {size} bytes is cut off or of another type")
    return document, data[start + 8 : start + 8 + size]


def _check_total(
    document: dict[str, Any], placed: list[tuple[dict[str, Any], np.ndarray]], size: int, path: Path
) -> None:
    """ValueError if all placed primitives together hold far more Gaussians than `size` bytes can."""
    accessors = document["accessors"] if placed else []
    counts = [accessors[primitive["attributes"]["POSITION"]]["count"] for primitive, _ in placed]
    total = sum(max(count, 0) for count in counts if isinstance(count, int))
    limit = max(_FREE_COUNT, size // 8)
    if total > limit:
        raise ValueError(
            f"{path}: {len(placed)} primitives place {total} Gaussians, more than the {limit} accepted of {size} bytes"
        )


def _placed_primitives(document: dict[str, Any], path: Path) -> list[tuple[dict[str, Any], np.ndarray]]:
    """(splat primitive, [4, 4] node transform) in the default scene."""
    nodes, found = document.get("nodes", []), []
    scenes = document.get("scenes", [])
    roots = scenes[document.get("scene", 0)].get("nodes", []) if scenes else range(len(nodes))
    waiting = [(index, np.eye(4)) for index in roots]
    visited: set[int] = set()
    while waiting:
        index, parent = waiting.pop()
        if index in visited:  # a node has one parent; a cycle must not hang the reader
            continue
        visited.add(index)
        node = nodes[index]
        place = parent @ _node_matrix(node)
        waiting += [(child, place) for child in node.get("children", [])]
        if "mesh" in node:
            primitives = document["meshes"][node["mesh"]]["primitives"]
            found += [(item, place) for item in primitives if _EXTENSION in item.get("extensions", {})]
            if len(found) > _MAX_PRIMITIVES:
                raise ValueError(f"{path}: more than {_MAX_PRIMITIVES} splat primitives are placed in the scene")
    return found


def _node_matrix(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = (float(value) for value in node.get("rotation", (0, 0, 0, 1)))
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), dtype=np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _read_primitive(
    document: dict[str, Any], binary: bytes, primitive: dict[str, Any], place: np.ndarray, path: Path
) -> Gaussians:
    attributes = primitive["attributes"]

    def column(name: str, kind: str) -> torch.Tensor:
        if name not in attributes:
            raise ValueError(f"{path}: {_EXTENSION} primitive without attribute {name}")
        return torch.from_numpy(_read_accessor(document, binary, attributes[name], kind, path))

    bands = [name for name in attributes if name.startswith(f"{_EXTENSION}:SH_DEGREE_")]
    degree = {1: 0, 4: 1, 9: 2, 16: 3}.get(len(bands))
    if degree is None:
        raise ValueError(f"{path}: {len(bands)} attributes SH_DEGREE_*; expected 1, 4, 9 or 16")
    sizes = {name: document["accessors"][index]["count"] for name, index in attributes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{path}: attributes of different lengths: {sizes}")
    sh = [column(f"{_EXTENSION}:SH_DEGREE_{band}_COEF_{order}", "VEC3") for band, order in _coefficients(degree)]
    gaussians = Gaussians(
        column("POSITION", "VEC3"),
        column(f"{_EXTENSION}:SCALE", "VEC3"),
        column(f"{_EXTENSION}:ROTATION", "VEC4").roll(1, dims=1),
        column(f"{_EXTENSION}:OPACITY", "SCALAR")[:, 0],
        torch.stack(sh, dim=1),
    )
    if np.array_equal(place, np.eye(4)):
        return gaussians
    linear = torch.from_numpy(place[:3, :3])
    scale = float(torch.linalg.det(linear)) ** (1 / 3) if bool(torch.isfinite(linear).all()) else 0.0
    if not (isinstance(scale, float) and scale > 0) or not torch.allclose(
        linear @ linear.T, torch.eye(3).double() * scale**2, atol=1e-4 * scale**2
    ):
        raise ValueError(f"{path}: a node scales the splat unevenly or mirrors it; only similarities are supported")
    rotation = matrix_to_quaternion((linear / scale).float())
    return gaussians.transform(rotation, torch.from_numpy(place[:3, 3]), scale)


def _read_accessor(document: dict[str, Any], binary: bytes, index: int, kind: str, path: Path) -> np.ndarray:
    """[count, width] float32; normalised integers are scaled as glTF 2.0, 3.6.2.4 says."""
    accessor = document["accessors"][index]
    view = document["bufferViews"][accessor["bufferView"]]
    if accessor["type"] != kind or accessor["componentType"] not in _COMPONENTS or "sparse" in accessor:
        raise ValueError(
            f"{path}: accessor {index} is {accessor['type']} of {accessor['componentType']}; expected {kind}"
        )
    dtype, width = np.dtype(_COMPONENTS[accessor["componentType"]]), _WIDTH[kind]
    row = width * dtype.itemsize
    count, start = accessor["count"], view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    stride = view.get("byteStride", row)
    numbers = (count, start, stride, view.get("buffer", 0))
    if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers) or numbers[3]:
        raise ValueError(f"{path}: damaged glTF: accessor {index} with count, start, stride, buffer {numbers}")
    if count and (
        stride < width * dtype.itemsize or start + (count - 1) * stride + width * dtype.itemsize > len(binary)
    ):
        raise ValueError(f"{path}: truncated glTF: accessor {index} of {count} rows runs past {len(binary)} bytes")
    if not count:
        return np.zeros((0, width), np.float32)
    rows = np.ndarray((count, width), dtype, binary, start, (stride, dtype.itemsize))
    values = rows.astype(np.float32)
    if dtype.kind != "f":
        values = np.maximum(values / np.iinfo(dtype).max, -1)
    return values

"""What an asset may name and how much it may ask for, checked before a mesh library parses it.

A file from elsewhere can point outside its folder, promise counts it does not hold, or unpack to far more than it
weighs. `read_asset` refuses such a file with its reason; what it lets through is read from memory, so that nothing
changes between the check and the use, and needs less than 4 GB from loading to rendering.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MAX_FILE_BYTES = 512 * 2**20  # an asset and all it names; binary data is held up to four times while it is parsed
MAX_TEXT_BYTES = 128 * 2**20  # .obj, .mtl, .gltf and ASCII .ply; parsing text takes up to twenty times its size
MAX_TEXT_LINES = 6_000_000  # of .obj and ASCII .ply; each is some 300 bytes of Python objects while it is parsed
MAX_TEXT_WORDS = 4 * MAX_TEXT_LINES  # a polygon of n corners becomes n - 2 triangles, 130 bytes each in the parser
MAX_TREE_VALUES = 4_000_000  # objects, lists and their items in a glTF tree; each is some 100 bytes once parsed
MAX_TRIANGLES = 4_000_000  # over all instances; parsing them takes up to 500 bytes a triangle
MAX_VERTICES = 3 * MAX_TRIANGLES  # as many as triangles that share no vertex have
MAX_NODES = 50_000  # of a scene graph; each mesh node is drawn on its own
MAX_DEPTH = 500  # of a scene graph; the transform of a node is the product of all above it
MAX_TEXTURE_PIXELS = 8192**2  # of one picture: 256 MB as RGBA
MAX_CONVERTED_PIXELS = 3072**2  # of one that is converted from specular-glossiness; trimesh takes 270 bytes a pixel
MAX_TEXTURE_SIDE = 16384  # what OpenGL drivers take, software ones included
MAX_DRAWN_PIXELS = 4 * MAX_TEXTURE_PIXELS  # over all parts of an asset: 1.4 GB uploaded with mipmaps
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TGA", "TIFF", "GIF")  # decoded by Pillow alone, no outside program

_COMPONENT_BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
_COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_TRIANGLE_STRIP = 5
_DATA_URI = "base64,"
_NO_SEPARATORS = bytes(b for b in range(128) if not chr(b).isspace())  # beyond ASCII there are more kinds of space


class RefusedAsset(ValueError):
    """An asset asks for what it may not have; the message is the reason, without the asset's name."""


class AssetFiles:
    """The files that an asset may read: those in its folder and below, links followed, `MAX_FILE_BYTES` in all.

    It is given to trimesh as the resolver of names in the asset. trimesh goes on without a texture or material that it
    cannot read, so what was refused is kept in ``refusal``.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent.resolve()
        self.refusal: str | None = None
        self._files: dict[str, bytes] = {}
        self._left = MAX_FILE_BYTES

    def get(self, name: str) -> bytes:
        """Content of a file by the name that the asset has for it (percent-encoded or with backslashes, too).

        Raises:
            RefusedAsset: it lies outside the folder, does not exist, or is too large.
        """
        if name not in self._files:
            self._files[name] = self._read(name)
        return self._files[name]

    def __getitem__(self, name: str) -> bytes:
        return self.get(name)

    def _read(self, name: str) -> bytes:
        shown = repr(name[:200])
        for spelling in dict.fromkeys((name.strip(), unquote(name.strip()), unquote(name.strip()).replace("\\", "/"))):
            try:
                path = (self.folder / spelling).resolve()
                if not path.is_relative_to(self.folder):
                    self.refusal = f"refers to {shown}, which is outside its folder"
                    raise RefusedAsset(self.refusal)
                if path.is_file():
                    return self.take(path)
            except RefusedAsset:
                raise
            except (OSError, ValueError, RuntimeError):  # too long, a zero byte, or links in a circle: no such file
                continue
        raise RefusedAsset(f"refers to {shown}, which does not exist")

    def take(self, path: Path) -> bytes:
        """Content of a file on disk, within what is left of the asset's bytes."""
        with path.open("rb") as file:
            data = file.read(self._left + 1)
        if len(data) > self._left:
            self.refusal = f"with the files it names it is larger than {MAX_FILE_BYTES:,} bytes"
            raise RefusedAsset(self.refusal)
        self._left -= len(data)
        return data


def read_asset(path: Path) -> tuple[bytes, AssetFiles]:
    """Content of a ``.glb``, ``.gltf``, ``.obj`` or ``.ply`` file, checked against the limits, and what it may name.

    Raises:
        RefusedAsset: a limit is passed, or a base-colour texture or material is missing or unreadable.
        OSError: the file cannot be read.
        Exception: what Python raises on a tree that is not glTF (KeyError, TypeError, ...).
    """
    files = AssetFiles(path)
    data = files.take(path)
    suffix = path.suffix.lower()
    if suffix == ".glb":
        tree, binary = glb_chunks(data)
        _check_gltf(tree, binary, files)
    elif suffix == ".gltf":
        _check_text(data, rows=False)
        _check_gltf(_json(data), b"", files)
    elif suffix == ".obj":
        _check_obj(data, files)
    elif suffix == ".ply":
        _check_ply(data, files)
    else:
        raise RefusedAsset("not a .glb, .gltf, .obj or .ply file")
    return data, files


def check_size(triangles: int, vertices: int) -> None:
    """Refuses more geometry than `MAX_TRIANGLES` or `MAX_VERTICES`."""
    if triangles > MAX_TRIANGLES:
        raise RefusedAsset(f"{triangles:,} triangles, more than {MAX_TRIANGLES:,}")
    if vertices > MAX_VERTICES:
        raise RefusedAsset(f"{vertices:,} vertices, more than {MAX_VERTICES:,}")


def check_picture(data: bytes, name: str, limit: int = MAX_TEXTURE_PIXELS) -> None:
    """Refuses what is not a picture or unpacks to too much, by its header alone."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
                width, height = picture.size
        except Image.DecompressionBombError:
            raise RefusedAsset(f"{name} has more than {limit:,} pixels") from None
        except Exception as error:  # Pillow raises whatever its parsers meet
            raise RefusedAsset(f"{name} is not a {', '.join(PICTURE_FORMATS)} picture") from error
    if width * height > limit or max(width, height) > MAX_TEXTURE_SIDE:
        raise RefusedAsset(
            f"{name} is {width} x {height} pixels, more than {limit:,} or {MAX_TEXTURE_SIDE:,} along a side"
        )


def _check_text(data: bytes, rows: bool = True) -> None:
    if len(data) > MAX_TEXT_BYTES:
        raise RefusedAsset(f"{len(data):,} bytes of text, more than {MAX_TEXT_BYTES:,}; save it as .glb")
    if not rows:
        return
    lines, words = data.count(b"\n"), len(data.translate(None, delete=_NO_SEPARATORS))
    if lines > MAX_TEXT_LINES or words > MAX_TEXT_WORDS:
        raise RefusedAsset(
            f"{lines:,} lines and {words:,} words of text, more than {MAX_TEXT_LINES:,} or {MAX_TEXT_WORDS:,};"
            " save it as .glb"
        )


def glb_chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The tree and the binary chunk of a glTF 2.0 binary file."""
    if len(data) < 20 or data[:4] != b"glTF":
        raise RefusedAsset("not a glTF binary file (no glTF header)")
    length, kind = struct.unpack("<I4s", data[12:20])
    if kind != b"JSON" or length > len(data) - 20:
        raise RefusedAsset(f"its header announces {length:,} bytes of JSON in a file of {len(data):,} bytes")
    start, binary = 20 + length, b""
    while start + 8 <= len(data):
        size, kind = struct.unpack("<I4s", data[start : start + 8])
        if size > len(data) - start - 8:
            raise RefusedAsset(f"its header announces {size:,} bytes in a file of {len(data):,} bytes")
        if kind == b"BIN\0" and not binary:
            binary = data[start + 8 : start + 8 + size]
        start += 8 + size
    return _json(data[20 : 20 + length]), binary


def _json(data: bytes) -> dict[str, Any]:
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_TREE_VALUES:
        raise RefusedAsset(f"its glTF tree has more than {MAX_TREE_VALUES:,} values")
    tree = json.loads(data.decode("utf-8"))
    if not isinstance(tree, dict):
        raise RefusedAsset("its glTF tree is not an object")
    return tree


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise RefusedAsset(f"a size in its glTF tree is {value!r:.50}, not a whole number")
    return value


def _check_gltf(tree: dict[str, Any], binary: bytes, files: AssetFiles) -> None:
    accessors, views = tree.get("accessors", []), tree.get("bufferViews", [])
    asked = sum(_count(view["byteLength"]) for view in views)
    if asked > MAX_FILE_BYTES:
        raise RefusedAsset(f"its buffer views ask for {asked:,} bytes, more than {MAX_FILE_BYTES:,}")
    asked = sum(_count(a["count"]) * _COMPONENT_BYTES[a["componentType"]] * _COMPONENTS[a["type"]] for a in accessors)
    if asked > MAX_FILE_BYTES:
        raise RefusedAsset(f"its accessors ask for {asked:,} bytes, more than {MAX_FILE_BYTES:,}")
    meshes = [_mesh_size(mesh, accessors) for mesh in tree.get("meshes", [])]
    check_size(sum(t for t, _ in meshes), sum(v for _, v in meshes))
    nodes = tree.get("nodes", [])
    _check_graph(nodes)
    drawn = [meshes[node["mesh"]] for node in nodes if "mesh" in node]
    check_size(sum(t for t, _ in drawn), sum(v for _, v in drawn))
    buffers = [_buffer(buffer, binary, files) for buffer in tree.get("buffers", [])]
    for name, index, limit in _decoded_textures(tree):
        picture = tree["images"][index]
        if "bufferView" in picture:
            view = views[picture["bufferView"]]
            start = _count(view.get("byteOffset", 0))
            content = buffers[view["buffer"]][start : start + view["byteLength"]]
        else:
            content = _uri(picture["uri"], files)
        check_picture(content, name, limit)


def _mesh_size(mesh: dict[str, Any], accessors: list[dict[str, Any]]) -> tuple[int, int]:
    """Triangles and vertices of a glTF mesh as it declares them."""
    triangles = vertices = 0
    for primitive in mesh["primitives"]:
        points = accessors[primitive["attributes"]["POSITION"]]["count"]
        corners = accessors[primitive["indices"]]["count"] if "indices" in primitive else points
        triangles += corners if primitive.get("mode") == _TRIANGLE_STRIP else corners // 3
        vertices += points
    return triangles, vertices


def _check_graph(nodes: list[dict[str, Any]]) -> None:
    """Refuses a scene graph with too many nodes, a cycle, or too deep a chain."""
    if len(nodes) > MAX_NODES:
        raise RefusedAsset(f"{len(nodes):,} scene nodes, more than {MAX_NODES:,}")
    parents, depth = [0] * len(nodes), [1] * len(nodes)
    for node in nodes:
        for child in node.get("children", []):
            parents[_count(child)] += 1
    free = [index for index, count in enumerate(parents) if count == 0]
    placed = 0
    while free:  # parents before their children; what is never free hangs on a cycle
        index = free.pop()
        placed += 1
        for child in nodes[index].get("children", []):
            depth[child] = max(depth[child], depth[index] + 1)
            parents[child] -= 1
            if parents[child] == 0:
                free.append(child)
    if placed < len(nodes):
        raise RefusedAsset("its scene graph has a cycle")
    if max(depth, default=0) > MAX_DEPTH:
        raise RefusedAsset(f"its scene graph is {max(depth):,} levels deep, more than {MAX_DEPTH}")


def _buffer(buffer: dict[str, Any], binary: bytes, files: AssetFiles) -> bytes:
    return _uri(buffer["uri"], files) if "uri" in buffer else binary


def _uri(uri: str, files: AssetFiles) -> bytes:
    start = uri.find(_DATA_URI)
    return files.get(uri) if start < 0 else base64.b64decode(uri[start + len(_DATA_URI) :])


def _decoded_textures(tree: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Name, image and pixel limit of every texture that will be decoded: base colours and what is converted to them."""
    wanted = []
    for number, material in enumerate(tree.get("materials", [])):
        plain = material.get("pbrMetallicRoughness", {})
        converted = material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness", {})
        for slots, key, limit in (
            (plain, "baseColorTexture", MAX_TEXTURE_PIXELS),
            (converted, "diffuseTexture", MAX_CONVERTED_PIXELS),
            (converted, "specularGlossinessTexture", MAX_CONVERTED_PIXELS),
        ):
            if key in slots:
                wanted.append((f"{key} of material {number}", _image_of(tree, slots[key]["index"]), limit))
    return wanted


def _image_of(tree: dict[str, Any], index: int) -> int:
    texture = tree["textures"][_count(index)]
    extensions = texture.get("extensions", {})
    if "source" not in texture and "KHR_texture_basisu" in extensions:
        raise RefusedAsset("its textures are KTX2, which is not read; convert them to PNG, JPEG or WebP")
    webp = extensions.get("EXT_texture_webp", {})
    return _count(webp.get("source", texture.get("source")))


def _check_obj(data: bytes, files: AssetFiles) -> None:
    _check_text(data)
    check_size(data.count(b"\nf"), data.count(b"\nv "))
    name = _rest_of_line(data, b"mtllib")
    if name is None:
        return
    library = files.get(name)
    _check_text(library)
    for line in library.decode("utf-8", "replace").splitlines():
        words = line.split(maxsplit=1)
        if len(words) == 2 and words[0].lower() == "map_kd":
            check_picture(files.get(words[1]), f"texture {words[1]!r:.200}")


def _rest_of_line(data: bytes, key: bytes) -> str | None:
    """What follows the first ``key`` on its line (as trimesh looks for it), or None."""
    start = data.find(key)
    if start < 0:
        return None
    end = data.find(b"\n", start)
    return data[start + len(key) : end if end >= 0 else len(data)].decode("utf-8", "replace").strip()


def _check_ply(data: bytes, files: AssetFiles) -> None:
    end = data.find(b"end_header")
    if not data.startswith(b"ply") or not 0 <= end <= 2**16:
        raise RefusedAsset("not a PLY file (no header)")
    header = data[:end]
    ascii_format = b"format ascii" in header
    if ascii_format:
        _check_text(data)
    sizes = {"face": 0, "vertex": 0}
    for line in header.decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["element"]:
            count = int(words[2])
            if not 0 <= count <= len(data):
                raise RefusedAsset(f"its header announces {count:,} of {words[1]!r:.50} in {len(data):,} bytes")
            sizes[words[1]] = count
    check_size(sizes["face"], sizes["vertex"])
    start = header.lower().find(b"texturefile")
    if start >= 0:
        name = header[start + len(b"texturefile") :].splitlines()[0].decode("utf-8", "replace").strip()
        check_picture(files.get(name), f"texture {name!r:.200}")

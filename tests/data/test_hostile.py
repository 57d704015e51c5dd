"""Assets that want to read elsewhere, fill the memory, or break a stage: refused with a reason, one line each."""

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from diff2to3.data import _limits
from diff2to3.data._mesh import load_mesh
from diff2to3.data._render_stage import voxelize_objects
from diff2to3.data._store import Store
from PIL import Image

HUGE = {"componentType": 5126, "count": 10**8, "type": "VEC3"}  # an accessor without data: zeros
GLB = struct.pack("<4sIII4s", b"glTF", 2, 30, 2, b"JSON")
TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)


def picture(size=(4, 4), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(file, kind)
    return file.getvalue()


def bomb(side):
    """A PNG whose header says side x side pixels, in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def tree_of(points=TRIANGLE, image=None):
    """A glTF tree of a triangle with its data inside; `image` is a URI."""
    data = points.tobytes() + np.zeros((len(points), 2), np.float32).tobytes()
    tree = {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": len(data), "uri": inline(data)}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": points.nbytes},
            {"buffer": 0, "byteOffset": points.nbytes, "byteLength": len(points) * 8},
        ],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": len(points), "type": "VEC3"},
            {"bufferView": 1, "componentType": 5126, "count": len(points), "type": "VEC2"},
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        "scene": 0,
    }
    if image is not None:
        tree["images"], tree["textures"] = [{"uri": image}], [{"source": 0}]
        tree["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
        tree["meshes"][0]["primitives"][0]["material"] = 0
    return tree


def inline(data):
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def gltf(folder, tree):
    folder.mkdir(exist_ok=True)
    path = folder / "a.gltf"
    path.write_text(json.dumps(tree))
    return path


def obj(folder, material="m.mtl", texture=None):
    folder.mkdir(exist_ok=True)
    path = folder / "a.obj"
    path.write_text(f"mtllib {material}\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nusemtl m\nf 1/1 2/1 3/1\n")
    if texture is not None:
        (folder / "m.mtl").write_text(f"newmtl m\nmap_Kd {texture}\n")
    return path


def ply(folder, texture="t.png", counts=(3, 1), form="ascii"):
    folder.mkdir(exist_ok=True)
    path = folder / "a.ply"
    path.write_text(
        f"ply\nformat {form} 1.0\ncomment TextureFile {texture}\nelement vertex {counts[0]}\nproperty float x\n"
        "property float y\nproperty float z\nproperty float s\nproperty float t\n"
        f"element face {counts[1]}\nproperty list uchar int vertex_indices\nend_header\n"
        "0 0 0 0 0\n1 0 0 0 0\n0 1 0 0 0\n3 0 1 2\n"
    )
    return path


def refused(path, reason):
    """Loading fails with one line that names the file and the reason."""
    with pytest.raises(ValueError, match=reason) as caught:
        load_mesh(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.fixture
def opened():
    """Paths that Python opened for reading since the fixture was made."""
    paths, active = [], [True]

    def watch(event, arguments):
        if active[0] and event == "open" and isinstance(arguments[0], str) and str(arguments[1]).startswith("r"):
            paths.append(os.path.realpath(arguments[0]))

    sys.addaudithook(watch)
    yield paths
    active[0] = False


ESCAPES = [
    "../secret.png",
    "{absolute}",
    "%2e%2e/secret.png",
    "..%2Fsecret.png",
    "..\\secret.png",
    "link.png",
    "sub/../../secret.png",
]


@pytest.mark.parametrize("make", [lambda f, n: gltf(f, tree_of(image=n)), lambda f, n: obj(f, texture=n), ply])
@pytest.mark.parametrize("name", ESCAPES)
def test_no_texture_is_read_outside_the_folder(tmp_path, opened, make, name):
    secret, folder = tmp_path / "secret.png", tmp_path / "asset"
    secret.write_bytes(picture())
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "link.png").symlink_to(secret)
    path = make(folder, name.format(absolute=secret))
    refused(path, "outside its folder")
    assert str(path) in opened  # the hook works
    assert not [p for p in opened if p == str(secret)]


@pytest.mark.parametrize("name", ["../m.mtl", "{absolute}", "%2e%2e/m.mtl"])
def test_no_material_or_buffer_is_read_outside_the_folder(tmp_path, opened, name):
    secret = tmp_path / "m.mtl"
    secret.write_text("newmtl m\nKd 1 0 0\n")
    name = name.format(absolute=secret)
    refused(obj(tmp_path / "asset", name), "outside its folder")
    tree = tree_of()
    tree["buffers"][0]["uri"] = name
    refused(gltf(tmp_path / "asset", tree), "outside its folder")
    tree = tree_of()
    tree["images"] = [{"uri": name}]  # an image that nothing shows
    refused(gltf(tmp_path / "asset", tree), "outside its folder")
    assert str(secret) not in opened


def test_names_inside_the_folder_are_found_however_they_are_spelt(tmp_path):
    folder = tmp_path / "asset"
    (folder / "some pictures").mkdir(parents=True)
    (folder / "some pictures" / "t.png").write_bytes(picture((3, 5)))
    for path in (
        gltf(folder, tree_of(image="some%20pictures/t.png")),
        obj(folder, texture="some pictures\\t.png"),
        ply(folder, "some pictures/../some pictures/t.png"),
    ):
        assert load_mesh(path).parts[0].texture.shape == (5, 3, 4), path


@pytest.mark.parametrize("make", [lambda f, n: gltf(f, tree_of(image=n)), lambda f, n: obj(f, texture=n), ply])
def test_missing_and_broken_textures(tmp_path, make):
    folder = tmp_path / "asset"
    refused(make(folder, "t.png"), "does not exist")
    refused(make(folder, "http://127.0.0.1/t.png"), "does not exist")
    (folder / "t.png").write_bytes(b"no picture")
    refused(make(folder, "t.png"), "is not a PNG")
    (folder / "t.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Pillow would run Ghostscript
    refused(make(folder, "t.png"), "is not a PNG")
    (folder / "t.png").write_bytes(picture((64, 64))[:-60])
    refused(make(folder, "t.png"), "not a readable mesh")
    for side in (8193, 20_000, 2**31 - 1):
        (folder / "t.png").write_bytes(bomb(side))
        refused(make(folder, "t.png"), "pixels|not a PNG")
    (folder / "t.png").write_bytes(picture((20_000, 1)))
    refused(make(folder, "t.png"), "20000 x 1 pixels")


def test_missing_material_library(tmp_path):
    refused(obj(tmp_path / "asset"), r"'m\.mtl', which does not exist")


def test_textures_are_decoded_once_and_counted_for_every_part(tmp_path, monkeypatch):
    tree = tree_of(image=inline(picture((10, 10))))
    tree["meshes"][0]["primitives"] *= 3
    mesh = load_mesh(gltf(tmp_path / "asset", tree))
    assert mesh.parts[0].texture is mesh.parts[2].texture
    monkeypatch.setattr("diff2to3.data._mesh.MAX_DRAWN_PIXELS", 299)
    refused(gltf(tmp_path / "asset", tree), "more than 299 pixels together")


def change(path, value):
    """The tree of a triangle with one entry replaced."""
    tree = tree_of()
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (change(["accessors", 0, "count"], 10**12), "accessors ask for"),
        (change(["accessors", 0], {"componentType": 5126, "count": 13_000_000, "type": "VEC3"}), "triangles"),
        (change(["accessors", 0, "count"], -1), "not a whole number"),
        (change(["accessors", 0, "count"], 1.5), "not a whole number"),
        (change(["bufferViews", 0, "byteLength"], 10**12), "buffer views ask for"),
        (change(["bufferViews", 0, "byteLength"], 40_000), "not a readable mesh"),
        (change(["accessors", 0, "bufferView"], 7), "not a readable mesh"),
        (change(["accessors"], [*tree_of()["accessors"], HUGE]), "accessors ask for"),
        (change(["nodes"], [{"children": [1]}, {"children": [0], "mesh": 0}]), "cycle"),
        (change(["nodes"], [{"children": [0], "mesh": 0}]), "cycle"),
        (change(["nodes"], [{"children": [9], "mesh": 0}]), "not a readable mesh"),
        (change(["nodes"], [{"children": [i + 1]} for i in range(600)] + [{"mesh": 0}]), "601 levels deep"),
        (change(["nodes"], [{"mesh": 0}] * 60_000), "60,000 scene nodes"),
        (change(["meshes"], []), "not a readable mesh"),
        (change(["meshes", 0, "primitives"], []), "no triangles"),
        (change(["meshes", 0, "primitives", 0, "mode"], 0), "no triangles"),
        ([], "not an object"),
        (tree_of(np.full((3, 3), np.nan, np.float32)), "not finite"),
        (tree_of(np.full((3, 3), np.inf, np.float32)), "not finite"),
        (tree_of(TRIANGLE * 0), "coincide"),
        (tree_of(TRIANGLE * np.float32(1e-40)), "float32 cannot scale"),
        (tree_of(TRIANGLE * np.float32(3e38) - np.float32(1.7e38)), "float32 cannot scale"),
        (tree_of(np.tile(TRIANGLE, (12_000, 1)).reshape(-1, 3)), "too many large triangles"),
        (tree_of(image="data:image/ktx2;base64,"), "is not a PNG"),
        (change(["scenes"], [{"nodes": [5]}]), "not a readable mesh"),
    ],
)
def test_hostile_trees(tmp_path, tree, reason):
    refused(gltf(tmp_path / "asset", tree), reason)


def test_instances_are_counted(tmp_path, monkeypatch):
    tree = change(["nodes"], [{"mesh": 0}] * 4)
    tree["scenes"][0]["nodes"] = [0, 1, 2, 3]
    assert len(load_mesh(gltf(tmp_path / "asset", tree)).triangles) == 4
    monkeypatch.setattr(_limits, "MAX_TRIANGLES", 3)
    refused(tmp_path / "asset" / "a.gltf", "4 triangles, more than 3")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (struct.pack("<4sIII4s", b"glTF", 2, 2**32 - 1, 2**32 - 1, b"JSON"), "announces 4,294,967,295 bytes of JSON"),
        (GLB + b"{}" + struct.pack("<I4s", 2**31, b"BIN\0"), "announces 2,147,483,648"),
        (b"glTF", "no glTF header"),
        (struct.pack("<4sIII4s", b"glTF", 2, 200_020, 200_000, b"JSON") + b"[" * 200_000, "RecursionError"),
    ],
)
def test_hostile_binary_headers(tmp_path, content, reason):
    path = tmp_path / "a.glb"
    path.write_bytes(content)
    refused(path, reason)


def test_too_much_text_and_too_many_values(tmp_path, monkeypatch):
    refused(ply(tmp_path / "p", counts=(10**15, 1)), "announces 1,000,000,000,000,000 of 'vertex'")
    refused(ply(tmp_path / "p", counts=(3, -1)), "announces -1 of 'face'")
    (tmp_path / "p" / "t.png").write_bytes(picture())
    refused(ply(tmp_path / "p", form="binary_little_endian"), "not a readable mesh")
    path = obj(tmp_path / "o", texture="t.png")
    (tmp_path / "o" / "t.png").write_bytes(picture())
    load_mesh(path)
    for name, limit, reason in (
        ("MAX_FILE_BYTES", 90, "larger than 90 bytes"),
        ("MAX_TEXT_BYTES", 50, "bytes of text"),
        ("MAX_TEXT_LINES", 4, "lines"),
        ("MAX_TEXT_WORDS", 20, "words"),
        ("MAX_TRIANGLES", 0, "1 triangles"),
        ("MAX_VERTICES", 1, "2 vertices|3 vertices"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_limits, name, limit)
            refused(path, reason)
    monkeypatch.setattr(_limits, "MAX_TREE_VALUES", 20)
    refused(gltf(tmp_path / "g", tree_of()), "more than 20 values")


def test_an_index_cannot_point_outside_either(tmp_path):
    from diff2to3.data._render_stage import asset_path

    folder = tmp_path / "assets"
    folder.mkdir()
    gltf(tmp_path / "other", tree_of())
    (folder / "link.gltf").symlink_to(tmp_path / "other" / "a.gltf")
    for object_id in ("../other/a", str(tmp_path / "other" / "a"), "link"):
        with pytest.raises(ValueError, match="outside"):
            asset_path(folder, object_id)
    with pytest.raises(ValueError, match="no mesh file"):
        asset_path(folder, "x" * 300)


def test_a_stage_reports_them_all_and_goes_on(tmp_path):
    source = tmp_path / "assets"
    source.mkdir()
    for name, tree in (
        ("good", tree_of()),
        ("nan", tree_of(TRIANGLE * np.float32(np.nan))),
        ("loop", change(["nodes"], [{"children": [0]}])),
        ("escape", tree_of(image="../../secret.png")),
    ):
        (source / f"{name}.gltf").write_text(json.dumps(tree))
    store = Store(tmp_path / "set")
    failures = voxelize_objects(source, store, ["good", "nan", "loop", "escape", "../x"], 16, workers=0)
    assert set(failures) == {"nan", "loop", "escape", "../x"}
    manifest = json.loads((store.root / "voxels" / "manifest.json").read_text())
    assert manifest["objects"] == 1
    assert "cycle" in manifest["failures"]["loop"]
    assert "outside its folder" in manifest["failures"]["escape"]
    assert not any("\n" in reason for reason in failures.values())


@pytest.mark.skipif(sys.platform == "win32", reason="needs prlimit-like limits")
def test_ten_million_faces_need_little_memory(tmp_path):
    """Refused by the header, in a process that may not have 2 GB."""
    points, corners = np.zeros((3, 3), np.float32).tobytes(), 30_000_000
    tree = {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": 36 + corners * 4}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}, {"buffer": 0, "byteOffset": 36, "byteLength": corners * 4}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5125, "count": corners, "type": "SCALAR"},
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
    }
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    path = tmp_path / "big.glb"
    with path.open("wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 28 + len(text) + 36 + corners * 4))
        file.write(
            struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", 36 + corners * 4, b"BIN\0") + points
        )
        file.truncate(28 + len(text) + 36 + corners * 4)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9))\n"
        "from diff2to3.data._mesh import load_mesh\n"
        "try: load_mesh(sys.argv[1])\nexcept ValueError as error: print(error)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment, check=True
    )
    assert "10,000,000 triangles, more than 4,000,000" in done.stdout
    Path(path).unlink()

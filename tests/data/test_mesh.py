"""Loading assets: axes, size, textures, colours, scene graphs, and what is refused."""

import json
import struct

import numpy as np
import pytest
import trimesh
from diff2to3.data._mesh import load_mesh
from PIL import Image


def textured_box(extents=(1.0, 2.0, 4.0)):
    box = trimesh.creation.box(extents)
    image = Image.fromarray(np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=image, baseColorFactor=[255, 128, 0, 255])
    uv = np.random.default_rng(0).random((len(box.vertices), 2))
    box.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return box


def test_y_up_becomes_z_up_and_the_front_faces_minus_y(tmp_path):
    points = np.array([[0, 0, 0], [0.1, 0, 0], [0, 2.0, 0], [0, 0, 1.0]])  # glTF: up is +y, the front is +z
    trimesh.Trimesh(points, [[0, 1, 2], [0, 1, 3]], process=False).export(tmp_path / "axes.glb")
    vertices = load_mesh(tmp_path / "axes.glb").parts[0].vertices
    up, front = vertices[2] - vertices[0], vertices[3] - vertices[0]
    np.testing.assert_allclose(up / 2, [0, 0, 0.475], atol=1e-6)
    np.testing.assert_allclose(front, [0, -0.475, 0], atol=1e-6)


@pytest.mark.parametrize("suffix", [".glb", ".gltf", ".obj", ".ply"])
def test_longest_side_is_095_and_the_box_is_centred(tmp_path, suffix):
    mesh = trimesh.creation.box((3.0, 5.0, 1.0))
    mesh.apply_translation((100, -7, 3))
    path = tmp_path / f"box{suffix}"
    mesh.export(path)
    triangles = load_mesh(path).triangles.reshape(-1, 3)
    assert triangles.dtype == np.float32
    np.testing.assert_allclose(triangles.max(0), np.array([3, 1, 5]) / 5 * 0.475, atol=1e-5)
    np.testing.assert_allclose(triangles.min(0), -triangles.max(0), atol=1e-5)


def test_texture_factor_and_uv_survive(tmp_path):
    box = textured_box()
    box.export(tmp_path / "box.glb")
    (part,) = load_mesh(tmp_path / "box.glb").parts
    assert part.texture.shape == (4, 8, 4)
    np.testing.assert_array_equal(part.texture[..., :3], np.asarray(box.visual.material.baseColorTexture))
    assert (part.texture[..., 3] == 255).all()
    np.testing.assert_allclose(part.uv, box.visual.uv, atol=1e-6)
    np.testing.assert_allclose(part.colors, np.broadcast_to([255, 128, 0, 255], part.colors.shape), atol=1)


@pytest.mark.parametrize(
    ("mode", "cutoff", "factor", "first_visible"),
    [
        (None, None, 255, 0),  # opaque: alpha means nothing
        ("OPAQUE", None, 10, 0),
        ("MASK", None, 255, 128),
        ("MASK", 0.25, 255, 64),
        ("MASK", 0.25, 102, 160),
        ("MASK", 0.9, 255, 230),
        ("MASK", 0.9, 200, 256),
        ("MASK", 0.0, 255, 0),
        ("BLEND", 0.9, 255, 128),  # a cutoff belongs to MASK alone
    ],
)
@pytest.mark.parametrize("textured", [True, False])
def test_alpha_mode(tmp_path, mode, cutoff, factor, first_visible, textured):
    """Of a texture with every alpha, which texels our renderers draw: those whose product with the colour is a half."""
    ramp = np.full((16, 16, 4), 255, np.uint8)
    ramp[..., 3] = np.arange(256).reshape(16, 16)
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(ramp) if textured else None,
        baseColorFactor=[255, 255, 255, factor],
        alphaMode=mode,
        alphaCutoff=cutoff,
    )
    box = trimesh.creation.box()
    box.visual = trimesh.visual.TextureVisuals(uv=box.vertices[:, :2], material=material)
    box.export(tmp_path / "box.glb")
    (part,) = load_mesh(tmp_path / "box.glb").parts
    drawn = part.texture[..., 3].astype(float).ravel() * part.colors[0, 3] / 255 >= 127.5
    alpha = np.arange(256) if textured else np.array([255])
    np.testing.assert_array_equal(drawn, alpha >= first_visible)


@pytest.mark.parametrize("textured", [True, False])
def test_vertex_colours_beside_a_material(tmp_path, textured):
    """glTF multiplies colour of the vertices, factor and texture."""
    box = textured_box()
    if not textured:
        box.visual.material.baseColorTexture = None
    painted = np.random.default_rng(0).integers(0, 256, (len(box.vertices), 4)).astype(np.uint8)
    box.visual.vertex_attributes["color"] = painted
    box.export(tmp_path / "box.glb")
    (part,) = load_mesh(tmp_path / "box.glb").parts
    assert part.texture.shape == ((4, 8, 4) if textured else (1, 1, 4))
    np.testing.assert_allclose(part.colors[:, :3], painted[:, :3] * [1, 128 / 255, 0], atol=1)
    assert (part.colors[:, 3] == 255).all()


@pytest.mark.parametrize("suffix", [".glb", ".ply"])
def test_vertex_colours(tmp_path, suffix):
    mesh = trimesh.creation.icosphere(1)
    colors = np.random.default_rng(0).integers(0, 256, (len(mesh.vertices), 4)).astype(np.uint8)
    colors[:, 3] = 255
    mesh.visual.vertex_colors = colors
    mesh.export(tmp_path / f"ball{suffix}")
    (part,) = load_mesh(tmp_path / f"ball{suffix}").parts
    np.testing.assert_array_equal(part.colors, colors)
    np.testing.assert_array_equal(part.texture, np.full((1, 1, 4), 255))


def test_every_node_of_a_scene_graph_is_placed_by_its_transform(tmp_path):
    scene, box = trimesh.Scene(), trimesh.creation.box((1, 1, 1))
    scene.add_geometry(box, node_name="parent", geom_name="box", transform=trimesh.transformations.scale_matrix(2))
    shift = trimesh.transformations.translation_matrix((0, 3, 0))
    scene.add_geometry(box, node_name="child", geom_name="box", parent_node_name="parent", transform=shift)
    scene.export(tmp_path / "scene.glb")
    mesh = load_mesh(tmp_path / "scene.glb")
    assert len(mesh.parts) == 2
    low, high = zip(*((p.vertices.min(0), p.vertices.max(0)) for p in mesh.parts), strict=True)
    # heights -1..1 and 5..7 before normalisation: 8 in all, so 0.95 / 8 a unit
    np.testing.assert_allclose(sorted(part[2] for part in low), [-0.475, 0.2375], atol=1e-5)
    np.testing.assert_allclose(sorted(part[2] for part in high), [-0.2375, 0.475], atol=1e-5)


def test_alternative_spellings_of_the_same_box_agree(tmp_path):
    box = textured_box()
    box.export(tmp_path / "box.glb")
    box.export(tmp_path / "box.gltf")
    first, second = load_mesh(tmp_path / "box.glb"), load_mesh(tmp_path / "box.gltf")
    np.testing.assert_array_equal(first.triangles, second.triangles)
    np.testing.assert_array_equal(first.parts[0].texture, second.parts[0].texture)


def break_buffer(path, change):
    """Rewrites a .glb after `change(json, binary)`."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    tree, binary = json.loads(data[20 : 20 + length]), bytearray(data[28 + length :])
    change(tree, binary)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(binary), 0x004E4942) + binary
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def nan_vertex(tree, binary):
    view = tree["bufferViews"][
        tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]["bufferView"]
    ]
    binary[view["byteOffset"] : view["byteOffset"] + 4] = struct.pack("<f", float("nan"))


def far_index(tree, binary):
    view = tree["bufferViews"][tree["accessors"][tree["meshes"][0]["primitives"][0]["indices"]]["bufferView"]]
    start = view.get("byteOffset", 0)
    binary[start : start + 4] = b"\xff\xff\xff\x7f"


@pytest.mark.parametrize(("change", "reason"), [(nan_vertex, "finite"), (far_index, "do not exist|not a readable")])
def test_damaged_buffers_are_refused(tmp_path, change, reason):
    path = tmp_path / "box.glb"
    trimesh.creation.box((1, 1, 1)).export(path)
    break_buffer(path, change)
    with pytest.raises(ValueError, match=reason):
        load_mesh(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("noise.glb", b"glTF" + bytes(range(200))),
        ("cut.glb", None),
        ("empty.glb", b""),
        ("text.obj", b"v 1 2\nf 1 2 3\n"),
        ("points.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n0\n"),
        ("dot.obj", b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n"),
        ("external.gltf", b'{"asset":{"version":"2.0"},"buffers":[{"uri":"nowhere.bin","byteLength":4}],"meshes":[]}'),
    ],
)
def test_broken_files_are_value_errors_that_name_the_file(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        trimesh.creation.box((1, 1, 1)).export(path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_mesh(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.glb"):
        load_mesh(tmp_path / "none.glb")


@pytest.mark.parametrize("absolute", [False, True])
def test_nothing_is_read_outside_the_folder_of_the_asset(tmp_path, absolute):
    inside = tmp_path / "assets"
    inside.mkdir()
    trimesh.Scene(trimesh.creation.box((1, 1, 1))).export(inside / "box.gltf")
    load_mesh(inside / "box.gltf")
    tree = json.loads((inside / "box.gltf").read_text())
    for number, buffer in enumerate(tree["buffers"]):
        secret = tmp_path / f"secret{number}.bin"
        (inside / buffer["uri"]).rename(secret)
        buffer["uri"] = str(secret) if absolute else f"../{secret.name}"
    (inside / "box.gltf").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"box\.gltf"):
        load_mesh(inside / "box.gltf")

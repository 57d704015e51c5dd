"""The ComfyUI nodes of `examples/comfyui`, loaded, checked and run by a stand-in for ComfyUI, with `tiny`."""

import json
import sys
from pathlib import Path

import comfy_stub as stub
import gs_render
import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """All nodes by name, the output folder, and the positions of progress bars."""
    output, moves = tmp_path_factory.mktemp("output"), []
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "folder_paths", stub.folder_paths(output))
    patch.setitem(sys.modules, "comfy", type(sys)("comfy"))
    patch.setitem(sys.modules, "comfy.utils", stub.comfy_utils(moves))
    package = stub.load_package(EXAMPLES / "comfyui", "diff2to3_comfyui")
    yield package, package.NODE_CLASS_MAPPINGS | stub.core_nodes(EXAMPLES), output, moves
    patch.undo()


def test_nodes_keep_the_protocol(comfy):
    package, nodes, *_ = comfy
    assert package.NODE_DISPLAY_NAME_MAPPINGS.keys() == package.NODE_CLASS_MAPPINGS.keys()
    for name, node in nodes.items():
        stub.check_node(name, node)


def quick(graph):
    """The same graph with little work."""
    changes = {
        "Diff2to3LoadPipeline": {"device": "cpu"},
        "Diff2to3Generate": {"steps": 2},
        "Diff2to3ExtractMesh": {"resolution": 24, "views": 8, "size": 64},
        "Diff2to3RenderViews": {"views": 3, "size": 48},
    }
    for node in graph.values():
        node["inputs"] |= changes.get(node["class_type"], {})
    return graph


def test_the_workflow_makes_splat_mesh_and_views(comfy):
    _, nodes, output, moves = comfy
    graph = quick(json.loads((EXAMPLES / "comfyui" / "workflow.json").read_text()))
    shown, done = stub.execute(graph, nodes)
    assert shown["4"] == [{"3d": [{"filename": "mushroom_00001_.ply", "subfolder": "3d", "type": "output"}]}]
    assert shown["6"] == [{"3d": [{"filename": "mushroom_00002_.glb", "subfolder": "3d", "type": "output"}]}]
    assert shown["8"] == [{"images": [(48, 48, 3)] * 3}]
    [asset] = done["3"][0]
    saved = gs_render.load(output / "3d" / "mushroom_00001_.ply")
    assert len(saved) == len(asset.gaussians) > 1000
    assert done["6"][0] == ["3d/mushroom_00002_.glb"]
    assert (output / "3d" / "mushroom_00002_.glb").read_bytes()[:4] == b"glTF"
    [mesh] = done["5"][0]
    assert len(mesh.faces) > 100
    [views], [alpha] = done["7"]
    assert 0.02 < float(alpha.mean()) < 0.9
    assert float(views[alpha > 0.9].std()) > 0.05  # something is drawn
    assert moves[-1] == 1.0
    assert moves == sorted(moves)
    expected = np.asarray(asset.pictures[0])
    assert np.array_equal(expected, np.asarray(Image.open(EXAMPLES / "mushroom.png").convert("RGBA")))


def test_a_batch_becomes_objects_or_views_of_one(comfy):
    package, _, output, _ = comfy
    node = package.NODE_CLASS_MAPPINGS
    [pipeline] = node["Diff2to3LoadPipeline"]().load("tiny", "cpu", "float32", False)
    names = ("mushroom.png", "robot.png")
    pixels = [np.asarray(Image.open(EXAMPLES / name).convert("RGBA"), np.float32) / 255 for name in names]
    batch = torch.from_numpy(np.stack(pixels))
    settings = {"seed": 3, "steps": 1, "guidance": 0.0}
    [objects] = node["Diff2to3Generate"]().generate(pipeline, batch, **settings, multi_view=False)
    [together] = node["Diff2to3Generate"]().generate(pipeline, batch, **settings, multi_view=True)
    assert [len(asset.pictures) for asset in (*objects, *together)] == [1, 1, 2]
    alone = pipeline(EXAMPLES / "robot.png", **settings)
    assert torch.equal(objects[1].gaussians.means, alone.gaussians.means)
    assert objects[0].settings == {"seed": 3, "sample": 0, "steps": 1, "guidance": 0.0}
    for asset in objects:
        result = node["Diff2to3SaveSplat"]().save(asset, "batch/a", "splat")
    assert result["result"] == ("batch/a_00002_.splat",)
    assert sorted(path.name for path in (output / "batch").iterdir()) == ["a_00001_.splat", "a_00002_.splat"]
    with pytest.raises(ValueError, match="outside the output folder"):
        node["Diff2to3SaveSplat"]().save(objects[0], "../a", "splat")


def test_masks(comfy):
    """1 is background as Load Image has it, or the object; smaller masks are stretched; an empty one is none."""
    nodes = sys.modules["diff2to3_comfyui.nodes"]
    image = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    for mask_is, top in (("background", 0), ("object", 255)):
        pictures = nodes.to_pictures(image, mask, mask_is)
        assert [picture.mode for picture in pictures] == ["RGBA", "RGBA"]
        alpha = np.asarray(pictures[1])[..., 3]
        assert (alpha[0] == top).all()
        assert (alpha[-1] == 255 - top).all()
        assert np.array_equal(np.asarray(pictures[1])[..., :3], (image[1].numpy() * 255).round().astype(np.uint8))
    assert [picture.mode for picture in nodes.to_pictures(image, torch.zeros(1, 64, 64))] == ["RGB", "RGB"]
    assert nodes.to_pictures(torch.cat([image, image[..., :1]], -1))[0].mode == "RGBA"
    assert nodes.to_pictures(image, mask[0])[0].mode == "RGBA"
    with pytest.raises(ValueError, match="got 3 masks for 2 pictures"):
        nodes.to_pictures(image, torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match=r"got shape \[8, 8, 3\], expected \[B, H, W, 3 or 4\]"):
        nodes.to_pictures(image[0])


def test_without_comfyui_files_go_to_a_folder_of_their_own(tmp_path, monkeypatch):
    for module in ("folder_paths", "comfy.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    package = stub.load_package(EXAMPLES / "comfyui", "diff2to3_comfyui_alone")
    monkeypatch.chdir(tmp_path)
    nodes = sys.modules["diff2to3_comfyui_alone.nodes"]
    mesh = gs_render.Mesh(torch.rand(3, 3), torch.tensor([[0, 1, 2]]), torch.rand(3, 3))
    for number in (1, 2):
        result = package.NODE_CLASS_MAPPINGS["Diff2to3SaveMesh"]().save(mesh, "3d/m", "obj")
        assert result["result"] == (f"3d/m_0000{number}_.obj",)
    assert (tmp_path / "output" / "3d" / "m_00002_.obj").stat().st_size > 20
    assert nodes.progress_bar() is None

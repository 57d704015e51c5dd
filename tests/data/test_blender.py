"""Blender's pictures beside the CPU renderer's; needs the extra `blender`."""

import io
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from diff2to3._errors import ComponentError
from diff2to3._plugins import MESH_RENDERER, build, registry
from diff2to3.data._mesh import load_mesh
from diff2to3.data._store import Store
from diff2to3.data._synthesize import make_object
from diff2to3.data._views import orbit, sphere_views
from diff2to3.testing import MeshRendererContract

_REASON = next(
    component.unavailable_reason()
    for component in registry().components
    if (component.spec.role, component.spec.name) == ("mesh_renderer", "blender")
)
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"NO BLENDER: {_REASON}")
SIZE = 64


@pytest.fixture(scope="module")
def unlit():
    return build(MESH_RENDERER, "blender", {"light": "none"})


@pytest.fixture(scope="module")
def lit():
    return build(MESH_RENDERER, "blender", {"samples": 32})


class TestUnlit(MeshRendererContract):
    @pytest.fixture
    def component(self, unlit):
        return unlit


class TestUniformLight(MeshRendererContract):
    @pytest.fixture
    def component(self, lit):
        return lit


def objects(folder):
    for family, number in (("chair", 0), ("tree", 9), ("house", 2)):
        make_object(family, 0, number).export(folder / f"{family}.glb")
        yield load_mesh(folder / f"{family}.glb")


def psnr(first, second):
    pictures = [p[..., :3] / 255 * (p[..., 3:] / 255) + 1 - p[..., 3:] / 255 for p in (first, second)]
    return -10 * np.log10(np.square(pictures[0] - pictures[1]).mean())


def test_as_the_cpu_renderer_draws_also_with_the_axis_off_the_centre(unlit, tmp_path):
    cpu = build(MESH_RENDERER, "cpu", {"samples": 8})
    for mesh in objects(tmp_path):
        views = sphere_views(2, SIZE, np.random.default_rng(1))
        intrinsics = views.intrinsics + np.array([[0, 0, 5], [0, 0, -8], [0, 0, 0]], np.float32)
        expected, expected_depth = cpu(mesh, views.world_to_camera, intrinsics, SIZE)
        images, depth = unlit(mesh, views.world_to_camera, intrinsics, SIZE)
        assert psnr(images, expected) > 38
        np.testing.assert_array_equal(depth, expected_depth)


def test_uniform_light_darkens_creases_alone(lit, unlit, tmp_path):
    for mesh in objects(tmp_path):
        views = orbit(np.array([30.0]), np.array([20.0]), np.array([2.0]), np.array([40.0]), SIZE)
        arguments = (mesh, views.world_to_camera, views.intrinsics, SIZE)
        (flat, _), (shaded, _) = unlit(*arguments), lit(*arguments)
        inside = (flat[..., 3] == 255) & (shaded[..., 3] == 255)
        change = shaded[inside][:, :3].astype(int) - flat[inside][:, :3]
        assert np.median(change) <= 2  # no brighter
        assert np.mean(change) > -60
        assert psnr(flat, shaded) > 18


def test_cameras_with_two_focal_lengths_and_absent_gpus_are_refused(unlit, lopsided):
    views = sphere_views(1, SIZE, np.random.default_rng(1))
    stretched = views.intrinsics * np.array([[1.1], [1], [1]], np.float32)
    with pytest.raises(ValueError, match="focal lengths"):
        unlit(lopsided, views.world_to_camera, stretched, SIZE)
    if not build(MESH_RENDERER, "blender")._gpu:
        with pytest.raises(ComponentError, match="Cycles finds no GPU"):
            build(MESH_RENDERER, "blender", {"device": "gpu"})


def test_nothing_is_left_behind_and_nothing_is_printed(unlit, lopsided, capfd):
    import bpy

    views = sphere_views(1, SIZE, np.random.default_rng(1))
    unlit(lopsided, views.world_to_camera, views.intrinsics, SIZE)
    assert capfd.readouterr().out == ""
    assert [len(kind) for kind in (bpy.data.objects, bpy.data.meshes, bpy.data.images, bpy.data.materials)] == [0] * 4
    assert "bpy" not in sys.path[0]


def test_as_a_stage_in_worker_processes(tmp_path):
    from diff2to3._cli import cli

    for number in range(2):
        make_object("mug", 0, number).export(tmp_path / f"{number}.glb")
    options = ["--size", 32, "--views", 1, "--extra-views", 0, "--condition-views", 1, "--condition-fov", 10, 70]
    options += ["--renderer", "blender", "--renderer-set", "samples=4", "--workers", 2]
    out = tmp_path / "set"
    result = CliRunner().invoke(cli, ["data", "render", str(tmp_path), str(out), *map(str, options)])
    assert "2 objects done, 0 failed" in result.output
    settings = Store(out).manifest("render")["settings"]
    assert (settings["renderer"], settings["renderer_config"]["samples"]) == ("blender", 4)
    from PIL import Image

    tensors = Store(out).read("render", "0")
    with Image.open(io.BytesIO(tensors["view_png"].tobytes())) as picture:
        assert picture.size == (32, 32)

"""Pictures against closed forms: where things land, how deep they are, what edges hold."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diff2to3.data._views import condition_views, orbit, random_views, sphere_views
from gs_render import Camera

SIZE = 64


def single(azimuth=0.0, elevation=0.0, radius=2.0, fov=40.0, size=SIZE):
    return orbit(*(np.array([value]) for value in (azimuth, elevation, radius, fov)), size)


def square(low, high, depth_y=0.0):
    """Two triangles in the plane y = depth_y, from (x, z) = low to high."""
    (x0, z0), (x1, z1) = low, high
    a, b, c, d = ((x, depth_y, z) for x, z in ((x0, z0), (x1, z0), (x1, z1), (x0, z1)))
    return [[a, b, c], [a, c, d]]


def to_pixels(points, views):
    camera = Camera(torch.from_numpy(views.world_to_camera), torch.from_numpy(views.intrinsics), SIZE, SIZE)
    pixels, depth = camera.project(torch.as_tensor(points, dtype=torch.float32))
    return pixels[0].numpy(), depth[0].numpy()


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (37, 0), (90, 20), (-120, 55), (180, -30), (305, 80)])
def test_cameras_equal_those_of_gs_render(azimuth, elevation):
    views = single(azimuth, elevation, 1.7, 33.0, 96)
    expected = Camera.orbit(1, 1.7, 33.0, 96, elevation_degrees=elevation, start_degrees=azimuth)
    np.testing.assert_allclose(views.world_to_camera[0], expected.world_to_camera[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(views.intrinsics[0], expected.intrinsics[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("make", [sphere_views, random_views, lambda *a: condition_views(*a)[0]])
def test_all_views_look_at_the_origin_and_stand_outside_the_object(make):
    views = make(20, SIZE, np.random.default_rng(0))
    rotation, shift = views.world_to_camera[:, :3, :3], views.world_to_camera[:, :3, 3]
    np.testing.assert_allclose(
        rotation @ rotation.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (20, 3, 3)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)
    np.testing.assert_allclose(shift[:, :2], 0, atol=1e-6)
    assert (shift[:, 2] > np.sqrt(3) / 2).all()


def test_sphere_views_are_spread_evenly():
    views = sphere_views(64, SIZE, np.random.default_rng(0))
    eyes = -np.einsum("vji,vj->vi", views.world_to_camera[:, :3, :3], views.world_to_camera[:, :3, 3]) / 2
    nearest = np.sort(np.linalg.norm(eyes[:, None] - eyes[None], axis=-1), axis=1)[:, 1]
    assert nearest.min() > 0.25
    assert np.abs(eyes.mean(0)).max() < 0.05


def test_a_quad_covers_exactly_the_pixels_whose_centres_project_into_it(renderer, flat_mesh):
    views = single()
    mesh = flat_mesh(square((-0.31, -0.12), (0.23, 0.37)), [[255, 0, 0, 255]] * 2)
    images, _ = renderer(mesh, views.world_to_camera, views.intrinsics, SIZE)
    (left, bottom), (right, top) = to_pixels([[-0.31, 0, -0.12], [0.23, 0, 0.37]], views)[0]
    centre = np.arange(SIZE) + 0.5
    columns = (centre > left) & (centre < right)
    rows = (centre > top) & (centre < bottom)
    solid = images[0, ..., 3] >= 128
    expected = rows[:, None] & columns[None]
    border = (np.abs(centre - left) < 0.15) | (np.abs(centre - right) < 0.15)
    sure = ~(border[None] | ((np.abs(centre - top) < 0.15) | (np.abs(centre - bottom) < 0.15))[:, None])
    np.testing.assert_array_equal(solid & sure, expected & sure)


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (70, 30), (200, -25)])
def test_depth_is_view_space_z_at_the_centre_of_each_block(renderer, flat_mesh, azimuth, elevation):
    views = single(azimuth, elevation)
    mesh = flat_mesh(square((-0.4, -0.4), (0.4, 0.4), 0.1), [[0, 255, 0, 255]] * 2)
    _, depth = renderer(mesh, views.world_to_camera, views.intrinsics, SIZE)
    pixel = np.stack(np.meshgrid(np.arange(SIZE // 4) * 4 + 2.0, np.arange(SIZE // 4) * 4 + 2.0), -1)
    rays = np.concatenate([pixel, np.ones_like(pixel[..., :1])], -1) @ np.linalg.inv(views.intrinsics[0]).T
    rotation, shift = views.world_to_camera[0, :3, :3], views.world_to_camera[0, :3, 3]
    normal, point = rotation @ [0, 1, 0], rotation @ [0, 0.1, 0] + shift
    z = (normal @ point) / (rays @ normal)
    world = (rays * z[..., None] - shift) @ rotation
    inside = (np.abs(world[..., [0, 2]]) < 0.39).all(-1)
    outside = (np.abs(world[..., [0, 2]]) > 0.41).any(-1)
    assert inside.sum() > 20
    np.testing.assert_allclose(depth[0][inside], z[inside], atol=2e-3)
    assert np.isinf(depth[0][outside]).all()


def test_the_nearer_surface_wins_from_both_sides(renderer, flat_mesh):
    triangles = square((-0.3, -0.3), (0.3, 0.3), -0.2) + square((-0.3, -0.3), (0.3, 0.3), 0.2)
    mesh = flat_mesh(triangles, [[255, 0, 0, 255]] * 2 + [[0, 0, 255, 255]] * 2)
    for azimuth, colour in ((0, [255, 0, 0, 255]), (180, [0, 0, 255, 255])):
        views = single(azimuth)
        images, _ = renderer(mesh, views.world_to_camera, views.intrinsics, SIZE)
        np.testing.assert_array_equal(images[0, 32, 32], colour)


def test_edges_hold_partial_alpha_and_the_full_colour(renderer, lopsided, flat_mesh):
    views = single(20, 10)
    mesh = flat_mesh(lopsided.triangles, [[200, 100, 50, 255]] * 40)
    images, _ = renderer(mesh, views.world_to_camera, views.intrinsics, SIZE)
    alpha = images[0, ..., 3]
    edge = (alpha > 40) & (alpha < 255)
    assert edge.sum() > 50
    assert np.abs(images[0][edge][:, :3].astype(int) - [200, 100, 50]).max() <= 5
    assert (images[0][alpha == 0] == 0).all()


def test_texture_is_upright(renderer, tmp_path):
    import trimesh
    from diff2to3.data._mesh import load_mesh
    from PIL import Image

    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0, 0], picture[0, 1], picture[1, 0], picture[1, 1] = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])  # glTF frame, seen from +z
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(picture).resize((64, 64), 0))
    visual = trimesh.visual.TextureVisuals(uv=[[0, 0], [1, 0], [1, 1], [0, 1]], material=material)
    trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False).export(tmp_path / "t.glb")
    views = single()
    images, _ = renderer(load_mesh(tmp_path / "t.glb"), views.world_to_camera, views.intrinsics, SIZE)
    seen = images[0, [[24, 24], [40, 40]], [[24, 40], [24, 40]], :3]
    np.testing.assert_allclose(seen, picture, atol=1)


@pytest.mark.parametrize(("radius", "fov"), [(2.0, 40.0), (89.3, 1.0), (0.9, 120.0)])
def test_near_and_far_cameras_see_the_whole_object(renderer, flat_mesh, radius, fov):
    """The fields of view that condition views may have; the depth stays exact to a fraction of a voxel."""
    views = single(radius=radius, fov=fov)
    corner = flat_mesh(
        square((-0.3, -0.3), (0.3, 0.3), -0.4) + square((-0.3, 0.3), (0.3, 0.4), 0.4), [[9] * 3 + [255]] * 4
    )
    images, depth = renderer(corner, views.world_to_camera, views.intrinsics, SIZE)
    assert images[0, 32, 32, 3] == 255
    np.testing.assert_allclose(depth[0, SIZE // 8, SIZE // 8], radius - 0.4, atol=1e-4)


def test_straight_alpha_inverts_premultiplication():
    from diff2to3.data._renderers.gl import _straight_alpha

    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (64, 64, 1))
    colour = rng.integers(0, 256, (64, 64, 3))
    premultiplied = np.concatenate([np.rint(colour * alpha / 255), alpha], -1).astype(np.uint8)
    result = _straight_alpha(premultiplied)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[..., 3:], alpha)
    error = np.abs(result[..., :3].astype(int) - colour)
    assert (error <= np.ceil(128 / np.maximum(alpha, 1))).all(where=alpha > 0)
    assert (result[alpha[..., 0] == 0] == 0).all()


def test_triton_can_be_imported_after_a_context_was_made(mesh_renderer):
    """Mesa's software driver and Triton bring an LLVM each, and the process crashed when Triton's came second."""
    pytest.importorskip("triton")
    mesh_renderer("gl")  # skips where there is none
    code = "import torch; from diff2to3._plugins import MESH_RENDERER, build; build(MESH_RENDERER, 'gl'); import triton"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_two_contexts_in_one_process_do_not_disturb_each_other(mesh_renderer, lopsided):
    from diff2to3._plugins import MESH_RENDERER, build

    renderer = mesh_renderer("gl")
    views = single(30, 20)
    first, _ = renderer(lopsided, views.world_to_camera, views.intrinsics, SIZE)
    other = build(MESH_RENDERER, "gl")
    between, _ = other(lopsided, views.world_to_camera, views.intrinsics, SIZE)
    again, _ = renderer(lopsided, views.world_to_camera, views.intrinsics, SIZE)
    other.close()
    last, _ = renderer(lopsided, views.world_to_camera, views.intrinsics, SIZE)
    for images in (between, again, last):
        np.testing.assert_array_equal(images, first)

"""Cameras: conventions, construction, conversion."""

import math

import pytest
import torch
from gs_render import Camera


def test_azimuth_zero_looks_from_minus_y_and_grows_towards_plus_x():
    cameras = Camera.orbit(4, radius=2.0, elevation_degrees=0.0)
    expected = torch.tensor([[0.0, -2, 0], [2, 0, 0], [0, 2, 0], [-2, 0, 0]])
    assert torch.allclose(cameras.positions, expected, atol=1e-6)
    assert torch.allclose(
        Camera.orbit(1, 2.0, elevation_degrees=90.0).positions, torch.tensor([[0.0, 0, 2]]), atol=1e-6
    )


def test_projection_of_known_points():
    camera = Camera.orbit(1, radius=2.0, elevation_degrees=0.0, fov_degrees=90.0, size=(200, 100))
    pixels, depth = camera.project(torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0, 0.5], [0, -3.0, 0]]))
    assert torch.allclose(pixels[0, :3], torch.tensor([[100.0, 50], [112.5, 50], [100, 37.5]]), atol=1e-4)
    assert torch.allclose(depth, torch.tensor([[2.0, 2.0, 2.0, -1.0]]), atol=1e-6)
    assert torch.allclose(camera.fov_degrees[0, 1], torch.tensor(90.0), atol=1e-4)


@pytest.mark.parametrize("elevation", [-90.0, -30.0, 0.0, 60.0, 90.0])
def test_poses_are_rigid_and_right_handed(elevation):
    cameras = Camera.on_sphere([0.0, 50.0, 200.0], elevation, 3.0)
    rotation = cameras.world_to_camera[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(3))
    assert torch.allclose(cameras.camera_to_world @ cameras.world_to_camera, torch.eye(4).expand(3, 4, 4), atol=1e-5)
    pixels, depth = cameras.project(torch.zeros(1, 3))
    assert torch.allclose(pixels, torch.full((3, 1, 2), 256.0), atol=1e-3)
    assert torch.allclose(depth, torch.full((3, 1), 3.0), atol=1e-5)


def test_opengl_and_colmap_there_and_back():
    cameras = Camera.orbit(5, radius=1.5, fov_degrees=50.0, size=(64, 48))
    again = Camera.from_opengl(cameras.to_opengl(), 50.0, (64, 48))
    assert torch.allclose(again.world_to_camera, cameras.world_to_camera, atol=1e-5)
    assert torch.allclose(again.intrinsics, cameras.intrinsics)
    # An OpenGL camera at the world's origin without rotation looks along -z with y up.
    straight = Camera.from_opengl(torch.eye(4)[None], 50.0, 32)
    pixels, depth = straight.project(torch.tensor([[0.0, 0.1, -1.0]]))
    assert depth[0, 0] == 1
    assert pixels[0, 0, 1] < 16
    quaternions, translations = cameras.to_colmap()
    k = cameras.intrinsics[0]
    focal, principal = (float(k[0, 0]), float(k[1, 1])), (float(k[0, 2]), float(k[1, 2]))
    colmap = Camera.from_colmap(quaternions, translations, focal, principal, (64, 48))
    assert torch.allclose(colmap.world_to_camera, cameras.world_to_camera, atol=1e-6)


def test_batch_indexing_and_resize():
    cameras = Camera.orbit(6, size=100)
    assert len(cameras[2]) == 1
    assert torch.equal(cameras[-1].world_to_camera, cameras.world_to_camera[5:])
    assert len(cameras[1:4]) == 3
    assert len(list(cameras)) == 6
    assert torch.equal(Camera.concatenate([cameras[0], cameras[1:]]).world_to_camera, cameras.world_to_camera)
    half = cameras.resize(50)
    points = torch.rand(7, 3)
    assert torch.allclose(half.project(points)[0], cameras.project(points)[0] / 2, atol=1e-4)
    with pytest.raises(IndexError, match="camera 6 of a batch of 6"):
        cameras[6]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Camera.orbit(0), "at least 1, got 0"),
        (lambda: Camera.orbit(1, fov_degrees=180.0), "between 0 and 180, got 180"),
        (lambda: Camera.orbit(1, size=(0, 4)), r"positive int or \(width, height\)"),
        (lambda: Camera.look_at((1.0, 0.0, 0.0), (1.0, 0.0, 0.0)), "same point"),
        (lambda: Camera.concatenate([Camera.orbit(1, size=8), Camera.orbit(1, size=9)]), "one image size"),
    ],
)
def test_errors_say_what_is_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_look_at_broadcasts_over_eyes():
    cameras = Camera.look_at(torch.tensor([[2.0, 0, 0], [0, 0, -2.0]]), fov_degrees=60.0, size=32)
    assert len(cameras) == 2
    assert math.isclose(float(cameras.fov_degrees[0, 0]), 60.0, rel_tol=1e-5)

"""Turning, mirroring and recolouring act on pictures, cameras and voxels alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diff2to3.data._augment import (
    hue_matrix,
    mirror_cameras,
    mirror_coords,
    shift_hue,
    snap_quarter_turns,
    turn_cameras,
    yaw_coords,
    yaw_matrix,
)
from diff2to3.data._mesh import Mesh
from diff2to3.data._views import orbit
from diff2to3.data._voxelize import voxelize

SIZE = 64


def transformed(mesh, matrix):
    matrix = np.asarray(matrix, np.float64)[:3, :3]
    return Mesh(tuple(replace(p, vertices=(p.vertices @ matrix.T).astype(np.float32)) for p in mesh.parts))


def some_views():
    return orbit(np.array([0.0, 30.0, 215.0]), np.array([10.0, -20.0, 50.0]), np.full(3, 2.0), np.full(3, 40.0), SIZE)


def assert_same_pictures(first, second):
    """Equal but for single samples of edges that rounding moves."""
    difference = np.abs(first.astype(int) - second.astype(int)).max(-1)
    assert (difference > 1).mean() < 0.002
    assert difference.mean() < 0.05


def as_set(coords):
    return {tuple(row) for row in np.asarray(coords).tolist()}


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, -1])
def test_turned_object_from_turned_camera_gives_the_same_picture(mesh_renderer, lopsided, turns):
    views = some_views()
    expected, depth = mesh_renderer("cpu")(lopsided, views.world_to_camera, views.intrinsics, SIZE)
    cameras = turn_cameras(torch.from_numpy(views.world_to_camera), turns).numpy()
    images, turned_depth = mesh_renderer("cpu")(
        transformed(lopsided, yaw_matrix(turns)), cameras, views.intrinsics, SIZE
    )
    assert_same_pictures(images, expected)
    assert (np.isinf(depth) == np.isinf(turned_depth)).mean() > 0.99


def test_one_turn_moves_the_camera_by_90_degrees_of_azimuth():
    azimuth = np.array([20.0, 110.0])
    views = orbit(azimuth, np.full(2, 15.0), np.full(2, 2.0), np.full(2, 40.0), SIZE)
    turned = turn_cameras(torch.from_numpy(views.world_to_camera), 1)
    np.testing.assert_allclose(turned[0].numpy(), views.world_to_camera[1], atol=1e-6)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_yaw_coords_equals_voxelizing_the_turned_mesh(lopsided, turns):
    coords = torch.from_numpy(voxelize(lopsided, 16))
    expected = as_set(voxelize(transformed(lopsided, yaw_matrix(turns)), 16))
    assert as_set(yaw_coords(coords, turns, 16)) == expected


def test_mirror_coords_equals_voxelizing_the_mirrored_mesh(lopsided):
    coords = torch.from_numpy(voxelize(lopsided, 16))
    assert as_set(mirror_coords(coords, 16)) == as_set(voxelize(transformed(lopsided, np.diag([-1, 1, 1])), 16))


def test_mirrored_object_from_mirrored_camera_gives_the_flipped_picture(mesh_renderer, lopsided):
    views = some_views()
    expected, _ = mesh_renderer("cpu")(lopsided, views.world_to_camera, views.intrinsics, SIZE)
    cameras = mirror_cameras(torch.from_numpy(views.world_to_camera)).numpy()
    images, _ = mesh_renderer("cpu")(transformed(lopsided, np.diag([-1, 1, 1])), cameras, views.intrinsics, SIZE)
    flipped = expected[:, :, ::-1]
    interior = (images[..., 3] == 255) & (flipped[..., 3] == 255)
    difference = np.abs(images.astype(int) - flipped).max(-1)
    assert (difference[interior] > 1).mean() < 0.2  # edges differ: the samples of a pixel are not symmetric
    assert difference.mean() < 0.2 * np.abs(images.astype(int) - expected).max(-1).mean()
    np.testing.assert_allclose(np.linalg.det(cameras[:, :3, :3]), 1, atol=1e-5)


@pytest.mark.parametrize("azimuth", [*range(0, 360, 15), 44.9, 45.1, 359.9, -30])
def test_snapping_brings_the_camera_within_45_degrees_of_the_front(azimuth):
    views = orbit(*(np.array([value]) for value in (azimuth, 20.0, 2.0, 40.0)), SIZE)
    camera = turn_cameras(torch.from_numpy(views.world_to_camera), snap_quarter_turns(azimuth))[0].double()
    eye = -camera[:3, :3].T @ camera[:3, 3]
    assert abs(torch.rad2deg(torch.atan2(eye[0], -eye[1]))) <= 45 + 1e-4


@pytest.mark.parametrize("degrees", [0.0, 33.0, 120.0, 275.0])
def test_hue_keeps_greys_and_brightness(degrees):
    matrix = hue_matrix(degrees)
    np.testing.assert_allclose(matrix @ torch.full((3,), 0.7), [0.7] * 3, atol=1e-6)
    colour = torch.tensor([0.3, 0.5, 0.4])
    assert torch.isclose((matrix @ colour).sum(), colour.sum(), atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)


def test_hue_turns_red_to_green_to_blue():
    red, green, blue = torch.eye(3)
    np.testing.assert_allclose(hue_matrix(120) @ red, green, atol=1e-6)
    np.testing.assert_allclose(hue_matrix(120) @ green, blue, atol=1e-6)


def test_shift_hue_takes_one_matrix_a_picture_or_one_for_all():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    each = shift_hue(images, hue_matrix(torch.tensor([0.0, 90.0])))
    torch.testing.assert_close(each[0], images[0])
    torch.testing.assert_close(each[1:], shift_hue(images[1:], hue_matrix(90.0)))
    assert each.min() >= 0
    assert each.max() <= 1

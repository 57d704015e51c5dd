"""Surface voxels against analytic shapes and a brute-force overlap of triangles and boxes."""

import numpy as np
import pytest
import trimesh
from diff2to3.data._voxelize import voxelize


def overlaps(triangles, centres, half):
    """Separating-axis test of triangles [F, 3, 3] against boxes around centres [V, 3]: bool [V]."""
    found = np.zeros(len(centres), bool)
    axes = np.eye(3)
    for triangle in triangles.astype(np.float64):
        corners = triangle[None] - centres[:, None]
        edges = np.roll(triangle, -1, 0) - triangle
        directions = [*axes, np.cross(edges[0], edges[1]), *(np.cross(a, e) for a in axes for e in edges)]
        hit = np.ones(len(centres), bool)
        for direction in directions:
            along = corners @ direction
            reach = half * np.abs(direction).sum()
            hit &= (along.min(1) <= reach) & (along.max(1) >= -reach)
        found |= hit
    return found


def as_grid(coords, grid_size):
    occupied = np.zeros((grid_size,) * 3, bool)
    occupied[tuple(coords.T)] = True
    return occupied.ravel()


@pytest.mark.parametrize("grid_size", [8, 16])
def test_against_separating_axes(lopsided, grid_size):
    found = as_grid(voxelize(lopsided, grid_size), grid_size)
    index = np.stack(np.unravel_index(np.arange(grid_size**3), (grid_size,) * 3), 1)
    centres = (index + 0.5) / grid_size - 0.5
    touched = overlaps(lopsided.triangles, centres, 0.5 / grid_size + 1e-6)
    deep = overlaps(lopsided.triangles, centres, 0.25 / grid_size)
    assert not (found & ~touched).any()  # nothing that the surface does not touch
    assert not (deep & ~found).any()  # nothing missed that it enters by a quarter of a voxel
    assert (touched & ~found).sum() <= 0.1 * touched.sum()  # and little that it only clips


def test_cube(flat_mesh):
    box = trimesh.creation.box((0.75, 0.75, 0.75)).triangles + 1e-4  # faces inside voxels 1 and 14 of 16
    coords = voxelize(flat_mesh(box, np.full((12, 4), 255)), 16)
    side = np.arange(16)
    inside = (side >= 2) & (side <= 14)
    solid = inside[:, None, None] & inside[None, :, None] & inside[None, None, :]
    core = (side > 2) & (side < 14)
    shell = solid & ~(core[:, None, None] & core[None, :, None] & core[None, None, :])
    np.testing.assert_array_equal(as_grid(coords, 16).reshape(16, 16, 16), shell)


def test_sphere(flat_mesh):
    ball = trimesh.creation.icosphere(4, radius=0.4)
    coords = voxelize(flat_mesh(ball.triangles, np.full((len(ball.faces), 4), 255)), 32)
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    grid = np.stack(np.unravel_index(np.arange(32**3), (32,) * 3), 1)
    found = as_grid(coords, 32)
    for margin, share in ((0.0, 0.93), (0.25, 1.0)):  # of the voxels it clips, of those it enters by a quarter
        inner = margin + (1 - 2 * margin) * corners
        distance = np.linalg.norm((grid[:, None] + inner) / 32 - 0.5, axis=-1)
        crossed = (distance.min(1) < 0.398) & (distance.max(1) > 0.4)
        assert (found & crossed).sum() >= share * crossed.sum()
    centre = np.linalg.norm((grid + 0.5) / 32 - 0.5, axis=-1)
    assert (np.abs(centre[found] - 0.4) < np.sqrt(3) / 64 + 0.002).all()


def test_sorted_unique_in_range(lopsided):
    coords = voxelize(lopsided, 32)
    assert coords.dtype == np.int32
    assert coords.min() >= 0
    assert coords.max() < 32
    np.testing.assert_array_equal(coords, np.unique(coords, axis=0))


def test_a_point_lands_in_the_voxel_of_the_convention(flat_mesh):
    centre = (np.array([3, 17, 30]) + 0.5) / 32 - 0.5
    triangle = centre + np.array([[0, 0, 0], [0.001, 0, 0], [0, 0.001, 0]])
    np.testing.assert_array_equal(voxelize(flat_mesh([triangle], [[255] * 4]), 32), [[3, 17, 30]])

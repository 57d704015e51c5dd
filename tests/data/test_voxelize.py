"""Surface voxels against exact clipping in fractions, analytic shapes and samples of the surface."""

from fractions import Fraction

import numpy as np
import pytest
import trimesh
from diff2to3.data import _voxelize
from diff2to3.data._voxelize import voxelize
from hypothesis import given, settings
from hypothesis import strategies as st

RULES = ("exact", "sampled")


def clipped(polygon, axis, bound, sign):
    """Sutherland-Hodgman: the part of a polygon, segment or point where sign * (coordinate - bound) >= 0."""
    result = []
    for here, there in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        a, b = sign * (here[axis] - bound), sign * (there[axis] - bound)
        if a >= 0:
            result.append(here)
        if a * b < 0:
            result.append([x + (y - x) * a / (a - b) for x, y in zip(here, there, strict=True)])
    return result


def holds_a_point_of(triangle, cell, grid_size, margin=Fraction(0)):
    """Whether a voxel has a point of a triangle, in exact arithmetic: of the closed voxel's piece, being convex, some
    point is below all upper faces if for each of them some point is."""
    low = [Fraction(int(c)) / grid_size - Fraction(1, 2) - margin for c in cell]
    high = [x + Fraction(1, grid_size) + 2 * margin for x in low]
    piece = [[Fraction(float(x)) for x in vertex] for vertex in triangle]
    for axis in range(3):
        piece = clipped(piece, axis, low[axis], 1)
        piece = clipped(piece, axis, high[axis], -1)
    if not piece or margin > 0:
        return bool(piece)
    border = [c == grid_size - 1 for c in cell]
    return all(border[k] or min(point[k] for point in piece) < high[k] for k in range(3))


def cells_around(triangle, grid_size):
    """All voxels within one of the bounding box."""
    low, high = np.floor((triangle.min(0) + 0.5) * grid_size) - 1, np.floor((triangle.max(0) + 0.5) * grid_size) + 1
    sides = [range(int(max(a, 0)), int(min(b, grid_size - 1)) + 1) for a, b in zip(low, high, strict=True)]
    return [(i, j, k) for i in sides[0] for j in sides[1] for k in sides[2]]


def found(flat_mesh, triangles, grid_size, rule="exact"):
    triangles = np.asarray(triangles, np.float32).reshape(-1, 3, 3)
    return set(map(tuple, voxelize(flat_mesh(triangles, np.full((len(triangles), 4), 255)), grid_size, rule).tolist()))


def lattice(step):
    """Triangles whose vertices have coordinates that are multiples of a power of two: no rounding, many ties."""
    number = st.integers(-int(0.5 / step), int(0.5 / step)).map(lambda n: n * step)
    return st.lists(st.tuples(number, number, number), min_size=3, max_size=3)


@settings(max_examples=80, deadline=None)
@given(triangle=lattice(1 / 8), grid_size=st.sampled_from([4, 5]))
def test_exact_on_borders_edges_and_corners(flat_mesh, triangle, grid_size):
    """Voxel sides of two steps (ties everywhere), and of no whole number of steps."""
    triangle = np.array(triangle)
    expected = {c for c in cells_around(triangle, grid_size) if holds_a_point_of(triangle, c, grid_size)}
    assert found(flat_mesh, triangle, grid_size) == expected


@settings(max_examples=30, deadline=None)
@given(triangle=lattice(1 / 128))
def test_exact_in_a_finer_grid(flat_mesh, triangle):
    """Boxes are cut several times before they are voxels."""
    triangle = np.array(triangle)
    triangle[1:] = triangle[0] + (triangle[1:] - triangle[0]) / 4
    expected = {c for c in cells_around(triangle, 32) if holds_a_point_of(triangle, c, 32)}
    assert found(flat_mesh, triangle, 32) == expected


@settings(max_examples=60, deadline=None)
@given(corners=st.lists(st.floats(-0.5, 0.5, width=32), min_size=9, max_size=9))
def test_any_coordinates_up_to_rounding(flat_mesh, corners):
    """Found is what is entered by more than rounding, and nothing that is further away than rounding."""
    triangle, hair = np.array(corners, np.float32).reshape(3, 3), Fraction(1, 10**12)
    cells = found(flat_mesh, triangle, 4)
    for cell in cells_around(triangle, 4):
        if cell in cells:
            assert holds_a_point_of(triangle, cell, 4, hair)
        else:
            assert not holds_a_point_of(triangle, cell, 4, -hair)


def test_the_oracle_knows_the_rule():
    """Upper faces do not belong to a voxel, lower ones do; at the grid's border both."""
    face = np.array([[0, -0.4, -0.4], [0, 0.4, -0.4], [0, 0, 0.4]])
    assert [holds_a_point_of(face, (i, 4, 4), 8) for i in (3, 4)] == [False, True]
    border = face + np.array([0.5, 0, 0])
    assert holds_a_point_of(border, (7, 4, 4), 8)
    assert not holds_a_point_of(face, (3, 4, 4), 8, Fraction(-1, 10**6))
    assert holds_a_point_of(face, (3, 4, 4), 8, Fraction(1, 10**6))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("place", "layer"), [(-0.5, 0), (-0.25, 2), (0.0, 4), (0.125, 5), (0.5, 7)])
def test_a_face_between_two_layers_fills_one(flat_mesh, axis, place, layer):
    square = [[[0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [0, 1]]]
    triangles = np.insert(np.array(square) * 0.75 - 0.375, axis, place, axis=2)
    cells = np.array(sorted(found(flat_mesh, triangles, 8)))
    assert set(cells[:, axis]) == {layer}
    assert len(cells) == 7 * 7  # from 1 to 7 inside the face: its own upper edges are borders, too


def test_a_diagonal_face_through_edges_fills_the_diagonal(flat_mesh):
    triangles = [[[-0.5, -0.5, -0.5], [0.5, 0.5, -0.5], [0.5, 0.5, 0.5]]]
    assert {(i, j) for i, j, _ in found(flat_mesh, triangles, 8)} == {(i, i) for i in range(8)}


@pytest.mark.parametrize("rule", RULES)
def test_points_and_segments(flat_mesh, rule):
    corner = np.array([1, 2, 3]) / 8 - 0.5
    assert found(flat_mesh, [corner] * 3, 8, rule) == {(1, 2, 3)}
    end = corner + np.array([0.5, 0, 0])
    assert found(flat_mesh, [corner, end, corner], 8, rule) == {(i, 2, 3) for i in range(1, 6)}
    assert found(flat_mesh, [corner, corner + 0.25, corner + 0.125], 8, rule) == {(1, 2, 3), (2, 3, 4), (3, 4, 5)}


@pytest.mark.parametrize("grid_size", [7, 16, 64])
def test_holds_every_point_of_the_surface(lopsided, grid_size):
    rng = np.random.default_rng(0)
    weights = rng.dirichlet((1, 1, 1), (len(lopsided.triangles), 2000))
    weights[:, :3] = np.eye(3)
    points = np.einsum("fpk,fkd->fpd", weights, lopsided.triangles.astype(np.float64)).reshape(-1, 3)
    place = (points + 0.5) * grid_size
    sure = np.abs(place - np.rint(place)).min(1) > 1e-9
    sampled = set(map(tuple, np.floor(place[sure]).astype(int).tolist()))
    cells = set(map(tuple, voxelize(lopsided, grid_size).tolist()))
    assert sampled <= cells
    assert set(map(tuple, voxelize(lopsided, grid_size, "sampled").tolist())) <= cells


@pytest.mark.parametrize("rule", RULES)
def test_order_does_not_matter(flat_mesh, lopsided, rule, monkeypatch):
    expected = found(flat_mesh, lopsided.triangles, 16, rule)
    rng = np.random.default_rng(1)
    monkeypatch.setattr(_voxelize, "_TRIANGLES", 7)  # other batches, too
    monkeypatch.setattr(_voxelize, "_PAIRS", 11)
    shuffled = rng.permutation(lopsided.triangles)
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        assert found(flat_mesh, shuffled[:, order], 16, rule) == expected


def test_cube(flat_mesh):
    box = trimesh.creation.box((0.75, 0.75, 0.75)).triangles + 1e-4  # faces inside voxels 1 and 14 of 16
    side = np.arange(16)
    inside, core = (side >= 2) & (side <= 14), (side > 2) & (side < 14)
    cube = [x[:, None, None] & x[None, :, None] & x[None, None, :] for x in (inside, core)]
    for rule in RULES:
        assert found(flat_mesh, box, 16, rule) == set(map(tuple, np.argwhere(cube[0] & ~cube[1]).tolist()))


@pytest.mark.parametrize(("rule", "share"), [("exact", 1.0), ("sampled", 0.93)])
def test_sphere(flat_mesh, rule, share):
    ball = trimesh.creation.icosphere(4, radius=0.4)
    cells = voxelize(flat_mesh(ball.triangles, np.full((len(ball.faces), 4), 255)), 32, rule)
    occupied = np.zeros((32,) * 3, bool)
    occupied[tuple(cells.T)] = True
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    grid = np.argwhere(np.ones_like(occupied))
    flatness = ball.vertices[ball.faces].mean(1)  # of all points of a face its middle is nearest to the centre
    inner = np.linalg.norm(flatness, axis=1).min()
    for margin, least in ((0.0, share), (0.25, 1.0)):  # of the voxels it crosses, of those it enters by a quarter
        distance = np.linalg.norm((grid[:, None] + margin + (1 - 2 * margin) * corners) / 32 - 0.5, axis=-1)
        crossed = (distance.min(1) < inner) & (distance.max(1) > 0.4)
        assert (occupied.ravel() & crossed).sum() >= least * crossed.sum()
    middle = np.linalg.norm((cells + 0.5) / 32 - 0.5, axis=-1)
    assert (np.abs(middle - 0.4) < np.sqrt(3) / 64 + 0.002).all()


@pytest.mark.parametrize("rule", RULES)
def test_sorted_unique_in_range(lopsided, rule):
    coords = voxelize(lopsided, 32, rule)
    assert coords.dtype == np.int32
    assert coords.min() >= 0
    assert coords.max() < 32
    np.testing.assert_array_equal(coords, np.unique(coords, axis=0))


@pytest.mark.parametrize("rule", RULES)
def test_a_point_lands_in_the_voxel_of_the_convention(flat_mesh, rule):
    centre = (np.array([3, 17, 30]) + 0.5) / 32 - 0.5
    triangle = centre + np.array([[0, 0, 0], [0.001, 0, 0], [0, 0.001, 0]])
    assert found(flat_mesh, triangle, 32, rule) == {(3, 17, 30)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", [0.5001, -0.7, np.nan, np.inf])
def test_what_reaches_out_of_the_cube_is_refused(flat_mesh, rule, place):
    """Clipping would fill voxels of the border that the surface does not pass through."""
    with pytest.raises(ValueError, match=r"expected triangles inside \[-0.5, 0.5\]\^3"):
        found(flat_mesh, [[0, 0, 0], [0.1, 0, 0], [0, 0.1, place]], 8, rule)


def test_memory_does_not_grow_with_the_triangles(flat_mesh):
    """Half a million small triangles (36 MB of corners alone in float64) and a hundred large ones."""
    import tracemalloc

    rng = np.random.default_rng(0)
    small = rng.uniform(-0.4, 0.4, (500_000, 1, 3)) + rng.uniform(-0.01, 0.01, (500_000, 3, 3))
    large = rng.uniform(-0.45, 0.45, (100, 3, 3))
    mesh = flat_mesh(np.concatenate([small, large]), np.full((500_100, 4), 255))
    tracemalloc.start()
    voxelize(mesh, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6

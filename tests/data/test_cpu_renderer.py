"""The CPU renderer against rays cast one by one, closed forms, OpenGL, and meshes that no one should draw."""

import numpy as np
import pytest
from diff2to3.data._mesh import Mesh, MeshPart, load_mesh
from diff2to3.data._renderers._kernels import draw as draw_kernel
from diff2to3.data._renderers.cpu import CpuMeshRenderer, CpuMeshRendererConfig, mesh_depth
from diff2to3.data._synthesize import make_object
from diff2to3.data._views import orbit, sphere_views
from PIL import Image

SIZE = 32


def single(azimuth=0.0, elevation=0.0, radius=2.0, fov=40.0, size=SIZE):
    return orbit(*(np.array([value]) for value in (azimuth, elevation, radius, fov)), size)


def draw(mesh, views, samples=1):
    images, depth = CpuMeshRenderer(CpuMeshRendererConfig(samples=samples))(
        mesh, views.world_to_camera, views.intrinsics, views.size
    )
    return images[0], depth[0]


def textured(corners, faces, uv, texture, colors=None):
    corners = np.asarray(corners, np.float32)
    colors = np.full((len(corners), 4), 255, np.uint8) if colors is None else np.asarray(colors, np.uint8)
    part = MeshPart(corners, np.asarray(faces, np.int32), np.asarray(uv, np.float32), np.asarray(texture), colors)
    return Mesh((part,))


def wall(texture, uv=((0, 0), (1, 0), (1, 1), (0, 1)), half=0.5):
    """A square in the plane y = 0."""
    corners = [(-half, 0, -half), (half, 0, -half), (half, 0, half), (-half, 0, half)]
    return textured(corners, [(0, 1, 2), (0, 2, 3)], uv, texture)


def bilinear(texture, u, v):
    """RGB [P, 3] of a texture that repeats."""
    height, width = texture.shape[:2]
    x, y = u * width - 0.5, (1 - v) * height - 0.5
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    right, down = (x - column)[:, None], (y - row)[:, None]
    a, b, c, d = (texture[(row + j) % height, (column + i) % width, :3].astype(float) for j in (0, 1) for i in (0, 1))
    return (a * (1 - right) + b * right) * (1 - down) + (c * (1 - right) + d * right) * down


def cast(triangles, views, pixels):
    """Nearest hit beyond 0.05 of the rays through pixels [P, 2] (Moeller-Trumbore): triangle or -1, depth, weights."""
    rotation, shift = views.world_to_camera[0, :3, :3].astype(float), views.world_to_camera[0, :3, 3].astype(float)
    triangles = triangles.astype(float) @ rotation.T + shift
    rays = np.concatenate([pixels, np.ones((len(pixels), 1))], 1) @ np.linalg.inv(views.intrinsics[0].astype(float)).T
    hit, depth, weights = np.full(len(rays), -1), np.full(len(rays), np.inf), np.zeros((len(rays), 3))
    for number, (a, b, c) in enumerate(triangles):
        across = np.cross(rays, c - a)
        determinant = across @ (b - a)
        with np.errstate(all="ignore"):
            u = across @ -a / determinant
            v = rays @ np.cross(-a, b - a) / determinant
            z = (c - a) @ np.cross(-a, b - a) / determinant
        nearer = (u >= 0) & (v >= 0) & (u + v <= 1) & (z > 0.05) & (z < depth)
        hit[nearer], depth[nearer] = number, z[nearer]
        weights[nearer] = np.stack([1 - u - v, u, v], 1)[nearer]
    return hit, depth, weights


@pytest.mark.parametrize(
    ("azimuth", "elevation", "radius"), [(0, 0, 2.0), (70, 30, 1.2), (200, -50, 0.6), (10, 5, 0.2)]
)
def test_every_sample_shows_what_its_ray_hits(lopsided, azimuth, elevation, radius):
    """From outside and from amid the triangles, some of which reach behind the camera."""
    views = single(azimuth, elevation, radius, 60.0)
    pixels = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1).reshape(-1, 2)
    hit, _, _ = cast(lopsided.triangles, views, pixels)
    image, _ = draw(lopsided, views)
    image = image.reshape(-1, 4)
    expected = lopsided.parts[0].colors[3 * np.maximum(hit, 0)] * (hit >= 0)[:, None]
    assert (hit >= 0).sum() > 30
    assert (image != expected).any(1).sum() <= 1  # a ray through an edge may take either side
    blocks = np.stack(np.meshgrid(np.arange(2, SIZE, 4), np.arange(2, SIZE, 4)), -1).reshape(-1, 2)
    _, expected_depth, _ = cast(lopsided.triangles, views, blocks)
    found = mesh_depth(lopsided, views.world_to_camera, views.intrinsics, SIZE)[0].ravel()
    np.testing.assert_allclose(found, expected_depth, rtol=1e-5)


def test_a_triangle_that_reaches_behind_the_camera_ends_at_its_level_edge(flat_mesh):
    mesh = flat_mesh([[(-0.3, 0, 0.1), (0.3, 0, 0.1), (0, -5, -0.5)]], [[255, 255, 255, 255]])
    image, _ = draw(mesh, single())
    pixels = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1).reshape(-1, 2)
    hit, _, _ = cast(mesh.triangles, single(), pixels)
    np.testing.assert_array_equal(image[..., 3].ravel() > 0, hit >= 0)


def test_a_near_texture_is_bilinear_and_perspective_is_right():
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (4, 8, 4), dtype=np.uint8)
    texture[..., 3] = 255
    uv = np.array([(-0.3, 0.1), (1.9, -0.4), (1.2, 2.2), (0.4, 1.3)])  # repeats, and is no parallelogram
    colors = rng.integers(0, 256, (4, 4))
    colors[:, 3] = 255
    corners = [(-0.5, 0, -0.5), (0.5, 0.3, -0.5), (0.5, 0, 0.5), (-0.5, -0.3, 0.5)]
    mesh = textured(corners, [(0, 1, 2), (0, 2, 3)], uv, texture, colors)
    views = single(40, 20, 1.2, 40.0, 64)
    image, _ = draw(mesh, views)
    pixels = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), -1).reshape(-1, 2)
    hit, _, weights = cast(mesh.triangles, views, pixels)
    seen = hit >= 0
    corner = mesh.parts[0].faces[hit[seen]]
    place = np.einsum("pk,pkc->pc", weights[seen], uv[corner].astype(float))
    expected = bilinear(texture, place[:, 0], place[:, 1])
    tint = np.einsum("pk,pkc->pc", weights[seen], colors[corner].astype(float))[:, :3] / 255
    error = np.abs(image.reshape(-1, 4)[seen, :3] - expected * tint)
    assert seen.sum() > 800
    assert (error.max(1) > 0.51).sum() <= 2  # rays through the common edge


def test_a_far_texture_is_its_mean():
    """A fine checkerboard whose squares are far smaller than a sample: grey, not noise."""
    checker = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    texture = np.dstack([checker, checker, checker, np.full_like(checker, 255)])
    image, _ = draw(wall(texture), single(30, 10, 3.0))
    inside = image[image[..., 3] == 255][:, :3].astype(int)
    assert len(inside) > 100
    assert np.abs(inside - 127.5).max() <= 2


@pytest.mark.parametrize("level", [0.5, 1.25])
def test_two_levels_of_the_pyramid_blend(level):
    """A wall that faces the camera, 2^level texels from one sample to the next."""
    rng = np.random.default_rng(1)
    texture = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
    texture[..., 3] = 255
    views = single(size=64)
    radius = 2**level / 64 * float(views.intrinsics[0, 0, 0])
    views = single(radius=radius, size=64)
    image, _ = draw(wall(texture), views)
    rows, columns = np.nonzero(image[..., 3] == 255)
    u = (columns + 0.5 - 32) * radius / float(views.intrinsics[0, 0, 0]) + 0.5
    v = 0.5 - (rows + 0.5 - 32) * radius / float(views.intrinsics[0, 0, 0])
    pyramid = [texture]
    for _ in range(3):
        pyramid.append(np.asarray(Image.fromarray(pyramid[-1]).reduce(2)))
    lower = int(level)
    first, second = (bilinear(pyramid[k], u, v) for k in (lower, lower + 1))
    expected = first + (level - lower) * (second - first)
    assert len(rows) > 500
    assert np.abs(image[rows, columns, :3] - expected).max() < 1


def test_whole_repeats_of_a_texture_change_nothing():
    """Nor the level that it is seen at, however slanted it is."""
    texture = np.random.default_rng(2).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    texture[..., 3] = 255
    uv = np.array([(0, 0), (3, 0), (3, 3), (0, 3)])
    views = single(70, 15, 1.2)
    first, _ = draw(wall(texture, uv), views)
    again, _ = draw(wall(texture, uv + 16), views)
    assert (first[..., 3] > 0).sum() > 100
    assert np.abs(first.astype(int) - again).max() <= 1


def test_no_gap_between_triangles_and_no_pixel_beside_them():
    """A square cut into a thousand slivers around a point is as whole as one of two triangles."""
    angle = np.linspace(0, 2 * np.pi, 1001)[:-1]
    square = np.array([np.cos(angle), np.sin(angle)]) / np.maximum(np.abs(np.cos(angle)), np.abs(np.sin(angle)))
    corners = np.concatenate([[[0.013, 0, 0.007]], np.stack([square[0], 0 * angle, square[1]], 1) * 0.4])
    faces = [(0, 1 + i, 1 + (i + 1) % 1000) for i in range(1000)]
    white = np.full((1, 1, 4), 255, np.uint8)
    fan = textured(corners, faces, np.zeros((1001, 2)), white)
    for samples, views in ((1, single()), (3, single(40, 25))):
        image, _ = draw(fan, views, samples)
        whole, _ = draw(wall(white, half=0.4), views, samples)
        assert np.abs(image.astype(int) - whole).max() <= (0 if samples == 1 else 255 // samples**2 + 1)
        assert (image[..., 3] == 255).sum() > 200


def test_slivers_are_no_nearer_than_their_vertices():
    """Triangles seen from their edge, a few rounding errors wide, through samples: their own depth is noise."""
    rng = np.random.default_rng(0)
    w = rng.uniform(1.6, 2.4, (3000, 3))
    x = 3 * w * (1 + rng.integers(-3, 4, (3000, 3)) * 2.0**-52)
    points = np.stack([x, rng.uniform(0, 7, (3000, 3)) * w, w], 2).reshape(-1, 3)
    colors, nothing = np.full((9000, 4), 255, np.uint8), np.zeros((0, 4), np.uint8)
    white, levels = np.full((1, 4), 255, np.uint8), np.array([(0, 1, 1)])
    faces = np.arange(9000, dtype=np.int32).reshape(-1, 3)
    surface = (faces, np.zeros((9000, 2), np.float32), colors, white, nothing, levels)
    nearest, owner = np.zeros((8, 8), np.float32), np.full((8, 8), -1, np.int32)
    draw_kernel(points, surface, False, 0.05, 0, nearest, owner)
    assert (owner >= 0).sum() >= 6
    drawn = 1 / nearest[owner >= 0]
    assert drawn.min() >= 1.6 - 1e-6
    assert drawn.max() <= 2.4 + 1e-6


def test_nothing_nearer_than_the_near_plane_is_drawn(flat_mesh):
    """A floor a hundredth below the camera, from under it to the horizon."""
    mesh = flat_mesh([[(-5, -1.999, -0.01), (5, -1.999, -0.01), (0, 3, -0.01)]], [[255, 255, 255, 255]])
    image, _ = draw(mesh, single())
    pixels = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1).reshape(-1, 2)
    hit, _, _ = cast(mesh.triangles, single(), pixels)
    np.testing.assert_array_equal(image[..., 3].ravel() > 0, hit >= 0)
    assert (image[24] > 0).any()
    assert (image[25:] == 0).all()


def test_texels_and_vertices_with_little_alpha_are_holes():
    texture = np.full((2, 2, 4), 255, np.uint8)
    texture[0, :, 3] = 0  # the upper half
    image, depth = draw(wall(texture, half=0.36), single(), samples=3)
    assert (image[10:15, 8:24, 3] == 0).all()
    assert (image[18:22, 8:24, 3] == 255).all()
    assert np.isinf(depth[2:3, 2:6]).all()
    np.testing.assert_allclose(depth[5, 2:6], 2.0, atol=1e-5)
    half = textured(
        [(-0.3, 0, -0.3), (0.3, 0, -0.3), (0.3, 0, 0.3)], [(0, 1, 2)], np.zeros((3, 2)), texture[1:, :1],
        [(255, 0, 0, 120)] * 3,
    )  # fmt: skip
    assert (draw(half, single())[0] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30, 1e9])
def test_texture_coordinates_of_any_kind(value):
    uv = np.array([(0, 0), (1, value), (value, 1), (0, 1)])
    image, _ = draw(wall(np.full((3, 5, 4), 255, np.uint8), uv), single())
    assert (image[16, 16] == 255).all()


def test_triangles_without_area_and_behind_the_camera_are_not_drawn(flat_mesh):
    triangles = [
        [(0, 0, 0)] * 3,
        [(-0.3, 0, 0), (0.3, 0, 0), (0, 0, 0)],
        [(0, -0.3, 0), (0, 0.3, 0), (0, 0, 0)],  # along the view
        [(-9, -9, -9), (9, -9, -9), (0, -9, 9)],  # behind
    ]
    image, depth = draw(flat_mesh(triangles, [[255] * 4] * 4), single(), 2)
    assert (image == 0).all()
    assert np.isinf(depth).all()


def test_as_opengl_draws(mesh_renderer, tmp_path):
    """Whole textured objects: pictures differ at edges alone, depth by rounding."""
    gl = mesh_renderer("gl")
    for family, number in (("chair", 0), ("tree", 9), ("house", 2)):
        make_object(family, 0, number).export(tmp_path / f"{family}.glb")
        mesh = load_mesh(tmp_path / f"{family}.glb")
        views = sphere_views(4, 128, np.random.default_rng(number))
        arguments = (mesh, views.world_to_camera, views.intrinsics, 128)
        (expected, expected_depth), (images, depth) = (
            gl(*arguments),
            CpuMeshRenderer(CpuMeshRendererConfig())(*arguments),
        )
        alpha = [picture[..., 3:] / 255 for picture in (expected, images)]
        on_white = [p[..., :3] / 255 * a + 1 - a for p, a in zip((expected, images), alpha, strict=True)]
        assert -10 * np.log10(np.square(on_white[0] - on_white[1]).mean()) > 34
        solid = [a > 0.5 for a in alpha]
        assert (solid[0] & solid[1]).sum() > 0.97 * (solid[0] | solid[1]).sum()
        both = np.isfinite(expected_depth) & np.isfinite(depth)
        assert (np.isfinite(expected_depth) != np.isfinite(depth)).mean() < 0.005
        assert np.quantile(np.abs(expected_depth[both] - depth[both]), 0.99) < 1e-3


def test_the_same_picture_every_time(lopsided):
    first, _ = draw(lopsided, single(30, 20), 3)
    np.testing.assert_array_equal(draw(lopsided, single(30, 20), 3)[0], first)

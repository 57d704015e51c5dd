"""Lifting: equal to a plain loop, exact on scenes with a closed form, right about frames, occluders and gradients."""

import math
import os
from pathlib import Path

import pytest
import torch
from flux_features import _lifting as implementation
from flux_features import lift_features, voxel_centres
from gs_render import Camera
from hypothesis import given, settings
from hypothesis import strategies as st

OPTIONS = [("all", "zeros"), ("all", "exclude"), ("depth", "zeros"), ("depth", "exclude")]


def naive(maps, cameras, points, visibility, depth, tolerance, out_of_frame):
    """The definition, a view and a point at a time."""
    views, channels, rows, columns = maps.shape
    result = torch.zeros(len(points), channels, dtype=maps.dtype)
    for index, point in enumerate(points):
        values, in_frame, seen = [], [], []
        for v in range(views):
            pose, intrinsics = cameras.world_to_camera[v].double(), cameras.intrinsics[v].double()
            x, y, z = (pose[:3, :3] @ point + pose[:3, 3]).tolist()
            depth_in_view = max(z, 1e-6)
            u = float(intrinsics[0, 0] * x + intrinsics[0, 2] * z) / depth_in_view / cameras.width
            w = float(intrinsics[1, 1] * y + intrinsics[1, 2] * z) / depth_in_view / cameras.height
            inside = z > 0 and 0 <= u <= 1 and 0 <= w <= 1
            in_frame.append(inside)
            values.append(bilinear(maps[v], w * rows - 0.5, u * columns - 0.5) if inside else 0 * maps[v, :, 0, 0])
            if depth is not None:
                i = min(int(w * depth.shape[1]), depth.shape[1] - 1) if inside else 0
                j = min(int(u * depth.shape[2]), depth.shape[2] - 1) if inside else 0
                seen.append(inside and z <= float(depth[v, i, j]) + tolerance)
        counted = in_frame if out_of_frame == "exclude" else [True] * views
        if visibility == "depth" and any(seen):
            counted = seen
        chosen = [value for value, count in zip(values, counted, strict=True) if count]
        if chosen:
            result[index] = torch.stack(chosen).sum(0) / len(chosen)
    return result


def bilinear(feature_map, i, j):
    rows, columns = feature_map.shape[1:]
    i, j = min(max(i, 0), rows - 1), min(max(j, 0), columns - 1)
    top, left = min(int(i), rows - 1), min(int(j), columns - 1)
    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    a, b = i - top, j - left
    upper = (1 - b) * feature_map[:, top, left] + b * feature_map[:, top, right]
    lower = (1 - b) * feature_map[:, bottom, left] + b * feature_map[:, bottom, right]
    return (1 - a) * upper + a * lower


def double(cameras):
    return cameras.to(dtype=torch.float64)


@pytest.mark.parametrize(("visibility", "out_of_frame"), OPTIONS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    views=st.integers(1, 4),
    radius=st.sampled_from([0.3, 0.8, 2.0]),  # the nearest cameras stand between the points
    size=st.sampled_from([(8, 8), (24, 16)]),
    cells=st.sampled_from([(1, 1), (2, 3), (5, 4)]),
)
def test_equals_the_loop(visibility, out_of_frame, seed, views, radius, size, cells):
    generator = torch.Generator().manual_seed(seed)
    eyes = torch.nn.functional.normalize(torch.randn(views, 3, generator=generator), dim=1) * radius
    cameras = double(Camera.look_at(eyes, fov_degrees=50.0, size=size))
    points = torch.rand(12, 3, generator=generator, dtype=torch.float64) - 0.5
    maps = torch.randn(views, 3, *cells, generator=generator, dtype=torch.float64)
    depth = radius + torch.randn(views, 6, 7, generator=generator, dtype=torch.float64)
    depth[depth > radius + 1] = math.inf
    options = {"depth": depth, "depth_tolerance": 0.1, "out_of_frame": out_of_frame}
    lifted = lift_features(maps, cameras, points, visibility, **options)
    expected = naive(maps, cameras, points, visibility, depth, 0.1, out_of_frame)
    torch.testing.assert_close(lifted, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("cells", [(16, 12), (32, 24), (64, 48)])
def test_pixel_centres(cells):
    """Maps that hold the pixel position of each cell give back the exact projection, whatever their resolution."""
    rows, columns = cells
    cameras = double(Camera.orbit(num_views=5, radius=2.0, fov_degrees=60.0, size=(96, 128), elevation_degrees=25.0))
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) * cameras.height / rows
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) * cameras.width / columns
    maps = torch.stack(torch.meshgrid(x, y, indexing="xy")).expand(5, -1, -1, -1)
    points = 0.6 * (torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5)
    for v in range(5):
        pixels, _ = cameras[v].project(points)
        torch.testing.assert_close(lift_features(maps[v : v + 1], cameras[v], points), pixels[0], atol=1e-9, rtol=0)
    mean, _ = cameras.project(points)
    torch.testing.assert_close(lift_features(maps, cameras, points), mean.mean(0), atol=1e-9, rtol=0)


def test_a_single_pixel():
    """The centre of the world falls on the corner of four cells in the middle; a point to its right on known ones."""
    camera = Camera.look_at((0.0, -2.0, 0.0), fov_degrees=90.0, size=4)  # focal 2 px: 1 world unit is 1 px
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0.5], [-1.5, 0, 1.5], [1.5, 0, -1.5], [1.5, 0, 1.5]])
    lifted = lift_features(maps, camera, points)[:, 0]
    torch.testing.assert_close(lifted, torch.tensor([7.5, 6.0, 0.0, 15.0, 3.0]), atol=1e-5, rtol=0)


def test_out_of_frame():
    """One camera sees the point, one looks away from it, and one has it beside its frame."""
    point = torch.tensor([[0.0, 0.0, 0.4]])
    eyes = torch.tensor([[0.0, -2.0, 0.0], [0.0, -2.0, 0.0], [0.0, -2.0, 0.0]])
    targets = torch.tensor([[0.0, 0.0, 0.0], [0.0, -4.0, 0.0], [2.0, 0.0, 0.0]])
    cameras = Camera.look_at(eyes, targets, fov_degrees=40.0, size=32)
    maps = torch.tensor([6.0, 100.0, 100.0]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    assert lift_features(maps, cameras, point).item() == pytest.approx(2.0)
    assert lift_features(maps, cameras, point, out_of_frame="exclude").item() == pytest.approx(6.0)
    for rule in ("zeros", "exclude"):  # seen by none at all
        assert lift_features(maps[1:], cameras[1:], point, out_of_frame=rule).item() == 0.0


def test_depth_visibility_with_an_occluder():
    """A wall at y = 0 hides what is behind it from the camera in front, and the other way round."""
    cameras = Camera.look_at(torch.tensor([[0.0, -2.0, 0.0], [0.0, 2.0, 0.0]]), fov_degrees=40.0, size=64)
    maps = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    wall = torch.full((2, 64, 64), 2.0)
    points = torch.tensor([[0.0, -0.2, 0.0], [0.1, 0.2, 0.1], [0.0, 0.0, 0.2], [0.0, -0.02, 0.0]])

    def lift(visibility, **options):
        return lift_features(maps, cameras, points, visibility, **options)[:, 0].tolist()

    assert lift("all") == [3.0, 3.0, 3.0, 3.0]
    assert lift("depth", depth=wall) == [1.0, 5.0, 3.0, 3.0]  # within the tolerance of the wall: both
    assert lift("depth", depth=wall, depth_tolerance=0.01) == [1.0, 5.0, 3.0, 1.0]
    assert lift("depth", depth=torch.full((2, 8, 8), math.inf)) == [3.0] * 4
    assert lift("depth", depth=torch.full((2, 8, 8), 0.5)) == [3.0] * 4  # seen by none: all views
    half_open = wall.clone()
    half_open[:, :, 32:] = math.inf  # the right half of each picture has no wall
    assert lift("depth", depth=half_open)[1] == 3.0  # x > 0 is right in the picture from -y


def test_gradients_reach_maps_points_and_cameras():
    cameras = double(Camera.orbit(num_views=3, radius=2.0, fov_degrees=50.0, size=32))
    generator = torch.Generator().manual_seed(5)
    maps = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    points = (0.8 * torch.rand(5, 3, generator=generator, dtype=torch.float64) - 0.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, p: lift_features(m, cameras, p), (maps, points))
    pose = cameras.world_to_camera.clone().requires_grad_()
    moved = Camera(pose, cameras.intrinsics, cameras.width, cameras.height)
    lift_features(maps, moved, points).sum().backward()
    assert float(pose.grad.abs().max()) > 0


@pytest.mark.parametrize(("visibility", "out_of_frame"), OPTIONS)
def test_chunks_change_nothing(monkeypatch, visibility, out_of_frame):
    cameras = Camera.orbit(num_views=3, radius=1.0, fov_degrees=40.0, size=32)
    generator = torch.Generator().manual_seed(6)
    maps, points = torch.randn(3, 2, 4, 4, generator=generator), torch.rand(50, 3, generator=generator) - 0.5
    options = {"depth": torch.ones(3, 8, 8), "out_of_frame": out_of_frame}
    whole = lift_features(maps, cameras, points, visibility, **options)
    monkeypatch.setattr(implementation, "_CHUNK_SAMPLES", 21)  # 7 points at a time
    torch.testing.assert_close(lift_features(maps, cameras, points, visibility, **options), whole)
    assert lift_features(maps, cameras, points[:0], visibility, **options).shape == (0, 2)


@pytest.mark.parametrize("visibility", ["all", "depth"])
def test_memory_of_150_views_and_32768_voxels(visibility):
    """Under 2 GB with all inputs, which are 0.2 GB (`all` needs the most: 0.43 GB beyond them)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.is_file() and os.access(reset, os.W_OK)):
        pytest.skip("NO PEAK: this system does not tell a process's peak of memory")

    def megabytes(name):
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1]) / 1024

    cameras = Camera.orbit(num_views=150, radius=2.0, fov_degrees=40.0, size=512, elevation_degrees=20.0)
    points = torch.rand(32768, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    maps, depth = torch.ones(150, 16, 64, 64), torch.full((150, 512, 512), 2.0)
    reset.write_text("5")
    before = megabytes("VmRSS:")
    lifted = lift_features(maps, cameras, points, visibility, depth=depth)
    assert megabytes("VmHWM:") - before < 800
    assert lifted.shape == (32768, 16)


def test_half_precision_rounds_only_the_features():
    """Positions of half-precision maps are not rounded, under autocast neither."""
    cameras = Camera.orbit(num_views=4, radius=2.0, fov_degrees=40.0, size=512)
    generator = torch.Generator().manual_seed(7)
    maps = torch.randn(4, 3, 64, 64, generator=generator).half()
    points = 0.5 * torch.rand(40, 3, generator=generator)
    exact = lift_features(maps.double(), double(cameras), points.double())
    lifted = lift_features(maps, cameras, points)
    assert lifted.dtype == torch.float16
    torch.testing.assert_close(lifted.double(), exact, atol=2e-3, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(lift_features(maps.float(), cameras, points).double(), exact, atol=2e-4, rtol=0)


def test_voxel_centres():
    coords = torch.tensor([[0, 0, 0], [31, 15, 16]], dtype=torch.int32)
    expected = torch.tensor([[-31 / 64] * 3, [31 / 64, -1 / 64, 1 / 64]])
    assert torch.equal(voxel_centres(coords, 32), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_maps": torch.zeros(2, 1, 4, 4)}, r"got \(2, 1, 4, 4\) and 3 cameras"),
        ({"voxels": torch.zeros(5, 2)}, r"centres of voxels, float \[L, 3\], got torch.float32 \(5, 2\)"),
        ({"voxels": torch.zeros(5, 3, dtype=torch.int32)}, r"got torch.int32 \(5, 3\); voxel_centres\("),
        ({"visibility": "some"}, "visibility = 'some': expected 'all' or 'depth'"),
        ({"out_of_frame": "drop"}, "out_of_frame = 'drop': expected 'zeros' or 'exclude'"),
        ({"visibility": "depth"}, r"needs depth maps \[V=3, h, w\], got None"),
        ({"visibility": "depth", "depth": torch.zeros(2, 4, 4)}, r"needs depth maps .* got \(2, 4, 4\)"),
    ],
)
def test_errors(change, message):
    arguments = {
        "feature_maps": torch.zeros(3, 1, 4, 4),
        "cameras": Camera.orbit(num_views=3, size=32),
        "voxels": torch.zeros(5, 3),
    }
    with pytest.raises(ValueError, match=message):
        lift_features(**(arguments | change))

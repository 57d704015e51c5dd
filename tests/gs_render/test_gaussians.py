"""The container: shapes, values, similarity transforms with the harmonics, selection."""

import math

import jaxtyping
import pytest
import torch
from gs_render import Camera, Gaussians, render

FIELDS = ("means", "scales", "quaternions", "opacities", "sh")


@pytest.fixture
def _plain_errors():
    """Without the run-time shape checker of the test suite, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_plain_errors")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("means", torch.zeros(3, 2), r"means: expected shape \(3, 3\), got \(3, 2\)"),
        ("scales", torch.zeros(2, 3), r"scales: expected shape \(3, 3\), got \(2, 3\)"),
        ("opacities", torch.zeros(3, 1), r"opacities: expected shape \(3,\), got \(3, 1\)"),
        ("sh", torch.zeros(3, 5, 3), r"K one of 1, 4, 9, 16, got \(3, 5, 3\)"),
        ("sh", torch.zeros(3, 1, 3).double(), r"sh is torch.float64 on cpu, but means are torch.float32"),
    ],
)
def test_shapes_are_checked(make_gaussians, field, value, message):
    values = {name: getattr(make_gaussians(3), name) for name in FIELDS}
    with pytest.raises(ValueError, match=message):
        Gaussians(**(values | {field: value}))
    with pytest.raises(TypeError, match=f"{field}: expected a torch.Tensor, got list"):
        Gaussians(**(values | {field: []}))
    with pytest.raises(TypeError, match=f"{field}: expected a floating-point tensor, got torch.int64"):
        Gaussians(**(values | {field: values[field].long()}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("means", math.nan, r"means: 1 values are not finite, the first in row 2"),
        ("scales", math.inf, "scales: 1 values are not finite"),
        ("scales", -0.5, r"scales: expected values >= 0, got -0.5"),
        ("opacities", 1.5, r"opacities: expected values in \[0, 1\]"),
    ],
)
def test_validate_names_what_is_wrong(make_gaussians, field, value, message):
    scene = make_gaussians(5)
    getattr(scene, field)[2] = value if getattr(scene, field).ndim == 1 else torch.tensor([value, 1.0, 1.0])
    with pytest.raises(ValueError, match=message):
        scene.validate()


def test_validate_refuses_a_zero_quaternion(make_gaussians):
    scene = make_gaussians(5)
    scene.quaternions[3] = 0
    with pytest.raises(ValueError, match="row 3 is zero"):
        scene.validate()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_similarity_moves_the_picture_with_the_camera(make_gaussians, degree):
    """Moving object and camera alike leaves the picture alone, which needs the harmonics to turn along."""
    scene = make_gaussians(200, seed=degree, degree=degree).to(dtype=torch.float64)
    angle = torch.tensor([0.3, -0.8, 0.5, 0.4], dtype=torch.float64)
    shift, scale = torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64), 1.7
    moved = scene.transform(angle, shift, scale)
    rotation = Gaussians.from_rgb(*(torch.ones(1, n).double() for n in (3, 3)), angle[None], torch.ones(1).double(),
                                  torch.ones(1, 3).double()).transform(None).covariances  # fmt: skip
    assert rotation.shape == (1, 3, 3)
    camera = Camera.orbit(2, radius=2.0, size=48).to(dtype=torch.float64)
    from gs_render._rotation import quaternion_to_matrix

    turn = quaternion_to_matrix(angle)
    pose = camera.world_to_camera.clone()
    pose[:, :3, :3] = camera.world_to_camera[:, :3, :3] @ turn.T
    pose[:, :3, 3] = scale * camera.world_to_camera[:, :3, 3] - pose[:, :3, :3] @ shift
    before = render(scene, camera, backend="torch")
    after = render(moved, Camera(pose, camera.intrinsics, 48, 48), backend="torch")
    assert torch.allclose(before.color, after.color, atol=1e-9)
    assert torch.allclose(scale * before.depth, after.depth, atol=1e-9)


def test_transform_takes_matrices_and_refuses_others(make_gaussians):
    scene = make_gaussians(4, degree=1)
    quarter = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    by_matrix = scene.transform(quarter)
    by_quaternion = scene.transform([math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5)])
    assert torch.allclose(by_matrix.covariances, by_quaternion.covariances, atol=1e-6)
    assert torch.allclose(by_matrix.means[:, 0], -scene.means[:, 1], atol=1e-6)
    with pytest.raises(ValueError, match="not a proper rotation"):
        scene.transform([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="scale must be > 0, got 0"):
        scene.transform(scale=0.0)


def test_selection(make_gaussians):
    scene = make_gaussians(50)
    assert len(scene[10:20]) == 10
    assert len(scene[scene.opacities > 0.5]) == int((scene.opacities > 0.5).sum())
    assert torch.equal(scene[torch.tensor([3, 1])].means, scene.means[[3, 1]])
    with pytest.raises(TypeError, match=r"gaussians\[2:3\]"):
        scene[2]
    kept = scene.prune(min_opacity=0.3, max_scale=0.05)
    assert kept.opacities.min() >= 0.3
    assert kept.scales.max() <= 0.05
    box = scene.crop((-0.2, -0.2, 0.0), (0.2, 0.2, 0.5))
    assert 0 < len(box) < 50
    assert box.means[:, 2].min() >= 0


def test_concatenate_pads_harmonics(make_gaussians):
    low, high = make_gaussians(3), make_gaussians(4, degree=2)
    both = Gaussians.concatenate([low, high])
    assert (len(both), both.sh_degree) == (7, 2)
    assert not both.sh[:3, 1:].any()
    assert torch.equal(both.sh[3:], high.sh)
    with pytest.raises(ValueError, match="at least one"):
        Gaussians.concatenate([])


def test_colour_and_moves(make_gaussians):
    rgb = torch.tensor([[0.2, 0.5, 1.0]])
    scene = Gaussians.from_rgb(torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 4), torch.ones(1), rgb)
    assert torch.allclose(scene.rgb, rgb, atol=1e-6)
    assert make_gaussians(2).to(dtype=torch.float64).dtype == torch.float64
    same = make_gaussians(2)
    assert same.to("cpu") is same
    assert repr(same) == "Gaussians(2, sh_degree=0, torch.float32, cpu)"

"""The CPU backend against the plain PyTorch oracle, and the cases in which splatting goes wrong."""

import math
import os

import pytest
import torch
from gs_render import Camera, Gaussians, RenderOutput, backend_status, render, render_batch, use_backend
from gs_render._project import project
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FIELDS = ("means", "scales", "quaternions", "opacities", "sh")
MODES = ({"filter_2d": 0.3, "antialias": False}, {"filter_2d": 0.1, "antialias": True})
BACKENDS = ("cpu", "torch")


def one(mean=(0.0, 0.0, 0.0), scale=(0.1, 0.1, 0.1), opacity=0.9, rgb=(1.0, 0.5, 0.0)) -> Gaussians:
    rows = [torch.tensor([value]) for value in (mean, scale, (1.0, 0.0, 0.0, 0.0))]
    return Gaussians.from_rgb(*rows, torch.tensor([opacity]), torch.tensor([rgb]))


def objective(output, seed=0):
    """A scalar that weighs every output value differently."""
    weights = torch.randn((*output.color.shape[:3], 5), generator=torch.Generator().manual_seed(seed)).to(output.color)
    return (torch.cat([output.color, output.alpha, output.depth], dim=-1) * weights).sum()


@pytest.mark.parametrize("mode", MODES, ids=["classic", "antialias"])
@pytest.mark.parametrize("degree", [0, 3])
def test_cpu_equals_oracle_with_gradients(make_gaussians, leaves, mode, degree):
    scene = make_gaussians(300, seed=degree, degree=degree)
    cameras = Camera.orbit(2, radius=1.8, size=(72, 56))
    results = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        gaussians = leaves(scene, dtype)
        pose = cameras.world_to_camera.to(dtype).clone().requires_grad_()
        views = Camera(pose, cameras.intrinsics.to(dtype), 72, 56)
        output = render(gaussians, views, (0.1, 0.6, 0.9), backend, **mode)
        inputs = [getattr(gaussians, name) for name in FIELDS] + [pose]
        results.append((output, torch.autograd.grad(objective(output), inputs)))
    (fast, fast_gradients), (slow, slow_gradients) = results
    for name in ("color", "alpha", "depth"):
        assert (getattr(fast, name) - getattr(slow, name)).abs().max() < 1e-4, name
    for name, ours, exact in zip((*FIELDS, "pose"), fast_gradients, slow_gradients, strict=True):
        assert (ours - exact).norm() <= 1e-3 * exact.norm(), name


def knife_edge(scene, camera, options) -> torch.Tensor:
    """[H, W] pixels in which float32 and float64 may decide a threshold differently: an alpha near 1/255 or 0.999, or a
    transmittance near 1e-4, where the picture itself jumps."""
    double = camera.to(dtype=torch.float64)
    size = (camera.width, camera.height)
    pose, intrinsics = double.world_to_camera[0], double.intrinsics[0]
    wide = scene.to(dtype=torch.float64)
    seen = project(wide, pose, intrinsics, size, options["filter_2d"], options["antialias"])
    order = torch.argsort(seen.features[:, 3], stable=True)
    x, y = torch.arange(size[0]) + 0.5, torch.arange(size[1])[:, None] + 0.5
    edge = torch.zeros(size[1], size[0], dtype=torch.bool)
    transmittance = torch.ones(size[1], size[0], dtype=torch.float64)
    for index in order[seen.visible[order]]:
        dx, dy = x - seen.means[index, 0], y - seen.means[index, 1]
        xx, xy, yy = seen.conics[index]
        alpha = seen.opacities[index] * torch.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)
        edge |= ((alpha * 255 - 1).abs() < 1e-3) | ((alpha / 0.999 - 1).abs() < 1e-3)
        transmittance *= 1 - torch.where(alpha >= 1 / 255, alpha.clamp_max(0.999), 0.0)
        edge |= (transmittance / 1e-4 - 1).abs() < 1e-2
    return edge


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 60),
    degree=st.integers(0, 3),
    smallest=st.floats(1e-4, 0.1),
    spread=st.floats(1.0, 30.0),
    radius=st.floats(0.3, 4.0),
    elevation=st.floats(-90.0, 90.0),
    mode=st.sampled_from(MODES),
)
def test_cpu_equals_oracle_on_any_scene(make_gaussians, seed, count, degree, smallest, spread, radius, elevation, mode):
    """Values to 1e-4 and gradients to 1e-3 of their norm, from needles to blobs, cameras inside the object included."""
    scene = make_gaussians(count, seed, degree, (smallest, min(smallest * spread, 0.5)))
    camera = Camera.orbit(1, radius, size=(40, 36), elevation_degrees=elevation)
    calm = ~knife_edge(scene, camera, mode)[None, :, :, None]
    results = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        values = [getattr(scene, name).detach().to(dtype).clone().requires_grad_() for name in FIELDS]
        pose = camera.world_to_camera.to(dtype).clone().requires_grad_()
        views = Camera(pose, camera.intrinsics.to(dtype), 40, 36)
        output = render(Gaussians(*values), views, 0.4, backend, **mode)
        kept = RenderOutput(output.color * calm, output.alpha * calm, torch.zeros_like(output.depth))
        results.append((output, torch.autograd.grad(objective(kept, seed), [*values, pose])))
    (fast, fast_gradients), (slow, slow_gradients) = results
    assert ((fast.color - slow.color).abs() * calm).max() < 1e-4
    assert ((fast.alpha - slow.alpha).abs() * calm).max() < 1e-4
    seen = calm & (slow.alpha > 0.01)
    assert ((fast.depth - slow.depth).abs() * seen).max() < 1e-4 * max(1.0, radius)
    for name, ours, exact in zip((*FIELDS, "pose"), fast_gradients, slow_gradients, strict=True):
        assert (ours - exact).norm() <= 1e-3 * exact.norm() + 1e-4, name


def test_oracle_gradients_are_right(make_gaussians, leaves):
    """Finite differences in float64. A wide blur keeps every alpha away from the cut-off, where the image jumps."""
    gaussians = leaves(make_gaussians(4, seed=3, degree=1, scale=(0.5, 0.9)), torch.float64)
    cameras = Camera.orbit(1, radius=3.0, size=6).to(dtype=torch.float64)

    def draw(means, scales, quaternions, opacities, sh, pose):
        views = Camera(pose, cameras.intrinsics, 6, 6)
        output = render(Gaussians(means, scales, quaternions, opacities, sh), views, 0.3, "torch", antialias=True)
        return output.color, output.alpha, output.depth

    pose = cameras.world_to_camera.clone().requires_grad_()
    assert torch.autograd.gradcheck(draw, (*(getattr(gaussians, name) for name in FIELDS), pose), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gaussians_give_the_background(backend):
    output = render(Gaussians.empty(), Camera.orbit(3, size=20), (0.2, 0.4, 0.6), backend)
    assert torch.allclose(output.color, torch.tensor([0.2, 0.4, 0.6]).expand(3, 20, 20, 3))
    assert not output.alpha.any()
    assert not output.depth.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "gaussian",
    [
        one(mean=(0.0, -5.0, 0.0)),  # behind the camera
        one(mean=(0.0, -2.0, 0.0)),  # at the camera
        one(mean=(50.0, 0.0, 0.0)),  # out of the picture
        one(opacity=0.0),
        one(opacity=1 / 256),
    ],
)
def test_what_cannot_be_seen_leaves_no_trace(backend, gaussian):
    camera = Camera.orbit(1, radius=2.0, elevation_degrees=0.0, size=32)
    output = render(gaussian, camera, 0.5, backend)
    assert torch.equal(output.color, torch.full((1, 32, 32, 3), 0.5))
    assert not output.alpha.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixel_value_in_closed_form(backend):
    """The centre pixel of an isotropic Gaussian on the axis, odd image size: distance to the mean is 0."""
    camera = Camera.orbit(1, radius=2.0, elevation_degrees=0.0, size=33, fov_degrees=40.0)
    output = render(one(opacity=0.6), camera, 0.25, backend)
    expected = 0.6 * torch.tensor([1.0, 0.5, 0.0]) + 0.4 * 0.25
    assert torch.allclose(output.color[0, 16, 16], expected, atol=1e-5)
    assert math.isclose(output.alpha[0, 16, 16, 0], 0.6, abs_tol=1e-5)
    assert math.isclose(output.depth[0, 16, 16, 0], 2.0, abs_tol=1e-5)
    focal = camera.intrinsics[0, 0, 0].item()
    variance = (0.1 * focal / 2) ** 2 + 0.3
    assert math.isclose(output.alpha[0, 16, 20, 0], 0.6 * math.exp(-8 / variance), abs_tol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sub_pixel_gaussian_needs_antialias_to_keep_its_energy(backend):
    camera = Camera.orbit(1, radius=2.0, elevation_degrees=0.0, size=33)
    tiny = one(scale=(1e-3, 1e-3, 1e-3), opacity=0.99)
    plain = render(tiny, camera, 0.0, backend).alpha.sum()
    fair = render(tiny, camera, 0.0, backend, antialias=True).alpha.sum()
    focal = camera.intrinsics[0, 0, 0].item()
    area = 2 * math.pi * (1e-3 * focal / 2) ** 2 * 0.99
    assert plain > 20 * area
    assert fair < 1.5 * area


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_area_and_full_screen(backend, leaves):
    camera = Camera.orbit(1, radius=2.0, size=40)
    flat = leaves(Gaussians.concatenate([one(scale=(0.0, 0.0, 0.0)), one(scale=(50.0, 50.0, 50.0), opacity=0.5)]))
    for options in ({}, {"antialias": True}, {"filter_2d": 0.0}, {"filter_2d": 0.0, "antialias": True}):
        output = render(flat, camera, 0.0, backend, **options)
        assert torch.isfinite(output.color).all()
        assert output.alpha.min() > 0.49
        gradients = torch.autograd.grad(objective(output), [getattr(flat, name) for name in FIELDS])
        for name, gradient in zip(FIELDS, gradients, strict=True):
            assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearer_one_hides_the_farther(backend):
    wall = {"scale": (0.3, 0.3, 0.3), "opacity": 1.0}
    red, blue = one((0.0, -0.5, 0.0), rgb=(1.0, 0.0, 0.0), **wall), one((0.0, 0.5, 0.0), rgb=(0.0, 0.0, 1.0), **wall)
    camera = Camera.orbit(1, elevation_degrees=0.0, size=17)
    for scene in ([red, blue], [blue, red]):
        center = render(Gaussians.concatenate(scene), camera, 0.0, backend).color[0, 8, 8]
        assert center[0] > 0.98
        assert center[2] < 0.01


def test_batch_equals_single_calls(make_gaussians):
    objects = [make_gaussians(count, seed=count) for count in (20, 0, 35)]
    cameras = Camera.orbit(6, size=24)
    ground = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    together = render_batch(objects, cameras, ground)
    for index, item in enumerate(objects):
        own = slice(2 * index, 2 * index + 2)
        alone = render(item, cameras[own], ground[own])
        assert torch.equal(together.color[own], alone.color)
        assert torch.equal(together.depth[own], alone.depth)
    with pytest.raises(ValueError, match="same number of cameras"):
        render_batch(objects, cameras[:5])


def test_choice_of_backend(make_gaussians):
    scene, camera = make_gaussians(5), Camera.orbit(1, size=16)
    assert backend_status()["torch"] is None
    with pytest.raises(ValueError, match=r"unknown backend 'metal'.*gsplat"):
        render(scene, camera, backend="metal")
    with use_backend("torch"):
        assert torch.equal(render(scene, camera).color, render(scene, camera, backend="torch").color)
    if backend_status()["gsplat"] is not None:
        with pytest.raises(RuntimeError, match="gsplat"):
            render(scene, camera, backend="gsplat")
    assert render(scene.to(dtype=torch.float64), camera).color.dtype == torch.float64


def test_background_of_wrong_shape_is_refused(make_gaussians):
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        render(make_gaussians(3), Camera.orbit(2, size=8), torch.zeros(4, 3))


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 33), (100, 3)])
def test_any_image_size(make_gaussians, size):
    scene, camera = make_gaussians(50), Camera.orbit(1, size=size)
    fast, slow = render(scene, camera, backend="cpu"), render(scene, camera, backend="torch")
    assert fast.color.shape == (1, size[1], size[0], 3)
    assert (fast.color - slow.color).abs().max() < 1e-4


def test_a_forked_child_can_render(make_gaussians):
    """Data loaders fork after the parent has drawn; threads of the parent do not exist in the child.

    The picture is small enough for PyTorch to use no OpenMP of its own, which would not survive the fork.
    """
    scene, camera = make_gaussians(1000), Camera.orbit(1, size=64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = render(scene, camera, backend="cpu").color
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        same = torch.equal(render(scene, camera, backend="cpu").color, expected)
        os._exit(0 if same else 1)
    torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_gradients_do_not_depend_on_threads(make_gaussians, leaves):
    camera, gradients = Camera.orbit(1, size=96), []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        scene = leaves(make_gaussians(500, degree=1))
        objective(render(scene, camera, backend="cpu")).backward()
        gradients.append(scene.means.grad)
    torch.set_num_threads(before)
    assert torch.equal(*gradients)


def test_stacking_pads_every_field_as_the_renderer_expects():
    """gsplat gets one tensor a field; padding is invisible (opacity 0) and valid (unit scale and quaternion)."""
    from gs_render._backends.gsplat import stack_padded

    generator = torch.Generator().manual_seed(0)

    def draw(count):
        shapes = ((3,), (3,), (4,), (), (1, 3))
        return Gaussians(*(torch.rand(count, *shape, generator=generator) for shape in shapes))

    objects = [draw(3), draw(0), draw(7)]
    filler = {"means": 0.0, "scales": 1.0, "quaternions": 1.0, "opacities": 0.0, "sh": 0.0}
    stacked = stack_padded(objects)
    for name, value in filler.items():
        expected = torch.nn.utils.rnn.pad_sequence([getattr(item, name) for item in objects], True, value)
        assert torch.equal(stacked[name], expected)

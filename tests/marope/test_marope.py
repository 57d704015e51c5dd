"""Properties that make MARoPE a rotary embedding one can trust, against oracles written independently of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marope import AxialRoPE, MARoPE, apply_rotary, equal_axes, norm_rotary, ntk_theta, rotary_table

SIGNED = ["+x", "-x", "+y", "-y", "+z", "-z"]
ORIENTATIONS = [
    (plane, rows, columns)
    for plane in SIGNED
    for rows in SIGNED
    for columns in SIGNED
    if len({plane[1], rows[1], columns[1]}) == 3
]
SCALINGS = [None, ("linear", 2.0), ("linear", (1.0, 2.0, 4.0)), ("ntk", 2.0), ("ntk", (2.0, 1.0, 3.0))]


def complex_oracle(x, positions, axes_dim, theta):
    """Interleaved rotation as multiplication by a unit complex128 number, one channel pair at a time."""
    out = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()).clone()
    bases = theta if isinstance(theta, tuple) else (theta,) * len(axes_dim)
    pair = 0
    for axis, (dim, base) in enumerate(zip(axes_dim, bases, strict=True)):
        for i in range(dim // 2):
            angle = positions[..., axis].double() * base ** (-2 * i / dim)
            out[..., pair] *= torch.polar(torch.ones_like(angle), angle)[..., None]
            pair += 1
    return torch.view_as_real(out).flatten(-2)


def random_qk(length, heads, head_dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, heads, head_dim, generator=generator).to(dtype) for _ in range(2))


@settings(max_examples=40, deadline=None)
@given(
    axes=st.lists(st.integers(1, 6).map(lambda n: 2 * n), min_size=1, max_size=4),
    spare=st.integers(0, 3),
    theta=st.sampled_from([10.0, 100.0, 10000.0]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_complex128_oracle_for_any_axes(axes, spare, theta, seed):
    rope = AxialRoPE(sum(axes) + 2 * spare, axes, theta=theta)
    q, k = random_qk(9, 2, rope.head_dim, seed)
    positions = torch.randint(-70, 70, (9, len(axes)), generator=torch.Generator().manual_seed(seed))
    for got, x in zip(rope(q, k, positions), (q, k), strict=True):
        torch.testing.assert_close(got.double(), complex_oracle(x, positions, axes, theta), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("scaling", SCALINGS[1:])
def test_scaling_equals_the_oracle_on_scaled_positions_or_bases(scaling):
    axes, theta = (16, 24, 22), (10000.0, 500.0, 100.0)
    rope = AxialRoPE(64, axes, theta=theta, scaling=scaling)
    q, k = random_qk(30, 2, 64)
    positions = torch.randint(-9, 70, (30, 3), generator=torch.Generator().manual_seed(0))
    method, factors = scaling[0], torch.tensor(scaling[1], dtype=torch.float64).expand(3)
    if method == "linear":
        expected = complex_oracle(q, positions / factors, axes, theta)
    else:
        bases = tuple(ntk_theta(*each) for each in zip(theta, factors.tolist(), axes, strict=True))
        expected = complex_oracle(q, positions, axes, bases)
    torch.testing.assert_close(rope(q, k, positions)[0].double(), expected, atol=2e-6, rtol=2e-6)


@settings(max_examples=25, deadline=None)
@given(
    shift=st.tuples(*[st.integers(-40, 40)] * 3),
    interleaved=st.booleans(),
    theta=st.sampled_from([50.0, 10000.0, (50.0, 10000.0, 300.0)]),
    scaling=st.sampled_from(SCALINGS),
    seed=st.integers(0, 2**16),
)
def test_attention_scores_depend_on_relative_positions_only(shift, interleaved, theta, scaling, seed):
    rope = MARoPE(head_dim=64, grid_size=16, interleaved=interleaved, theta=theta, scaling=scaling)
    q, k = random_qk(20, 3, 64, seed)
    positions = rope.volume(torch.randint(0, 16, (20, 3), generator=torch.Generator().manual_seed(seed)))

    def scores(at):
        a, b = rope(q, k, at)
        return torch.einsum("ihd,jhd->hij", a, b)

    torch.testing.assert_close(scores(positions), scores(positions + torch.tensor(shift)), atol=3e-5, rtol=1e-5)


def test_scores_do_change_with_relative_position():
    rope = MARoPE(head_dim=64, grid_size=16)
    q, k = random_qk(1, 1, 64)
    near, far = (rope.table(torch.tensor([[x, 0.0, 0.0]])) for x in (1.0, 3.0))
    base = rope.table(torch.zeros(1, 3))
    rotated_q = apply_rotary(q, base)
    assert (rotated_q * apply_rotary(k, near)).sum() != (rotated_q * apply_rotary(k, far)).sum()


@settings(max_examples=25, deadline=None)
@given(interleaved=st.booleans(), head_dim=st.integers(3, 40).map(lambda n: 2 * n), seed=st.integers(0, 2**16))
def test_norms_are_kept(interleaved, head_dim, seed):
    rope = MARoPE(head_dim=head_dim, grid_size=32, interleaved=interleaved)
    q, k = random_qk(30, 2, head_dim, seed)
    positions = rope.volume(torch.randint(0, 32, (30, 3), generator=torch.Generator().manual_seed(seed)))
    for got, x in zip(rope(q, k, positions), (q, k), strict=True):
        torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    axes=st.sampled_from(ORIENTATIONS),
    grid_size=st.integers(1, 8),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    images=st.integers(1, 3),
    extent=st.sampled_from(["index", "grid"]),
    scaling=st.sampled_from(SCALINGS),
)
def test_volume_and_planes_never_share_a_position(axes, grid_size, size, images, extent, scaling):
    rope = MARoPE(64, grid_size, plane_axis=axes[0], orientation=axes[1:], plane_extent=extent, scaling=scaling)
    steps = torch.arange(grid_size)
    volume = rope.volume(torch.cartesian_prod(steps, steps, steps).reshape(-1, 3))
    everything = torch.cat([volume, *(rope.plane(*size, index=m) for m in range(images))])
    assert len(everything.unique(dim=0)) == len(everything) == grid_size**3 + images * size[0] * size[1]
    angles = torch.cat(rope.table(everything), dim=-1)
    assert len(angles.unique(dim=0)) == len(everything), "different positions are different rotations"


def test_default_plane_is_the_papers():
    rope = MARoPE(head_dim=64, grid_size=4)
    positions = rope.plane(2, 3)
    assert positions.tolist() == [[i, j, 4] for i in range(2) for j in range(3)]
    assert rope.plane(2, 3, index=2)[:, 2].tolist() == [6.0] * 6


def test_plane_of_a_camera_that_looks_from_minus_y():
    rope = MARoPE(head_dim=64, grid_size=4, plane_axis="-y", orientation=("-z", "+x"))
    positions = rope.plane(4, 4, index=1).reshape(4, 4, 3)
    assert positions[0, 0].tolist() == [0, -2, 3], "the top left patch is at the top, on the side of low x"
    assert positions[3, 1].tolist() == [1, -2, 0]


def test_grid_extent_centres_every_patch_over_the_voxels_it_covers():
    rope = MARoPE(64, 8, plane_axis="-y", orientation=("-z", "+x"), plane_extent="grid")
    positions = rope.plane(16, 4).reshape(16, 4, 3)
    assert positions[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert positions[:3, 0, 2].tolist() == [7.25, 6.75, 6.25]
    same = MARoPE(64, 8, plane_extent="index").plane(8, 8)
    assert torch.equal(MARoPE(64, 8, plane_extent="grid").plane(8, 8), same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_get_float32_angles(dtype):
    rope = MARoPE(head_dim=64, grid_size=1024)
    q, k = random_qk(1024, 1, 64, dtype=dtype)
    positions = rope.volume(torch.arange(1024)[:, None].expand(-1, 3))
    table = rope.table(positions.to(torch.float32))
    assert table.cos.dtype == table.sin.dtype == torch.float32
    got, _ = rope(q, k, positions)
    assert got.dtype == dtype
    exact = complex_oracle(q, positions, rope.axes_dim, rope.theta)
    assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps * q.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_normalised_low_precision_is_rounded_once(autocast):
    rope = MARoPE(head_dim=64, grid_size=16)
    q, k = random_qk(200, 3, 64, dtype=torch.bfloat16)
    positions = rope.volume(torch.randint(0, 16, (200, 3), generator=torch.Generator().manual_seed(0)))
    weights = random_qk(1, 1, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = norm_rotary(q, k, rope.table(positions), *(w.view(64) for w in weights))
    for got, x, w in zip(out, (q, k), weights, strict=True):
        normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * w.double()
        exact = complex_oracle(normed, positions, rope.axes_dim, rope.theta)
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
def test_autocast_changes_nothing(dtype, interleaved):
    rope = MARoPE(head_dim=64, grid_size=16, interleaved=interleaved)
    q, k = random_qk(10, 2, 64, dtype=dtype)
    outside = rope(q, k, rope.plane(2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = rope.table(rope.plane(2, 5))
        inside = rope(q, k, rope.plane(2, 5))
    assert table.cos.dtype == torch.float32
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(inside, outside, strict=True))


def test_half_split_pairs_are_the_interleaved_ones_in_another_order():
    shape = {"head_dim": 32, "axes_dim": (12, 8, 8)}
    q, k = random_qk(7, 2, 32)
    positions = torch.randint(0, 30, (7, 3))
    split = MARoPE(**shape, interleaved=False)(q, k, positions)
    order = torch.arange(32).reshape(2, 16).T.flatten()  # (0, 16, 1, 17, ...): half pairs made neighbours
    adjacent = MARoPE(**shape)(q[..., order], k[..., order], positions)
    for a, b in zip(split, adjacent, strict=True):
        torch.testing.assert_close(a[..., order], b)


def test_padded_and_packed_layouts_agree():
    rope = MARoPE(head_dim=24, grid_size=8)
    q, k = random_qk(6, 2, 24)
    positions = rope.plane(2, 3)
    packed = rope(q, k, positions)
    padded = rope(q[None].expand(3, -1, -1, -1), k[None].expand(3, -1, -1, -1), positions)
    per_object = rope(q[None], k[None], positions[None])
    for a, b, c in zip(packed, padded, per_object, strict=True):
        assert torch.equal(b, a.expand(3, -1, -1, -1))
        assert torch.equal(c[0], a)


def test_any_memory_layout_is_accepted():
    rope = MARoPE(head_dim=12, grid_size=8)
    table = rope.table(rope.plane(2, 2))
    x = torch.randn(4, 2, 12)
    expected = apply_rotary(x, table)
    odd_offset = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    odd_stride = torch.nn.functional.pad(x, (0, 1))[..., :12]
    for same in (odd_offset, odd_stride, x.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        assert torch.equal(apply_rotary(same, table), expected)


def test_gradients_are_the_transposed_rotation():
    rope = MARoPE(head_dim=12, grid_size=8)
    table = rope.table(rope.plane(2, 2))
    x = torch.randn(4, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: apply_rotary(y, table), (x,), atol=1e-6)
    gradient = torch.randn_like(x)
    apply_rotary(x, table).backward(gradient)
    back = apply_rotary(gradient, type(table)(table.cos, -table.sin))
    torch.testing.assert_close(x.grad, back)


def test_nothing_to_save_and_nothing_remembered():
    rope = MARoPE(head_dim=64, grid_size=8, theta=100.0)
    q, k = random_qk(4, 1, 64)
    before = rope(q, k, rope.plane(2, 2))
    rope(q.bfloat16(), k.bfloat16(), rope.plane(2, 2).bfloat16())
    assert not rope.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before, rope(q, k, rope.plane(2, 2)), strict=True))
    assert not torch.equal(before[0], MARoPE(head_dim=64, grid_size=8, theta=10.0)(q, k, rope.plane(2, 2))[0])


class Rotate(torch.nn.Module):
    """The functions as a module, which is what `torch.export` takes."""

    def __init__(self, normalise):
        super().__init__()
        self.normalise = normalise

    def forward(self, q, k, positions):
        table = rotary_table(positions, 24, (8, 8, 8), scaling=("ntk", 2.0))
        if self.normalise:
            weight = torch.linspace(0.5, 1.5, 24)
            return norm_rotary(q, k, table, weight, weight)
        return apply_rotary(q, table), apply_rotary(k, table)


ROPE = pytest.param(MARoPE(24, 8), id="MARoPE")
HALF_SPLIT = pytest.param(MARoPE(24, 8, interleaved=False), id="MARoPE half-split")
FUNCTION = pytest.param(Rotate(False), id="apply_rotary")
NORMED = pytest.param(Rotate(True), id="norm_rotary")


@pytest.mark.parametrize("rope", [ROPE, HALF_SPLIT, FUNCTION, NORMED])
def test_export_keeps_the_result_for_any_number_of_tokens(rope):
    length = torch.export.Dim("length", min=2)
    inputs = (*random_qk(6, 2, 24), MARoPE(24, 8).plane(2, 3))
    exported = torch.export.export(rope, inputs, dynamic_shapes=({0: length},) * 3).module()
    for case in (inputs, (*random_qk(35, 2, 24, seed=1), MARoPE(24, 8).plane(5, 7))):
        for a, b in zip(exported(*case), rope(*case), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("rope", "autocast"),
    [(*ROPE.values, False), (*HALF_SPLIT.values, True), (*FUNCTION.values, True), (*NORMED.values, True)],
)
def test_compiles_as_one_graph_with_gradients(rope, autocast):
    """Through AOTAutograd, which traces the backward too; kernels are the business of whatever compiles the graph."""
    torch.compiler.reset()
    compiled = torch.compile(rope, backend="aot_eager", fullgraph=True)
    positions = MARoPE(24, 8).plane(2, 3)
    results = []
    for function in (rope, compiled):
        q, k = (x.bfloat16().requires_grad_() for x in random_qk(6, 2, 24))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = function(q, k, positions)
        weights = random_qk(6, 2, 24, seed=1)
        sum((a.float() * w).sum() for a, w in zip(out, weights, strict=True)).backward()
        results.append((*out, q.grad, k.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=0, rtol=2**-7)


def test_planes_and_volumes_are_traced_too():
    rope = MARoPE(24, 8, plane_axis="-y", orientation=("-z", "+x"), plane_extent="grid")
    q, k = random_qk(8, 2, 24)

    def rotated(queries, keys, voxels):
        return rope(queries, keys, torch.cat([rope.plane(2, 3), rope.volume(voxels)]))

    voxels = torch.tensor([[1, 2, 3], [7, 0, 4]])
    compiled = torch.compile(rotated, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(q, k, voxels), rotated(q, k, voxels), strict=True):
        torch.testing.assert_close(a, b)


def test_ntk_theta_stretches_the_longest_wavelength_only():
    theta = ntk_theta(10000.0, 2.0, 20)
    longest = -18 / 20
    assert math.isclose(theta**longest, 10000.0**longest / 2, rel_tol=1e-9)
    assert ntk_theta(10000.0, 2.0, 2) == 10000.0


def test_linear_scaling_meets_the_trained_positions_again():
    trained, doubled = MARoPE(64, 16), MARoPE(64, 32, scaling=("linear", 2.0))
    voxels = torch.randint(0, 16, (40, 3))
    for got, expected in (
        (doubled.table(doubled.volume(2 * voxels)), trained.table(trained.volume(voxels))),
        (doubled.table(doubled.plane(32, 32).view(32, 32, 3)[::2, ::2]), trained.table(trained.plane(16, 16))),
    ):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.flatten(0, -2), b)


def test_ntk_scaling_keeps_neighbours_and_stretches_the_longest_wavelength_of_every_axis():
    axes = (16, 24, 20)
    trained, doubled = (MARoPE(64, 16, axes_dim=axes, scaling=s) for s in (None, ("ntk", 2.0)))
    near = trained.volume(torch.tensor([[1, 2, 3]]))
    one, other = (rope.table(positions) for rope, positions in ((trained, near), (doubled, near)))
    twice = doubled.table(2 * near)
    last = -1
    for dim in axes:
        first, last = last + 1, last + dim // 2
        assert torch.equal(one.sin[0, first], other.sin[0, first])
        torch.testing.assert_close(one.sin[0, last], twice.sin[0, last])


def test_an_image_of_more_patches_spans_the_same_plane():
    rope = MARoPE(64, 32, plane_extent="grid")
    small, large = rope.plane(32, 32).view(32, 32, 3), rope.plane(64, 64).view(32, 2, 32, 2, 3)
    torch.testing.assert_close(large.mean(dim=(1, 3)), small)


def test_equal_axes_leaves_the_rest_unrotated():
    assert equal_axes(64) == (20, 20, 20)
    table = rotary_table(torch.tensor([[5, 6, 7]]), 64, equal_axes(64))
    assert table.cos.shape == (1, 32)
    assert table.cos[0, 30:].tolist() == [1, 1]
    assert table.sin[0, 30:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MARoPE(head_dim=63), "even"),
        (lambda: MARoPE(head_dim=4), "too small for 3 axes"),
        (lambda: MARoPE(axes_dim=(32, 32)), "one share for each of x, y and z"),
        (lambda: MARoPE(axes_dim=(32, 32, 32)), "takes 96 channels"),
        (lambda: MARoPE(axes_dim=(21, 21, 22)), "even numbers"),
        (lambda: MARoPE(grid_size=0), "at least 1"),
        (lambda: MARoPE(plane_axis="w"), "got 'w'"),
        (lambda: MARoPE(plane_axis="z", orientation=("+x", "-z")), "three different axes"),
        (lambda: MARoPE(plane_extent="fit"), "plane_extent"),
        (lambda: MARoPE(theta=0), "theta must be positive"),
        (lambda: MARoPE(theta=(1e4, 1e4)), "one for each of 3 axes"),
        (lambda: MARoPE(scaling=("yarn", 2.0)), r"got \('yarn', 2.0\)"),
        (lambda: MARoPE(scaling=2.0), "got 2.0"),
        (lambda: MARoPE(scaling=("ntk", 0.0)), "the factor of scaling must be positive"),
        (lambda: MARoPE().plane(0, 4), "h >= 1"),
        (lambda: MARoPE().volume(torch.zeros(4, 4)), r"\[L, 3\]"),
        (lambda: MARoPE().table(torch.zeros(4, 2)), "one column for each of the 3 axes"),
        (lambda: MARoPE()(torch.zeros(5, 1, 64), torch.zeros(5, 1, 64), torch.zeros(4, 3)), "does not fit a table"),
        (lambda: equal_axes(64, 0), "at least one axis"),
        (lambda: ntk_theta(1e4, -1.0, 8), "must be positive"),
    ],
)
def test_errors_say_what_came_and_what_is_expected(build, message):
    with pytest.raises(ValueError, match=message):
        build()

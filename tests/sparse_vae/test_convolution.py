"""Convolutions and pooling against dense convolutions in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from sparse_vae import (
    SparseConv3d,
    SparseDownConv3d,
    SparseTensor,
    SparseUpConv3d,
    Topology,
    convolution_backend,
    convolution_backends,
    downsample,
    upsample,
)
from sparse_vae import _conv as conv
from sparse_vae import _kernel_map as kernel_map
from sparse_vae._conv import _neighbour_map, _octant_map


def to_dense(x: SparseTensor) -> torch.Tensor:
    """[B, C, N, N, N] with zeros where no voxel is."""
    topology = x.topology
    b, i, j, k = topology.coords.long().unbind(dim=1)
    dense = x.features.new_zeros(topology.batch_size, *[topology.grid_size] * 3, x.num_channels)
    return dense.index_put((b, i, j, k), x.features).permute(0, 4, 1, 2, 3)


def at_voxels(dense: torch.Tensor, topology: Topology) -> torch.Tensor:
    b, i, j, k = topology.coords.long().unbind(dim=1)
    return dense.permute(0, 2, 3, 4, 1)[b, i, j, k]


def scene(objects, channels, grid_size=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    topology, _ = Topology.from_coords(objects, grid_size)
    features = torch.randn(len(topology), channels, generator=generator, dtype=torch.float64).to(dtype)
    return SparseTensor(features.requires_grad_(), topology)


def assert_same_with_gradients(actual, expected, inputs):
    """Outputs and gradients with respect to all inputs agree."""
    torch.testing.assert_close(actual, expected)
    weight = torch.linspace(-1, 1, actual.numel(), dtype=actual.dtype).view(actual.shape)
    for a, b in zip(
        torch.autograd.grad((actual * weight).sum(), inputs, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_submanifold_convolution_equals_a_dense_one(objects, kernel_size):
    x = scene(objects, 4)
    layer = SparseConv3d(4, 6, kernel_size).double()
    dense = F.conv3d(to_dense(x), layer.weight.permute(0, 4, 1, 2, 3), layer.bias, padding=kernel_size // 2)
    inputs = (x.features, layer.weight, layer.bias)
    assert_same_with_gradients(layer(x).features, at_voxels(dense, x.topology), inputs)


def test_down_convolution_equals_a_dense_one(objects):
    x = scene(objects, 4)
    layer = SparseDownConv3d(4, 6).double()
    out = layer(x)
    assert out.topology is x.topology.coarser().topology
    dense = F.conv3d(to_dense(x), layer.weight.permute(0, 4, 1, 2, 3), layer.bias, stride=2)
    assert_same_with_gradients(out.features, at_voxels(dense, out.topology), (x.features, layer.weight, layer.bias))


def test_up_convolution_equals_a_dense_one(objects):
    fine = Topology.from_coords(objects, 16)[0]
    coarse = fine.coarser().topology
    x = SparseTensor(torch.randn(len(coarse), 4, dtype=torch.float64, requires_grad=True), coarse)
    layer = SparseUpConv3d(4, 6).double()
    out = layer(x, fine)
    assert out.topology is fine
    dense = F.conv_transpose3d(to_dense(x), layer.weight.permute(4, 0, 1, 2, 3), layer.bias, stride=2)
    assert_same_with_gradients(out.features, at_voxels(dense, fine), (x.features, layer.weight, layer.bias))


@pytest.mark.parametrize("budget", [1, 2**29])
def test_gathered_products_equal_pairwise_ones(objects, budget, monkeypatch):
    """The CUDA formulation, run on the CPU, in one piece and in several."""
    monkeypatch.setattr(kernel_map, "GATHER_BUDGET", budget)
    topology = Topology.from_coords([*objects, *objects, *objects], 16)[0]
    assert len(topology) > 1024
    for maps, out_rows in ((_neighbour_map(topology, 3), len(topology)), (_octant_map(topology), None)):
        x = torch.randn(len(topology), 5, dtype=torch.float64)
        weight = torch.randn(7, len(maps.sources), 5, dtype=torch.float64)
        expected = kernel_map._forward(x, weight, maps)
        torch.testing.assert_close(kernel_map._gathered_forward(x, weight, maps), expected)
        assert out_rows is None or len(expected) == out_rows
        grad = torch.randn_like(expected)
        torch.testing.assert_close(
            kernel_map._gathered_weight_gradient(x, grad, maps).double(),
            kernel_map._weight_gradient(x, grad, maps),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("mode", ["mean", "sum", "max", "trellis"])
def test_pooling(objects, mode):
    x = scene(objects, 4)
    pooled = downsample(x, mode)
    coarse, parent, _ = x.topology.coarser()
    rows = []
    for number in range(len(coarse)):
        members = x.features[parent == number]
        rows.append(
            {
                "mean": lambda m: m.mean(0),
                "sum": lambda m: m.sum(0),
                "max": lambda m: m.amax(0),
                "trellis": lambda m: m.sum(0) / (len(m) + 1),
            }[mode](members)
        )
    assert pooled.topology is coarse
    assert_same_with_gradients(pooled.features, torch.stack(rows), (x.features,))


def test_upsample_returns_to_the_fine_topology(objects):
    x = scene(objects, 4)
    pooled = downsample(x)
    up = upsample(pooled, x.topology)
    assert up.topology is x.topology
    assert_same_with_gradients(up.features, pooled.features[x.topology.coarser().parent], (x.features,))
    with pytest.raises(ValueError, match="coarse level"):
        upsample(x, x.topology)
    with pytest.raises((ValueError, TypeCheckError)):
        downsample(x, "median")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 215), unique=True, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_permuting_voxels_permutes_the_output(cells, random):
    cells = torch.tensor(cells)
    coords = torch.stack([cells // 36, cells // 6 % 6, cells % 6], dim=1)
    features = torch.randn(len(cells), 3, dtype=torch.float64)
    permutation = torch.tensor(random.sample(range(len(cells)), len(cells)))
    layer = SparseConv3d(3, 2).double()

    def run(coords, features):
        topology, order = Topology.from_coords([coords], 6)
        result = torch.empty(len(coords), 2, dtype=torch.float64)
        result[order] = layer(SparseTensor(features[order], topology)).features.detach()
        return result

    torch.testing.assert_close(run(coords[permutation], features[permutation]), run(coords, features)[permutation])


def test_gathered_products_of_nothing():
    topology, _ = Topology.from_coords([torch.empty(0, 3, dtype=torch.int64)], 8)
    maps = _neighbour_map(topology, 3)
    x, weight = torch.empty(0, 3), torch.empty(5, 27, 3)
    assert kernel_map._gathered_forward(x, weight, maps).shape == (0, 5)
    assert not kernel_map._gathered_weight_gradient(x, torch.empty(0, 5), maps).any()


def test_mixed_precision(objects):
    x = scene(objects, 8, dtype=torch.float32)
    layer = SparseConv3d(8, 8)
    expected = layer(x).features
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x).features
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    gradient, weight_gradient = torch.autograd.grad(out.float().square().sum(), (x.features, layer.weight))
    assert gradient.dtype == weight_gradient.dtype == torch.float32


def test_objects_without_voxels():
    empty = torch.empty(0, 3, dtype=torch.int64)
    topology, _ = Topology.from_coords([empty, empty], 8)
    x = SparseTensor(torch.empty(0, 3), topology)
    assert SparseConv3d(3, 5)(x).features.shape == (0, 5)
    assert downsample(x).features.shape == (0, 3)


def test_wrong_arguments_are_explained(objects):
    x = scene(objects, 4)
    with pytest.raises(ValueError, match="4 channels, expected 5"):
        SparseConv3d(5, 6)(x)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        SparseConv3d(4, 6, kernel_size=2)
    with pytest.raises(ValueError, match="choose one of torch, triton, spconv, spconv-triton"):
        SparseConv3d(4, 6, backend="cudnn")
    with pytest.raises(RuntimeError, match="'spconv' is not available: it is used on CUDA only"):
        SparseConv3d(4, 4, backend="spconv")(x)
    with convolution_backend("spconv-triton"), pytest.raises(RuntimeError, match="needs a GPU"):
        SparseConv3d(4, 4)(x)
    report = convolution_backends()
    assert report["torch"] is None
    assert "CUDA" in report["spconv"]


def test_a_dtype_that_a_backend_does_not_know_is_named(surface, monkeypatch):
    backends = tuple(dataclasses.replace(backend, is_available=lambda device: None) for backend in conv._BACKENDS)
    monkeypatch.setattr(conv, "_BACKENDS", backends)
    topology, _ = Topology.from_coords([surface(10, 8)], 8)
    for backend, dtype in (("spconv", torch.bfloat16), ("triton", torch.float64)):
        layer = SparseConv3d(4, 4, backend=backend).to(dtype)
        with pytest.raises(ValueError, match=f"'{backend}' takes .* got {dtype}"):
            layer(SparseTensor(torch.zeros(len(topology), 4, dtype=dtype), topology))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton", "spconv", "spconv-triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_backends_on_the_gpu(surface, backend, dtype):
    reason = convolution_backends("cuda")[backend] if torch.cuda.is_available() else "there is no GPU"
    if reason is not None:
        pytest.skip(reason)
    topology, _ = Topology.from_coords([surface(10, 32), surface(14, 32)], 32)
    x = torch.randn(len(topology), 32, dtype=torch.float64, requires_grad=True)
    layer = SparseConv3d(32, 48).double()
    expected = layer(SparseTensor(x, topology)).features
    weight = torch.randn_like(expected)
    expected = (expected, *torch.autograd.grad((expected * weight).sum(), (x, layer.weight)))

    on_gpu = topology.to("cuda")
    y = x.detach().to("cuda", dtype).requires_grad_()
    twin = SparseConv3d(32, 48, backend=backend).to("cuda", dtype)
    twin.load_state_dict(layer.state_dict())
    if backend == "spconv" and dtype == torch.bfloat16:
        with pytest.raises(ValueError, match=r"'spconv' takes .* float16, float32; got torch.bfloat16"):
            twin(SparseTensor(y, on_gpu))
        return
    out = twin(SparseTensor(y, on_gpu)).features
    actual = (out, *torch.autograd.grad((out * weight.to("cuda", dtype)).sum(), (y, twin.weight)))
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}[dtype]  # float32 may use TF32
    for a, b in zip(actual, expected, strict=True):
        error = (a.double().cpu() - b).abs().max() / b.abs().max()
        assert error < tolerance, f"relative error {error:.2e}"

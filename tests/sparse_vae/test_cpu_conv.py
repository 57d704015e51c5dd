"""The tiled convolution of the CPU against the gathered products, the other plain PyTorch formulation."""

import pytest
import torch
from sparse_vae import SparseConv3d, SparseDownConv3d, SparseTensor, SparseUpConv3d, Topology
from sparse_vae import _cpu_conv as cpu_conv
from sparse_vae import _kernel_map as kernel_map
from sparse_vae._conv import _neighbour_map, _octant_map
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(params=[16, 64, 1024], ids="blocks of {}".format)
def small_tiles(monkeypatch, request):
    """Tiles of two blocks, many for the scenes of these tests, or a single one."""
    monkeypatch.setattr(cpu_conv, "BLOCK", request.param)
    monkeypatch.setattr(cpu_conv, "TILE_BYTES", 1)


def maps(objects):
    """Maps with and without an identity offset, in both directions."""
    topology, _ = Topology.from_coords(objects, 16)
    return [_neighbour_map(topology, 3), _octant_map(topology), _octant_map(topology).transposed]


def operands(kernels, dtype=torch.float64, in_channels=5, out_channels=7):
    generator = torch.Generator().manual_seed(5)
    shapes = [(kernels.num_inputs, in_channels), (out_channels, len(kernels.sources), in_channels)]
    shapes.append((kernels.num_outputs, out_channels))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.usefixtures("small_tiles")
def test_tiles_add_up_to_gathered_products(objects):
    for kernels in maps(objects):
        x, weight, grad = operands(kernels)
        expected = kernel_map._gathered_forward(x, weight, kernels)
        torch.testing.assert_close(cpu_conv.forward(x, weight, kernels.pairs), expected)
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        expected = torch.einsum("md,kmc->dkc", grad, padded[kernels.sources])
        torch.testing.assert_close(cpu_conv.weight_gradient(x, grad, kernels.pairs), expected)


@pytest.mark.usefixtures("small_tiles")
def test_every_pair_is_in_one_tile(objects):
    for kernels in maps(objects):
        pairs = kernels.pairs
        met = torch.zeros(kernels.sources.shape, dtype=torch.int64)
        covered = torch.zeros(kernels.num_outputs, dtype=torch.int64)
        for rows, pieces in pairs.tiles(pairs.tile_rows(8)):
            covered[rows] += 1
            for k, inputs, outputs in pieces:
                assert torch.equal(kernels.sources[k, outputs], inputs)
                assert outputs.min() >= rows.start
                assert outputs.max() < rows.stop
                met[k, outputs] += 1
        assert (covered == 1).all()
        expected = (kernels.sources < kernels.num_inputs).long()
        if kernels.identity is not None:
            expected[kernels.identity] = 0
        assert torch.equal(met, expected)


@pytest.mark.usefixtures("small_tiles")
def test_gradients(objects):
    fine, _ = Topology.from_coords([o[::9] for o in objects], 16)
    coarse = fine.coarser().topology
    for layer, topology, extra in [
        (SparseConv3d(2, 3), fine, ()),
        (SparseDownConv3d(2, 3), fine, ()),
        (SparseUpConv3d(2, 3), coarse, (fine,)),
    ]:
        x = torch.randn(len(topology), 2, dtype=torch.float64, requires_grad=True)
        weight = layer.double().weight.detach().clone().requires_grad_()

        def run(x, weight, layer=layer, topology=topology, extra=extra):
            return functional_call(layer, {"weight": weight}, (SparseTensor(x, topology), *extra)).features

        assert torch.autograd.gradcheck(run, (x, weight), fast_mode=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_can_be_repeated_exactly(objects, dtype):
    kernels = maps(objects)[0]
    x, weight, grad = operands(kernels, dtype)
    for run in (
        lambda: cpu_conv.forward(x, weight, kernels.pairs),
        lambda: cpu_conv.forward(grad, weight.permute(2, 1, 0), kernels.transposed.pairs),
        lambda: cpu_conv.weight_gradient(x, grad, kernels.pairs),
    ):
        assert torch.equal(run(), run())


def test_the_weight_gradient_adds_tiles_up_in_float32(objects, monkeypatch):
    monkeypatch.setattr(cpu_conv, "BLOCK", 2)
    monkeypatch.setattr(cpu_conv, "TILE_BYTES", 1)
    kernels = maps(objects)[0]
    x, _, grad = (t.abs() for t in operands(kernels, torch.bfloat16))  # equal signs: rounding cannot cancel out
    actual = cpu_conv.weight_gradient(x, grad, kernels.pairs)
    assert actual.dtype == torch.float32
    expected = cpu_conv.weight_gradient(x.double(), grad.double(), kernels.pairs)
    torch.testing.assert_close(actual.double(), expected, rtol=4e-3, atol=0)  # one bfloat16 rounding a product


def test_memory_is_bounded_by_a_tile(objects, monkeypatch):
    monkeypatch.setattr(cpu_conv, "BLOCK", 16)
    monkeypatch.setattr(cpu_conv, "TILE_BYTES", 1)
    kernels = maps(objects)[0]
    x, weight, grad = operands(kernels)
    results = [cpu_conv.forward(x, weight, kernels.pairs), cpu_conv.weight_gradient(x, grad, kernels.pairs)]
    with Allocations() as made:
        cpu_conv.forward(x, weight, kernels.pairs)
    assert sorted(made.sizes)[-3:] == [32 * 5, 32 * 7, results[0].numel()]
    with Allocations() as made:
        cpu_conv.weight_gradient(x, grad, kernels.pairs)
    assert sorted(made.sizes)[-3:] == [32 * 5, 32 * 7, results[1].numel()]


class Allocations(TorchDispatchMode):
    """Elements of every tensor that operations inside the block make (not those that they write into)."""

    def __enter__(self):
        self.sizes = []
        self.storages = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
        self.storages |= {t.untyped_storage().data_ptr() for t in given}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.storages:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize(("width", "size"), [(16, 32), (64, 8), (512, 2), (4096, 2)])
def test_tiles_shrink_as_rows_grow_and_are_about_equal(width, size):
    """`size` blocks are 2 MB, or two; up to half as much more rather than a small rest."""
    for num_outputs in (0, 1, 1024, 5000, 12_289, 100_000):
        pairs = cpu_conv.RowPairs((), (), num_outputs, None)
        tile_rows, num_blocks = pairs.tile_rows(4 * width), -(-num_outputs // 1024)
        assert tile_rows <= 1.5 * size * 1024
        tiles = [rows for rows, _ in pairs.tiles(tile_rows)]
        assert sum(min(rows.stop, num_outputs) - rows.start for rows in tiles) == num_outputs
        assert len(tiles) <= max(1, num_blocks / size + 1)
        assert all(rows.stop - rows.start == tile_rows for rows in tiles)

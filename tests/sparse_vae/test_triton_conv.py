"""The Triton kernels against the PyTorch path: in Triton's interpreter on the CPU, compiled on the GPU.

The interpreter must be chosen before Triton is imported, so those cases run in a process of their own, which is this
file started as a script.
"""

import dataclasses
import subprocess
import sys

import pytest
import torch
from sparse_vae import (
    SparseConv3d,
    SparseDownConv3d,
    SparseTensor,
    SparseUpConv3d,
    Topology,
    convolution_backend,
    convolution_backends,
)
from sparse_vae import _conv as conv
from sparse_vae._kernel_map import KernelMap, convolve


def voxels(count: int, grid_size: int, seed: int) -> Topology:
    """Topology of distinct random voxels of two objects."""
    cells = torch.randperm(grid_size**3, generator=torch.Generator().manual_seed(seed))[:count]
    coords = torch.stack([cells // grid_size**2, cells // grid_size % grid_size, cells % grid_size], dim=1)
    return Topology.from_coords([coords[: count // 3], coords[count // 3 :]], grid_size)[0]


def kernel_maps(topology: Topology) -> dict[str, KernelMap]:
    octants = conv._octant_map(topology)
    return {"submanifold": conv._neighbour_map(topology, 3), "down": octants, "up": octants.transposed}


def with_gradients(x, weight, kernel_map, triton):
    """Output, gradient of the input and of the weight for a fixed upstream gradient."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    out = convolve(x, weight, kernel_map, triton)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).cos().to(out)
    return (out.detach(), *torch.autograd.grad(out, (x, weight), upstream))


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double().cpu() - expected.double().cpu()).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-12))


def compare(name, kernel_map, in_channels, out_channels, dtype, tolerance):
    """Kernels against PyTorch in float64 on the same numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(kernel_map.num_inputs, in_channels, generator=generator).to(dtype)
    weight = torch.randn(out_channels, len(kernel_map.sources), in_channels, generator=generator).to(dtype)
    expected = with_gradients(x.double(), weight.double(), kernel_map, triton=False)
    actual = with_gradients(x, weight, kernel_map, triton=True)
    for part, a, b in zip(("output", "input gradient", "weight gradient"), actual, expected, strict=True):
        assert a.dtype == dtype
        error = relative_error(a, b)
        assert error <= tolerance, f"{name} {in_channels} -> {out_channels} {dtype}: {part} is off by {error:.1e}"


def interpreted_cases() -> None:
    """All comparisons in Triton's interpreter."""
    from sparse_vae import _triton_conv

    single, half = (torch.float32, 1e-5), (torch.float16, 2e-3)
    maps = kernel_maps(voxels(90, 6, seed=0))
    compare("submanifold", maps["submanifold"], 3, 5, *single)
    compare("submanifold", maps["submanifold"], 16, 64, *half)
    for name in ("down", "up"):
        compare(name, maps[name], 64, 72, *single)
        compare(name, maps[name], 48, 5, *half)
    one = kernel_maps(voxels(1, 4, seed=0))
    none = kernel_maps(voxels(0, 4, seed=0))
    for name in maps:
        compare(name, one[name], 16, 3, *single)
        compare(name, none[name], 16, 3, *single)

    # several programs to a weight gradient, also where the budget allows fewer than there are rows for
    down = kernel_maps(voxels(600, 16, seed=2))["down"]
    for programs, budget in ((64, 2**26), (64, 2 * 4 * 8 * 20 * 16), (1, 1)):
        _triton_conv.PROGRAMS, _triton_conv.PARTIAL_BUDGET = programs, budget
        compare("down", down, 20, 16, *single)

    # groups of offsets, and more rows than a tile holds
    compare("submanifold", kernel_maps(voxels(400, 12, seed=3))["submanifold"], 20, 24, *single)

    # features that are a slice of channels
    x, weight = torch.randn(down.num_inputs, 24)[:, 3:19], torch.randn(8, 8, 16)
    pair = [with_gradients(x, weight, down, triton) for triton in (True, False)]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)

    # the comparison notices kernels that read one wrong row
    wrong = KernelMap(maps["down"].sources, maps["down"].targets)
    wrong.tile_plan.sources[3, 5] += 1
    with pytest.raises(AssertionError, match="output is off"):
        compare("wrong", wrong, 16, 16, *single)
    print("all interpreted cases agree")


def test_in_the_interpreter(interpret):
    interpret(__file__)


def test_import_leaves_triton_alone():
    code = """
import sys, torch
before = "triton" in sys.modules
import sparse_vae
assert "sparse_vae._triton_conv" not in sys.modules
assert ("triton" in sys.modules) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_default_is_torch_on_the_cpu():
    assert conv._default(torch.empty(1, 1)) == "torch"
    assert "needs a GPU" in convolution_backends("cpu")["triton"]
    topology = voxels(20, 4, seed=0)
    with convolution_backend("triton"), pytest.raises(RuntimeError, match="'triton' is not available: it needs a GPU"):
        SparseDownConv3d(4, 4)(SparseTensor(torch.zeros(20, 4), topology))


def test_one_setting_rules_every_convolution(monkeypatch):
    """The default and the context choose for submanifold and strided convolutions alike."""
    seen = []
    plain = conv.convolve
    monkeypatch.setattr(conv, "_triton_reason", lambda device: None)
    monkeypatch.setattr(conv, "convolve", lambda *args, triton=False: seen.append(triton) or plain(*args))
    monkeypatch.setattr(
        conv,
        "_BACKENDS",
        tuple(dataclasses.replace(b, is_available=lambda device: None) for b in conv._BACKENDS),
    )
    topology = voxels(60, 8, seed=0)

    def run(dtype=torch.float32):
        seen.clear()
        x = SparseTensor(torch.randn(60, 4, dtype=dtype), topology)
        y = SparseDownConv3d(4, 6).to(dtype)(SparseConv3d(4, 4).to(dtype)(x))
        SparseUpConv3d(6, 4).to(dtype)(y, topology)
        return list(seen)

    assert run() == [True] * 3
    assert run(torch.float64) == [False] * 3
    with convolution_backend("torch"):
        assert run() == [False] * 3
    with convolution_backend("triton"):
        assert run() == [True] * 3
        with pytest.raises(ValueError, match=r"float16, bfloat16, float32; got torch\.float64"):
            run(torch.float64)


def skip_without_gpu():
    reason = convolution_backends("cuda")["triton"] if torch.cuda.is_available() else "there is no GPU"
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(3, 5), (16, 64), (48, 96), (64, 64), (128, 64), (256, 192)])
def test_on_the_gpu(dtype, in_channels, out_channels):
    """Close to float64 and to PyTorch's own path, and the same bits every time."""
    skip_without_gpu()
    topology = voxels(5000, 32, seed=0)
    for name, kernel_map in kernel_maps(topology).items():
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(kernel_map.num_inputs, in_channels, generator=generator).to(dtype)
        weight = torch.randn(out_channels, len(kernel_map.sources), in_channels, generator=generator).to(dtype)
        expected = with_gradients(x.double(), weight.double(), kernel_map, triton=False)
        on_gpu = KernelMap(kernel_map.sources.cuda(), kernel_map.targets.cuda(), kernel_map.identity)
        actual = with_gradients(x.cuda(), weight.cuda(), on_gpu, triton=True)
        plain = with_gradients(x.cuda(), weight.cuda(), on_gpu, triton=False)
        again = with_gradients(x.cuda(), weight.cuda(), on_gpu, triton=True)
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}[dtype]  # float32 may use TF32
        for a, b, c, d in zip(actual, expected, plain, again, strict=True):
            assert relative_error(a, b) < tolerance, name
            assert relative_error(a, c) < 2 * tolerance, name
            assert torch.equal(a, d), name


@pytest.mark.gpu
def test_nothing_is_compiled_again_for_other_rows():
    skip_without_gpu()
    from sparse_vae import _triton_conv

    layer = SparseConv3d(16, 16).cuda()
    for count in (1, 15, 16, 1000, 1024, 4097):
        topology = voxels(count, 32, seed=count).to("cuda")
        layer(SparseTensor(torch.randn(count, 16, device="cuda"), topology)).features.sum().backward()
        kernels = (_triton_conv._forward_kernel, _triton_conv._weight_gradient_kernel)
        compiled = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
        if count == 1:
            first = compiled
        assert compiled == first


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreted_cases()

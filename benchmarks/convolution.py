"""Compare and time the convolution backends on surface voxels, forward and both gradients. Needs a CUDA device.

    python benchmarks/convolution.py [--objects 64] [--grid 32] [--dtype bfloat16] [--backends torch triton]

Errors are relative to the largest value of the `torch` backend's result, output and gradients together.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable

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

CASES = (("submanifold", 64, 64), ("submanifold", 128, 64), ("down", 64, 128), ("up", 128, 64))


def scene(num_objects: int, grid_size: int, device: str) -> Topology:
    """Shells of random spheres, two to an object: about 1,100 voxels an object on a 32-grid."""
    generator = torch.Generator().manual_seed(0)
    voxels = torch.cartesian_prod(*[torch.arange(grid_size)] * 3)
    coords = []
    for _ in range(num_objects):
        centres = (0.35 + 0.3 * torch.rand(2, 3, generator=generator)) * grid_size
        radii = (0.16 + 0.1 * torch.rand(2, generator=generator)) * grid_size
        distances = torch.cdist(voxels.float(), centres)
        coords.append(voxels[((distances - radii).abs() < 0.5).any(dim=1)])
    return Topology.from_coords(coords, grid_size)[0].to(device)


def convolution(
    kind: str, in_channels: int, out_channels: int, topology: Topology, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.nn.Parameter, torch.Tensor]:
    """The layer as a function of features, its weight, and features for it."""
    coarse = topology.coarser().topology
    layers = {"submanifold": SparseConv3d, "down": SparseDownConv3d, "up": SparseUpConv3d}
    layer = layers[kind](in_channels, out_channels, bias=False).to(topology.device, dtype)
    source = coarse if kind == "up" else topology
    x = torch.randn(len(source), in_channels, device=topology.device, dtype=dtype, requires_grad=True)
    extra = (topology,) if kind == "up" else ()
    return lambda features: layer(SparseTensor(features, source), *extra).features, layer.weight, x


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the device."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def compare(topology: Topology, dtype: torch.dtype, backends: list[str], repeats: int) -> list[tuple]:
    """Rows (case, backend, error, milliseconds of the forward, of the input and of the weight gradient)."""
    rows = []
    for kind, in_channels, out_channels in CASES:
        run, weight, x = convolution(kind, in_channels, out_channels, topology, dtype)
        expected = None
        for backend in backends:
            if kind != "submanifold" and backend not in ("torch", "triton"):
                continue
            with convolution_backend(backend):
                out = run(x)
                grad = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(dtype)
                results = [t.detach().double() for t in (out, *torch.autograd.grad(out, (x, weight), grad))]
                expected = expected or results
                pairs = zip(results, expected, strict=True)
                error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
                out = run(x)
                calls = [
                    lambda run=run, x=x: run(x),
                    lambda out=out, x=x, grad=grad: torch.autograd.grad(out, x, grad, retain_graph=True),
                    lambda out=out, w=weight, grad=grad: torch.autograd.grad(out, w, grad, retain_graph=True),
                ]
                times = [milliseconds(call, repeats) for call in calls]
            rows.append((f"{kind} {in_channels} -> {out_channels}", backend, error, *times))
    return rows


def table(rows: list[tuple]) -> str:
    lines = ["| convolution | backend | error | forward, ms | input gradient, ms | weight gradient, ms |"]
    lines.append("|---|---|---|---|---|---|")
    for case, backend, error, *times in rows:
        lines.append(f"| {case} | {backend} | {error:.1e} | " + " | ".join(f"{t:.3f}" for t in times) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=64)
    parser.add_argument("--grid", type=int, default=32)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--backends", nargs="+", default=["torch", "triton"], help="the first one is the reference")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    reasons = convolution_backends("cuda:0")
    for backend in arguments.backends:
        if reasons[backend] is not None:
            parser.error(f"{backend}: {reasons[backend]}")
    torch.manual_seed(0)
    topology = scene(arguments.objects, arguments.grid, "cuda:0")
    print(f"{torch.cuda.get_device_name()}; Python {platform.python_version()}; torch {torch.__version__}; ", end="")
    print(f"{len(topology):,} voxels of {arguments.objects} objects, grid {arguments.grid}, {arguments.dtype}\n")
    print(table(compare(topology, getattr(torch, arguments.dtype), arguments.backends, arguments.repeats)))


if __name__ == "__main__":
    main()

"""Time sparse convolution and the 2to3-VAE against spconv, spconv-triton and the bare matrix products.

    python benchmarks/sparse.py --device cpu [--out benchmarks/results/sparse_cpu.md]
    python benchmarks/sparse.py --device cuda [--out benchmarks/results/sparse_gpu.md]

Peers are timed where they are installed. spconv's CPU path is right on one OpenMP thread only, so on the CPU the script
insists on OMP_NUM_THREADS=1; its results are compared with ours before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from sparse_vae import SparseConv3d, SparseTensor, SparseVAE, SparseVAEConfig, Topology

PEERS = {"spconv": "spconv.pytorch", "spconv-triton": "spconv_triton.pytorch"}


def surface(count: int, grid_size: int) -> torch.Tensor:
    """`count` voxels [count, 3] of concentric spherical shells."""
    voxels = torch.cartesian_prod(*[torch.arange(grid_size)] * 3)
    distance = (voxels - (grid_size - 1) / 2).square().sum(dim=1).sqrt()
    shells = [(distance - radius).abs() < 0.5 for radius in range(grid_size // 2 - 2, 4, -4)]
    rows = torch.cat([voxels[shell] for shell in shells])
    if len(rows) < count:
        raise ValueError(f"a grid of {grid_size} holds {len(rows)} such voxels, not {count}")
    return rows[:count]


def scene(num_objects: int, count: int, grid_size: int, device: str) -> Topology:
    topology, _ = Topology.from_coords([surface(count, grid_size)] * num_objects, grid_size)
    return topology.to(device)


def timed(functions: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Shortest time of every call in milliseconds: other work on the machine can only add to it.

    The calls take turns, so that a slow spell of the machine meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            times[name].append(once(function, device))
    return {name: min(values[2:]) for name, values in times.items()}


def once(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def peer_layer(name: str, layer: SparseConv3d, topology: Topology):
    """The peer's layer with our weights as a function of features, and its weight; None if it is not installed."""
    try:
        library = importlib.import_module(PEERS[name])
    except ImportError:
        return None
    weight = layer.weight
    peer = library.SubMConv3d(layer.in_channels, layer.out_channels, 3, bias=False, indice_key="key")
    peer = peer.to(weight.device, weight.dtype)
    with torch.no_grad():
        peer.weight.copy_(weight.reshape(peer.weight.shape))
    pairs: dict = {}

    def run(features: torch.Tensor) -> torch.Tensor:
        x = library.SparseConvTensor(features, topology.coords, [topology.grid_size] * 3, topology.batch_size)
        x.indice_dict = pairs
        return peer(x).features

    return run, peer.weight


def bare_products(layer: SparseConv3d, topology: Topology) -> Callable[[], None]:
    """Only the matrix products that the pairs of neighbours require, on contiguous operands."""
    counts = (topology.neighbours() < len(topology)).sum(dim=1).tolist()
    weight = layer.weight.detach()
    operands = torch.randn(len(topology), layer.in_channels, device=weight.device, dtype=weight.dtype)
    matrices = weight.flatten(1, 3).permute(1, 2, 0).contiguous()

    def run() -> None:
        for matrix, count in zip(matrices, counts, strict=True):
            operands[:count] @ matrix

    return run


def convolution_rows(device: str, dtype: torch.dtype, count: int, widths: list[int], repeats: int) -> list[list[str]]:
    rows = []
    topology = scene(1, count, 64, device)
    for width in widths:
        layer = SparseConv3d(width, width, bias=False, backend="torch").to(device, dtype)
        x = torch.randn(len(topology), width, device=device, dtype=dtype, requires_grad=True)
        runs = {"ours": (lambda features, layer=layer: layer(SparseTensor(features, topology)).features, layer.weight)}
        runs |= {name: found for name in PEERS if (found := peer_layer(name, layer, topology)) is not None}
        expected = runs["ours"][0](x).detach()
        grad = torch.ones_like(expected)
        forward = {name: lambda run=run, x=x: run(x) for name, (run, _) in runs.items()}
        steps = {
            name: lambda run=run, weight=weight, x=x, grad=grad: torch.autograd.grad(run(x), (x, weight), grad)
            for name, (run, weight) in runs.items()
            if device == "cuda" or name == "ours"  # spconv 2.3.8 has no backward on the CPU
        }
        with torch.no_grad():
            forward_times = timed(forward | {"bare products": bare_products(layer, topology)}, device, repeats)
        step_times = timed(steps, device, repeats)
        for name, taken in forward_times.items():
            wrong = name in runs and (runs[name][0](x).detach() - expected).abs().max() > 1e-2 * expected.abs().max()
            both = f"{step_times[name]:.2f}" if name in step_times else ""
            rows.append([str(width), name + " (WRONG RESULT)" * bool(wrong), f"{taken:.2f}", both])
    return rows


def model_rows(device: str, dtype: torch.dtype, preset: str, repeats: int) -> list[list[str]]:
    config = SparseVAEConfig.preset(preset)
    model = SparseVAE(config).to(device).eval()
    rows = []
    counts = (5_000, 20_000, 80_000) if device == "cuda" else (2_500,)
    for count in counts:
        num_objects = max(1, count // 20_000)
        topology = scene(num_objects, count // num_objects, config.grid_size, device)
        x = SparseTensor(torch.randn(len(topology), config.in_channels, device=device), topology)
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            z = model.encode(x)
            calls = {"encoder": lambda x=x: model.encode(x), "decoder": lambda z=z: model.decode(z)}
            times = timed(calls, device, repeats).values()
        rows.append([preset, str(count), *(f"{t:.2f}" for t in times), f"{sum(times) / count * 1e3:.3f}"])
    return rows


def topology_rows(device: str, repeats: int) -> list[list[str]]:
    coords = [surface(2_500, 32).to(device)] * 32

    def build() -> None:
        topology, _ = Topology.from_coords(coords, 32)
        topology.windows(8, 0), topology.windows(8, 4), topology.neighbours(), topology.coarser()

    return [["32 x 2,500", f"{timed({'build': build}, device, repeats)['build']:.2f}"]]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment(device: str) -> str:
    names = ["torch", "spconv", "spconv-cu120", "spconv-cu126", "spconv-triton"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, 1 thread"
    revision = commit.stdout.strip() or "unknown"
    return f"{machine}; Python {platform.python_version()}; {', '.join(found)}; commit {revision}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    if device == "cpu":
        if os.environ.get("OMP_NUM_THREADS") != "1":
            parser.error("set OMP_NUM_THREADS=1: spconv's CPU path returns wrong rows with more threads")
        torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    count, widths = (20_000, [128, 512, 1024]) if device == "cuda" else (5_000, [64, 128, 256, 512])
    convolution = convolution_rows(device, dtype, count, widths, repeats)
    preset, model_dtype = ("paper", torch.bfloat16) if device == "cuda" else ("tiny", torch.float32)
    models = model_rows(device, model_dtype, preset, repeats)
    parts = [
        f"# Sparse operations, {device}",
        f"`python benchmarks/sparse.py --device {device}`: {environment(device)}.",
        f"All times are the shortest of {repeats} runs, in milliseconds.",
        f"Submanifold 3^3 convolution, {count:,} surface voxels of a 64^3 grid, {dtype}:",
        table(["channels", "implementation", "forward", "forward + backward"], convolution),
        f"2to3-VAE, forward, {model_dtype}:",
        table(["preset", "voxels", "encoder", "decoder", "both, microseconds a voxel"], models),
        "Building a topology with its windows, neighbours and coarse level:",
        table(["objects x voxels", "time"], topology_rows(device, repeats)),
    ]
    report = "\n\n".join(parts)
    print(report)
    if arguments.out:
        arguments.out.write_text(report + "\n")


if __name__ == "__main__":
    main()

"""Time sparse convolution and the 2to3-VAE against spconv, spconv-triton and the bare matrix products.

    python benchmarks/sparse.py --device cpu [--out benchmarks/results/sparse_cpu.md]
    python benchmarks/sparse.py --device cuda [--lpips VGG16.safetensors] [--out benchmarks/results/sparse_gpu.md]

Convolutions are those that a layer takes by default. Peers are timed where they are installed. spconv's CPU path is
right on one OpenMP thread only, so on the CPU the script insists on OMP_NUM_THREADS=1; its results are compared with
ours before anything is timed. "Recorded" is the device's own time: the same calls as a CUDA graph. `--lpips` names
LPIPS weights for the training step; without it the step has no LPIPS term.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import Report, shells, table
from sparse_vae import SparseConv3d, SparseTensor, SparseVAE, SparseVAEConfig, Topology, convolution_backend

PARTS = ("model", "topology", "training", "convolution")
PEERS = {"spconv": "spconv.pytorch", "spconv-triton": "spconv_triton.pytorch"}


def scene(num_objects: int, count: int, grid_size: int, device: str) -> Topology:
    topology, _ = Topology.from_coords([shells(count, grid_size)] * num_objects, grid_size)
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


def convolution_rows(device: str, dtype: torch.dtype, count: int, width: int, repeats: int) -> list[list[str]]:
    rows = []
    topology = scene(1, count, 64, device)
    layer = SparseConv3d(width, width, bias=False).to(device, dtype)
    x = torch.randn(len(topology), width, device=device, dtype=dtype, requires_grad=True)
    runs = {"ours": (lambda features, layer=layer: layer(SparseTensor(features, topology)).features, layer.weight)}
    runs |= {name: found for name in PEERS if (found := peer_layer(name, layer, topology)) is not None}
    grad = torch.ones(len(topology), width, device=device, dtype=dtype)
    forward = {name: lambda run=run, x=x: run(x) for name, (run, _) in runs.items()}
    steps = {
        name: lambda run=run, weight=weight, x=x, grad=grad: torch.autograd.grad(run(x), (x, weight), grad)
        for name, (run, weight) in runs.items()
        if device == "cuda" or name == "ours"  # spconv 2.3.8 has no backward on the CPU
    }
    first = {name: once(step, device) / 1e3 for name, step in steps.items()}
    with torch.no_grad(), convolution_backend("torch"):
        expected = deepcopy(layer).float()(SparseTensor(x.float(), topology)).features
    with torch.no_grad():
        forward_times = timed(forward | {"bare products": bare_products(layer, topology)}, device, repeats)
    step_times = timed(steps, device, repeats)
    for name, taken in forward_times.items():
        error = ""
        if name in runs:
            error = f"{float((runs[name][0](x).detach() - expected).norm() / expected.norm()):.1e}"
        both, start = (f"{times[name]:.2f}" if name in times else "" for times in (step_times, first))
        rows.append([str(width), name, f"{taken:.3f}", both, start, error])
    return rows


def model_rows(device: str, dtype: torch.dtype, preset: str, repeats: int) -> list[list[str]]:
    config = SparseVAEConfig.preset(preset)
    model = SparseVAE(config).to(device, dtype).eval()
    rows = []
    for count in (5_000, 20_000, 80_000) if device == "cuda" else (2_500,):
        num_objects = max(1, count // 20_000)
        topology = scene(num_objects, count // num_objects, config.grid_size, device)
        x = SparseTensor(torch.randn(len(topology), config.in_channels, device=device), topology)
        with torch.inference_mode():
            z = model.encode(x)
            calls = {"encoder": lambda x=x: model.encode(x), "decoder": lambda z=z: model.decode(z)}
            times = list(timed(calls, device, repeats).values())
            if device == "cuda":
                times += timed({name: recorded(call) for name, call in calls.items()}, device, repeats).values()
        per_voxel = [sum(times[i : i + 2]) / count * 1e3 for i in range(0, len(times), 2)]
        rows.append([preset, str(count), *(f"{t:.2f}" for t in times), *(f"{t:.3f}" for t in per_voxel)])
    return rows


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def one_window_at_a_time(q, k, v, layout, backend=None) -> torch.Tensor:
    """Attention as a loop over windows, which is what is left where no packed kernel is installed."""
    parts = zip(*(x.split(layout.lengths) for x in (q, k, v)), strict=True)
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts
    ]
    return torch.cat(out)


def training_rows(lpips: Path | None, repeats: int) -> list[list[str]]:
    """A training step of the paper's autoencoder: 4 objects of 10,000 voxels, one view of 512^2 each."""
    from gs_render import Camera, render_batch
    from gs_render.metrics import LPIPS, ssim
    from sparse_vae import _blocks, gaussian_regularisation, kl_divergence

    config = SparseVAEConfig.preset("paper")
    model = SparseVAE(config).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    perceptual = None if lpips is None else LPIPS(lpips).to("cuda")
    topology = scene(4, 10_000, config.grid_size, "cuda")
    x = SparseTensor(torch.randn(len(topology), config.in_channels, device="cuda"), topology)
    cameras = Camera.orbit(4, radius=2.0, fov_degrees=40.0, size=512).to("cuda")
    target = torch.rand(4, 3, 512, 512, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            objects, mean, logvar = model(x, generator)
        drawn = render_batch(objects, cameras, 1.0, filter_2d=config.gaussians.filter_2d, antialias=True)
        image = drawn.color.permute(0, 3, 1, 2)
        loss = F.l1_loss(image, target) + 0.2 * (1 - ssim(image, target).mean())
        if perceptual is not None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss + 0.2 * perceptual(image, target).mean()
        loss = loss + 1e-6 * kl_divergence(mean.features, logvar.features) + gaussian_regularisation(objects)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    rows = []
    for name, attention in (("ours", _blocks.attention), ("SDPA, one window at a time", one_window_at_a_time)):
        kept, _blocks.attention = _blocks.attention, attention
        torch.cuda.reset_peak_memory_stats()
        taken = timed({name: step}, "cuda", repeats)[name]
        _blocks.attention = kept
        memory = torch.cuda.max_memory_allocated() / 2**30
        rows.append([name, f"{taken:.0f}", f"{4e3 / taken:.1f}", f"{memory:.1f}"])
    return rows


def topology_rows(device: str, repeats: int) -> list[list[str]]:
    coords = [shells(2_500, 32).to(device)] * 32

    def build() -> None:
        topology, _ = Topology.from_coords(coords, 32)
        topology.windows(8, 0), topology.windows(8, 4), topology.neighbours(), topology.coarser()

    return [["32 x 2,500", f"{timed({'build': build}, device, repeats)['build']:.2f}"]]


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
    parser.add_argument("--lpips", type=Path, help="LPIPS weights (VGG16) for the training step on CUDA")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to time")
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
    shown = Report(arguments.out)
    for text in report(device, dtype, count, widths, arguments.lpips, repeats, arguments.parts):
        shown.add(text)


def report(
    device: str,
    dtype: torch.dtype,
    count: int,
    widths: list[int],
    lpips: Path | None,
    repeats: int,
    parts: Sequence[str],
) -> Iterator[str]:
    yield f"# Sparse operations, {device}"
    yield f"`python benchmarks/sparse.py --device {device}`: {environment(device)}."
    yield (
        f"All times are the shortest of {repeats} runs, in milliseconds; errors are relative to the product in "
        "float32, by norm."
    )
    if "model" in parts:
        preset, model_dtype = ("paper", torch.bfloat16) if device == "cuda" else ("tiny", torch.float32)
        yield f"2to3-VAE, forward, {model_dtype}:"
        recorded_columns = device == "cuda"
        head = ["preset", "voxels", "encoder", "decoder"] + [
            "encoder, recorded",
            "decoder, recorded",
        ] * recorded_columns
        head += ["both, microseconds a voxel"] + ["recorded"] * recorded_columns
        yield table(head, model_rows(device, model_dtype, preset, repeats))
    if "topology" in parts:
        yield "Building a topology with its windows, neighbours and coarse level:"
        yield table(["objects x voxels", "time"], topology_rows(device, repeats))
    if "training" in parts and device == "cuda":
        torch.set_float32_matmul_precision("high")  # as in training
        note = "" if lpips else ", without LPIPS"
        yield f"Training step of the `paper` autoencoder, 4 objects of 10,000 voxels and 512^2 pixels, bf16{note}:"
        head = ["attention", "step, ms", "objects a second", "peak memory, GiB"]
        yield table(head, training_rows(lpips, max(3, repeats // 4)))
        torch.set_float32_matmul_precision("highest")
    if "convolution" in parts:
        yield f"Submanifold 3^3 convolution, {count:,} surface voxels of a 64^3 grid, {dtype}:"
        head = ["channels", "implementation", "forward", "forward + backward", "first call, s", "error"]
        for width in widths:
            yield table(head, convolution_rows(device, dtype, count, width, repeats))


if __name__ == "__main__":
    main()

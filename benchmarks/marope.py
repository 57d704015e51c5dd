"""Time QK-RMSNorm and rotation against diffusers, and against the compiled plain expression.

    python benchmarks/marope.py --device cpu
    python benchmarks/marope.py --device cuda [--out benchmarks/results/marope_gpu.md]

q and k are [2, 5120, 16, 64] in bfloat16 on CUDA, and [2, 1024, 3, 64] (the size of preset tiny) in float32 on the CPU.
CUDA calls are timed as replays of one CUDA graph, so that nobody's launches from Python count.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]  # it has our name

import torch
from diffusers.models.embeddings import apply_rotary_emb
from marope import MARoPE, norm_rotary
from torch import Tensor, nn

SHAPES = {"cpu": ((2, 1024, 3, 64), torch.float32), "cuda": ((2, 5120, 16, 64), torch.bfloat16)}


def cases(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Callable[[Tensor, Tensor], object]]:
    """Functions of q and k: ours, ours compiled (CUDA), and diffusers' on the same tables."""
    rope = MARoPE(head_dim=shape[-1], grid_size=32)
    positions = torch.randint(0, 32, (shape[1], 3), device=device)
    table = rope.table(positions)
    theirs = tuple(part.repeat_interleave(2, dim=-1) for part in table)
    weight = torch.ones(shape[-1], device=device, dtype=dtype, requires_grad=True)
    norm = nn.RMSNorm(shape[-1], eps=1e-6).to(device, dtype)

    def ours(q: Tensor, k: Tensor):
        return norm_rotary(q, k, table, weight, weight)

    def plain(q: Tensor, k: Tensor):
        return norm_rotary(q, k, table, weight, weight, backend="torch")

    def diffusers(q: Tensor, k: Tensor):
        return tuple(apply_rotary_emb(norm(x), theirs, sequence_dim=1) for x in (q, k))

    found: dict[str, Callable[[Tensor, Tensor], object]] = {"marope": ours, "diffusers": diffusers}
    if device == "cuda":
        found["marope, plain"] = plain
        found["marope, plain, torch.compile"] = torch.compile(plain)
    return found


def timed(functions: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Shortest microseconds of every call; the calls take turns, so that a slow spell of the machine meets them all."""
    if device == "cuda":
        functions = {name: recorded(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 5):
        for name, function in functions.items():
            times[name].append(once(function, device))
    return {name: min(values[5:]) for name, values in times.items()}


CALLS = 20
"""Calls in one CUDA graph."""


def recorded(function: Callable[[], object]) -> Callable[[], object]:
    """`CALLS` calls of the function as one CUDA graph."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    return graph.replay


def once(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / CALLS
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    shape, dtype = SHAPES[device]
    q, k = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    grads = tuple(torch.randn_like(x) for x in (q, k))
    functions = cases(shape, dtype, device)

    def forward(function: Callable) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(q, k)

        return run

    def both(function: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(q, k), (q, k), grads)

    forwards = timed({name: forward(function) for name, function in functions.items()}, device, arguments.repeats)
    steps = timed({name: both(function) for name, function in functions.items()}, device, arguments.repeats)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, 1 thread"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = f"torch {version('torch')}, diffusers {version('diffusers')}"
    report = "\n".join(
        [
            f"# QK-RMSNorm and rotation, {device}\n",
            f"`python benchmarks/marope.py --device {device}`: {machine}; Python {platform.python_version()}; "
            f"{versions}; commit {commit.stdout.strip() or 'unknown'}.\n",
            f"q, k {list(shape)}, {dtype}; shortest of {arguments.repeats} runs, in microseconds.\n",
            "| implementation | forward | forward + backward |",
            "| --- | --- | --- |",
            *(f"| {name} | {forwards[name]:.1f} | {steps[name]:.1f} |" for name in functions),
        ]
    )
    print(report)
    if arguments.out:
        arguments.out.write_text(report + "\n")


if __name__ == "__main__":
    main()

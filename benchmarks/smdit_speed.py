"""Time SMDiT against the bare matrix products and attention that it consists of.

    python benchmarks/smdit_speed.py --device cpu [--out benchmarks/results/smdit_cpu.md]     # preset tiny, float32
    python benchmarks/smdit_speed.py --device cuda [--out benchmarks/results/smdit_gpu.md]    # preset paper, bfloat16

"Bare" replays the very products and attention calls of a forward on tensors of the same shapes and strides, nothing
else. On CUDA the script also times training steps, and with --compile the compiled blocks.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from smdit import EulerSampler, SMDiT, SMDiTConfig, flow_matching_loss
from sparse_vae import SparseTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

SCENES = {"cpu": ("tiny", torch.float32, (2_475,), 16), "cuda": ("paper", torch.bfloat16, (20_000, 10_000), 32)}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


class Recorder(TorchDispatchMode):
    """Every matrix product and attention call, with the shapes and strides of its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm") or "scaled_dot_product" in name:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def replay(self) -> Callable[[], None]:
        """The recorded calls as one function, on operands of its own."""

        def fresh(x):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).normal_()

        calls = [(func, tree_map(fresh, args), tree_map(fresh, kwargs)) for func, args, kwargs in self.calls]

        def run() -> None:
            for func, args, kwargs in calls:
                func(*args, **kwargs)

        return run


def surface(count: int, grid_size: int) -> torch.Tensor:
    """About `count` voxels [L, 3] of a spherical shell one voxel thick, cut to `count` where it holds more."""
    voxels = torch.cartesian_prod(*[torch.arange(grid_size)] * 3)
    distance = (voxels - (grid_size - 1) / 2).square().sum(dim=1).sqrt()
    shells = [(distance - radius).abs() < 0.5 for radius in range(grid_size // 2 - 2, 2, -4)]
    rows = torch.cat([voxels[shell] for shell in shells])
    if len(rows) < count:
        raise ValueError(f"a grid of {grid_size} holds {len(rows)} such voxels, not {count}")
    return rows[:count]


def inputs(config: SMDiTConfig, count: int, side: int, batch_size: int, device: str):
    coords = [surface(count, config.grid_size)] * batch_size
    features = [torch.randn(count, config.latent_channels) for _ in range(batch_size)]
    x = SparseTensor.from_coords(coords, features, config.grid_size).to(device)
    condition = torch.randn(batch_size, 1, side, side, config.condition_channels, device=device)
    return x, torch.full((batch_size,), 0.5, device=device), condition


def timed(functions: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Shortest time of every call in milliseconds; the calls take turns, so that a slow spell meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 3):
        for name, function in functions.items():
            synchronise(device)
            begin = time.perf_counter()
            function()
            synchronise(device)
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: min(values[3:]) for name, values in times.items()}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()  # in inference mode a dispatch mode would see composite operations, not the products in them
def forward_rows(model: SMDiT, dtype: torch.dtype, count: int, side: int, device: str, repeats: int) -> list[list[str]]:
    rows = []
    for batch_size in (1, 2):
        x, t, condition = inputs(model.config, count, side, batch_size, device)
        x = x.to(dtype=dtype)
        with FlopCounterMode(display=False) as counter, Recorder() as recorder:
            model(x, t, condition)
        bare = recorder.replay()
        taken = timed({"model": lambda: model(x, t, condition), "bare": bare}, device, repeats)  # noqa: B023
        tokens = sum(x.topology.coarser().topology.lengths)
        flops = counter.get_total_flops()
        rows.append(
            [
                f"{batch_size}",
                f"{count:,} ({tokens // batch_size:,} + {side * side:,})",
                f"{taken['model']:.2f}",
                f"{taken['bare']:.2f}",
                f"{taken['model'] / taken['bare']:.2f}",
                f"{flops / 1e12:.3f}",
                f"{flops / taken['model'] / 1e9:.2f}",
                utilisation(flops, taken["model"], device),
            ]
        )
    return rows


def utilisation(flops: float, milliseconds: float, device: str) -> str:
    if device != "cuda":
        return ""
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    return "" if peak is None else f"{flops / milliseconds * 1e3 / peak:.0%}"


def sampling_row(model: SMDiT, dtype: torch.dtype, count: int, side: int, device: str) -> list[str]:
    x, _, condition = inputs(model.config, count, side, 1, device)
    sampler = EulerSampler(steps=50, guidance=5.0) if device == "cuda" else EulerSampler(steps=25, guidance=5.0)
    noise = x.to(dtype=dtype)
    sampler.sample(model, noise, condition)
    synchronise(device)
    begin = time.perf_counter()
    sampler.sample(model, noise, condition)
    synchronise(device)
    return [f"{count:,}", f"{sampler.steps}", f"{time.perf_counter() - begin:.2f}"]


def training_row(model: SMDiT, count: int, side: int, device: str, repeats: int) -> list[str]:
    model = model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, _, condition = inputs(model.config, count, side, 1, device)
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = flow_matching_loss(model, x, condition, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    torch.cuda.reset_peak_memory_stats()
    taken = timed({"step": step}, device, repeats)["step"]
    return [f"{count:,}", f"{taken:.1f}", f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment(device: str) -> str:
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    revision = commit.stdout.strip() or "unknown"
    return f"{machine}; Python {platform.python_version()}; torch {version('torch')}; commit {revision}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SCENES), default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compile the blocks (CUDA; about a minute)")
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    preset, dtype, counts, side = SCENES[device]
    if device == "cpu":
        torch.set_num_threads(1)
    model = SMDiT(SMDiTConfig.preset(preset)).to(device, dtype).eval()
    if arguments.compile:
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile()
    forwards = [row for count in counts for row in forward_rows(model, dtype, count, side, device, repeats)]
    command = f"python benchmarks/smdit_speed.py --device {device}" + " --compile" * arguments.compile
    head = ["batch", "voxels (voxel + image tokens)", "forward", "bare", "ratio", "TFLOP", "TFLOP/s", "of peak"]
    parts = [
        f"# SMDiT, {device}",
        f"`{command}`: {environment(device)}.",
        f"Preset {preset}, {dtype}; times are the shortest of {repeats} runs, in milliseconds.",
        table(head, forwards),
        table(["voxels", "guided Euler steps", "seconds"], [sampling_row(model, dtype, counts[0], side, device)]),
    ]
    if device == "cuda" and not arguments.compile:
        head = ["voxels", "training step (forward, backward, AdamW), ms", "peak memory, GiB"]
        parts.append(table(head, [training_row(model, counts[0], side, device, repeats)]))
    report = "\n\n".join(parts)
    print(report)
    if arguments.out:
        arguments.out.write_text(report + "\n")


if __name__ == "__main__":
    main()

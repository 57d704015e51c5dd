"""Time SMDiT against the bare matrix products and attention that it consists of.

    python benchmarks/smdit.py --device cpu [--out benchmarks/results/smdit_cpu.md]     # preset tiny, float32
    python benchmarks/smdit.py --device cuda [--out benchmarks/results/smdit_gpu.md]    # preset paper, bfloat16

"Bare" replays the very products and attention calls of a forward on tensors of the same shapes and strides, nothing
else; "recorded" is the forward as sampling runs call it, a CUDA graph. On CUDA the script also times the plain and the
compiled path, whole sampling runs of both stages, looks for gaps in a profiler's trace, and times training steps.
Kernels are built anew, so that the first call is a stranger's.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from _report import Report, shells, table

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]  # it has our name

import torch
from marope import kernel_backend
from smdit import (
    CapturedVelocity,
    EulerSampler,
    MasterWeights,
    SMDiT,
    SMDiTConfig,
    StructureDiT,
    StructureDiTConfig,
    compile_blocks,
    flow_matching_loss,
)
from sparse_vae import SparseConv3d, SparseTensor, convolution_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

SCENES = {"cpu": ("tiny", torch.float32, (2_475,), 16), "cuda": ("paper", torch.bfloat16, (20_000, 10_000), 32)}
TRAINING = {  # weights in half precision with masters; blocks compiled, and if so whether launched from C++
    "autocast": (False, None),
    "autocast, compiled blocks": (False, False),
    "MasterWeights": (True, None),
    "MasterWeights, compiled blocks": (True, False),
    "MasterWeights, compiled blocks launched from C++": (True, True),
}
PARTS = ("forward", "sampling", "training", "compiled")
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
    """Voxels of shells so thick that they fill as many tokens as surfaces of objects do.

    20,000 voxels of a 64^3 grid then make 4.3k tokens, 10,000 make 2.4k.
    """
    return shells(count, grid_size, thickness=2.2 if count > 15_000 else 1.6, innermost=2)


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


def convolution_flops(model: SMDiT, call: Callable[[], object]) -> float:
    """Operations of the submanifold convolutions in a call: 2 x channels in x channels out for every pair of rows."""
    total = 0.0

    def count(layer: SparseConv3d, arguments: tuple) -> None:
        nonlocal total
        topology = arguments[0].topology
        pairs = int((topology.neighbours(layer.kernel_size) < len(topology)).sum())
        total += 2.0 * pairs * layer.in_channels * layer.out_channels

    layers = [module for module in model.modules() if isinstance(module, SparseConv3d)]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    call()
    for handle in handles:
        handle.remove()
    return total


@torch.no_grad()  # in inference mode a dispatch mode would see composite operations, not the products in them
def forward_rows(model: SMDiT, dtype: torch.dtype, count: int, side: int, device: str, repeats: int) -> list[list[str]]:
    rows = []
    for batch_size in (1, 2):
        x, t, condition = inputs(model.config, count, side, batch_size, device)
        x = x.to(dtype=dtype)

        def call(x=x, t=t, condition=condition):
            return model(x, t, condition)

        with FlopCounterMode(display=False) as counter, Recorder() as recorder:
            call()
        flops = counter.get_total_flops()
        if device == "cuda":  # elsewhere convolutions are products that the counter has seen
            flops += convolution_flops(model, call)
        calls = {"model": call, "bare": recorder.replay()}
        if device == "cuda":
            captured = CapturedVelocity(model)
            calls["recorded"] = lambda x=x, t=t, c=condition, captured=captured: captured(x, t, c)
        taken = timed(calls, device, repeats)
        best = taken.get("recorded", taken["model"])
        tokens = sum(x.topology.coarser().topology.lengths)
        rows.append(
            [
                f"{batch_size}",
                f"{count:,} ({tokens // batch_size:,} + {side * side:,})",
                f"{taken['model']:.2f}",
                f"{taken['recorded']:.2f}" if "recorded" in taken else "",
                f"{taken['bare']:.2f}",
                f"{best / taken['bare']:.2f}",
                f"{flops / 1e12:.3f}",
                f"{flops / best / 1e9:.2f}",
                utilisation(flops, best, device),
            ]
        )
    return rows


def utilisation(flops: float, milliseconds: float, device: str) -> str:
    if device != "cuda":
        return ""
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    return "" if peak is None else f"{flops / milliseconds * 1e3 / peak:.0%}"


@torch.no_grad()
def path_rows(model: SMDiT, count: int, side: int, repeats: int) -> list[list[str]]:
    """The default path beside the plain one: time, and how far the velocities are apart."""
    x, t, condition = inputs(model.config, count, side, 1, "cuda")
    x = x.to(dtype=torch.bfloat16)

    def plain():
        with kernel_backend("torch"), convolution_backend("torch"):
            return model(x, t, condition).features.float()

    def default():
        return model(x, t, condition).features.float()

    difference = ((default() - plain()).norm() / plain().norm()).item()
    taken = timed({"default": default, "plain": plain}, "cuda", repeats)
    return [[f"{count:,}", f"{taken['default']:.2f}", f"{taken['plain']:.2f}", f"{difference:.1e}"]]


@torch.no_grad()
def compiled_rows(model: SMDiT, counts: tuple[int, ...], side: int, repeats: int) -> list[list[str]]:
    """Time of a forward with compiled blocks, and the seconds that the first one took."""
    compile_blocks(model)
    rows = []
    for count in counts:
        x, t, condition = inputs(model.config, count, side, 1, "cuda")
        x = x.to(dtype=torch.bfloat16)
        begin = time.perf_counter()
        model(x, t, condition)
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        captured = CapturedVelocity(model)
        calls = {
            "model": lambda x=x, t=t, c=condition: model(x, t, c),
            "recorded": lambda x=x, t=t, c=condition, captured=captured: captured(x, t, c),
        }
        taken = timed(calls, "cuda", repeats)
        rows.append([f"{count:,}", f"{taken['model']:.2f}", f"{taken['recorded']:.2f}", f"{first:.1f}"])
    return rows


def run_seconds(sampler: EulerSampler, model, noise, condition, device: str) -> float:
    """Seconds of a sampling run, recording included; an earlier run has built kernels and tables."""
    sampler.sample(model, noise, condition)
    synchronise(device)
    begin = time.perf_counter()
    sampler.sample(model, noise, condition)
    synchronise(device)
    return time.perf_counter() - begin


def sampling_row(name: str, model: SMDiT, dtype: torch.dtype, count: int, side: int, device: str) -> list[str]:
    x, _, condition = inputs(model.config, count, side, 1, device)
    sampler = EulerSampler(steps=50 if device == "cuda" else 25, guidance=5.0)
    seconds = run_seconds(sampler, model, x.to(dtype=dtype), condition, device)
    return [f"{name}, {count:,} voxels", f"{sampler.steps}, guidance throughout", f"{seconds:.2f}"]


def structure_row() -> list[str]:
    """Stage 1 at TRELLIS's size: 16^3 latents, 1374 tokens of condition."""
    model = StructureDiT(StructureDiTConfig.preset("paper")).to("cuda", torch.bfloat16).eval()
    wake(model)
    sampler = EulerSampler(steps=25, guidance=5.0, interval=(0.5, 1.0), shift=3.0)
    noise = torch.randn(1, 8, 16, 16, 16, device="cuda")
    seconds = run_seconds(sampler, model, noise, torch.randn(1, 1374, 1024, device="cuda"), "cuda")
    return ["stage 1, 4,096 tokens", "25, shift 3, guidance in [0.5, 1]", f"{seconds:.2f}"]


def largest_gap(model: SMDiT, count: int, side: int) -> float:
    """Longest idle time of the device, in microseconds, between the kernels of sampling steps 4 to 7 of 8."""
    x, _, condition = inputs(model.config, count, side, 1, "cuda")
    noise, sampler = x.to(dtype=torch.bfloat16), EulerSampler(steps=8, guidance=5.0)
    sampler.sample(model, noise, condition)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for step in sampler.trajectory(model, noise, condition):
            if step.index == 2:
                torch.cuda.synchronize()  # what comes later follows the recording without a break
        torch.cuda.synchronize()
    events = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    begin = events[0][0] + 0.55 * (events[-1][1] - events[0][0])
    gaps, busy_until = [0.0], None
    for start, end in events:
        if start > begin:
            if busy_until is not None:
                gaps.append(start - busy_until)
            busy_until = max(end, busy_until or end)
    return max(gaps)


def wake(model: torch.nn.Module) -> None:
    """Random weights where a new model has zeros, so that nothing multiplies or normalises zeros."""
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values.to(parameter))


def training_step(config: SMDiTConfig, count: int, side: int, halves: bool) -> tuple[SMDiT, Callable[[], None]]:
    """A model and its step of forward, backward and AdamW on one object; under autocast, or with masters of halves."""
    model = SMDiT(config).to("cuda").train()
    wake(model)
    masters = MasterWeights(model, torch.bfloat16) if halves else None
    parameters = model.parameters() if masters is None else masters.parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    x, _, condition = inputs(config, count, side, 1, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=masters is None):
            loss = flow_matching_loss(model, x, condition, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if masters is not None:
            masters.take_gradients()
        optimizer.step()
        if masters is not None:
            masters.give_weights()

    return model, step


def training_rows(config: SMDiTConfig, count: int, side: int, repeats: int, way: str) -> list[list[str]]:
    halves, cpp_wrapper = TRAINING[way]
    model, step = training_step(config, count, side, halves)
    if cpp_wrapper is not None:
        compile_blocks(model, cpp_wrapper=cpp_wrapper)
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    torch.cuda.reset_peak_memory_stats()
    taken = timed({"step": step}, "cuda", repeats)["step"]
    peak = torch.cuda.max_memory_allocated() / 2**30
    return [[way, f"{count:,}", f"{taken:.1f}", f"{peak:.1f}", f"{first:.1f}"]]


def environment(device: str) -> str:
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    revision = commit.stdout.strip() or "unknown"
    return f"{machine}; Python {platform.python_version()}; torch {version('torch')}; commit {revision}"


def forward_part(model: SMDiT, dtype: torch.dtype, counts: tuple[int, ...], side: int, device: str, repeats: int):
    head = [
        "batch",
        "voxels (voxel + image tokens)",
        "forward",
        "recorded",
        "bare",
        "ratio",
        "TFLOP",
        "TFLOP/s",
        "of peak",
    ]
    yield table(head, [row for n in counts for row in forward_rows(model, dtype, n, side, device, repeats)])
    if device == "cuda":
        head = ["voxels", "default", "plain PyTorch", "difference"]
        yield table(head, path_rows(model, counts[0], side, repeats))


def sampling_part(model: SMDiT, dtype: torch.dtype, counts: tuple[int, ...], side: int, device: str) -> Iterator[str]:
    rows = [sampling_row("stage 2", model, dtype, counts[0], side, device)]
    yield table(["run", "steps", "seconds"], [structure_row(), *rows] if device == "cuda" else rows)
    if device == "cuda":
        gap = largest_gap(model, counts[0], side)
        yield f"Longest time that the device was idle between kernels of consecutive sampling steps: {gap:.1f} us."


def training_part(config: SMDiTConfig, count: int, side: int, repeats: int, ways: Sequence[str]) -> Iterator[str]:
    head = ["training step, bf16", "voxels", "forward + backward + AdamW, ms", "peak memory, GiB", "first step, s"]
    for way in ways:
        yield table(head, training_rows(config, count, side, repeats, way))
        torch.compiler.reset()


def compiled_part(model: SMDiT, dtype: torch.dtype, counts: tuple[int, ...], side: int, repeats: int) -> Iterator[str]:
    """Comes last: the model stays compiled."""
    yield table(["voxels", "compiled blocks", "recorded", "first call, s"], compiled_rows(model, counts, side, repeats))
    row = sampling_row("stage 2, compiled", model, dtype, counts[0], side, "cuda")
    yield table(["run", "steps", "seconds"], [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SCENES), default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to time; the last two need CUDA")
    parser.add_argument("--ways", nargs="+", choices=tuple(TRAINING), default=tuple(TRAINING), help="of training")
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    preset, dtype, counts, side = SCENES[device]
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    model = SMDiT(SMDiTConfig.preset(preset)).to(device, dtype).eval()
    wake(model)
    x, t, condition = inputs(model.config, counts[0], side, 1, device)
    synchronise(device)
    begin = time.perf_counter()
    with torch.no_grad():
        model(x.to(dtype=dtype), t, condition)
    synchronise(device)
    first = time.perf_counter() - begin
    report = Report(arguments.out)
    report.add(f"# SMDiT, {device}")
    report.add(f"`python benchmarks/smdit.py --device {device}`: {environment(device)}.")
    report.add(
        f"Preset {preset}, {dtype}; times are the shortest of {repeats} runs, in milliseconds. First call, "
        f"kernels built anew: {first:.1f} s."
    )
    parts = {
        "forward": lambda: forward_part(model, dtype, counts, side, device, repeats),
        "sampling": lambda: sampling_part(model, dtype, counts, side, device),
        "training": lambda: training_part(model.config, counts[0], side, repeats, arguments.ways),
        "compiled": lambda: compiled_part(model, dtype, counts, side, repeats),
    }
    for name, part in parts.items():
        if name in arguments.parts and (device == "cuda" or name in ("forward", "sampling")):
            for text in part():
                report.add(text)


if __name__ == "__main__":
    main()

"""Time training: the 2to3-VAE and both flows, on objects made on the fly, through the very engine of `diff2to3 train`.

    python benchmarks/train.py --device cuda --parts vae,structure-flow,flow [--presets small,paper] [--out FILE.md]
    python benchmarks/train.py --device cuda --parts continued --presets small      # half a run, then resumed
    python benchmarks/train.py --device cuda --parts budget          # most voxels of a batch in 80 GB
    python benchmarks/train.py --device cuda --parts processes --presets paper      # two GPUs: DDP and FSDP2
    python benchmarks/train.py --device cuda --parts switch --presets small         # from one to two and back
    python benchmarks/train.py --parts resume,kills,disk             # what interrupts a run, on the CPU
    python benchmarks/train.py --tiny --parts vae,structure-flow,flow,processes     # all of it at the smallest size

Speed, MFU and memory are those that the engine logs, over `--steps` steps after as many to warm up: data are read from
disk, decoded and put together meanwhile. "Busy" is the share of the time in which a kernel ran, from a profiler's trace
of ten later steps. MFU counts the products and attention of the plain implementations, three times for what learns and
once for what is frozen, over the device's dense bfloat16 peak.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _report import Report, shells, table

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

import numpy as np
import torch
from diff2to3.data._render_stage import write_objects
from diff2to3.data._store import Store, encode_pngs
from diff2to3.data._views import orbit
from diff2to3.train._checkpoint import save_model
from diff2to3.train._config import TrainConfig
from diff2to3.train._engine import train
from diff2to3.train._parallel import recompute_blocks
from diff2to3.train._stage import to_device
from diff2to3.train.stages import build_stage
from flux_features import FluxFeatures, FluxFeaturesConfig
from sparse_vae import SparseVAE, SparseVAEConfig, StructureVAE, StructureVAEConfig

TRELLIS_STEP = 0.180
"""Seconds of TRELLIS's SLAT flow L, forward and backward, one object of 20,000 voxels, fp16, on an H200."""
LIMIT = 80e9
BATCH = {"small": {"vae": 8, "structure-flow": 64, "flow": 8}, "paper": {"vae": 4, "structure-flow": 8, "flow": 4}}
"""Objects of a step."""
PARTS = ("vae", "structure-flow", "flow", "continued", "budget", "processes", "switch")
TESTS = Path(__file__).parents[1] / "tests" / "train"


@dataclass(frozen=True)
class Size:
    """How large the objects and models are."""

    grid: int
    voxels: int
    picture: int
    objects: int
    models: dict[str, dict[str, Any]]


def size_of(preset: str) -> Size:
    """The preset's models on 64^3 grids and 512^2 pictures."""
    models = {name: {"preset": preset} for name in ("features", "vae", "structure-vae", "structure-flow", "flow")}
    if (
        preset == "paper"
    ):  # TRELLIS's stage 1 sees DINOv2's tokens, which carry places; the paper's FLUX's, which do not
        models["structure-flow"] |= {"condition_channels": 64, "condition_position": "absolute"}
    return Size(64, 20_000, 512, 32, models)


TINY = Size(
    16,
    200,
    32,
    8,
    {
        "features": {"image_size": 32, "encoder_blocks": [0, 0, 0, 1], "decoder_blocks": [1, 0, 0, 0]},
        "vae": {"grid_size": 16, "width": 32, "num_blocks": 1, "num_heads": 2, "window_size": 4,
                "gaussians": {"num_gaussians": 2, "scale_bias": 0.03}},
        "structure-vae": {"grid_size": 16, "latent_channels": 4, "encoder_channels": [8, 8],
                          "decoder_channels": [8, 8], "num_middle_blocks": 1},
        "structure-flow": {"latent_channels": 4, "grid_size": 8, "width": 32, "num_heads": 2, "head_dim": 16,
                           "num_double_blocks": 1, "num_single_blocks": 1},
        "flow": {"grid_size": 16, "io_channels": [16], "width": 32, "num_heads": 2, "head_dim": 16,
                 "num_double_blocks": 1, "num_single_blocks": 1},
    },
)  # fmt: skip


def make_data(root: Path, size: Size) -> Path:
    """A data set of shells in every stage up to `latents`; pictures are smooth, so that they decode as usual.

    The last of 32 objects has 2.5 % fewer voxels than the first.
    """
    store, rng = Store(root), np.random.default_rng(0)
    coords = shells(size.voxels, size.grid, thickness=2.2, innermost=2).numpy().astype(np.uint8)
    names = [f"object{number:03d}" for number in range(size.objects)]
    write_objects(store, [{"id": name, "split": "train"} for name in names])
    views, side = 4, size.picture
    y, x = np.mgrid[:side, :side] / side
    for number, name in enumerate(names):
        waves = [np.sin(rng.uniform(5, 40) * x + rng.uniform(5, 40) * y + k) for k in range(3 * views)]
        colour = np.stack(waves).reshape(views, 3, side, side).transpose(0, 2, 3, 1) * 100 + 128
        inside = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.16) * 255.0
        alpha = np.broadcast_to(inside[None, ..., None], (views, side, side, 1))
        png, bounds = encode_pngs(np.concatenate([colour, alpha], -1).astype(np.uint8))
        azimuth, ones = rng.uniform(0, 360, views), np.ones(views)
        cameras = orbit(azimuth, 20 * ones, 2 * ones, 40 * ones, side)
        rendered = {"condition_azimuth": azimuth.astype(np.float32)}
        for kind in ("view", "condition"):
            rendered |= {f"{kind}_png": png, f"{kind}_bounds": bounds}
            rendered |= {f"{kind}_pose": cameras.world_to_camera, f"{kind}_intrinsics": cameras.intrinsics}
        own = coords[: len(coords) - len(coords) * number // 1250]  # no two objects have the same number
        features = rng.normal(size=(1, len(own), 16)).astype(np.float16)
        variants = {"hue": np.zeros(1, np.float32), "mirrored": np.zeros(1, np.uint8)}
        store.write("render", name, rendered, {})
        store.write("voxels", name, {"coords": own}, {})
        store.write("features", name, {"features": features} | variants, {})
        latents = rng.normal(size=(1, 4, len(own), 8)).astype(np.float16)
        store.write("latents", name, {"latents": latents}, {})
    for stage in ("render", "voxels", "features", "latents"):
        store.write_manifest(stage, {}, store.finished(stage, {}, names), {})
    return root


def make_parts(root: Path, size: Size) -> dict[str, Path]:
    """Model folders that flows build on, with random weights; returns them by role."""
    made = {}
    unit = {"latent_mean": [0.0] * 8, "latent_std": [1.0] * 8}
    for role, config_class, model_class, name in (
        ("features", FluxFeaturesConfig, FluxFeatures, "features"),
        ("vae", SparseVAEConfig, SparseVAE, "vae"),
        ("structure_vae", StructureVAEConfig, StructureVAE, "structure-vae"),
    ):
        values = dict(size.models[name])
        config = config_class.preset(values.pop("preset", "tiny"))
        config = config_class.model_validate(config.model_dump() | values)
        if role != "features":
            count = config.latent_channels
            config = config.model_copy(update={k: tuple(v[:count]) for k, v in unit.items()})
        save_model(root / role, config, model_class(config).state_dict())
        made[role] = root / role
    return made


def settings(name: str, size: Size, data: Path, parts: dict[str, Path], out: Path, **changes: Any) -> TrainConfig:
    roles = {"flow": ("features", "vae"), "structure-flow": ("features", "structure_vae")}.get(name, ())
    values: dict[str, Any] = {
        "data": data,
        "out": out,
        "model": size.models[name],
        "parts": {role: parts[role] for role in roles},
        "streaming": True,
        "workers": 8,
        "warmup_steps": 0,
        "checkpoint_every": None,
        "validate_every": 10**9,
    }
    return TrainConfig(**values | changes)


def logged(out: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


class Busy:
    """Share of the time in which the device works, over ten steps from a given one on."""

    def __init__(self, first: int, device: str) -> None:
        self.first, self.device, self.share = first, device, float("nan")
        self.profile: Any = None

    def __call__(self, step: int) -> None:
        if self.device != "cuda":
            return
        if step == self.first:
            torch.cuda.synchronize()
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profile.start()
        elif step == self.first + 10:
            torch.cuda.synchronize()
            self.profile.stop()
            spans = sorted(
                (event.time_range.start, event.time_range.end)
                for event in self.profile.events()
                if event.device_type == torch.autograd.DeviceType.CUDA
            )
            busy, until = 0.0, spans[0][0]
            for start, end in spans:
                busy += max(0.0, end - max(start, until))
                until = max(until, end)
            self.share = busy / (until - spans[0][0])


def made_on(device: str, name: str, config: TrainConfig) -> Any:
    """The stage, its weights drawn on the device: a billion of them take half a minute on a CPU."""
    with torch.device(device):
        return build_stage(name, config)


def measure(name: str, config: TrainConfig, steps: int, device: str) -> dict[str, float]:
    """The engine's figures over the second `steps` steps, and the busy share over ten later ones."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    busy = Busy(2 * steps + 2, device)
    config = config.model_copy(update={"steps": 2 * steps + 14, "log_every": steps})
    with contextlib.redirect_stdout(sys.stderr):
        train(made_on(device, name, config), config, on_step=busy)
    figures = next(line for line in logged(config.out) if line["step"] == 2 * steps)
    return figures | {"busy": busy.share}


def speed_rows(name: str, preset: str, size: Size, root: Path, steps: int, device: str, options: dict) -> list:
    data, parts = root / "data", {p.name: p for p in (root / "parts").iterdir()}
    batch = BATCH[preset][name] if preset in BATCH else 2
    choices: dict[str, dict[str, Any]] = {f"batch {batch}": {"batch_size": batch}}
    if name == "flow":
        choices = {"batch 1": {"batch_size": 1}} | choices
    choices["recomputed blocks"] = {"batch_size": batch, "gradient_checkpointing": True}
    if name == "structure-flow" and device == "cuda":
        choices["compiled"] = {"batch_size": batch, "compile": True}
    if name != "vae":
        half = {"precision": "bf16-weights", "compile": True}
        choices |= {f"{label}, bf16 weights, compiled": choices[label] | half for label in list(choices)[:-1]}
    rows = []
    for label, changes in choices.items():
        out = root / f"{name}-{label}".replace(" ", "-")
        try:
            figures = measure(name, settings(name, size, data, parts, out, **options | changes), steps, device)
        except torch.OutOfMemoryError:
            rows.append([preset, name, label, "does not fit", "", "", "", "", ""])
            continue
        except Exception as error:  # of compilers, say: the other rows are still worth having
            rows.append([preset, name, label, " ".join(f"failed: {error}".split())[:200], "", "", "", "", ""])
            continue
        versus = f"{figures['objects/s'] * TRELLIS_STEP:.2f}" if name == "flow" and preset == "paper" else ""
        rows.append(
            [
                preset,
                name,
                label,
                f"{1e3 / figures['it/s']:.1f}",
                f"{figures['objects/s']:.2f}",
                f"{figures['mfu']:.1%}" if "mfu" in figures else "",
                f"{figures['busy']:.1%}" if figures["busy"] == figures["busy"] else "",
                f"{figures['GiB']:.1f}" if "GiB" in figures else "",
                versus,
            ]
        )
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)  # all that there is if a later one takes too long
    return rows


SPEED = ["preset", "stage", "batch", "step, ms", "objects/s", "MFU", "busy", "peak GiB", "times TRELLIS's"]


def memory(stage: Any, config: TrainConfig) -> float:
    """Bytes that a step takes at most with a budget of voxels; infinity where it does not fit the device."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        batch = to_device(stage.batches(config, "train", device)[0], device)
        stage.prepare(batch)
        optimizer = torch.optim.AdamW([p for p in stage.model.parameters() if p.requires_grad], fused=True)
        average = [p.detach().clone() for p in stage.model.parameters()]  # as the engine's
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = stage(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del average
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        stage.model.zero_grad(set_to_none=True)


def budget_rows(size: Size, root: Path, options: dict) -> list:
    """Most objects of a batch whose step stays within 80 GB, and their voxels."""
    data, parts = root / "data", {p.name: p for p in (root / "parts").iterdir()}
    rows = []
    for name in ("vae", "flow"):
        stage = made_on("cuda", name, settings(name, size, data, parts, root / "budget", **options))
        for recompute in (False, True):
            if recompute:
                recompute_blocks(stage.model)
            found: dict[int, float] = {}

            def fits(count: int, name=name, stage=stage, found=found) -> bool:
                config = settings(name, size, data, parts, root / "budget", **options | {"batch_size": count})
                found[count] = memory(stage, config)
                return found[count] <= LIMIT

            low, high = 0, 1
            while high <= size.objects and fits(high):
                low, high = high, 2 * high
            high = min(high, size.objects + 1)
            while high - low > max(1, low // 8):
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            taken = f"{found[low] / 1e9:.1f}" if low else ""
            rows.append([name, "recomputed" if recompute else "kept", f"{low}", f"{low * size.voxels:,}", taken])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
        del stage, fits
    return rows


BUDGET = ["stage, preset paper", "inside of blocks", "objects", "voxels", "peak GB"]


def launch(name: str, config: TrainConfig, ranks: int, resume: bool = False) -> list[dict[str, float]]:
    """Trains in processes that Accelerate's launcher starts; returns what they logged."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "config.yaml"
    path.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(ranks), "--num_machines", "1"]
    command += ["--multi_gpu"] * (ranks > 1) + ["--mixed_precision", "no", "--main_process_port", "0"]
    command += ["--dynamo_backend", "no", "-m", "diff2to3", "train", name, str(path), *["--resume"] * resume]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    return logged(config.out)


def process_rows(size: Size, root: Path, steps: int, options: dict, batch: int) -> list:
    """One process, two with DDP, two with FSDP2: speed of equal batches each, losses of equal global batches."""
    data, parts = root / "data", {p.name: p for p in (root / "parts").iterdir()}
    options = options | {"steps": 2 * steps, "log_every": steps, "batch_size": batch, "checkpoint_every": None}
    rows, reference, one = [], [], 0.0
    for label, ranks, changes in (
        ("one", 1, {}),
        ("one, two batches a step", 1, {"accumulate": 2}),
        ("two, DDP", 2, {}),
        ("two, FSDP2", 2, {"sharding": "fsdp2"}),
    ):
        out = root / f"processes-{len(rows)}"
        lines = launch("flow", settings("flow", size, data, parts, out, **options | changes), ranks)
        losses, speed = [line["loss"] for line in lines], lines[-1]["objects/s"]
        if "accumulate" in changes:
            reference = losses
        one = one or speed
        taken = f"{lines[-1]['GiB']:.1f}" if "GiB" in lines[-1] else ""
        rows.append([label, f"{speed:.2f}", f"{speed / one:.2f}", taken, *compare(losses, reference)])
    return rows


def continued_rows(size: Size, root: Path, steps: int, options: dict) -> list:
    """Runs that go on from half-way, against the same throughout."""
    data, parts = root / "data", {p.name: p for p in (root / "parts").iterdir()}
    options = options | {"steps": 2 * steps, "log_every": 1, "batch_size": 2, "checkpoint_every": steps}
    rows = []
    for name in ("vae", "structure-flow", "flow"):
        out = root / f"continued-{name}"
        config = settings(name, size, data, parts, out, **options)
        for resume in (False, True):
            torch.manual_seed(0)
            with contextlib.redirect_stdout(sys.stderr):
                train(build_stage(name, config), config, resume=resume)
            (out / "checkpoints" / f"{2 * steps:08d}").rename(out / f"end-{resume}")
        losses = [line["loss"] for line in logged(out)]
        rows.append([name, f"{steps} + {steps}", *compare(losses[2 * steps :], losses[steps : 2 * steps])])
    return rows


CONTINUED = ["stage", "steps", "losses after going on, first and last", "differ from the run throughout by at most"]


def switch_rows(size: Size, root: Path, steps: int, options: dict, batch: int) -> list:
    """Runs that go on from half-way, with another number of processes than they began with."""
    data, parts = root / "data", {p.name: p for p in (root / "parts").iterdir()}
    options = options | {"steps": 2 * steps, "log_every": 1, "batch_size": batch, "checkpoint_every": steps}
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {"accumulate": 2}),
        "two with FSDP2": (2, {"sharding": "fsdp2"}),
    }
    rows, reference = [], []
    for label, (ranks, changes) in ways.items():
        out = root / label.replace(" ", "-")
        lines = launch("flow", settings("flow", size, data, parts, out, **options | changes), ranks)
        reference = reference or [line["loss"] for line in lines]
        (out / "checkpoints" / f"{2 * steps:08d}").rename(out / "end")
    for (first, second), (ranks, changes) in zip(
        (tuple(ways), tuple(reversed(ways))), reversed(ways.values()), strict=True
    ):
        out = root / first.replace(" ", "-")
        lines = launch("flow", settings("flow", size, data, parts, out, **options | changes), ranks, resume=True)
        rows.append([first, second, *compare([line["loss"] for line in lines][-steps:], reference[-steps:])])
    return rows


def compare(losses: list[float], reference: list[float]) -> list[str]:
    """First and last loss, and the largest relative difference."""
    if not reference:
        return ["", ""]
    gap = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
    return [f"{losses[0]:.4f}, {losses[-1]:.4f}", f"{gap:.1e}"]


PROCESSES = ["processes", "objects/s", "of one's", "peak GiB a GPU", "loss, first and last", "differs by at most"]
SWITCH = ["first half", "second half", "loss, first and last", "differs from one throughout by at most"]


def interruption_rows(parts: list[str]) -> list:
    """Tests of what interrupts a run, with what they count."""
    chosen = {
        "resume": ["test_engine.py", "-k", "bit_for_bit"],
        "kills": ["test_state.py", "-k", "dies_at or twenty"],
        "disk": ["test_state.py", "-k", "full_disk or grow or damaged or whole"],
    }
    rows = []
    for part in (part for part in chosen if part in parts):
        file, *options = chosen[part]
        command = [sys.executable, "-m", "pytest", "-q", str(TESTS / file), *options]
        process = subprocess.run(command, capture_output=True, text=True)
        lines = process.stdout.strip().splitlines()
        counts = [line for line in lines if " passed" in line or " failed" in line] or lines[-1:]
        rows.append([part, " ".join(["pytest", f"tests/train/{file}", *options]), counts[-1].strip("= ")])
    return rows


def environment(device: str) -> str:
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return f"{machine}; Python {platform.python_version()}; torch {version('torch')}; commit {commit.stdout.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parts", default="vae,structure-flow,flow", help="which tables, separated by commas")
    parser.add_argument("--presets", default="small,paper")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="everything at the smallest size")
    parser.add_argument("--lpips", type=Path, help="LPIPS's VGG16 weights; without them the VAE has no such term")
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")
    arguments = parser.parse_args()
    device, parts = arguments.device, arguments.parts.split(",")
    options: dict[str, Any] = {} if device == "cuda" else {"device": "cpu", "precision": "fp32"}
    report = Report(arguments.out)
    report.add(f"# Training, {device}")
    report.add(f"`python benchmarks/train.py {' '.join(sys.argv[1:])}`: {environment(device)}.")
    if interruptions := interruption_rows(parts):
        report.add(table(["part", "command", "result"], interruptions))
    for preset in ["tiny"] if arguments.tiny else arguments.presets.split(","):
        wanted = [part for part in PARTS if part in parts]
        if not wanted:
            continue
        size = TINY if arguments.tiny else size_of(preset)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            make_data(root / "data", size)
            make_parts(root / "parts", size)
            for part in wanted:
                if part == "processes":
                    rows = process_rows(size, root, arguments.steps, options, 2)
                    report.add(f"Stage `flow`, preset {preset}.\n\n{table(PROCESSES, rows)}")
                elif part == "switch":
                    rows = switch_rows(size, root, arguments.steps, options, 2)
                    report.add(f"Stage `flow`, preset {preset}.\n\n{table(SWITCH, rows)}")
                elif part == "continued":
                    report.add(table(CONTINUED, continued_rows(size, root, arguments.steps, options)))
                elif part == "budget":
                    report.add(table(BUDGET, budget_rows(size, root, options)))
                else:
                    more = {"options": {"lpips": arguments.lpips}} if arguments.lpips and part == "vae" else {}
                    rows = speed_rows(part, preset, size, root, arguments.steps, device, options | more)
                    report.add(table(SPEED, rows))


if __name__ == "__main__":
    main()

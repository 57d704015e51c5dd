"""Batch generation: ``diff2to3 generate DIR`` by one process and by workers: objects a second, and the same files?

    python benchmarks/generate.py                                    # CPU, 2 workers of one thread each
    python benchmarks/generate.py --device cuda --workers 2 --count 32
    python benchmarks/generate.py --device cuda --workers 2 --kill   # a worker is killed half-way
    python benchmarks/generate.py --engine ray

Of N workers each takes one of the GPUs that there are, in turn. The rate counts from the moment when each process has
made an object, so that loading does not; the whole time of the command, with loading, stands beside it. The pictures
are those of examples/, turned, so that each is another one.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]  # holds smdit.py

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))


@dataclass(frozen=True)
class Result:
    """A run: seconds in all, objects a second once every process has made one, contents of its splats by name."""

    seconds: float
    rate: float
    splats: dict[str, bytes]


def write_pictures(folder: Path, count: int) -> None:
    from PIL import Image

    for number in range(count):
        picture = Image.open(EXAMPLES[number % len(EXAMPLES)])
        turned = picture.rotate(7 * (number // len(EXAMPLES)), resample=Image.Resampling.BICUBIC)
        turned.save(folder / f"p{number:03d}.png")


def run(pictures: Path, out: Path, options: list[str], processes: int = 1, kill_after: int | None = None) -> Result:
    command = [sys.executable, "-m", "diff2to3", "generate", str(pictures), "-o", str(out), *options]
    start, times = time.perf_counter(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for _ in process.stdout:
        times.append(time.perf_counter())
        if len(times) == kill_after:
            threading.Thread(target=kill_a_worker, args=(process.pid,)).start()
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")
    seconds = time.perf_counter() - start
    splats = {path.name: path.read_bytes() for path in sorted(out.glob("*.ply"))}
    if len(times) != len(splats):
        raise RuntimeError(f"{len(times)} objects were told and {len(splats)} are there")
    rate = (len(times) - processes) / (times[-1] - times[processes - 1]) if len(times) > processes else 0.0
    return Result(seconds, rate, splats)


def kill_a_worker(parent: int) -> None:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            found = int(fields[1]) == parent and "spawn_main" in (folder / "cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if found:
            os.kill(int(folder.name), signal.SIGKILL)
            return


def machine(device: str) -> str:
    import torch

    if device != "cuda":
        return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--engine", default="local", choices=["local", "ray"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=12, help="objects")
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many is taken")
    parser.add_argument("--format", default="ply", help="files of each object")
    parser.add_argument("--steps", type=int, help="of both stages; default: the pipeline's")
    parser.add_argument("--pipeline", help="default: the embedded one")
    parser.add_argument("--threads", type=int, default=1, help="of each process, on the CPU")
    parser.add_argument("--kill", action="store_true", help="kill a worker half-way (engine local)")
    options = parser.parse_args()
    base = ["--device", options.device, "--format", options.format, "--threads", str(options.threads)]
    base += ["--steps", str(options.steps)] if options.steps else []
    base += ["--pipeline", options.pipeline] if options.pipeline else []
    spread = ["--engine", options.engine, "--workers", str(options.workers)]
    kill_after = options.count // 2 if options.kill else None
    serial, workers = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        write_pictures(folder / "in", options.count)
        run(EXAMPLES[0], folder / "warm", base)  # compiled kernels are on disk from here on
        for number in range(options.rounds):
            serial.append(run(folder / "in", folder / f"serial{number}", base))
            workers.append(run(folder / "in", folder / f"workers{number}", base + spread, options.workers, kill_after))
    one, many = (max(results, key=lambda result: result.rate) for results in (serial, workers))
    same = sum(one.splats[name] == many.splats.get(name) for name in one.splats)
    print(f"{machine(options.device)}; {options.count} objects, {options.format}, best of {options.rounds}\n")
    print("| run | objects a second | against serial | whole command |\n|---|---|---|---|")
    print(f"| serial | {one.rate:.3f} | 1 | {one.seconds:.1f} s |")
    killed = ", one killed half-way" if options.kill else ""
    label = f"{options.workers} workers, {options.engine}{killed}"
    print(f"| {label} | {many.rate:.3f} | {many.rate / one.rate:.2f} | {many.seconds:.1f} s |")
    print(f"\n{len(many.splats)} of {options.count} objects, {same} of them byte for byte as the serial run's")
    complete = len(many.splats) == len(one.splats) == options.count
    return 0 if complete and (same == options.count or options.device != "cpu") else 1


if __name__ == "__main__":
    raise SystemExit(main())

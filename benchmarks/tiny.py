"""What the embedded pipeline costs whoever runs it: start-up, time, memory, and whether it repeats itself.

    python benchmarks/tiny.py            # this machine
    python benchmarks/tiny.py --stages   # where the CPU seconds go, on one thread
    python benchmarks/tiny.py --gpu      # how far CUDA is from the CPU for the same seed

How good its results are is measured by `diff2to3 eval reconstruction` and `diff2to3 eval generation`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]  # holds smdit.py

PICTURE = Path(__file__).parents[1] / "examples" / "chair.png"


def process(*command: str, **variables: str) -> tuple[float, float]:
    """Wall-clock seconds and peak resident GB of a whole process, with more environment variables."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | variables,
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def best_start(*command: str) -> float:
    return min(process(*command)[0] for _ in range(5))


def cpu_rows() -> list[tuple[str, str, str, bool]]:
    bare = best_start("-c", "pass")
    imported = best_start("-c", "import diff2to3") - bare
    shown = best_start("-m", "diff2to3", "--help")
    rows = [
        ("`import diff2to3`", f"{imported:.2f} s", "0.3 s", imported <= 0.3),
        ("`diff2to3 --help`, whole process", f"{shown:.2f} s", "0.5 s", shown <= 0.5),
    ]
    with tempfile.TemporaryDirectory() as folder:
        generate = ("-m", "diff2to3", "generate", str(PICTURE), "--device", "cpu", "-o")
        first, _ = process(*generate, f"{folder}/first", NUMBA_CACHE_DIR=folder)  # no compiled kernels on disk yet
        process(*generate, f"{folder}/warm")
        seconds, gigabytes = process(*generate, f"{folder}/a")
        process(*generate, f"{folder}/b")
        same = (Path(folder, "a/chair.ply").read_bytes()) == (Path(folder, "b/chair.ply").read_bytes())
    return [
        *rows,
        ("`diff2to3 generate`, whole process, every output", f"{seconds:.1f} s", "20 s", seconds <= 20),
        ("the very first one, which compiles the renderer", f"{first:.1f} s", "20 s", first <= 20),
        ("its resident memory", f"{gigabytes:.2f} GB", "2 GB", gigabytes <= 2),
        ("the same seed twice", "the same .ply" if same else "another .ply", "the same bytes", same),
    ]


ONE_THREAD = """
import runpy, sys, time
time.perf_counter = time.process_time  # the manifest's timings become CPU seconds
runpy.run_module("diff2to3", run_name="__main__")
"""


def stages() -> str:
    """CPU seconds of one `generate` on one thread, stage by stage, as a table."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["generate", str(PICTURE), "--device", "cpu", "--threads", "1", "-o", folder, "--overwrite"]
        for _ in range(2):  # the second finds compiled kernels
            before = os.times()
            subprocess.run([sys.executable, "-c", ONE_THREAD, *arguments], check=True, capture_output=True)
            after = os.times()
        timings = json.loads(Path(folder, "chair.json").read_text())["timings"]
    whole = after.children_user + after.children_system - before.children_user - before.children_system
    rows = {"start and end of the process": whole - sum(timings.values()), **timings, "all": whole}
    return "\n".join(["| stage | CPU s |", "|---|---|", *(f"| {name} | {value:.2f} |" for name, value in rows.items())])


def gpu_row() -> tuple[str, str, str, bool]:
    from diff2to3 import Pipeline
    from gs_render import Camera, render

    colors = []
    for device in ("cpu", "cuda"):
        gaussians = Pipeline.from_pretrained(device=device)(PICTURE, seed=0).gaussians.to("cpu")
        colors.append(render(gaussians, Camera.orbit(num_views=8, size=256), 1.0, backend="cpu").color.mean((1, 2)))
    gap = (colors[0] - colors[1]).abs().max().item()
    return ("CPU and CUDA, mean colour of 8 views", f"{gap:.1e} apart", "1e-2", gap <= 1e-2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="compare CUDA with the CPU")
    parser.add_argument("--stages", action="store_true", help="CPU seconds by stage")
    options = parser.parse_args()
    if options.stages:
        print(stages())
        return 0
    rows = [gpu_row()] if options.gpu else cpu_rows()
    print("| what | measured | wanted | met |\n|---|---|---|---|")
    for what, measured, wanted, met in rows:
        print(f"| {what} | {measured} | {wanted} | {'yes' if met else 'no'} |")
    return 0 if all(row[3] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Speed and agreement of gs_render's backends.

    python benchmarks/render.py            # CPU: against the plain torch backend, turntables; two threads
    python benchmarks/render.py --gpu      # CUDA: gsplat backend against the oracle, and what our call adds to gsplat's

`--write FILE` replaces the section of that machine in a results file (benchmarks/results/render.md).
"""

from __future__ import annotations

import argparse
import functools
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from gs_render import Camera, Gaussians, render, render_batch

FIELDS = ("means", "scales", "quaternions", "opacities", "sh")
Row = tuple[str, str, str, str]


def shell_scene(count: int, pixels: tuple[float, float] = (1.0, 3.0), size: int = 512) -> tuple[Gaussians, Camera]:
    """A sphere of Gaussians whose standard deviations span `pixels`, and one camera."""
    generator = torch.Generator().manual_seed(0)
    camera = Camera.orbit(1, radius=2.0, size=size)
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    per_pixel = 2.0 / float(camera.intrinsics[0, 0, 0])
    scales = (pixels[0] + (pixels[1] - pixels[0]) * torch.rand(count, 3, generator=generator)) * per_pixel
    quaternions = torch.randn(count, 4, generator=generator)
    opacities = 0.05 + 0.9 * torch.rand(count, generator=generator)
    rgb = torch.rand(count, 3, generator=generator)
    return Gaussians.from_rgb(0.45 * direction, scales, quaternions, opacities, rgb), camera


def leaves(gaussians: Gaussians, dtype: torch.dtype = torch.float32, device: str | None = None) -> Gaussians:
    """The same values as leaves of a new graph."""
    moved = gaussians.detach().to(device, dtype)
    return Gaussians(**{name: getattr(moved, name).clone().requires_grad_() for name in FIELDS})


def best_of(call: Callable[[], object], repeats: int) -> float:
    """Shortest wall time in seconds; after one warm-up, unless one call is all there is."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def forward(gaussians: Gaussians, camera: Camera, backend: str) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return render(gaussians, camera, backend=backend)

    return call


def forward_backward(gaussians: Gaussians, camera: Camera, backend: str) -> Callable[[], object]:
    def call() -> None:
        render(leaves(gaussians), camera, backend=backend).color.square().mean().backward()

    return call


def cpu_rows() -> list[Row]:
    torch.set_num_threads(2)
    rows = []
    for count, limit in ((100_000, 0.12), (500_000, 0.45)):
        scene, camera = shell_scene(count)
        seconds = best_of(forward(scene, camera, "cpu"), 10)
        both = best_of(forward_backward(scene, camera, "cpu"), 5)
        rows.append(
            (
                f"cpu forward, {count} Gaussians of 1-3 px, 512^2",
                f"{seconds:.3f} s",
                f"<= {limit} s",
                ok(seconds <= limit),
            )
        )
        ratio = both / seconds
        rows.append(
            (f"cpu forward + backward, {count}", f"{both:.3f} s, {ratio:.2f}x forward", "<= 3x", ok(ratio <= 3))
        )
        if count == 100_000:
            slow = best_of(forward(scene, camera, "torch"), 1)
            slow_both = best_of(forward_backward(scene, camera, "torch"), 1)
            for name, ours, theirs in (("forward", seconds, slow), ("forward + backward", both, slow_both)):
                factor = theirs / ours
                rows.append(
                    (f"torch {name}, {count}", f"{theirs:.2f} s, {factor:.0f}x cpu", ">= 15x", ok(factor >= 15))
                )
    return rows + turntable_rows()


def turntable_rows() -> list[Row]:
    from gs_render import save_video, turntable_cameras

    rows = []
    for count, frames, size, limit in ((50_000, 120, 512, 9.0), (20_000, 48, 384, 3.0)):
        scene, _ = shell_scene(count, size=size)
        with tempfile.TemporaryDirectory() as folder:
            path, cameras = Path(folder) / "turntable.mp4", turntable_cameras(frames, size)
            seconds = best_of(functools.partial(save_video, scene, path, cameras), 2)
        label = f"turntable .mp4, {frames} frames {size}^2, {count} Gaussians"
        rows.append((label, f"{seconds:.2f} s", f"<= {limit:.0f} s", ok(seconds <= limit)))
    return rows


def gpu_rows() -> list[Row]:
    return [*gpu_agreement(), gpu_batch(), gpu_overhead()]


def gpu_agreement() -> list[Row]:
    """Colour, alpha, depth and all gradients of one random scene, gsplat in float32 against the oracle in float64."""
    rows = []
    base, _ = shell_scene(2000, (0.3, 12.0), size=160)
    sh = 0.2 * torch.randn(2000, 16, 3, generator=torch.Generator().manual_seed(1))
    sh[:, :1] = base.sh
    cameras = Camera.orbit(3, radius=2.0, size=(160, 128))
    for label, options in (("classic 0.3", {}), ("antialias 0.1", {"filter_2d": 0.1, "antialias": True})):
        outcomes = []
        for backend, dtype in (("gsplat", torch.float32), ("torch", torch.float64)):
            scene = leaves(replace(base, sh=sh), dtype, "cuda")
            pose = cameras.world_to_camera.to("cuda", dtype).requires_grad_()
            views = Camera(pose, cameras.intrinsics.to("cuda", dtype), 160, 128)
            output = render(scene, views, (0.1, 0.5, 0.9), backend, **options)
            values = torch.cat([output.color, output.alpha, output.depth], dim=-1)
            weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2)).to(values)
            inputs = [*(getattr(scene, name) for name in FIELDS), pose]
            outcomes.append((output, torch.autograd.grad((values * weights).sum(), inputs)))
        (fast, fast_gradients), (slow, slow_gradients) = outcomes
        for name in ("color", "alpha", "depth"):
            # At the edge of the 1/255 cut-off float32 and float64 may decide differently: one step, in a few pixels.
            difference = (getattr(fast, name).double() - getattr(slow, name)).abs()
            worst, jumps = float(difference.max()), int((difference > 1e-3).sum())
            note = f"max {worst:.1e}, {jumps} of {difference.numel()} over 1e-3"
            rows.append((f"gsplat vs oracle {label}: {name}", note, "1e-3", ok(worst <= 1e-3)))
        for name, ours, exact in zip((*FIELDS, "pose"), fast_gradients, slow_gradients, strict=True):
            error = float((ours.double() - exact).norm() / exact.norm())
            rows.append((f"gsplat vs oracle {label}: gradient {name}", f"{error:.1e}", "1e-3", ok(error <= 1e-3)))
    return rows


def gpu_batch() -> Row:
    """`render_batch` of objects of different sizes against single calls."""
    objects = [shell_scene(count)[0].to("cuda") for count in (500, 1300, 20)]
    cameras = Camera.orbit(6, size=96).to("cuda")
    together = render_batch(objects, cameras, 0.5)
    worst = 0.0
    for index, item in enumerate(objects):
        own = slice(2 * index, 2 * index + 2)
        alone = render(item, cameras[own], 0.5)
        worst = max(worst, float((together.color[own] - alone.color).abs().max()))
    return ("gsplat render_batch vs single calls: color", f"{worst:.1e}", "1e-5", ok(worst <= 1e-5))


def gpu_overhead(count: int = 200_000, size: int = 512) -> Row:
    """Wall time of `render` and of the same call to gsplat, taken in turns."""
    from gsplat import rasterization

    scene, camera = shell_scene(count, size=size)
    scene, camera = scene.to("cuda"), camera.to("cuda")
    background = torch.ones(1, 3, device="cuda")

    def direct() -> object:
        return rasterization(
            scene.means, scene.quaternions, scene.scales, scene.opacities, scene.sh, camera.world_to_camera,
            camera.intrinsics, size, size, eps2d=0.3, sh_degree=0, packed=False, backgrounds=background,
            render_mode="RGB+ED",
        )  # fmt: skip

    def ours() -> object:
        return render(scene, camera)

    def burst(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 50

    with torch.no_grad():
        burst(direct), burst(ours)
        pairs = [(burst(direct), burst(ours)) for _ in range(30)]
    base = statistics.median(pair[0] for pair in pairs)
    added = statistics.median(pair[1] for pair in pairs) / base - 1
    figures = f"direct {1e3 * base:.3f} ms, ours {100 * added:+.1f} %"
    return (f"gsplat call, {count} Gaussians, {size}^2", figures, "<= +5 %", ok(added <= 0.05))


def ok(passed: bool) -> str:
    return "yes" if passed else "NO"


def machine(gpu: bool) -> str:
    """What the figures were measured with."""
    versions = {name: _version(name) for name in ("torch", "numba", "av", "gsplat")}
    hardware = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{hardware}; Python {platform.python_version()}, {used}; commit {commit.strip() or 'unknown'}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the CUDA checks instead of the CPU ones")
    parser.add_argument("--write", type=Path, help="results file whose section of this machine is replaced")
    options = parser.parse_args()
    rows = gpu_rows() if options.gpu else cpu_rows()
    command = "python benchmarks/render.py" + (" --gpu" if options.gpu else "")
    title = "GPU" if options.gpu else "CPU"
    lines = [
        f"## {title}",
        "",
        f"`{command}`, {machine(options.gpu)}.",
        "",
        "| what | measured | wanted | met |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    section = "\n".join(lines) + "\n"
    print(section)
    if options.write:
        text = options.write.read_text() if options.write.exists() else "# Rendering\n"
        text = re.sub(rf"\n## {title}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
        options.write.write_text(f"{text.rstrip()}\n\n{section}")
    return 0 if all(row[-1] == "yes" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

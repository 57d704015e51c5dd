"""Parts of `diff2to3 data` on this machine, each with a section of its own in the results.

    python benchmarks/data.py --voxels 100 --assets ASSETS --write benchmarks/results/data_cpu.md
    python benchmarks/data.py --renderers 20 --assets ASSETS --write benchmarks/results/data_cpu.md
    python benchmarks/data.py --stages 200 --assets ASSETS --write benchmarks/results/data_cpu.md
    python benchmarks/data.py --stages 0 --assets ASSETS --device cuda --network paper    # every object

voxels: objects of a folder, drawn at random, by both rules, one thread; of three rounds in turns the best.
renderers: the same by every mesh renderer that works here: pictures with depth that two processes draw in a second, as
`data render --workers 2` has them, the time that a core takes for one (which other work on the machine disturbs less),
and how far the pictures differ. Blender draws two of the objects.
stages: the commands of `diff2to3 data` over objects of a folder, drawn at random, and what comes of them in a minute
(`_stages.py`). `--folder` keeps the data sets, so that a run goes on where one with other `--parts` or `--size` ended.
`--write` replaces a part's section in a results file.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import subprocess
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
from _stages import HEAD, PARTS, StageRun, failures
from diff2to3._errors import ComponentError, ComponentNotFoundError
from diff2to3._plugins import MESH_RENDERER, build
from diff2to3.data._mesh import MESH_SUFFIXES, load_mesh
from diff2to3.data._store import tool_versions
from diff2to3.data._views import sphere_views
from diff2to3.data._voxelize import Rule, voxelize

TITLE = "# Data, cpu"
RULES: tuple[Rule, ...] = get_args(Rule)


def drawn_at_random(assets: Path, count: int, seed: int) -> list[Path]:
    """Files of `count` objects of a folder."""
    files = sorted(path for path in assets.rglob("*") if path.suffix in MESH_SUFFIXES)
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))[:count]]


def voxels(assets: Path, count: int, seed: int) -> list[str]:
    """Voxels an object and the time it takes, by rule; rows of the table."""
    meshes = [load_mesh(path) for path in drawn_at_random(assets, count, seed)]
    rows = [
        "| grid | rule | voxels an object: mean | median | time an object: mean | most |",
        "|---|---|---|---|---|---|",
    ]
    for grid_size in (32, 64):
        found = {rule: [voxelize(mesh, grid_size, rule) for mesh in meshes] for rule in RULES}
        times = {rule: np.full(len(meshes), np.inf) for rule in RULES}
        for _ in range(3):
            for number, mesh in enumerate(meshes):
                for rule in RULES:
                    start = time.perf_counter()
                    voxelize(mesh, grid_size, rule)
                    times[rule][number] = min(times[rule][number], time.perf_counter() - start)
        for rule in RULES:
            sizes, spent = [len(coords) for coords in found[rule]], times[rule] * 1000
            rows.append(
                f"| {grid_size}^3 | {rule} | {np.mean(sizes):,.0f} | {np.median(sizes):,.0f} |"
                f" {spent.mean():.1f} ms | {spent.max():.0f} ms |"
            )
        exact, sampled = (sum(map(len, found[rule])) for rule in RULES)
        rows.append(f"| {grid_size}^3 | sampled finds | {sampled / exact:.2%} of exact | | | |")
    triangles = [len(mesh.triangles) for mesh in meshes]
    return [*rows, "", f"Triangles an object: median {np.median(triangles):,.0f}, most {max(triangles):,}."]


def drawing(name: str, config: dict[str, Any], paths: list[Path], size: int, views: int, pipe: Any) -> None:
    """A process of the benchmark of renderers: one picture to get ready, then all whenever it is told to."""
    renderer = build(MESH_RENDERER, name, config)
    cameras = sphere_views(views, size, np.random.default_rng(0))
    meshes = [load_mesh(path) for path in paths]
    renderer(meshes[0], cameras.world_to_camera[:1], cameras.intrinsics[:1], size)
    pipe.send(0.0)
    while pipe.recv():
        start = time.process_time()
        for mesh in meshes:
            renderer(mesh, cameras.world_to_camera, cameras.intrinsics, size)
        pipe.send(time.process_time() - start)


class Pair:
    """Two processes that draw half of the objects each; best round so far, in seconds and in seconds of a core."""

    def __init__(self, name: str, config: dict[str, Any], paths: list[Path], size: int, views: int) -> None:
        context, self.pictures, self.processes = get_context("spawn"), len(paths) * views, []
        self.seconds = self.core_seconds = float("inf")
        for share in (paths[::2], paths[1::2]):
            here, there = context.Pipe()
            process = context.Process(target=drawing, args=(name, config, share, size, views, there), daemon=True)
            process.start()
            self.processes.append((process, here))
        for _, pipe in self.processes:
            pipe.recv()

    def draw(self) -> None:
        """A round."""
        start = time.perf_counter()
        for _, pipe in self.processes:
            pipe.send(True)
        spent = sum(pipe.recv() for _, pipe in self.processes)
        self.seconds = min(self.seconds, time.perf_counter() - start)
        self.core_seconds = min(self.core_seconds, spent)

    def end(self) -> None:
        for process, pipe in self.processes:
            pipe.send(False)
            process.join()


def speeds(kinds: dict[str, Any], paths: list[Path], size: int, views: int, rounds: int) -> dict[str, str]:
    """Two cells by renderer. They take turns, so that what else the machine does is fair to all."""
    pairs = {kind: Pair(*named, paths, size, views) for kind, named in kinds.items()}
    for _ in range(rounds):
        for pair in pairs.values():
            pair.draw()
    for pair in pairs.values():
        pair.end()
    return {k: f"{p.pictures / p.seconds:.3g} | {1000 * p.core_seconds / p.pictures:,.3g} ms" for k, p in pairs.items()}


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean PSNR on white, and intersection over union of the silhouettes, of RGBA pictures [V, S, S, 4]."""
    scores = []
    for pair in zip(first, second, strict=True):
        alpha = [picture[..., 3:] / 255 for picture in pair]
        on_white = [p[..., :3] / 255 * a + 1 - a for p, a in zip(pair, alpha, strict=True)]
        error = np.square(on_white[0] - on_white[1]).mean()
        a, b = (x > 0.6 for x in alpha)  # none of 4, 8 or 9 samples gives 0.6
        scores.append((-10 * np.log10(max(error, 1e-8)), (a & b).sum() / max(1, (a | b).sum())))
    psnr, iou = np.mean(scores, 0)
    return float(psnr), float(iou)


def renderers(assets: Path, count: int, seed: int) -> list[str]:
    """Speed and agreement of the mesh renderers; rows of two tables."""
    paths, unlit = drawn_at_random(assets, count, seed), {"light": "none"}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {"gl": ("gl", {}), "cpu": ("cpu", {})}
    kinds |= {"blender, unlit": ("blender", unlit), "blender, uniform light": ("blender", {})}
    notes, opened = [], {}
    for kind, (name, config) in kinds.items():
        try:
            opened[kind] = build(MESH_RENDERER, name, config)
        except (ComponentError, ComponentNotFoundError) as error:
            notes.append(f"{kind} is left out: {error}.")
    if "gl" in opened:
        info = opened["gl"].context.info["GL_RENDERER"]  # type: ignore[attr-defined]
        notes.append(f"OpenGL: {info}, {opened['gl'].samples} samples a pixel.")  # type: ignore[attr-defined]
    rows = ["| renderer | 256^2: views a second | core time a view | 512^2: views a second | core time a view |"]
    rows.append("|---|---|---|---|---|")
    fast = {kind: kinds[kind] for kind in opened if not kind.startswith("blender")}
    slow = {kind: kinds[kind] for kind in opened if kind not in fast}
    small, large = (speeds(fast, paths, side, 16, 5) | speeds(slow, paths[:2], side, 1, 2) for side in (256, 512))
    rows += [f"| {kind} | {small[kind]} | {large[kind]} |" for kind in opened]
    rows += [
        "",
        "| pictures of 256^2 | objects | mean PSNR | least | mean silhouette IoU | least |",
        "|---|---|---|---|---|---|",
    ]
    cameras, fine = sphere_views(8, 256, np.random.default_rng(seed)), build(MESH_RENDERER, "cpu", {"samples": 12})
    meshes = [load_mesh(path) for path in paths]
    pictures: dict[str, list[np.ndarray]] = {"cpu with 12 x 12 samples": []}
    for mesh in meshes:
        pictures["cpu with 12 x 12 samples"].append(fine(mesh, cameras.world_to_camera, cameras.intrinsics, 256)[0])
    for kind, renderer in opened.items():
        some = meshes[:2] if kind.startswith("blender") else meshes
        pictures[kind] = [renderer(mesh, cameras.world_to_camera, cameras.intrinsics, 256)[0] for mesh in some]
    for first, second in itertools.combinations(pictures, 2):
        scores = np.array([difference(a, b) for a, b in zip(pictures[first], pictures[second], strict=False)])
        (psnr, iou), (least, least_iou) = scores.mean(0), scores.min(0)
        rows.append(
            f"| {first} / {second} | {len(scores)} | {psnr:.1f} dB | {least:.1f} dB | {iou:.4f} | {least_iou:.4f} |"
        )
    return [*rows, "", *notes]


def staged_options(given: argparse.Namespace) -> str:
    """The options of a run of stages that tell what it measured."""
    named = {
        n: getattr(given, n) for n in ("device", "size", "network", "processes", "model_processes", "model_objects")
    }
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in named.items())
    return f"--stages {given.stages} --assets ASSETS --parts {' '.join(given.parts)} {options}"


def staged_rows(given: argparse.Namespace) -> list[str]:
    """The table of stages, printed row by row too, and why objects failed."""
    rows = list(HEAD)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        run = StageRun(
            given.assets,
            folder,
            given.stages,
            given.seed,
            processes=given.processes,
            model_processes=given.model_processes,
            model_objects=given.model_objects,
            device=given.device,
        )
        for row in run.rows(given.parts, given.size, given.network):
            print(row, flush=True)
            rows.append(row)
        return [*rows, "", *failures(folder)[:20]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = parser.add_mutually_exclusive_group(required=True)
    part.add_argument("--voxels", type=int, metavar="COUNT", help="objects to voxelize by both rules")
    part.add_argument("--renderers", type=int, metavar="COUNT", help="objects to draw by every renderer")
    part.add_argument("--stages", type=int, metavar="COUNT", help="objects to send through the stages, 0 for all")
    parser.add_argument("--assets", type=Path, required=True, help="folder of the objects to draw from")
    staged = parser.add_argument_group("stages")
    staged.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    staged.add_argument("--folder", type=Path, help="where the data sets stay; default a temporary one")
    staged.add_argument("--device", default="cpu")
    staged.add_argument("--size", type=int, default=256, help="side of the pictures")
    staged.add_argument("--network", default="tiny", help="tiny (embedded), or a preset with random weights: paper ...")
    staged.add_argument("--processes", type=int, default=os.cpu_count())
    staged.add_argument("--model-processes", type=int, default=1, help="that share the device")
    staged.add_argument("--model-objects", type=int, default=0, help="objects of features and latents; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="results file whose section is replaced")
    arguments = parser.parse_args()
    if arguments.stages is not None:
        heading, options, rows = (
            f"## Stages, pictures of {arguments.size}^2",
            staged_options(arguments),
            staged_rows(arguments),
        )
    elif arguments.voxels:
        heading, options = "## Rules of voxels", f"--voxels {arguments.voxels} --assets ASSETS"
        rows = voxels(arguments.assets, arguments.voxels, arguments.seed)
    else:
        heading, options = "## Mesh renderers", f"--renderers {arguments.renderers} --assets ASSETS"
        rows = renderers(arguments.assets, arguments.renderers, arguments.seed)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    known = tool_versions()
    tools = [f"{t} {known[t]}" for t in ("trimesh", "pillow", "numpy", "numba", "moderngl", "bpy") if t in known]
    head = [
        heading,
        "",
        f"`python benchmarks/data.py {options} --seed {arguments.seed}`: {platform.machine()} CPU,"
        f" {os.cpu_count()} cores,",
        f"Python {platform.python_version()}; {', '.join(tools)}; commit {commit}.",
        "",
    ]
    section = "\n".join([*head, *rows]).rstrip() + "\n"
    print(section)
    if arguments.write:
        old = arguments.write.read_text() if arguments.write.exists() else f"{TITLE}\n"
        kept = re.sub(rf"\n{heading}\n.*?(?=\n## |\Z)", "", old, flags=re.DOTALL).rstrip()
        arguments.write.write_text(f"{kept}\n\n{section}")


if __name__ == "__main__":
    main()

"""Fuzzed assets through loading and voxelizing.

    python benchmarks/data.py --fuzz 2000 --seed 0 --write benchmarks/results/data_cpu.md

Whole assets of every format (made here, with textures beside or inside) are damaged at random: bits flipped, bytes cut,
repeated or overwritten, numbers and names replaced by hostile ones. Each must load or be refused by a ValueError of
one line; anything else counts as a crash. The process that reads them may open no file outside the asset's folder.
`--write` replaces the section of this benchmark in a results file.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import trimesh
from diff2to3.data._mesh import load_mesh
from diff2to3.data._voxelize import voxelize
from PIL import Image

NUMBERS = (b"-1", b"0", b"65536", b"4294967295", b"1e400", b"999999999999", b"NaN", b"null", b"[]", b"0.5")
NAMES = (b"../outside.png", b"/etc/passwd", b"%2e%2e/outside.png", b"link.png", b"", b"\x00", b"file:///etc/passwd")
TITLE = "# Data, cpu"
HEADING = "## Fuzzed assets"


def whole_assets(folder: Path) -> list[Path]:
    """One asset a format, each in a folder of its own."""
    ball = trimesh.creation.icosphere(1)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    uv = np.random.default_rng(1).random((len(ball.vertices), 2))
    ball.visual = trimesh.visual.TextureVisuals(uv=uv, image=Image.fromarray(pixels))
    scene = trimesh.Scene()
    scene.add_geometry(ball, node_name="parent")
    shift = trimesh.transformations.translation_matrix((2, 0, 0))
    scene.add_geometry(ball, node_name="child", parent_node_name="parent", transform=shift)
    paths = [folder / kind / f"asset{suffix}" for kind, suffix in KINDS]
    for path in paths:
        path.parent.mkdir(parents=True)
        if path.parent.name == "ply_text":
            ball.export(path, encoding="ascii")
        else:
            (scene if path.suffix in (".glb", ".gltf") else ball).export(path)
        (path.parent / "link.png").symlink_to(folder / "outside.png")
    Image.fromarray(pixels).save(folder / "outside.png")
    return paths


KINDS = (("glb", ".glb"), ("gltf", ".gltf"), ("obj", ".obj"), ("ply", ".ply"), ("ply_text", ".ply"))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to three random changes."""
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        at, length = rng.randrange(len(data)), rng.randint(1, 64)
        change = rng.choice(("flip", "cut", "end", "repeat", "noise", "number", "number", "name"))
        if change == "flip":
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif change == "cut":
            data = data[:at] + data[at + length :]
        elif change == "end":
            data = data[:at]
        elif change == "repeat":
            data = data[:at] + data[at : at + length] * rng.randint(2, 20) + data[at + length :]
        elif change == "noise":
            data = data[:at] + rng.randbytes(length) + data[at + length :]
        else:
            found = list(re.finditer(rb"\d+" if change == "number" else rb"[\w/]+\.(?:png|mtl|bin)", data[:20_000]))
            if found:
                start, end = rng.choice(found).span()
                data = data[:start] + rng.choice(NUMBERS if change == "number" else NAMES) + data[end:]
    return data


def fuzz(count: int, seed: int) -> list[str]:
    """Damages and reads `count` assets; rows of the table."""
    rng, opened = random.Random(seed), []
    sys.addaudithook(lambda event, a: opened.append(a[0]) if event == "open" and str(a[1]).startswith("r") else None)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind, _ in KINDS}
    slowest, outside, crashes = 0.0, set(), []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root).resolve()
        paths = whole_assets(folder)
        for path in paths:
            voxelize(load_mesh(path), 16)  # also imports all that loading needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(count):
            path = rng.choice(paths)
            victim = rng.choice([p for p in sorted(path.parent.iterdir()) if not p.is_symlink()] + [path] * 3)
            whole = victim.read_bytes()
            victim.write_bytes(damaged(whole, rng))
            opened.clear()
            start = time.perf_counter()
            try:
                voxelize(load_mesh(path), 16)
                outcome = "loaded"
            except ValueError as error:
                outcome = "refused" if "\n" not in str(error) else "crashed"
            except BaseException as error:
                outcome = "crashed"
                crashes.append(f"{path.parent.name}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.perf_counter() - start)
            outcomes[path.parent.name][outcome] += 1
            own = (str(path.parent), sys.prefix, sys.base_prefix)
            outside |= {str(p) for p in opened if not os.path.realpath(os.fsdecode(p)).startswith(own)}
            victim.write_bytes(whole)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = ["| format | tried | loaded | refused | crashed |", "|---|---|---|---|---|"]
    for kind, seen in outcomes.items():
        rows.append(f"| {kind} | {seen.total()} | {seen['loaded']} | {seen['refused']} | {seen['crashed']} |")
    rows += [
        "",
        f"Slowest {slowest:.2f} s. Peak memory {after / 1024:.0f} MB, {(after - before) / 1024:.0f} MB of it",
        f"grown while fuzzing. Files opened outside the asset's folder: {len(outside)}.",
        *(f"- {line}" for line in [*crashes[:10], *sorted(outside)[:10]]),
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, default=2000, help="assets to damage and read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="results file whose section is replaced")
    arguments = parser.parse_args()
    rows = fuzz(arguments.fuzz, arguments.seed)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("trimesh", "pillow", "numpy"))
    head = [
        HEADING,
        "",
        f"`python benchmarks/data.py --fuzz {arguments.fuzz} --seed {arguments.seed}`: {platform.machine()} CPU,",
        f"Python {platform.python_version()}; {versions}; commit {commit}.",
        "",
    ]
    section = "\n".join([*head, *rows]).rstrip() + "\n"
    print(section)
    if arguments.write:
        old = arguments.write.read_text() if arguments.write.exists() else f"{TITLE}\n"
        kept = re.sub(rf"\n{HEADING}\n.*?(?=\n## |\Z)", "", old, flags=re.DOTALL).rstrip()
        arguments.write.write_text(f"{kept}\n\n{section}")


if __name__ == "__main__":
    main()

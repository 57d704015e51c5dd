"""Kills, ends and interrupts real work at random moments, and looks whether what is left is whole.

    python tests/faults/run.py --count 50                    # each command 50 times, by SIGKILL
    python tests/faults/run.py generate data --signal TERM   # only these, by SIGTERM
    python tests/faults/run.py --count 50 --signal INT --seed 1

After every death each file must be one that an undisturbed run writes, byte for byte, and nothing may be lost that was
finished; the run that follows must end with exactly the undisturbed run's files. Processes are forks of this one, which
has imported everything, so that they die at work and not in an import. Exit code 1 where something did not survive.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diff2to3._cli import main
from PIL import Image, ImageDraw

TESTS = Path(__file__).resolve().parents[1]


@dataclass
class Work:
    """A command that is to survive.

    Args:
        run: does it, into a folder.
        files: of such a folder, what must be whole, by name; raises where something is there too early.
        seconds: how long it takes undisturbed.
        expected: the files of an undisturbed run.
    """

    run: Callable[[Path], Any]
    files: Callable[[Path], dict[str, bytes]]
    seconds: float = 0.0
    expected: dict[str, bytes] = field(default_factory=dict)


def module(path: Path) -> Any:
    """A file of the tests as a module."""
    spec = importlib.util.spec_from_file_location(f"faults_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def command(*arguments: Any) -> None:
    """``diff2to3 ...`` as in a process of its own."""
    sys.argv = ["diff2to3", *map(str, arguments)]
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise


def generation(folder: Path) -> Work:
    """``generate`` of eight pictures by the smallest pipeline."""
    pictures, pipeline = folder / "pictures", folder / "pipeline"
    pictures.mkdir()
    pipeline.mkdir()
    module(TESTS / "conftest.py").build_micro_pipeline(pipeline)
    for number in range(8):
        image = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(image).ellipse((10, 10, 30 + 3 * number, 50), fill=(200, 25 * number, 40, 255))
        image.save(pictures / f"p{number}.png")
    options = ["--pipeline", pipeline, "--device", "cpu", "--format", "ply,spz,html"]

    def files(out: Path) -> dict[str, bytes]:
        from diff2to3._manifest import read_manifest

        for path in out.glob("*.json"):  # a manifest comes last: where it is, all is
            assert all((out / file).is_file() for file in read_manifest(path).files.values()), f"{path} came too early"
        return {path.name: path.read_bytes() for path in out.glob("[!.]*") if path.suffix != ".json"}

    return Work(lambda out: command("generate", pictures, "-o", out, *options), files)


def preparation(folder: Path) -> Work:
    """Stage ``voxels`` of forty assets."""
    import trimesh
    from diff2to3.data._render_stage import list_assets, voxelize_objects
    from diff2to3.data._store import Store

    for number in range(40):
        trimesh.creation.icosphere(2, radius=1 + number).export(folder / f"o{number}.glb")
    ids = [row["id"] for row in list_assets(folder, None)]

    def run(out: Path) -> None:
        voxelize_objects(folder, Store(out), ids, 16, 0)

    return Work(run, lambda out: {path.name: path.read_bytes() for path in out.glob("voxels/[!.]*.safetensors")})


def training(folder: Path, checkpoint_every: int = 2) -> Work:
    """Sixty steps of a structure VAE, with checkpoints."""
    from diff2to3.train import stages
    from diff2to3.train._config import TrainConfig
    from diff2to3.train._engine import train
    from diff2to3.train._state import verify

    shared = module(TESTS / "train" / "conftest.py")
    data = shared.write_data(folder, {f"pack/{name}": "train" for name in "abc"})
    settings = {"steps": 60, "batch_size": 2, "warmup_steps": 0, "precision": "fp32", "device": "cpu"}
    settings |= {"checkpoint_every": checkpoint_every, "log_every": 1, "model": shared.MODELS["structure-vae"]}

    def run(out: Path) -> None:
        config = TrainConfig(data=data, out=out, **settings)
        train(stages.build_stage("structure-vae", config), config, resume=True)

    def files(out: Path) -> dict[str, bytes]:
        for checkpoint in out.glob("checkpoints/[0-9]*"):
            verify(checkpoint)
        return {path.name: path.read_bytes() for path in out.glob("model/*")}

    return Work(run, files)


WORKS = {"generate": generation, "data": preparation, "train": training}


def forked(work: Work, out: Path) -> int:
    """A process that does the work; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        work.run(out)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """Exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def torture(name: str, work: Work, folder: Path, count: int, how: signal.Signals, rng: random.Random) -> list[str]:
    """Ends the work `count` times; returns what was wrong afterwards."""
    start = time.monotonic()
    assert end_of(forked(work, folder / "whole")) == 0, f"{name} fails undisturbed"
    work.seconds, work.expected = time.monotonic() - start, work.files(folder / "whole")
    assert work.expected, f"{name} writes nothing"
    problems, deaths, finished, had = [], 0, 0, set[str]()
    out = folder / "out-0"
    while deaths < count:
        pid = forked(work, out)
        time.sleep(rng.uniform(0, 0.9 * work.seconds))
        os.kill(pid, how)
        code = end_of(pid)
        deaths += code != 0
        if code not in (0, -how, 128 + how):
            problems.append(f"death {deaths}: exit code {code}")
        try:
            found = work.files(out)
        except Exception as error:  # whatever it is: what is left is not whole
            problems.append(f"death {deaths}: {type(error).__name__}: {error}")
            found = {}
        problems += [f"death {deaths}: {file} is not whole" for file in found if found[file] != work.expected.get(file)]
        problems += [f"death {deaths}: {file} is lost" for file in had - set(found)]
        if how != signal.SIGKILL:
            problems += [f"death {deaths}: {path.name} is left over" for path in temporary(out)]
        had = set(found)
        if code == 0 or had == set(work.expected):
            finished += 1
            problems += check_end(work, out)
            out, had = folder / f"out-{finished}", set()
    problems += check_end(work, out)
    print(
        f"{name}: {deaths} x {how.name}, {finished + 1} runs brought to their end, {len(problems)} problems", flush=True
    )
    return [f"{name}: {problem}" for problem in problems]


def temporary(out: Path) -> list[Path]:
    return [path for path in out.rglob(".*") if "tmp" in path.name or path.name == ".new"] if out.is_dir() else []


def check_end(work: Work, out: Path) -> list[str]:
    """Lets a run come to its end; what differs from an undisturbed one."""
    if (code := end_of(forked(work, out))) != 0:
        return [f"the last run: exit code {code}"]
    found = work.files(out)
    wrong = [name for name in found.keys() | work.expected if found.get(name) != work.expected.get(name)]
    wrong += [f"{path}, left over," for path in out.glob(".*-tmp-*")]
    return [f"{name} differs at the end" for name in wrong]


def run_all() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; default: all")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    how, rng, problems = signal.Signals[f"SIG{options.signal}"], random.Random(options.seed), []
    torch.set_num_threads(1)
    for name in ("diff2to3._pipeline", "diff2to3.train.stages.structure_vae", "torch._dynamo", "rich.progress"):
        importlib.import_module(name)
    for name in options.works or WORKS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "input").mkdir()
            work = WORKS[name](Path(folder) / "input")
            problems += torture(name, work, Path(folder), options.count, how, rng)
    print("\n".join(problems) or "all survived")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(run_all())

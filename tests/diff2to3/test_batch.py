"""``generate`` with many pictures: by workers that die, again after it was stopped, with some that cannot be read."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from diff2to3 import _atomic, _generation
from diff2to3._cli import _generate, cli
from diff2to3._errors import InputError, OutputError
from PIL import Image, ImageDraw

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="NOT TESTED: no /proc, not Linux"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
NAMES = ("a", "b", "c", "d", "e", "f")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pictures, and what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(NAMES):
        image = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(image).ellipse((10, 10, 30 + 5 * number, 50), fill=(200, 40 * number, 40, 255))
        image.save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def command(micro_pipeline):
    def build(*arguments):
        options = [
            "--pipeline",
            str(micro_pipeline),
            "--device",
            "cpu",
            "--seed",
            "3",
            "--steps",
            "15",
            "--threads",
            "1",
        ]
        return ["generate", *map(str, arguments), *options]

    return build


@pytest.fixture(scope="module")
def serial(pictures, command, tmp_path_factory):
    """What one process makes, one picture after the other."""
    out = tmp_path_factory.mktemp("serial") / "out"
    invoke(command(pictures, "-o", out, "--format", "ply,html"))
    return contents(out)


def invoke(arguments, code=0):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code or (code == 2 and isinstance(result.exception, InputError)), result.output
    return result


def contents(out):
    """The files by name, but the manifests: these hold times."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    manifests = {name: json.loads(found.pop(name)) for name in list(found) if name.endswith(".json")}
    assert all(manifest["name"] + ".json" == name for name, manifest in manifests.items())
    assert {name for manifest in manifests.values() for name in manifest["files"].values()} == set(found)
    return found


def made(out):
    """When each manifest was written: it changes when an object is made again."""
    return {path.stem: path.stat().st_mtime_ns for path in out.glob("*.json")}


def spread(arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "diff2to3", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def processes(words, parent=None):
    """Processes whose command line has the words, by number; see proc(5)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if words in (folder / "cmdline").read_text() and parent in (None, int(fields[1])):
                found.append(int(folder.name))
    return found


def children(pid):
    """Worker processes, without Python's own helpers."""
    return processes("spawn_main", pid)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def test_a_folder_gives_one_object_a_picture(serial):
    assert sorted(serial) == [f"{name}.{suffix}" for name in NAMES for suffix in ("html", "ply")]


def test_two_workers_of_which_one_is_killed_half_way(pictures, command, serial, tmp_path):
    """Nothing lost, nothing twice, and every byte as one process makes it."""
    out = tmp_path / "out"
    options = ["-o", out, "--format", "ply,html", "--workers", 2, "--json"]
    process = spread(command(pictures, *options))
    wait_for(lambda: len(made(out)) >= 2)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    results = [json.loads(line)["name"] for line in printed.splitlines()]
    assert sorted(results) == list(NAMES)
    assert contents(out) == serial
    before = made(out)
    again = invoke(command(pictures, *options, "--workers", 1))
    assert len(again.stdout.splitlines()) == len(NAMES)
    assert made(out) == before


def test_a_killed_run_goes_on_where_it_was(pictures, command, serial, tmp_path):
    out = tmp_path / "out"
    arguments = command(pictures, "-o", out, "--format", "ply,html", "--workers", 2)
    process = spread(arguments)
    wait_for(lambda: len(made(out)) >= 2)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(worker) for worker in workers))  # a worker outlives it by one object at most
    before = made(out)
    assert len(before) < len(NAMES)
    (out / f".{_atomic.platform.node()}-{process.pid}-tmp-f").mkdir(exist_ok=True)  # as if killed while it wrote
    invoke(arguments[: arguments.index("--workers")] + arguments[arguments.index("--workers") + 2 :])
    assert before.items() <= made(out).items()
    assert contents(out) == serial


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_on_a_ray_cluster(pictures, command, serial, tmp_path, monkeypatch):
    if find_spec("ray") is None:
        pytest.skip("NO RAY: `pip install 'diff2to3[scale]'`, to test generation on a cluster")
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written into the home folder
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    killing = threading.Thread(target=kill_an_actor, args=(tmp_path / "out",))
    killing.start()
    try:
        invoke(command(pictures, "-o", tmp_path / "out", "--format", "ply,html", "--engine", "ray"))
    finally:
        ray.shutdown()
    killing.join()
    assert contents(tmp_path / "out") == serial


def kill_an_actor(out):
    """One of the two workers, once two objects are done."""
    wait_for(lambda: len(made(out)) >= 2 if out.is_dir() else False)
    os.kill(processes("ray::Worker")[0], signal.SIGKILL)


@pytest.mark.parametrize(
    "change",
    ["nothing", "picture", "seed", "steps", "format", "manifest", "file", "weights", "overwrite"],
)
def test_what_is_finished(pictures, command, tmp_path, micro_pipeline, change):
    """An object is made again when its picture or a setting changed, or a file is missing; else it is left alone."""
    from shutil import copytree

    source, pipeline, out = tmp_path / "in", tmp_path / "pipeline", tmp_path / "out"
    source.mkdir()
    copytree(micro_pipeline, pipeline)
    for name in "ab":
        (source / f"{name}.png").write_bytes((pictures / f"{name}.png").read_bytes())
    base = ["generate", source, "-o", out, "--format", "ply", "--device", "cpu", "--pipeline", pipeline, "--steps", 1]
    invoke([str(part) for part in base])
    before, more, expected = made(out), [], "ab"
    if change == "nothing":
        expected = ""
    elif change == "picture":
        (source / "a.png").write_bytes((pictures / "c.png").read_bytes())
        expected = "a"
    elif change == "manifest":
        (out / "a.json").write_text((out / "a.json").read_text()[:100])
        expected = "a"
    elif change == "file":
        (out / "b.ply").unlink()
        expected = "b"
    elif change == "weights":
        replace_weights(pipeline / "backbone.safetensors")
    else:
        more = {"seed": ["--seed", 9], "steps": ["--steps", 2], "format": ["--format", "ply,splat"]}.get(change, [])
        more = more or ["--overwrite"]
    invoke([str(part) for part in [*base, *more]])
    assert {name for name, written in made(out).items() if written != before[name]} == set(expected)


def replace_weights(path):
    from safetensors.torch import load_file, save_file

    save_file({name: 1.01 * value for name, value in load_file(path).items()}, path)
    config = json.loads((path.parent / "pipeline.json").read_text())
    (path.parent / "pipeline.json").write_text(json.dumps(config | {"weights": {}}))  # their hashes


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_is_listed_at_the_end_and_the_rest_is_done(pictures, command, tmp_path, workers):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_text("no picture")
    (source / "b.png").write_bytes((pictures / "b.png").read_bytes())
    (source / "c.png").write_bytes((pictures / "c.png").read_bytes()[:60])
    options = ["--workers", str(workers)] if workers else []
    result = invoke(command(source, "-o", tmp_path / "out", "--format", "ply", *options), code=2)
    assert str(result.exception) == "2 of 3 objects failed; the others are done"
    told = [line for line in result.output.splitlines() if line.startswith("diff2to3: failed: ")]
    assert len(told) == 2
    assert f"failed: a ({source / 'a.png'}): {source / 'a.png'} is not a picture that can be read" in told[0]
    assert f"failed: c ({source / 'c.png'}): " in told[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.json", "b.ply"]


def test_a_fault_of_one_object_is_told_apart_from_bad_input(pictures, command, tmp_path, monkeypatch):
    make = _generation.Maker.__call__

    def broken(self, item):
        if item.name == "b":
            raise RuntimeError("it broke")
        return make(self, item)

    monkeypatch.setattr(_generation.Maker, "__call__", broken)
    result = invoke(command(pictures, "-o", tmp_path, "--format", "ply", "--guidance", 0), code=1)
    assert "failed: b" in result.output
    assert "RuntimeError: it broke" in result.output
    assert len(made(tmp_path)) == len(NAMES) - 1


def test_a_full_disk_ends_the_run_at_once(pictures, command, tmp_path, monkeypatch):
    written = []

    def full(directory, name, last):
        written.append(name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_generation, "staging", full)
    result = invoke(command(pictures, "-o", tmp_path / "out", "--format", "ply", "--guidance", 0), code=2)
    assert isinstance(result.exception, OutputError)
    assert "No space left on device" in str(result.exception)
    assert len(written) == 1
    assert not (tmp_path / "out").exists()


def test_a_pipeline_that_cannot_be_loaded_is_said_once_by_workers_too(pictures, command, tmp_path, micro_pipeline):
    from shutil import copytree

    broken = copytree(micro_pipeline, tmp_path / "broken")
    (broken / "backbone.safetensors").write_bytes(b"")
    arguments = command(pictures, "-o", tmp_path / "out", "--workers", 2)
    arguments[arguments.index(str(micro_pipeline))] = str(broken)
    process = spread(arguments)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert printed == ""
    assert errors.strip().startswith("diff2to3: error: ")
    assert errors.count("\n") == 1
    assert "backbone.safetensors" in errors
    assert not (tmp_path / "out").exists()


def test_names_that_would_collide(pictures, command, tmp_path):
    """Numbered where they can be; refused before anything is made where a file would replace another."""
    picture = (pictures / "a.png").read_bytes()
    for name in ("x.png", "x.PNG", "X.jpg", "y.compressed.png", "y.png"):
        (tmp_path / name).write_bytes(picture)
    Image.open(pictures / "a.png").convert("RGB").save(tmp_path / "X.jpg")
    x = [tmp_path / name for name in ("x.png", "x.PNG", "X.jpg")]
    invoke(command(*x, "-o", tmp_path / "out", "--format", "ply", "--guidance", 0))
    assert sorted(made(tmp_path / "out")) == ["X-3", "x", "x-2"]
    both = tuple((str(tmp_path / name),) for name in ("y.compressed.png", "y.png"))
    job = SimpleNamespace(objects=both, samples=(0,), out=tmp_path / "out", formats=("ply", "compressed.ply"))
    with pytest.raises(InputError, match=r"y\.compressed\.ply would be a file of .*y\.png and of .*y\.compressed\.png"):
        _generate._check_outputs(job, [])


def test_no_picture_is_replaced(pictures, command, tmp_path):
    (tmp_path / "a.png").write_bytes((pictures / "a.png").read_bytes())
    refused = invoke(command(tmp_path / "a.png", "-o", tmp_path, "--format", "ply,png"), code=2)
    assert f"{tmp_path / 'a.png'} would replace the picture" in str(refused.exception)
    refused = invoke(command(tmp_path, "-o", tmp_path, "--samples", 2), code=2)
    assert "is the one of the pictures" in str(refused.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    invoke(command(tmp_path, "-o", tmp_path, "--format", "ply", "--guidance", 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.ply", "a.png"]


def test_a_folder_without_pictures(command, tmp_path):
    refused = invoke(command(tmp_path, "-o", tmp_path / "out"), code=2)
    assert "is a folder without pictures; expected files that end in .png" in str(refused.exception)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_the_workers_and_leaves_whole_objects(pictures, command, tmp_path, how):
    out = tmp_path / "out"
    process = spread(
        command(pictures, "-o", out, "--format", "ply,html", "--workers", 2),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: made(out))
    workers = children(process.pid)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + how
    assert "Traceback" not in errors
    assert not any(alive(worker) for worker in workers)
    assert {name.split(".")[0] for name in contents(out)} == set(made(out))

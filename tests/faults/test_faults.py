"""What can go wrong around a run: deaths, disks, memory, broken weights, odd clocks and locales.

`run.py`, `memory.py` and `soak.py` beside this file do the same at length.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diff2to3 import Pipeline, _atomic
from diff2to3._cli import cli
from diff2to3._errors import DeviceMemoryError, InputError, NonFiniteError, OutputError, PipelineFormatError
from diff2to3.train._checkpoint import read_weights
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, HERE / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=280,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="NOT TESTED: no fork")
@pytest.mark.parametrize(
    ("how", "works", "count"), [("KILL", ["generate", "data"], 4), ("TERM", ["generate", "data", "train"], 2)]
)
def test_deaths_at_random_moments(how, works, count):
    result = script("run.py", *works, "--count", count, "--signal", how)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all survived\n")


def test_memory_does_not_grow(micro_pipeline):
    result = script("memory.py", "--count", 120, "--every", 15, "--pipeline", micro_pipeline)
    assert result.returncode == 0, result.stdout + result.stderr


def generate(pictures, out, pipeline, *options):
    base = ["generate", pictures, "-o", out, "--pipeline", pipeline, "--device", "cpu", "--steps", 1]
    arguments = [*base, *([] if "--format" in options else ["--format", "ply"]), *options]
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def splats(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.ply"))}


def test_a_full_disk_leaves_whole_objects_and_the_run_goes_on_when_there_is_room(
    small_disk, four_pictures, micro_pipeline, tmp_path
):
    assert generate(four_pictures, tmp_path / "whole", micro_pipeline).exit_code == 0
    expected = splats(tmp_path / "whole")
    room = (max(map(len, expected.values())) * 5 // 2 + 60_000) // 1024  # for two of the four
    disk = small_disk(f"{room}k")
    result = generate(four_pictures, disk / "out", micro_pipeline)
    assert isinstance(result.exception, OutputError), result.output
    assert str(result.exception).endswith("cannot be written: No space left on device")
    found = splats(disk / "out")
    assert 1 <= len(found) < 4
    assert all(expected[name] == data for name, data in found.items())
    assert sorted(path.suffix for path in (disk / "out").iterdir()) == sorted([".ply", ".json"] * len(found))
    small_disk("20m")
    assert generate(four_pictures, disk / "out", micro_pipeline).exit_code == 0
    assert splats(disk / "out") == expected


def test_a_full_disk_ends_a_stage_of_the_data_in_one_line(small_disk, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    assets = tmp_path / "assets"
    assets.mkdir()
    for number in range(12):
        trimesh.creation.icosphere(3, radius=1 + number).export(assets / f"o{number}.glb")
    disk = small_disk("64k")
    command = ["data", "voxelize", str(assets), str(disk), "--workers", "1", "--grid-size", "32"]
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, OutputError), result.output
    assert str(result.exception).endswith("cannot be written: No space left on device")
    found = list(disk.rglob("*.safetensors"))
    assert found
    assert all(load_whole(path) for path in found)
    assert not list(disk.rglob("*.tmp"))
    small_disk("20m")
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert len(list(disk.rglob("*.safetensors"))) == 12


def load_whole(path):
    return len(load_file(path)) > 0


def test_a_file_system_that_is_read_only(small_disk, four_pictures, micro_pipeline):
    disk = small_disk("1m", "ro")
    result = generate(four_pictures, disk / "out", micro_pipeline)
    assert isinstance(result.exception, InputError)
    assert "Read-only file system" in str(result.exception)
    assert "is not writable" in str(result.exception)


@pytest.fixture(scope="module")
def pipeline(micro_pipeline):
    return Pipeline.from_pretrained(micro_pipeline, device="cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NOT TESTED: reads /proc")
def test_gaps_between_blocks_in_use_are_given_back(pipeline, four_pictures):
    """The C library keeps them; with every object they grow."""
    pipeline(four_pictures / "p0.png")
    blocks = [bytearray(100_000) for _ in range(1000)]
    before = resident_megabytes()
    del blocks[::2]
    assert resident_megabytes() > before - 10
    pipeline(four_pictures / "p0.png")
    assert resident_megabytes() < before - 40


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def starving(component, most):
    """Make a component run out of memory for more than so many objects at once."""
    forward = type(component).forward

    def forward_or_fail(noise, t, *rest):
        if len(t) > 2 * most:  # guidance doubles the batch
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 1 GiB."
            )
        return forward(component, noise, t, *rest)

    return forward_or_fail


def test_a_batch_that_does_not_fit_is_made_in_halves(pipeline, four_pictures, monkeypatch):
    pictures = sorted(four_pictures.iterdir())
    expected = pipeline.batch(pictures, seed=3)
    monkeypatch.setattr(pipeline.backbone, "forward", starving(pipeline.backbone, 1))
    found = pipeline.batch(pictures, seed=3)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.voxels, other.voxels)
        torch.testing.assert_close(one.gaussians.means, other.gaussians.means, atol=1e-4, rtol=0)


def test_an_object_that_does_not_fit_says_what_to_lower(pipeline, four_pictures, monkeypatch):
    monkeypatch.setattr(pipeline.backbone, "forward", starving(pipeline.backbone, 0))
    with pytest.raises(DeviceMemoryError) as caught:
        pipeline(four_pictures / "p0.png")
    assert str(caught.value) == (
        "cpu has too little memory for the backbone (CUDA out of memory. Tried to allocate 2.00 GiB); try --low-vram "
        "(low_vram=True), --dtype bfloat16, --guidance 0, which halves the batch, fewer pictures of the object, "
        "--device cpu"
    )


@pytest.mark.parametrize("role", ["feature_extractor", "structure", "backbone", "latent_decoder"])
def test_weights_that_are_not_finite_are_named(micro_pipeline, four_pictures, tmp_path, role):
    """In a file, and in a model that was changed in memory."""
    from shutil import copytree

    path = copytree(micro_pipeline, tmp_path / "broken") / f"{role}.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights, reverse=True) if weights[name].is_floating_point())
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, path)
    config = json.loads((path.parent / "pipeline.json").read_text())
    (path.parent / "pipeline.json").write_text(json.dumps(config | {"weights": {}}))  # their hashes
    result = generate(four_pictures, tmp_path / "out", tmp_path / "broken")
    assert isinstance(result.exception, PipelineFormatError), result.output
    assert f"{path}: tensor {name} holds 1 values that are NaN" in str(result.exception)
    broken = Pipeline.from_pretrained(micro_pipeline, device="cpu")
    for tensor in broken.components[role].state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    first = next(n for n, t in broken.components[role].state_dict().items() if t.is_floating_point())
    with pytest.raises(NonFiniteError, match=f"tensors of the {role} hold NaN or infinite numbers, the first: {first}"):
        broken(four_pictures / "p0.png")


def test_numbers_that_a_dtype_cannot_hold_are_told_apart(pipeline, four_pictures, monkeypatch):
    forward = type(pipeline.backbone).forward

    def overflowing(*arguments):
        return forward(pipeline.backbone, *arguments).replace(
            torch.full_like(forward(pipeline.backbone, *arguments).features, torch.inf)
        )

    monkeypatch.setattr(pipeline.backbone, "forward", overflowing)
    with pytest.raises(NonFiniteError, match=r"the backbone gave NaN .* though its weights are finite"):
        pipeline(four_pictures / "p0.png")


def test_a_model_folder_with_nan_is_named(tmp_path):
    save_file({"good": torch.ones(2), "layer.weight": torch.tensor([1.0, torch.nan])}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: tensor layer\.weight holds NaN"):
        read_weights(tmp_path)


PLACES = {
    "turkish": {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
    "ascii": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
    "kiritimati": {"TZ": "Pacific/Kiritimati"},
}


@pytest.mark.parametrize("place", PLACES)
def test_another_locale_or_time_zone_changes_nothing(four_pictures, micro_pipeline, tmp_path, place):
    """With a name that neither ASCII nor a careless lower() survives."""
    source = tmp_path / "ıİöÖ"
    source.mkdir()
    (source / "İI.PNG").write_bytes((four_pictures / "p1.png").read_bytes())
    out = tmp_path / place / "Öut"
    arguments = ["generate", source, "-o", out, "--pipeline", micro_pipeline, "--device", "cpu", "--format", "ply"]
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith(("LC_", "LANG"))} | PLACES[place]
    result = subprocess.run(
        [sys.executable, "-m", "diff2to3", *map(str, arguments), "--steps", "1", "--json"],
        capture_output=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert generate(source, tmp_path / "here", micro_pipeline).exit_code == 0
    assert [path.name for path in sorted(out.iterdir())] == ["İI.json", "İI.ply"]
    assert splats(out) == splats(tmp_path / "here")


def test_settings_and_tables_are_utf8_whatever_the_locale(tmp_path):
    code = (
        "from pathlib import Path; from diff2to3._settings import load_settings; "
        "from diff2to3.data._store import Store, write_rows; from diff2to3.train._config import TrainConfig;"
        f"root = Path({str(tmp_path)!r});"
        "(root / 'c.yaml').write_bytes('data: m\\u00f6bel\\nout: aus'.encode());"
        "write_rows(root / 'objects.csv', [{'id': 'k\\u00fche', 'split': 'train'}]);"
        "assert str(load_settings(root / 'c.yaml', (), TrainConfig).data) == 'm\\u00f6bel';"
        "assert Store(root).objects()[0]['id'] == 'k\\u00fche'"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT | PLACES["ascii"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_clock_that_runs_backwards(four_pictures, micro_pipeline, tmp_path, monkeypatch):
    """Nothing goes by the time of day: durations stay positive, and what is finished stays so."""
    now = [4e9]

    def backwards():
        now[0] -= 1000
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    out = tmp_path / "out"
    assert generate(four_pictures, out, micro_pipeline).exit_code == 0
    manifests = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(manifests) == 4
    assert all(seconds >= 0 for manifest in manifests for seconds in manifest["timings"].values())
    for path in out.iterdir():
        os.utime(path, (2e9, 2e9))  # from the future
    written = {path: path.stat().st_mtime for path in out.iterdir()}
    assert generate(four_pictures, out, micro_pipeline).exit_code == 0
    assert {path: path.stat().st_mtime for path in out.iterdir()} == written


def test_ctrl_c_leaves_no_half_file(four_pictures, micro_pipeline, tmp_path):
    """While a large file is being written, of which only a part can be on the disk."""
    code = (
        "import sys, os, signal, threading, time, diff2to3._generation as g\n"
        "from pathlib import Path\n"
        "from diff2to3._cli import main\n"
        "write = Path.write_bytes\n"
        "def slow(self, data):\n"
        "    write(self, data[: len(data) // 2])\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(10)\n"
        "Path.write_bytes = slow\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv = ['diff2to3', 'generate', {str(four_pictures / 'p0.png')!r}, '-o', {str(tmp_path / 'out')!r}, "
        f"'--pipeline', {str(micro_pipeline)!r}, '--device', 'cpu', '--format', 'ply', '--steps', '1']\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 130, result.stderr
    assert "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda root: _atomic.output_folder(root / "a" / "b"),
        lambda root: _atomic.new_folder(root / "a"),
        lambda root: _atomic.staging(root, "a", "a.json"),
    ],
)
def test_ctrl_c_when_a_folder_has_just_been_made_removes_it(tmp_path, monkeypatch, make):
    mkdir = Path.mkdir

    def interrupted(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        if path != tmp_path:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), make(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_fit_no_memory_are_refused_by_their_header(tmp_path):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    result = CliRunner().invoke(cli, ["generate", str(tmp_path), "-o", str(tmp_path / "out"), "--device", "cpu"])
    assert isinstance(result.exception, InputError)
    assert "expected at most 64,000,000 pixels" in str(result.exception)


def test_sigterm_saves_a_training_run(tmp_path):
    """Told to end, it ends after the step at hand, with a checkpoint of it; the end is that of an undisturbed run."""
    spec = importlib.util.spec_from_file_location("faults_run", HERE / "run.py")
    faults = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    (tmp_path / "input").mkdir()
    work = faults.training(tmp_path / "input", checkpoint_every=1000)
    pid = faults.forked(work, tmp_path / "out")
    log = tmp_path / "out" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)
    assert faults.end_of(pid) == 128 + signal.SIGTERM
    [checkpoint] = (tmp_path / "out" / "checkpoints").iterdir()
    assert 5 <= int(checkpoint.name) < 60
    assert faults.end_of(faults.forked(work, tmp_path / "whole")) == 0
    work.expected = work.files(tmp_path / "whole")
    assert work.expected
    assert faults.check_end(work, tmp_path / "out") == []


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_manifest_goes_first_and_comes_last(tmp_path, monkeypatch, moves):
    """Killed between any two moves, no manifest stands beside files of another make."""
    replace, done = os.replace, []
    for name in ("a.html", "a.json", "a.ply"):
        (tmp_path / name).write_text("old")

    def dying(source, target):
        if len(done) == moves:
            raise SystemExit(137)
        done.append(target.name)
        replace(source, target)

    monkeypatch.setattr(_atomic.os, "replace", dying)
    with suppress(SystemExit), _atomic.staging(tmp_path, "a", "a.json") as folder:
        for name in ("a.html", "a.json", "a.ply"):
            (folder / name).write_text("new")
    assert not (tmp_path / "a.json").exists()
    assert done == ["a.html", "a.ply"][:moves]


@pytest.mark.gpu
def test_a_gpu_with_little_memory_makes_smaller_batches_and_then_says_what_to_lower():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pictures = [HERE.parents[1] / "examples" / "chair.png"] * 16
    pipeline = Pipeline.from_pretrained(device="cuda")
    expected = pipeline(pictures[0])
    total, needed = torch.cuda.get_device_properties(0).total_memory, torch.cuda.max_memory_reserved()
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5 * needed / total))
        found = pipeline.batch(pictures)
        assert len(found) == len(pictures)
        assert abs(len(found[-1].voxels) - len(expected.voxels)) <= 0.01 * len(expected.voxels)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
        with pytest.raises(DeviceMemoryError, match=r"has too little memory for the .*; try --low-vram"):
            pipeline(pictures[0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

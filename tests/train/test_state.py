"""Checkpoints: whole or not there, whatever ends the process, and told apart from damaged ones."""

import errno
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diff2to3._cli import cli
from diff2to3._errors import InputError
from diff2to3.train import _state
from diff2to3.train._engine import train
from diff2to3.train._state import DamagedCheckpointError, verify
from diff2to3.train.stages import build_stage
from safetensors.torch import load_file


def run(config, resume=False, stage="structure-vae"):
    return train(build_stage(stage, config), config, resume)


def same(one, two):
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def settings(micro_config, tmp_path):
    """Configuration of six steps with a checkpoint after each second one, and the model that they end with."""
    whole = micro_config("structure-vae", steps=6, checkpoint_every=2, out=tmp_path / "whole")
    run(whole)
    return whole.model_copy(update={"out": tmp_path / "run"}), whole.out / "model"


def test_a_checkpoint_holds_everything_and_no_pickle(micro_config):
    config = micro_config("structure-vae", steps=4, checkpoint_every=1, keep_checkpoints=3)
    run(config)
    assert [path.name for path in sorted((config.out / "checkpoints").iterdir())] == [
        "00000002",
        "00000003",
        "00000004",
    ]
    folder = config.out / "checkpoints" / "00000004"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    meta = json.loads((folder / "state.json").read_text())
    assert (meta["step"], meta["item"], meta["average"]) == (4, 4, 4)
    names = set(load_file(folder / "model.safetensors"))
    moments = set(load_file(folder / "optimizer.safetensors"))
    assert moments == {f"{name}:{entry}" for name in names for entry in ("step", "exp_avg", "exp_avg_sq")}
    verify(folder)


def test_a_checkpoint_of_pickles_is_not_run(settings, tmp_path):
    """Even where the check sums are right."""
    config, _ = settings
    run(config)
    trace = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return open, (str(trace), "w")

    for folder in (config.out / "checkpoints").iterdir():
        torch.save({"a": Bomb()}, folder / "average.safetensors")
        content, meta = (folder / "average.safetensors").read_bytes(), json.loads((folder / "state.json").read_text())
        meta["files"]["average.safetensors"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        (folder / "state.json").write_text(json.dumps(meta))
        verify(folder)
    with pytest.raises(InputError, match=r"not safetensors .* the only kind read"):
        run(config, resume=True)
    assert not trace.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"average": "3"},
        {"scalars": []},
        {"item": None},
        {"step": 1e3},
        {"files": {}},
        {"files": {"../x": {}}},
        {"files": 1},
    ],
    ids=str,
)
def test_a_state_of_other_types_is_damaged(settings, change):
    config, _ = settings
    run(config)
    folder = config.out / "checkpoints" / "00000006"
    meta = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(meta | change))
    with pytest.raises(DamagedCheckpointError):
        verify(folder)


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.safetensors", "state.json", "cut", "gone", "older"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(settings, capsys, damage):
    config, model = settings
    run(config)
    last = config.out / "checkpoints" / "00000006"
    if damage == "cut":
        os.truncate(last / "average.safetensors", 100)
    elif damage == "gone":
        (last / "clip.safetensors").unlink()
    elif damage == "older":
        meta = json.loads((last / "state.json").read_text())
        (last / "state.json").write_text(json.dumps(meta | {"format": 1}))
    else:
        contents = bytearray((last / damage).read_bytes())
        contents[len(contents) // 2] ^= 0xFF  # in state.json: no longer text
        (last / damage).write_bytes(contents)
    (config.out / "model" / "model.safetensors").unlink()
    capsys.readouterr()
    run(config, resume=True)
    told = capsys.readouterr()
    assert "trying the checkpoint before it" in told.err
    assert str(last) in told.err
    assert "resumed at step 4" in told.out
    assert same(config.out / "model", model)
    verify(last)  # written anew in the place of the damaged one


def test_no_whole_checkpoint_ends_the_run_in_one_line(settings):
    config, _ = settings
    run(config)
    for folder in (config.out / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(InputError, match=r"none of 2 checkpoints is whole; remove them to start anew"):
        run(config, resume=True)


class Dead(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(("call", "moments"), [("fsync", 7), ("rename", 1)])
def test_a_process_that_dies_at_any_step_of_writing_loses_no_more_than_that_checkpoint(
    settings, monkeypatch, call, moments
):
    config, model = settings

    def interrupt(step):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(build_stage("structure-vae", config), config, on_step=interrupt)
    plain, remove = getattr(os, call), _state.shutil.rmtree
    for moment in range(moments):
        calls, dead = iter(range(100)), []

        def die(*arguments, calls=calls, moment=moment, dead=dead):
            if next(calls) == moment:
                dead.append(True)
                raise Dead
            return plain(*arguments)

        def tidy(*arguments, dead=dead, **options):  # the dead leave what is half written
            return None if dead else remove(*arguments, **options)

        monkeypatch.setattr(_state.os, call, die)
        monkeypatch.setattr(_state.shutil, "rmtree", tidy)
        with pytest.raises(Dead):
            run(config, resume=True)
        monkeypatch.undo()
        assert (config.out / "checkpoints" / ".new").is_dir() == (moment < 6)  # the last one comes after the renaming
    run(config, resume=True)
    assert same(config.out / "model", model)
    assert not (config.out / "checkpoints" / ".new").exists()


def test_a_full_disk_is_said_and_training_goes_on(settings, monkeypatch, capsys):
    """The second checkpoint does not fit; the others do. Nothing of it is left."""
    config, model = settings
    plain, saved = _state.save_file, []

    def full(tensors, path):
        saved.append(path)
        if len(saved) == 6:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(tensors, path)

    monkeypatch.setattr(_state, "save_file", full)
    run(config)
    told = capsys.readouterr().err
    assert "the checkpoint of step 4 cannot be written" in told
    assert "No space left on device" in told
    assert "that of step 2 stays" in told
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["00000002", "00000006"]
    assert same(config.out / "model", model)


FULL = """
import resource, signal, sys
from pathlib import Path
from diff2to3.train._config import load_config
from diff2to3.train._engine import train
from diff2to3.train.stages import build_stage
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True  # it would be cut off too, and break imports from then on
config = load_config(Path(sys.argv[1]))
stage = build_stage("structure-vae", config)
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
train(stage, config, on_step=lambda step: limit(20_000 if step in (2, 3) else resource.RLIM_INFINITY))
"""


def test_files_that_cannot_grow_any_more_leave_the_run_and_the_checkpoint_before(settings):
    """What the operating system itself refuses, in all parts of writing: after step 2 files end at 20 kB."""
    config, model = settings
    path = config.out.with_suffix(".yaml")
    path.write_text(config.model_dump_json())
    process = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    [line] = [line for line in process.stderr.splitlines() if line.startswith("train: ")]
    assert line.startswith("train: the checkpoint of step 4 cannot be written")
    assert line.endswith("that of step 2 stays")
    assert same(config.out / "model", model)


def test_twenty_kills_at_random_moments(micro_config, shard_data, tmp_path):
    """Each loses at most the steps since the last checkpoint, and the end is that of the run that nobody killed."""
    whole = micro_config(
        "structure-vae", data=shard_data, steps=150, checkpoint_every=2, log_every=1, out=tmp_path / "whole"
    )
    run(whole)
    path = tmp_path / "config.yaml"
    path.write_text(whole.model_copy(update={"out": tmp_path / "killed"}).model_dump_json())
    script = Path(__file__).with_name("kills.py")
    process = subprocess.run([sys.executable, script, path, "20", "0"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    *killed, _ = rows = json.loads(process.stdout)
    assert sum(row["seconds"] is not None for row in rows) == 20, rows
    assert all(row["checkpoint"] >= row["from"] for row in rows)  # none is lost
    assert all(row["reported"] - row["checkpoint"] <= 2 for row in killed if row["reported"])
    assert same(tmp_path / "killed" / "model", whole.out / "model")


def test_a_checkpoint_half_removed_is_not_one(settings, monkeypatch):
    """Killed while it removes the oldest: what is left of that has another name, and goes with the next."""
    config, _ = settings
    remove, killed = _state.shutil.rmtree, []

    def dying(folder, **options):
        if Path(folder).is_dir() and any(Path(folder).glob("state.json")) and not killed:
            killed.append(folder)
            (Path(folder) / "state.json").unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(_state.shutil, "rmtree", dying)
    short = config.model_copy(update={"keep_checkpoints": 1})
    with pytest.raises(KeyboardInterrupt):
        run(short)
    found = [path for path in (config.out / "checkpoints").iterdir() if path.name.isdigit()]
    assert killed
    assert found
    for checkpoint in found:
        verify(checkpoint)
    run(short, resume=True)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["00000006"]


def test_checkpoints_of_older_versions_and_of_other_models_are_explained_in_one_line(micro_config, tmp_path):
    config = micro_config("structure-vae")
    (config.out / "checkpoint").mkdir(parents=True)
    path = tmp_path / "config.yaml"
    path.write_text(config.model_dump_json())
    result = CliRunner().invoke(cli, ["train", "structure-vae", str(path), "--resume"])
    assert isinstance(result.exception, InputError)
    assert "was written by an older version, whose checkpoints cannot be gone on from" in str(result.exception)
    assert "\n" not in str(result.exception)
    (config.out / "checkpoint").rmdir()
    run(config)
    wider = config.model_copy(update={"model": config.model | {"encoder_channels": [8, 16]}})
    with pytest.raises(InputError, match=r"is of another model: .* has shape \[.*\], expected \[.*\]; resume with"):
        run(wider, resume=True)
    deeper = config.model_copy(update={"model": config.model | {"num_middle_blocks": 2}})
    with pytest.raises(InputError, match=r"is of another model: \d+ tensors are in one alone"):
        run(deeper, resume=True)


def test_verify_reports_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(DamagedCheckpointError, match="is not a whole checkpoint"):
        verify(tmp_path)

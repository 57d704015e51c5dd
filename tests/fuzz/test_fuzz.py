"""A small share of `python tests/fuzz/run.py --minutes 15`, and proof that each kind of crash is seen."""

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutations import mutate, mutate_inside, mutate_json
from run import Fuzzer, Outcome, table, write_section
from targets import TARGETS, Target

SLOW = {"pipeline": 20, "mesh.glb": 40, "mesh.gltf": 40, "mesh.obj": 40, "mesh.ply": 40, "mesh.ply-text": 40}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused(name, tmp_path):
    outcome = Fuzzer(TARGETS[name], tmp_path).run(SLOW.get(name, 100), None, seed=1)
    assert not outcome.crashes
    assert outcome.refused > 0  # damage reaches the checks
    assert outcome.read + outcome.refused == outcome.tried == SLOW.get(name, 100)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TARGETS)
def test_valid_input_is_read(name, tmp_path):
    """Else the fuzzer would damage what is refused anyway."""
    target = TARGETS[name]
    for number, make in enumerate(target.make):
        folder = tmp_path / str(number) / "case"
        folder.mkdir(parents=True)
        if getattr(make, "__name__", "") in ("_inflated", "_trellis_pipeline"):
            continue  # aliases without end, and a folder without the models that it names
        target.read(make(folder)[0])


def _crashing(tmp_path, read, **options):
    """The crashes of a target that reads so."""

    def make(folder):
        (folder / "a.json").write_text('{"a": 1}')
        return [folder / "a.json"]

    return Fuzzer(Target("bad", (make,), read, **options), tmp_path / "cases", tmp_path / "keep").run(20, None, 0)


def test_every_kind_of_crash_is_seen_and_its_input_kept(tmp_path, monkeypatch):
    calls = iter(range(10**6))

    def late(action):
        """Well with the valid input, which is read first."""
        calls = iter(range(10**6))
        return lambda path: action(path) if next(calls) else None

    def raises(error):
        def read(path):
            raise error

        return read

    def reads_elsewhere(path):
        Path("/etc/hostname").open().close()

    assert _crashing(tmp_path / "1", late(raises(KeyError("a")))).crashed == 20
    assert _crashing(tmp_path / "2", late(raises(ValueError("two\nlines")))).crashed == 20
    assert _crashing(tmp_path / "3", late(raises(ValueError("one line")))).refused == 20
    assert _crashing(tmp_path / "4", late(raises(MemoryError()))).crashed == 20
    outside = _crashing(tmp_path / "5", late(reads_elsewhere), alone=True)
    assert next(iter(outside.crashes)) == "PermissionError at opened"
    monkeypatch.setattr("run.SECONDS_PER_INPUT", 1)
    slow = _crashing(tmp_path / "6", lambda path: time.sleep(30) if next(calls) == 1 else None)
    assert [key.split()[0] for key in slow.crashes] == ["TimeoutError"]
    assert len(list((tmp_path / "1" / "keep").iterdir())) == 1


def test_a_seed_gives_the_same_damage():
    valid = json.dumps({"a": [1, 2, {"b": "c.png"}], "d": 0.5}).encode()
    for change in (mutate, mutate_json, lambda d, r: mutate_inside("x.json", d, r)):
        first, second = ([change(valid, random.Random(s)) for s in range(200)] for _ in range(2))
        assert first == second
        assert len(set(first)) > 50


def test_the_table_is_replaced_and_the_text_around_it_stays(tmp_path, monkeypatch):
    results = tmp_path / "reliability.md"
    monkeypatch.setattr("run.RESULTS", results)
    results.write_text("# Reliability\n\n## Faults\n\nothers\n")
    text = table([Outcome("a", read=2, refused=1, crashed=1, crashes={"x": "y"})], "command", "versions")
    write_section(text)
    results.write_text(results.read_text() + "\nnotes\n")
    write_section(text.replace("| a |", "| b |"))
    after = results.read_text()
    assert after.count("## Fuzzing") == 1
    assert all(text in after for text in ("others", "notes", "| b | 4 |"))
    assert "| a |" not in after


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="NOT TESTED: address space is read from /proc")
def test_memory_is_limited():
    import subprocess

    code = "import run, numpy; run.limit_memory(0.25); numpy.ones(1 << 24); numpy.ones(1 << 29)"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "Unable to allocate 4.00 GiB" in result.stderr

"""`diff2to3 data pack`: shards that WebDataset and plain Python read, made once, whole or not there."""

import json
import re
import signal
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from diff2to3._cli import cli
from diff2to3._errors import InputError
from diff2to3.data._render_stage import write_objects
from diff2to3.data._run import run_stage
from diff2to3.data._shards import pack
from diff2to3.data._store import Store
from safetensors.numpy import load

IDS = ["a", "pack/b", "c.v2", *(f"o{k}" for k in range(9))]  # a folder and a dot in a name
SIZE = 3 * 4096


def features_of(object_id):
    return np.random.default_rng(len(object_id) + ord(object_id[-1])).normal(size=(2, 50, 16)).astype(np.float16)


def fill(root, ids=IDS, seed=0):
    """A data set of two stages; 4 kB an object."""
    store = Store(root)
    write_objects(store, [{"id": i, "split": "val" if i == "o8" else "train", "family": "é"} for i in ids])
    run_stage(store, "voxels", ids, lambda i: {"coords": np.arange(6, dtype=np.uint8).reshape(2, 3)}, {"grid_size": 8})
    run_stage(store, "features", ids, lambda i: {"features": features_of(i)}, {"seed": seed})
    return store


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "set")


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_webdataset_reads_every_object_once(store, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="NO WEBDATASET: `pip install 'diff2to3[scale]'`")
    out = tmp_path / "out"
    index = pack(store, out, (), SIZE)
    urls = [str(out / shard["name"]) for shard in index["shards"]]
    assert len(urls) > 3
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert sorted(sample["json"]["id"] for sample in samples) == sorted(IDS)
    for sample in samples:
        assert sample["json"]["family"] == "é"
        features = load(sample["features.safetensors"])["features"]
        assert features.dtype == np.float16
        np.testing.assert_array_equal(features, features_of(sample["json"]["id"]))
        assert load(sample["voxels.safetensors"])["coords"].shape == (2, 3)


def test_plain_python_reads_what_the_index_says(store, tmp_path):
    out = tmp_path / "out"
    pack(store, out, (), SIZE)
    index = json.loads((out / "index.json").read_text())
    assert index["complete"]
    assert index["stages"]["features"]["settings"] == {"seed": 0}
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    found = {}
    for shard in index["shards"]:
        path = out / shard["name"]
        assert path.stat().st_size == shard["bytes"] <= SIZE + 2 * 10240  # the end of a tar is padded
        assert sha256(path.read_bytes()).hexdigest() == shard["sha256"] == sums[shard["name"]]
        with tarfile.open(path) as tar:
            rows = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]
            assert len(rows) == shard["objects"]
            assert {row["split"] for row in rows} == {shard["split"]}
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    assert len(found) == 3 * len(IDS)
    assert found["c%2Ev2.features.safetensors"] == store.path("features", "c.v2").read_bytes()
    assert found["pack__b.features.safetensors"] == store.path("features", "pack/b").read_bytes()
    assert {p.name for p in out.iterdir()} == {*sums, "index.json", "SHA256SUMS"}


def test_same_data_same_bytes_and_a_second_run_writes_no_shard(store, tmp_path):
    pack(store, tmp_path / "one", (), SIZE)
    pack(fill(tmp_path / "again"), tmp_path / "two", (), SIZE)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*.tar")}
    pack(store, tmp_path / "one", (), SIZE)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*.tar")} == times


def test_changed_data_and_lost_shards_are_packed_again(store, tmp_path):
    out = tmp_path / "out"
    first = pack(store, out, (), SIZE)
    names = [shard["name"] for shard in first["shards"]]
    (out / names[0]).unlink()
    (out / names[1]).write_bytes(b"half")
    assert pack(store, out, (), SIZE) == first
    fill(store.root, seed=1)
    changed = pack(store, out, (), SIZE)
    assert changed["stages"]["features"]["settings"] == {"seed": 1}
    assert [s["sha256"] for s in changed["shards"]] != [s["sha256"] for s in first["shards"]]
    one = pack(store, out, ("voxels",), 10**9)
    assert [p.name for p in sorted(out.glob("*.tar"))] == [s["name"] for s in one["shards"]]
    assert len(one["shards"]) == 2


def test_objects_that_lack_a_stage_are_left_out_with_the_reason(store, tmp_path):
    store.path("features", "a").unlink()
    store.write("features", "o1", {"features": features_of("o1")}, {"seed": 7})
    index = pack(store, tmp_path / "out", (), SIZE)
    assert index["skipped"] == {"a": "lacks features", "o1": "other settings than the last run's: features"}
    assert index["objects"] == len(IDS) - 2
    assert not pack(store, tmp_path / "voxels", ("voxels",), SIZE)["skipped"]


def test_a_damaged_file_is_not_packed(store, tmp_path):
    path = store.path("features", "o3")
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)
    with pytest.raises(InputError, match=r"o3\.safetensors is damaged"):
        pack(store, tmp_path / "out", (), SIZE)
    assert not list((tmp_path / "out").glob(".*"))


KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from diff2to3.data import _shards
from diff2to3.data._store import Store

members, add = 0, _shards._add

def add_or_die(tar, name, payload):
    global members
    members += 1
    if members == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    add(tar, name, payload)

_shards._add = add_or_die
_shards.pack(Store(Path(sys.argv[1])), Path(sys.argv[2]), (), int(sys.argv[3]))
"""


def test_kill_9_leaves_whole_shards_and_the_next_run_goes_on(store, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(store.root), str(out), str(SIZE)])
    assert killed.returncode == -signal.SIGKILL
    index = json.loads((out / "index.json").read_text())
    assert not index["complete"]
    before = {shard["name"]: (out / shard["name"]).stat().st_mtime_ns for shard in index["shards"]}
    assert list(before) == [path.name for path in sorted(out.glob("*.tar"))] != []
    for shard in index["shards"]:
        assert sha256((out / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    pack(store, out, (), SIZE)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    pack(store, tmp_path / "at_once", (), SIZE)
    assert contents(out) == contents(tmp_path / "at_once")


def test_command(store, tmp_path):
    arguments = ["data", "pack", str(store.root), str(tmp_path / "out"), "--stage", "features", "--shard-size", "12KB"]
    store.path("features", "a").unlink()
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "pack: a: lacks features" in result.output
    count = len(list((tmp_path / "out").glob("*.tar")))
    assert f"pack: {len(IDS) - 1} objects in {count} shards, 1 left out" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SET", "OUT", "--shard-size", "256"], "expected a number with KB, MB or GB"),
        (["SET", "OUT", "--shard-size", "0MB"], "expected a number with KB, MB or GB"),
        (["SET", "OUT", "--stage", "latents"], "run `diff2to3 data` for stage 'latents'"),
        (["EMPTY", "OUT"], "not a data set"),
        (["SET", "FOREIGN"], "is not an index of shards"),
    ],
)
def test_mistakes_are_input_errors(store, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.json").write_text('["something else"]')
    places = {"SET": store.root, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "FOREIGN": tmp_path / "foreign"}
    result = CliRunner().invoke(cli, ["data", "pack", *(str(places.get(a, a)) for a in arguments)])
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_arithmetic_of_the_paper_scale_plan():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    lines = re.findall(r"`([^`\n]+) = ([\d.]+)`", page)
    assert len(lines) > 30
    for expression, result in lines:
        assert re.fullmatch(r"[\d.e+*/() -]+", expression), expression
        assert eval(expression) == pytest.approx(float(result), rel=0.01), expression

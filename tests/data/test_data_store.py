"""The data set on disk: whole files or none, work done once, failures on record."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from hashlib import sha256

import numpy as np
import pytest
from diff2to3._engines import Workers
from diff2to3.data._render_stage import asset_path, list_assets, write_objects
from diff2to3.data._run import run_stage
from diff2to3.data._store import Store, decode_png, encode_pngs, outputs_hash, settings_hash
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


class Work:
    """Tensors of an object, a failure for those named bad; remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, object_id):
        self.asked.append(object_id)
        if object_id.startswith("bad"):
            raise ValueError(f"{object_id}.glb: no triangles\nfound")
        return {"name": np.frombuffer(object_id.encode(), np.uint8)}


def test_second_run_does_nothing_and_changed_settings_redo(tmp_path):
    store, work, ids = Store(tmp_path), Work(), ["a", "pack/b"]
    assert run_stage(store, "s", ids, work, {"n": 1}) == {}
    assert work.asked == ids
    assert store.read("s", "pack/b")["name"].tobytes() == b"pack/b"
    run_stage(store, "s", ids, work, {"n": 1})
    assert work.asked == ids
    run_stage(store, "s", ids, work, {"n": 2})
    assert work.asked == ids * 2


def test_failures_are_skipped_recorded_and_tried_again(tmp_path):
    store, work = Store(tmp_path), Work()
    failures = run_stage(store, "s", ["a", "bad1", "c"], work, {})
    assert failures == {"bad1": "ValueError: bad1.glb: no triangles found"}
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["failures"] == failures
    assert manifest["objects"] == 2
    assert not store.path("s", "bad1").exists()
    work.asked.clear()
    run_stage(store, "s", ["a", "bad1", "c"], work, {})
    assert work.asked == ["bad1"]


def test_manifest_holds_counts_hashes_and_versions(tmp_path):
    store, ids = Store(tmp_path), ["a", "bad1", "c"]
    run_stage(store, "s", ids, Work(), {"n": 1})
    manifest = store.manifest("s")
    assert (manifest["objects"], manifest["failed"]) == (2, 1)
    assert manifest["settings_hash"] == settings_hash({"n": 1})
    assert manifest["versions"]["numpy"] == np.__version__
    hashes = {}
    for object_id in ("a", "c"):
        payload = store.path("s", object_id).read_bytes()
        hashes[object_id] = sha256(payload[8 + int.from_bytes(payload[:8], "little") :]).hexdigest()
    assert store.finished("s", {"n": 1}, ids) == hashes
    assert manifest["outputs"] == {"sha256": outputs_hash(hashes), "without_hash": 0}
    run_stage(store, "s", ids, Work(), {"n": 1})
    assert store.manifest("s") == manifest


def test_same_tensors_same_bytes(tmp_path):
    tensors = {"b": np.ones((2, 3), np.float16), "a": np.zeros(5, np.uint8), "scalar": np.array(1.5)}
    contents = set()
    for number in range(8):
        store = Store(tmp_path / str(number))
        store.write("s", "o", tensors, {"n": 1})
        contents.add(store.path("s", "o").read_bytes())
    assert len(contents) == 1
    with safe_open(store.path("s", "o"), "np") as file:
        assert file.metadata()["settings"] == settings_hash({"n": 1})
    for name, value in store.read("s", "o").items():
        np.testing.assert_array_equal(value, tensors[name])
        assert value.dtype == tensors[name].dtype


def test_a_file_says_what_it_was_made_with(tmp_path):
    store, ids = Store(tmp_path), ["a", "b"]
    run_stage(store, "s", ids, Work(), {"n": 1, "rule": [2, {"x": None}]})
    assert store.settings("s", "a") == {"n": 1, "rule": [2, {"x": None}]}
    assert store.settings("s", "absent") == {}
    for asked in ({"n": 1}, {"rule": [2, {"x": None}]}, {"rule": (2, {"x": None}), "n": 1}):
        assert list(store.finished("s", asked, ids)) == ids
    for asked in ({"n": 2}, {"n": 1, "more": 1}, {"rule": [2, {"x": 0}]}):
        assert store.finished("s", asked, ids) == {}


def test_files_from_before_hashes_are_finished(tmp_path):
    store, work = Store(tmp_path), Work()
    store.path("s", "a").parent.mkdir()
    save_file({"x": np.ones(3)}, store.path("s", "a"), {"settings": settings_hash({"n": 1})})
    run_stage(store, "s", ["a", "b"], work, {"n": 1})
    assert work.asked == ["b"]
    assert store.read("s", "a")["x"].sum() == 3
    assert store.manifest("s")["outputs"]["without_hash"] == 1


@pytest.mark.parametrize("payload", [b"", b"glTF" * 40, (2).to_bytes(8, "little") + b"[]", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_unfinished(tmp_path, payload):
    store = Store(tmp_path)
    store.path("s", "a").parent.mkdir()
    store.path("s", "a").write_bytes(payload)
    assert store.finished("s", {}, ["a"]) == {}


def test_half_a_file_is_made_again(tmp_path):
    store, work = Store(tmp_path), Work()
    run_stage(store, "s", ["a"], work, {})
    path = store.path("s", "a")
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ValueError, match="cannot be read"):
        store.read("s", "a")
    run_stage(store, "s", ["a"], work, {})
    assert work.asked == ["a", "a"]
    assert store.read("s", "a")["name"].tobytes() == b"a"


def test_faults_of_the_program_are_not_hidden(tmp_path):
    def work(object_id):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run_stage(Store(tmp_path), "s", ["a"], work, {})


@pytest.fixture
def stage_work(tmp_path, monkeypatch):
    """A module that worker processes can import."""
    (tmp_path / "stage_work_for_test.py").write_text(
        textwrap.dedent("""
        import os, signal, time
        import numpy as np

        state = {}

        def start(value):
            state["value"] = value

        def work(object_id):
            if object_id == "killer":
                os.kill(os.getpid(), signal.SIGKILL)
            if object_id == "bad":
                raise ValueError("no triangles")
            time.sleep(0.01)
            return {"value": np.array([state["value"]])}
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import stage_work_for_test

    yield stage_work_for_test
    sys.modules.pop("stage_work_for_test")


def test_a_dying_worker_costs_only_the_object_that_killed_it(tmp_path, stage_work):
    ids = ["a", "b", "killer", "bad", *(f"c{k}" for k in range(8))]
    store = Store(tmp_path / "set")
    failures = run_stage(store, "s", ids, stage_work.work, {}, Workers(2, stage_work.start, (7,)))
    assert set(failures) == {"killer", "bad"}
    assert failures["killer"] == "RuntimeError: tried 3 times, its worker process died (SIGKILL)"
    for object_id in set(ids) - set(failures):
        assert store.read("s", object_id)["value"] == [7]


def test_kill_9_leaves_whole_files_only(tmp_path):
    script = textwrap.dedent(f"""
        from pathlib import Path
        import numpy as np
        from diff2to3.data._store import Store
        store, k = Store(Path({str(tmp_path)!r})), 0
        while True:
            store.write("s", f"o{{k % 50}}", {{"x": np.full(500_000, k)}}, {{"n": 1}})
            k += 1
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("s/*.safetensors"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    files = list(tmp_path.glob("s/*.safetensors"))
    assert len(files) >= 10
    for file in files:
        values = load_file(file)["x"]
        assert len(values) == 500_000
        assert (values == values[0]).all()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", ["noise", "flat"])
def test_pngs_are_lossless(channels, kind):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 20, channels), np.uint8)
    if kind == "flat":
        images[:] = images[:, :1, :1]
    data, bounds = encode_pngs(images)
    for index in range(3):
        np.testing.assert_array_equal(decode_png(data, bounds, index), images[index])
    assert data[bounds[1] : bounds[2]].tobytes().startswith(b"\x89PNG")


def test_objects_only_grow(tmp_path):
    store = Store(tmp_path)
    write_objects(store, [{"id": "a", "split": "train"}, {"id": "b", "split": "val"}])
    write_objects(store, [{"id": "b", "split": "test"}, {"id": "c", "split": "train"}])
    assert {row["id"]: row["split"] for row in store.objects()} == {"a": "train", "b": "test", "c": "train"}
    assert [row["id"] for row in store.objects("train")] == ["a", "c"]


def test_a_folder_without_objects_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"not a data set.*data render"):
        Store(tmp_path).objects()


def test_assets_are_listed_from_the_index_or_from_files(tmp_path):
    with pytest.raises(ValueError, match=r"no .*glb"):
        list_assets(tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "b.obj").touch()
    (tmp_path / "a.GLB").touch()
    assert [row["id"] for row in list_assets(tmp_path)] == ["a", "pack/b"]
    assert asset_path(tmp_path, "pack/b").name == "b.obj"
    with pytest.raises(ValueError, match="no mesh file for 'x'"):
        asset_path(tmp_path, "x")
    (tmp_path / "index.csv").write_text("id,split\nz,val\n")
    assert list_assets(tmp_path) == [{"id": "z", "split": "val"}]
    (tmp_path / "index.csv").write_text("name\nz\n")
    with pytest.raises(ValueError, match="columns id, split"):
        list_assets(tmp_path)

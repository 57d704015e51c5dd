"""The Ray engine on a local cluster of two workers: nothing lost and nothing twice, whoever dies.

Slow for its size (20 to 50 seconds): it starts a real cluster.
"""

import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diff2to3._cli import cli
from diff2to3._engines import Workers, _ray, using_engine
from diff2to3._errors import InputError
from diff2to3.data._run import run_stage
from diff2to3.data._store import Store, encode_pngs
from diff2to3.data._views import sphere_views
from diff2to3.train._checkpoint import save_model
from flux_features import FluxFeatures, FluxFeaturesConfig
from sparse_vae import GaussianConfig, SparseVAE, SparseVAEConfig

TINY_VAE = {"grid_size": 16, "width": 32, "num_blocks": 1, "num_heads": 2, "window_size": 4}
TINY_VAE |= {"gaussians": GaussianConfig(num_gaussians=2)}

WORK = """
import os, signal, time
from pathlib import Path
import numpy as np

state = {}

def start(log):
    state["log"] = Path(log)

def work(object_id):
    with state["log"].open("a") as file:
        file.write(f"{object_id} {os.getpid()}\\n")
    if object_id == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    if object_id == "bad":
        raise ValueError("no triangles")
    if object_id == "fault":
        raise TypeError("a bug")
    time.sleep(0.25)
    return {"name": np.frombuffer(object_id.encode(), np.uint8)}
"""


@pytest.fixture(scope="module")
def ray_work(tmp_path_factory):
    """A module that the workers of a running cluster of two CPUs can import."""
    if find_spec("ray") is None:
        pytest.skip(
            "NO RAY: `pip install 'diff2to3[scale]'`, where Ray has a wheel for this Python, to test its engine"
        )
    import ray

    folder = tmp_path_factory.mktemp("modules")
    (folder / "ray_work_for_test.py").write_text(textwrap.dedent(WORK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written into the home folder
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.syspath_prepend(str(folder))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
        import ray_work_for_test

        yield ray_work_for_test
        ray.shutdown()
        sys.modules.pop("ray_work_for_test")


def asked(log):
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def kill_one_worker(log, after):
    """Kills the process that took the last object, once ``after`` objects were taken."""
    deadline = time.monotonic() + 60
    while len(asked(log)) < after and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(int(asked(log)[-1][1]), signal.SIGKILL)


def test_two_workers_and_one_is_killed_half_way(tmp_path, ray_work, monkeypatch):
    ids, log = ["bad", *(f"o{k}" for k in range(30))], tmp_path / "log"
    store, written, write = Store(tmp_path / "set"), Counter(), Store.write

    def counting(self, stage, object_id, tensors, settings):
        written[object_id] += 1
        return write(self, stage, object_id, tensors, settings)

    monkeypatch.setattr(Store, "write", counting)
    killing = threading.Thread(target=kill_one_worker, args=(log, 15))
    killing.start()
    with using_engine("ray"):
        failures = run_stage(store, "s", ids, ray_work.work, {}, Workers(2, ray_work.start, (str(log),)))
    killing.join()
    calls = asked(log)
    assert len({pid for _, pid in calls[:15]}) == 2
    assert len({pid for _, pid in calls}) == 3  # another worker took the place of the dead one
    assert len(calls) == len(ids) + 1  # the object under way was tried again, and no other
    assert failures == {"bad": "ValueError: no triangles"}
    assert written == dict.fromkeys(ids[1:], 1)
    for object_id in ids[1:]:
        assert store.read("s", object_id)["name"].tobytes() == object_id.encode()
    assert json.loads((store.root / "s" / "manifest.json").read_text())["objects"] == 30
    with using_engine("ray"):
        run_stage(store, "s", ids[1:], ray_work.work, {}, Workers(2, ray_work.start, (str(log),)))
    assert asked(log) == calls


def test_an_object_that_kills_its_worker_fails_alone(tmp_path, ray_work):
    ids, log = ["a", "killer", "b", "c"], tmp_path / "log"
    store = Store(tmp_path / "set")
    with using_engine("ray"):
        failures = run_stage(store, "s", ids, ray_work.work, {}, Workers(2, ray_work.start, (str(log),)))
    assert list(failures) == ["killer"]
    assert "tried 3 times, ActorDiedError" in failures["killer"]
    assert Counter(object_id for object_id, _ in asked(log)) == {"a": 1, "killer": 3, "b": 1, "c": 1}
    assert len(store.finished("s", {}, ids)) == 3


def test_faults_of_the_program_come_back_as_they_are(tmp_path, ray_work):
    workers = Workers(2, ray_work.start, (str(tmp_path / "log"),))
    with using_engine("ray"), pytest.raises(TypeError, match="a bug") as caught:
        run_stage(Store(tmp_path / "set"), "s", ["a", "fault"], ray_work.work, {}, workers)
    assert any("in work" in note for note in caught.value.__notes__)


def test_stages_make_the_same_files_on_the_cluster(tmp_path, ray_work):
    """From assets to latents, but for the pictures."""
    trimesh = pytest.importorskip("trimesh")
    (tmp_path / "assets").mkdir()
    for number in range(2):
        trimesh.creation.icosphere(1, radius=1 + number).export(tmp_path / "assets" / f"o{number}.glb")
    extractor, vae = FluxFeaturesConfig(image_size=64), SparseVAEConfig.preset("tiny").model_copy(update=TINY_VAE)
    save_model(tmp_path / "extractor", extractor, FluxFeatures(extractor).state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = {name: v + 0.05 * torch.randn_like(v) for name, v in SparseVAE(vae).state_dict().items()}
    save_model(tmp_path / "vae", vae, weights)  # no layer stays zero
    outputs = []
    for engine in ("ray", "local"):
        out, spread = tmp_path / engine, ["--engine", engine, "--workers", "1"]
        invoke("voxelize", tmp_path / "assets", out, *spread, "--grid-size", 16)
        run_stage(Store(out), "render", ["o0", "o1"], lambda object_id: pictures(), {})
        invoke("features", out, "--extractor", tmp_path / "extractor", "--views", 2, "--grid-size", 16, *spread)
        invoke("latents", out, "--vae", tmp_path / "vae", *spread)
        outputs.append({str(f.relative_to(out)): f.read_bytes() for f in out.glob("*/*.safetensors")})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 8


def invoke(*arguments):
    result = CliRunner().invoke(cli, ["data", *map(str, arguments)])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"


def pictures():
    """Stage ``render`` of a noise cube seen twice."""
    views = sphere_views(2, 64, np.random.default_rng(0))
    png, bounds = encode_pngs(np.random.default_rng(1).integers(0, 256, (2, 64, 64, 4), np.uint8))
    return {
        "view_png": png,
        "view_bounds": bounds,
        "view_pose": views.world_to_camera,
        "view_intrinsics": views.intrinsics,
        "view_depth": np.full((2, 16, 16), 2, np.float16),
    }


def test_ray_missing_is_said_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "a.glb").touch()
    monkeypatch.setattr(_ray, "find_spec", lambda name: None)
    arguments = ["data", "voxelize", str(tmp_path), str(tmp_path / "set"), "--engine", "ray"]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, InputError), result.output
    assert "pip install 'diff2to3[scale]'" in str(result.exception)
    assert not (tmp_path / "set").exists()

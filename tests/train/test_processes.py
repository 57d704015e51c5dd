"""Several processes, started by the launcher of Accelerate: they learn what one does, and go on from each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diff2to3._errors import InputError
from diff2to3.train._engine import train
from diff2to3.train.stages import build_stage
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")


def launch(stage, config, ranks, resume=False):
    """Trains in processes of their own."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "config.yaml"
    path.write_text(config.model_dump_json())  # JSON is YAML
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    run = subprocess.run(
        [*launcher, str(WORKER), stage, str(path), *(["--resume"] if resume else [])],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def losses(config):
    lines = map(json.loads, (config.out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def same(one, two, **tolerance):
    first, second = (load_file(path) for path in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_learn_what_one_does_and_each_goes_on_from_the_other(
    micro_config, folder_data, tmp_path, sharding
):
    """Two processes make the very batches of a step that one accumulates; after step 3 the number changes."""
    settings = {"data": folder_data, "steps": 6, "checkpoint_every": 3, "keep_checkpoints": 9, "learning_rate": 1e-3}
    settings |= {"batch_size": 2, "clip_percentile": 50.0, "clip_window": 2}
    alone = micro_config("vae", **settings, accumulate=2, out=tmp_path / "alone")
    train(build_stage("vae", alone), alone)
    both = micro_config("vae", **settings, out=tmp_path / "both", sharding=sharding)
    launch("vae", both, 2)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    for name in ("model", "average", "optimizer"):
        files = [c.out / "checkpoints" / "00000006" / f"{name}.safetensors" for c in (alone, both)]
        same(*files, rtol=1e-3, atol=2e-5)
    same(alone.out / "model/model.safetensors", both.out / "model/model.safetensors", rtol=1e-3, atol=2e-5)

    (both.out / "checkpoints" / "00000006").rename(tmp_path / "taken away")
    one = both.model_copy(update={"accumulate": 2, "sharding": "none"})
    train(build_stage("vae", one), one, resume=True)  # of two processes, in one
    assert losses(one)[-3:] == pytest.approx(losses(alone)[-3:], rel=1e-5)
    if sharding == "none":
        return  # starting processes takes the time
    (alone.out / "checkpoints" / "00000006").rename(tmp_path / "taken away too")
    two = alone.model_copy(update={"accumulate": 1, "sharding": sharding})
    launch("vae", two, 2, resume=True)  # of one process, in two
    assert losses(two)[-3:] == pytest.approx(losses(alone)[3:6], rel=1e-5)


def test_sharding_needs_processes(micro_config):
    config = micro_config("vae", sharding="fsdp2")
    with pytest.raises(InputError, match="fsdp2 needs several processes"):
        train(build_stage("vae", config), config)

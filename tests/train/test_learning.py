"""Training with bfloat16 weights and float32 masters of them."""

import json

import pytest
import torch
from diff2to3._errors import InputError
from diff2to3.train._engine import train
from diff2to3.train._learning import Learning
from diff2to3.train.stages import build_stage
from safetensors.torch import load_file
from torch import nn

HALF = "bf16-weights"


def run(name, config, **options):
    torch.manual_seed(0)
    train(build_stage(name, config), config, **options)
    lines = map(json.loads, (config.out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", ["flow", "structure-flow"])
def test_masters_learn_what_float32_does_and_a_resumed_run_is_the_same(trained_parts, tmp_path, name):
    settings = {"steps": 6, "checkpoint_every": 4, "learning_rate": 1e-3, "accumulate": 2}
    plain = trained_parts(name, **settings, out=tmp_path / "plain")
    half = trained_parts(name, **settings, precision=HALF, out=tmp_path / "half")
    assert run(name, half) == pytest.approx(run(name, plain), rel=2e-2)
    kept = [load_file(config.out / "model" / "model.safetensors") for config in (plain, half)]
    assert {value.dtype for value in kept[1].values()} == {torch.float32}
    torch.manual_seed(0)
    start = build_stage(name, plain).model.state_dict()
    moved = [torch.cat([(k[n] - start[n]).flatten() for n in sorted(k)]) for k in kept]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.7
    assert any(not torch.equal(value, value.bfloat16().float()) for value in kept[1].values())

    (half.out / "checkpoints" / "00000006").rename(tmp_path / "taken away")
    (half.out / "log.jsonl").unlink()
    run(name, half, resume=True)
    for file in ("model", "average", "optimizer"):
        one, two = (
            load_file(folder / f"{file}.safetensors")
            for folder in (tmp_path / "taken away", half.out / "checkpoints" / "00000006")
        )
        assert all(torch.equal(one[key], two[key]) for key in one), file


def test_what_cannot_have_bfloat16_weights_is_refused(micro_config):
    config = micro_config("vae", precision=HALF)
    with pytest.raises(InputError, match="bf16-weights is for the flows"):
        train(build_stage("vae", config), config)


def test_parameters_that_learn_are_named_as_the_models():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    for half in (False, True):
        learning = Learning(model, half)
        assert list(learning.parameters) == ["0.weight", "1.weight", "1.bias"]
        assert {p.dtype for p in learning.parameters.values()} == {torch.float32}
        assert list(learning.state()) == list(model.state_dict())

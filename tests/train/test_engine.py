"""The training loop: schedule, resuming, what it does when something goes wrong."""

import json

import pytest
import torch
from diff2to3._errors import InputError
from diff2to3.train import _engine
from diff2to3.train._config import TrainConfig, load_config
from diff2to3.train._engine import Schedule, train
from diff2to3.train._learning import Learning
from diff2to3.train._optimizer import make_optimizers
from diff2to3.train.stages import STAGES, build_stage
from safetensors.torch import load_file


def _run(stage, config, resume=False):
    return train(build_stage(stage, config), config, resume)


@pytest.mark.parametrize(
    ("stage", "optimizer", "source"),
    [
        ("structure-vae", "adamw", "micro_data"),
        ("vae", "muon", "micro_data"),
        ("vae", "adamw", "shard_data"),
        ("autoencoder", "adamw", "shard_data"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    micro_config, tmp_path, monkeypatch, request, stage, optimizer, source
):
    data = request.getfixturevalue(source)
    whole = micro_config(stage, data=data, steps=6, checkpoint_every=2, out=tmp_path / "whole", optimizer=optimizer)
    _run(stage, whole)

    cut = whole.model_copy(update={"out": tmp_path / "cut"})
    log = _engine.Log.__call__

    def interrupt(self, step, seconds, figures):
        log(self, step, seconds, figures)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(_engine.Log, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _run(stage, cut)
    monkeypatch.undo()
    assert json.loads((cut.out / "checkpoints" / "00000004" / "state.json").read_text())["step"] == 4
    _run(stage, cut, resume=True)

    first, second = (load_file(c.out / "checkpoints" / "00000006" / "model.safetensors") for c in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (load_file(c.out / "model" / "model.safetensors") for c in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss(micro_config):
    config = micro_config("structure-vae", steps=60, learning_rate=3e-3, log_every=1)
    _run("structure-vae", config)
    losses = [
        json.loads(line)["loss"] for line in (config.out / "log.jsonl").read_text().splitlines() if '"loss"' in line
    ]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_muon_updates_the_matrices_inside_the_blocks_and_adamw_the_rest(micro_config, monkeypatch):
    config = micro_config("vae", optimizer="muon")
    model = build_stage("vae", config).model
    muon, adamw = make_optimizers(Learning(model), config, fused=False)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden, others = ([names[id(p)] for g in o.param_groups for p in g["params"]] for o in (muon, adamw))
    assert sorted(hidden + others) == sorted(names.values())
    linear = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert set(hidden) == {name for name in linear if ".blocks." in name} != linear
    assert len(make_optimizers(Learning(model), micro_config("vae"), fused=False)) == 1
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match=r"needs torch 2\.9 or newer"):
        make_optimizers(Learning(model), config, fused=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(micro_config):
    config = micro_config("structure-vae", steps=6, checkpoint_every=2)
    stage = build_stage("structure-vae", config)
    plain = stage.forward

    def poisoned(batch):
        loss, figures = plain(batch)
        stage.calls = getattr(stage, "calls", 0) + 1
        return (loss * float("nan") if stage.calls == 4 else loss), figures

    stage.forward = poisoned
    with pytest.raises(RuntimeError, match="step 4: the loss is nan"):
        train(stage, config)
    saved = load_file(config.out / "checkpoints" / "00000002" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_learning_rate_warms_up_and_follows_whichever_of_steps_and_minutes_is_further():
    config = TrainConfig(
        data=".", out=".", steps=100, max_minutes=1, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1
    )
    schedule = Schedule(config)
    assert schedule.learning_rate(0, 0) == pytest.approx(0.1)
    assert schedule.learning_rate(50, 0) == pytest.approx(0.55)
    assert schedule.learning_rate(20, 30) == pytest.approx(0.55)
    assert schedule.learning_rate(20, 60) == pytest.approx(0.1)
    assert schedule.progress(20, 90) == 1


def test_config_file_with_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: d\nout: o\nmodel: {preset: tiny}\n")
    config = load_config(path, ("steps=7", "model.width=64", "options.frame=canonical"))
    assert (config.steps, config.model, config.options) == (7, {"preset": "tiny", "width": 64}, {"frame": "canonical"})


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("data: d\nout: o\nstep: 3\n", (), "step"),
        ("data: d\n", (), "out"),
        ("- 1\n", (), "expected a mapping"),
        ("data: [\n", (), "not a readable YAML"),
        ("data: d\nout: o\n", ("steps",), "expected key=value"),
        ("data: d\nout: o\n", ("steps=many",), "steps"),
        ("data: d\nout: o\n", ("steps=[",), "the value is not YAML"),
        ("data: d\nout: o\n", ("data.x=1",), "data is no mapping"),
    ],
)
def test_bad_configs_are_explained(tmp_path, text, overrides, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(path, overrides)


def test_unknown_options_and_missing_parts_are_explained(micro_config):
    with pytest.raises(InputError, match="lpip_weight"):
        build_stage("vae", micro_config("vae", options={"lpip_weight": 1}))
    with pytest.raises(InputError, match="builds on a trained features"):
        build_stage("flow", micro_config("flow", parts={}))


def test_every_tiny_configuration_names_a_stage_and_validates():
    from pathlib import Path

    folder = Path(__file__).parents[2] / "configs" / "tiny"
    found = {path.stem: load_config(path) for path in folder.glob("*.yaml")}
    assert set(STAGES) <= set(found)

"""Parts of the loop: packing, averaging, clipping, recomputing, several views, foreign components, what is told."""

import json
from typing import Literal

import diff2to3
import numpy as np
import pytest
import torch
from diff2to3._errors import InputError
from diff2to3.train._average import Average, Clip
from diff2to3.train._batches import ConditionBatches
from diff2to3.train._config import TrainConfig
from diff2to3.train._data import open_data
from diff2to3.train._engine import train
from diff2to3.train._learning import Learning
from diff2to3.train._log import Meter, count_flops
from diff2to3.train._packing import Packing, pack
from diff2to3.train._parallel import blocks, recompute_blocks
from diff2to3.train.stages import STAGES, build_stage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel
from torch import nn

CPU, GRID = torch.device("cpu"), 16
ALL = ("render", "voxels", "features", "latents")


def run(stage, config, **options):
    return train(build_stage(stage, config), config, **options)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(50, 120), st.integers(1, 9))
def test_packing_holds_every_object_once_a_pass_within_the_budget(lengths, budget, most):
    packing = Packing(lengths, budget, most, seed=3)
    count = len(pack(np.random.default_rng([3, 0, 7]).permutation(packing.fitting), np.array(lengths), budget, most))
    items = [packing[item] for item in range(count)]
    assert sorted(np.concatenate(items).tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in item) <= budget and len(item) <= most for item in items)
    again = Packing(lengths, budget, most, seed=3)
    assert np.array_equal(again[count + 2], packing[count + 2])  # whatever was asked for before


def test_packing_fills_nine_tenths_of_the_budget():
    lengths = np.random.default_rng(0).lognormal(9.2, 0.5, 2000).astype(int).clip(max=50_000)
    packing = Packing(lengths, 80_000, 99, 0)
    assert np.mean([lengths[packing[item]].sum() for item in range(100)]) > 0.9 * 80_000


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_of_a_budget(micro_config, folder_data, capsys, streaming):
    config = micro_config("flow", data=folder_data, streaming=streaming, batch_size=9)
    lengths = open_data(config, "train", ALL, CPU).num_voxels()
    budget = int(np.sort(lengths)[-2])  # less than the largest has
    config = config.model_copy(update={"max_voxels": budget})
    batches = ConditionBatches(open_data(config, "train", ALL, CPU), GRID, "canonical", with_latents=True)
    for item in range(9):
        batch = batches[item]
        assert len(batch["latents"].features) <= budget
        assert len(batch["condition"]) == batch["batch_size"]
    assert f"train: 1 of 7 objects have over {budget} voxels and are left out" in capsys.readouterr().err
    small = config.model_copy(update={"max_voxels": 1})
    with pytest.raises(InputError, match="max_voxels: 1 is less than any of 7 objects has"):
        open_data(small, "train", ALL, CPU).draw(0)


def test_average_is_the_plain_recursion_and_is_only_lent():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, expected = Average(Learning(model), 0.6), None
    for step in range(8):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        share = min(0.6, (1 + step) / (10 + step))
        now = model.weight.detach().clone()
        expected = now if expected is None else share * expected + (1 - share) * now
    with average.in_place():
        assert torch.allclose(model.weight, expected, atol=1e-6)
    assert torch.equal(model.weight, now)
    assert set(average.values) == {"weight"}


def test_gradients_are_clipped_to_the_longest_and_to_the_percentile_of_those_before():
    parameter = torch.zeros(4, requires_grad=True)
    clip, lengths, after = Clip([parameter], 10.0, 50.0, 3, CPU), [1.0, 2.0, 4.0, 3.0, 100.0], []
    for length in lengths:
        parameter.grad = torch.full((4,), length / 2)
        assert float(clip()) == pytest.approx(length)
        after.append(float(parameter.grad.norm()))
    # The window is full after three; medians of (1, 2, 4) and of (2, 4, 3) follow.
    assert after == pytest.approx([1, 2, 4, 2, 3], rel=1e-4)
    plain = Clip([parameter], 10.0, None, 3, CPU)
    parameter.grad = torch.full((4,), 50.0)
    plain()
    assert float(parameter.grad.norm()) == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("stage", ["vae", "flow"])
def test_recomputed_blocks_give_the_same_gradients_and_keep_less(trained_parts, stage):
    config = trained_parts(stage)
    kept, found = [], []
    for recompute in (False, True):
        model_stage = build_stage(stage, config)
        with torch.no_grad():
            for parameter in model_stage.model.parameters():
                parameter.add_(0.02)  # new models return zero
        if recompute:
            recompute_blocks(model_stage.model)
        assert list(blocks(model_stage.model))
        batch = model_stage.batches(config, "train", CPU)[0]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss, _ = model_stage(batch)
        loss.backward()
        kept.append(sum(sizes))
        found.append({name: p.grad for name, p in model_stage.model.named_parameters() if p.grad is not None})
    assert kept[1] < kept[0]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_every_stage_makes_sheets_and_tells_trackers_and_accumulates(trained_parts, tmp_path):
    for name in STAGES:
        config = trained_parts(
            name, steps=2, accumulate=2, sample_every=2, trackers=("tensorboard",), max_voxels=4000,
            options={"condition_views": 2, "photo": {}}, gradient_checkpointing=True, out=tmp_path / "runs" / name,
        )  # fmt: skip
        if name == "autoencoder":
            config = config.model_copy(update={"max_voxels": None})
        run(name, config)
        sheet = Image.open(config.out / "samples" / "00000002.png")
        assert sheet.size[0] >= 32
        assert list((config.out / "tensorboard").rglob("events.*"))
        line = json.loads((config.out / "log.jsonl").read_text().splitlines()[0])
        assert line["objects/s"] > 0


def test_a_batch_shows_one_to_so_many_views_of_its_own_to_each_object(trained_parts):
    config = trained_parts("flow", options={"condition_views": 3}, batch_size=2)
    stage = build_stage("flow", config)
    batches, seen = stage.batches(config, "train", CPU), set()
    for item in range(12):
        condition = batches[item]["condition"]
        seen.add(condition.shape[1])
        for views in condition:
            assert len(torch.unique(views.flatten(1), dim=0)) == len(views)  # all different
        assert stage.condition(batches[item]).shape[:2] == condition.shape[:2]
    assert seen == {1, 2, 3}


class AcmeConfig(BaseModel):
    kind: Literal["acme"] = "acme"
    latent_channels: int = 8
    condition_channels: int = 3
    grid_size: int = GRID


class AcmeBackbone(nn.Module):
    """A backbone of somebody else's: with dropout, without `prepare` and without presets."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.latent_channels + config.condition_channels + 1, config.latent_channels)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, condition):
        owner = x.topology.coords[:, 0].long()
        told = torch.cat([t[:, None], condition.flatten(1, -2).mean(1)], 1)[owner]
        return x.replace(self.dropout(self.layer(torch.cat([x.features, told], 1))))


class AcmeExtractor(nn.Module):
    """An extractor without weights: the mean colour of 8 x 8 pixels."""

    channels, stride, image_size = 3, 8, 16

    def forward(self, images):
        return nn.functional.avg_pool2d(images, self.stride)

    def tokens(self, feature_map):
        return feature_map.permute(0, 2, 3, 1)


def test_a_foreign_backbone_and_extractor_train_and_resume_bit_for_bit(trained_parts, tmp_path):
    diff2to3.register(AcmeBackbone, role="backbone", name="acme", config=AcmeConfig)
    diff2to3.register(AcmeExtractor, role="feature_extractor", name="acme-pixels")
    settings = {"model": {"name": "acme"}, "options": {"extractor": {"name": "acme-pixels"}}, "steps": 4}
    parts = {"vae": trained_parts("flow").parts["vae"]}
    whole = trained_parts("flow", parts=parts, checkpoint_every=2, out=tmp_path / "whole", **settings)
    run("flow", whole)
    cut = whole.model_copy(update={"out": tmp_path / "cut"})

    def interrupt(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("flow", cut, on_step=interrupt)
    torch.manual_seed(99)  # what the resumed process has in its generator does not matter
    run("flow", cut, resume=True)
    first, second = ((c.out / "model" / "model.safetensors").read_bytes() for c in (whole, cut))
    assert first == second
    with pytest.raises(
        InputError, match=r"gives tokens of 3 channels, the model takes 64; set model\.condition_channels"
    ):
        build_stage("flow", whole.model_copy(update={"model": trained_parts("flow").model}))


def test_flops_are_those_of_the_products(trained_parts):
    """Thrice those of a linear layer that learns; nothing else is counted in a model that has nothing else."""
    diff2to3.register(AcmeBackbone, role="backbone", name="acme", config=AcmeConfig)
    diff2to3.register(AcmeExtractor, role="feature_extractor", name="acme-pixels")
    options = {"extractor": {"name": "acme-pixels"}, "jitter": 0.0}
    config = trained_parts("flow", model={"name": "acme"}, options=options)
    stage = build_stage("flow", config)
    batch = stage.batches(config, "train", CPU)[0]
    count = len(batch["latents"].features)
    # Hue: 3 x 3 matrices on the pictures' pixels, once.
    pixels = batch["condition"].shape[0] * batch["condition"].shape[-1] * batch["condition"].shape[-2]
    assert count_flops(stage, batch) * count == pytest.approx(3 * 2 * 12 * 8 * count + 2 * 9 * pixels, rel=0.01)


def test_meter_counts_all_processes():
    class Two:
        num_processes, device = 2, CPU

    meter = Meter(None, Two())
    meter.start -= 2
    meter.steps = 4
    meter.count({"batch_size": 6})
    figures = meter.read()
    assert figures["objects/s"] == pytest.approx(6, rel=0.05)
    assert figures["it/s"] == pytest.approx(2, rel=0.05)


def test_trackers_that_are_not_installed_are_named(micro_config, monkeypatch):
    from diff2to3.train import _parallel

    monkeypatch.setattr(_parallel, "find_spec", lambda name: None)
    config = micro_config("structure-vae", trackers=("wandb",))
    with pytest.raises(InputError, match="wandb is not installed: pip install wandb"):
        run("structure-vae", config)


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_every_configuration_has_known_settings(preset):
    """Names of settings and of the models' fields; the parts are not there."""
    from pathlib import Path

    from diff2to3.train._config import load_config
    from diff2to3.train.stages._base import Options
    from smdit import SMDiTConfig, StructureDiTConfig, StructureFlowConfig

    folder = Path(__file__).parents[2] / "configs" / preset
    found = {path.stem: load_config(path) for path in folder.glob("*.yaml") if path.stem != "accelerate"}
    assert set(found) == set(STAGES)
    for name, config in found.items():
        assert isinstance(config, TrainConfig)
        Options(**config.options)
        values = dict(config.model)
        if name == "structure-flow":
            flow = StructureFlowConfig.preset(values.pop("preset")).flow
            assert isinstance(type(flow).model_validate(flow.model_dump() | values), SMDiTConfig | StructureDiTConfig)

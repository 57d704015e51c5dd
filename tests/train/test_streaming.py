"""Training from shards: bounded memory, the exact place to go on from, and damage that is said and survived."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diff2to3._cli import cli
from diff2to3._errors import InputError
from diff2to3.data._shards import pack
from diff2to3.data._store import Store
from diff2to3.train._ahead import ReadAhead
from diff2to3.train._batches import ConditionBatches, PictureBatches, ViewBatches
from diff2to3.train._data import open_data
from diff2to3.train._engine import train
from diff2to3.train.stages import STAGES, build_stage

GRID, CPU = 16, torch.device("cpu")
ALL = ("render", "voxels", "features", "latents")


@pytest.fixture
def shards(shard_data, tmp_path):
    """A copy of the shards, to be damaged."""
    return shutil.copytree(shard_data, tmp_path / "shards")


def same(one, two):
    return (
        all(torch.equal(one[k], two[k]) for k in one if isinstance(one[k], torch.Tensor)) and one.keys() == two.keys()
    )


def views(config, **changes):
    return ViewBatches(open_data(config.model_copy(update=changes), "train", ALL, CPU), GRID)


def offset_of(data, number, stage, key):
    """First byte of a tensor in its shard."""
    file = data.objects.file(number, stage)
    return file.path, file.start + file._entry(key).start


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_every_stage_trains_from_shards_as_from_the_folder(micro_config, folder_data, shard_data, tmp_path):
    """Bit for bit, but for stage 1's latents, which are encoded one by one instead of all at once."""
    for name in STAGES:
        losses = []
        for source, folder in ((folder_data, "folder"), (shard_data, "shards")):
            config = micro_config(name, data=source, steps=3, batch_size=3)
            if folder == "shards":
                config = config.model_copy(update={"out": tmp_path / "from_shards" / name})
            train(build_stage(name, config), config)
            lines = map(json.loads, (config.out / "log.jsonl").read_text().splitlines())
            losses.append([line["loss"] for line in lines if "loss" in line])
            if name == "vae":
                path = config.out / "model" / "config.json"
                statistics = {"latent_mean": [0.0] * 8, "latent_std": [1.0] * 8}
                path.write_text(json.dumps(json.loads(path.read_text()) | statistics))
        assert len(losses[0]) == 3
        assert losses[0] == (pytest.approx(losses[1], rel=1e-3) if name == "structure-flow" else losses[1])


def test_command_line(shard_data, micro_config, tmp_path):
    config = micro_config("structure-vae", data=shard_data, out=tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(config.model_dump_json())
    arguments = ["train", "structure-vae", str(path), "--set", "workers=2", "--set", "streaming=true"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("stride", [1, 3])
def test_items_read_ahead_are_the_items(micro_config, shard_data, stride):
    config = micro_config("vae", data=shard_data)
    plain, ahead = views(config), ReadAhead(views(config), CPU, lambda item: item + stride, workers=2)
    for item in (2, 2 + stride, 2 + 2 * stride, 40, 40 + stride):  # also after a jump
        assert same(ahead[item], plain[item])
        assert len(ahead.made) < ahead.depth == 4


def test_memory_does_not_grow_with_the_data_set(micro_config, tmp_path, folder_data):
    """Forty objects of 0.26 MB in files: streaming them takes what a few batches take."""
    store = Store(tmp_path / "set")
    rows = "id,split\n" + "".join(f"o{k},train\n" for k in range(40))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "objects.csv").write_text(rows)
    names = [f"o{k}" for k in range(40)]
    rng = np.random.default_rng(0)
    for name in names:
        store.write("voxels", name, Store(folder_data).read("voxels", "pack/a"), {})
        store.write("render", name, Store(folder_data).read("render", "pack/a"), {})
        count = len(store.read("voxels", name)["coords"])
        features = {"features": rng.normal(size=(200, count, 16)).astype(np.float16)}
        store.write("features", name, features | {"hue": np.zeros(200, "f4"), "mirrored": np.zeros(200, "u1")}, {})
    for stage in ("render", "voxels", "features"):
        store.write_manifest(stage, {}, store.finished(stage, {}, names), {})
    index = pack(store, tmp_path / "shards", (), 2_000_000)
    assert sum(entry["bytes"] for entry in index["shards"]) > 10_000_000
    peaks = []
    for streaming in (True, False):
        config = micro_config("vae", data=tmp_path / "shards", streaming=streaming)
        tracemalloc.start()  # also counts NumPy's arrays, of which torch's are views
        try:
            batches = ViewBatches(open_data(config, "train", ALL[:3], CPU), GRID)
            for step in range(40):  # two passes
                batches[step]
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] > 8_000_000, peaks
    # The largest thing is one object's file, read whole to compare its SHA-256: 0.3 MB. What threads that earlier tests
    # left running take meanwhile counts too.
    assert peaks[0] < peaks[1] / 3, peaks


def test_missing_and_cut_off_shards_are_refused_at_the_start(micro_config, shards):
    config = micro_config("vae", data=shards)
    (shards / "train-000001.tar").unlink()
    last = shards / "train-000002.tar"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(InputError) as caught:
        views(config)
    message = str(caught.value)
    assert "2 of 4 shards are damaged: train-000001.tar is missing; train-000002.tar has" in message
    assert "run `diff2to3 data pack` again" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": False}, "packing has not ended; run `diff2to3 data pack` again"),
        ({"shards": [{"name": "x"}]}, "is not an index of shards"),
        ({"stages": {"voxels": {}}}, "the shards have no stage render, features, latents, only voxels"),
    ],
)
def test_unusable_indices(micro_config, shards, change, message):
    path = shards / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        views(micro_config("vae", data=shards))


@pytest.mark.parametrize("stage", ["voxels", "features", "render"])
def test_an_altered_object_is_said_and_replaced(micro_config, shards, capsys, stage):
    """By the next one, in every batch in the same way, whatever was read before."""
    config = micro_config("vae", data=shards, batch_size=4)
    data = open_data(config, "train", ALL, CPU)
    whole = [views(config)[step] for step in range(7)]
    key = {"voxels": "coords", "features": "features", "render": "view_bounds"}[stage]
    path, position = offset_of(data, 3, stage, key)
    for byte in range(0, 24, 4):  # of view_bounds: every entry of it that matters
        flip(path, position + byte)
    batches = views(config)
    damaged = [batches[step] for step in range(7)]
    assert capsys.readouterr().err.count("another object takes its place") == 1
    again = [views(config)[step] for step in reversed(range(7))][::-1]
    assert all(same(one, two) for one, two in zip(damaged, again, strict=True))
    for step, (one, two) in enumerate(zip(whole, damaged, strict=True)):
        objects = data.draw(step)[0]
        used = data.draw(step, frozenset({3}))[0]
        assert torch.equal(used, torch.where(objects == 3, 4, objects))
        keep = objects != 3
        assert torch.equal(one["image"][keep], two["image"][keep])
        assert torch.equal(one["pose"][keep], two["pose"][keep])
    assert same(whole[0], views(config, data=shards)[0]) == (3 not in data.draw(0)[0])


def test_a_damaged_picture_is_said_and_replaced(micro_config, shards, capsys):
    """Only in the batches that want it: the object's other pictures are used, whatever was found damaged before."""
    config = micro_config("autoencoder", data=shards, batch_size=7)
    data = open_data(config, "train", ("render",), CPU)
    path, position = offset_of(data, 2, "render", "view_png")
    for byte in range(100, 3000, 200):  # in its first picture
        flip(path, position + byte)
    batches = PictureBatches(data)
    found = [batches[step] for step in range(24)]
    assert capsys.readouterr().err.count("object 0 of train-000001.tar") == 1
    assert all(len(batch["image"]) == 7 for batch in found)
    again = [PictureBatches(open_data(config, "train", ("render",), CPU))[step] for step in range(24)]
    assert all(same(one, two) for one, two in zip(found, again, strict=True))


def test_a_damaged_tar_loses_what_comes_after(micro_config, shards, capsys):
    config = micro_config("flow", data=shards, batch_size=3)
    data = open_data(config, "train", ALL, CPU)
    path = data.objects.file(1, "render").path
    flip(path, data.objects.file(1, "render").start - 512 + 100)  # in the header of the second object's first file
    batches = ConditionBatches(open_data(config, "train", ALL, CPU), GRID, "canonical", with_latents=True)
    seen = torch.cat([batches[step]["object"] for step in range(7)])
    assert set(seen.tolist()) == {0, 2, 3, 4, 5, 6}
    assert f"{path}: " in capsys.readouterr().err


def test_a_dead_disk_ends_the_run(micro_config, shards):
    config = micro_config("vae", data=shards)
    batches = views(config)
    batches[0]
    for path in shards.glob("train-*.tar"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"item 0: 7 of its objects cannot be read; .*\.tar"):
        ReadAhead(batches, CPU, lambda item: item + 1, 2)[0]


def test_neither_a_data_set_nor_shards(micro_config, tmp_path):
    with pytest.raises(InputError, match=r"is not a data set: objects\.csv is missing"):
        views(micro_config("vae", data=tmp_path))

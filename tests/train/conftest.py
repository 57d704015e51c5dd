"""A data set of three made-up objects, written without any renderer: small balls and boxes on a 16^3 grid."""

import json

import numpy as np
import pytest
import torch

GRID, SIZE, VIEWS, VARIANTS = 16, 32, 3, 2


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory):
    """Root of the data set: splits train (2 objects) and val (1), every stage up to `latents` present."""
    return write_data(tmp_path_factory.mktemp("data"), {"pack/a": "train", "pack/b": "train", "pack/c": "val"})


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory):
    """The same with seven objects to train on."""
    splits = {f"pack/{name}": "train" for name in "abcdefg"} | {"pack/v": "val"}
    return write_data(tmp_path_factory.mktemp("folder"), splits)


@pytest.fixture(scope="session")
def shard_data(folder_data, tmp_path_factory):
    """`folder_data` in shards of two objects each."""
    from diff2to3.data._shards import pack
    from diff2to3.data._store import Store

    out = tmp_path_factory.mktemp("shards")
    index = pack(Store(folder_data), out, (), 100_000)
    assert [s["objects"] for s in index["shards"]] == [2, 2, 2, 1, 1], "objects of another size than the tests want"
    return out


def write_data(root, splits):
    """Made-up objects by id and split, in every stage up to `latents`."""
    from diff2to3.data._render_stage import write_objects
    from diff2to3.data._store import Store, encode_pngs
    from diff2to3.data._views import orbit

    store = Store(root)
    rows = [{"id": name, "split": split} for name, split in splits.items()]
    write_objects(store, rows)
    rng = np.random.default_rng(0)
    for row in rows:
        cells = np.stack(np.meshgrid(*[np.arange(GRID)] * 3, indexing="ij"), -1).reshape(-1, 3)
        keep = np.linalg.norm(cells - rng.uniform(5, 10, 3), axis=1) < rng.uniform(2, 4)
        coords = cells[keep].astype(np.uint8)
        pictures = rng.integers(0, 256, (VIEWS, SIZE, SIZE, 4), dtype=np.uint8)
        azimuth = rng.uniform(0, 360, VIEWS)
        ones = np.ones(VIEWS)
        views = orbit(azimuth, 20 * ones, 2 * ones, 40 * ones, SIZE)
        png, bounds = encode_pngs(pictures)
        rendered = {
            "view_depth": np.full((VIEWS, SIZE // 4, SIZE // 4), 2.0, np.float16),
            "condition_azimuth": azimuth.astype(np.float32),
        }
        for kind in ("view", "condition"):
            rendered |= {f"{kind}_png": png, f"{kind}_bounds": bounds}
            rendered |= {f"{kind}_pose": views.world_to_camera, f"{kind}_intrinsics": views.intrinsics}
        store.write("render", row["id"], rendered, {})
        store.write("voxels", row["id"], {"coords": coords}, {})
        features = rng.normal(size=(VARIANTS, len(coords), 16)).astype(np.float16)
        variants = {"hue": np.array([0, 120], np.float32), "mirrored": np.array([0, 1], np.uint8)}
        store.write("features", row["id"], {"features": features} | variants, {})
        latents = rng.normal(size=(VARIANTS, 4, len(coords), 8)).astype(np.float16)
        store.write("latents", row["id"], {"latents": latents}, {})
    for stage in ("render", "voxels", "features", "latents"):
        store.write_manifest(stage, {}, store.finished(stage, {}, splits), {})
    return store.root


FLOW = {"width": 32, "num_heads": 2, "head_dim": 16, "num_double_blocks": 1, "num_single_blocks": 1}
MODELS = {
    "autoencoder": {"image_size": SIZE, "encoder_blocks": [0, 0, 0, 1], "decoder_blocks": [1, 0, 0, 0]},
    "vae": {
        "grid_size": GRID,
        "width": 32,
        "num_blocks": 1,
        "num_heads": 2,
        "window_size": 4,
        "gaussians": {"num_gaussians": 2, "scale_bias": 0.03},
    },
    "structure-vae": {
        "grid_size": GRID,
        "latent_channels": 4,
        "encoder_channels": [8, 8],
        "decoder_channels": [8, 8],
        "num_middle_blocks": 1,
    },
    "structure-flow": {"latent_channels": 4, "grid_size": 8, **FLOW},
    "flow": {"grid_size": GRID, "io_channels": [16], **FLOW},
}


@pytest.fixture
def micro_config(micro_data, tmp_path):
    """micro_config(stage, **changes): the training configuration of a stage at the smallest size, on the CPU."""
    from diff2to3.train._config import TrainConfig

    def make(stage, **changes):
        folder = stage.replace("-", "_")
        parts = {
            "structure-flow": {"features": "autoencoder", "structure_vae": "structure_vae"},
            "flow": {"features": "autoencoder", "vae": "vae"},
        }.get(stage, {})
        settings = {
            "data": micro_data,
            "out": tmp_path / folder,
            "model": MODELS[stage],
            "parts": {role: tmp_path / name / "model" for role, name in parts.items()},
            "steps": 2,
            "batch_size": 2,
            "warmup_steps": 0,
            "precision": "fp32",
            "device": "cpu",
            "log_every": 1,
            "validate_every": 1000,
        }
        return TrainConfig(**settings | changes)

    return make


@pytest.fixture
def trained_parts(micro_config):
    """trained_parts(stage, **changes): its configuration, with the parts that it builds on trained for a step."""
    from diff2to3.train._engine import train
    from diff2to3.train.stages import build_stage

    for name in ("autoencoder", "vae", "structure-vae"):
        config = micro_config(name, steps=1)
        train(build_stage(name, config), config)
        if name == "vae":
            path = config.out / "model" / "config.json"
            statistics = {"latent_mean": [0.0] * 8, "latent_std": [1.0] * 8}
            path.write_text(json.dumps(json.loads(path.read_text()) | statistics))
    return micro_config

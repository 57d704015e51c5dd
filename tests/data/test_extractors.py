"""`diff2to3 data features --extractor`: where weights may come from, and whose consent a download needs."""

from types import SimpleNamespace

import diffusers  # noqa: F401  (it loads LLVM, which crashes once another test opened OpenGL on a machine without a GPU)
import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from diff2to3 import Pipeline
from diff2to3._cli import cli
from diff2to3._errors import InputError
from diff2to3._store import state_sha256
from diff2to3.data._extractor import ExtractorChoice, open_extractor
from diff2to3.data._feature_stage import FeatureSettings, Lifting
from diff2to3.data._render_stage import write_objects
from diff2to3.data._store import Store, encode_pngs
from diff2to3.data._views import sphere_views
from diff2to3.train._checkpoint import save_model
from flux_features import FluxFeatures, FluxFeaturesConfig
from flux_features import _config as presets
from gs_render import Camera
from safetensors.torch import save_file

GRID, SIZE, VIEWS = 8, 64, 3
SMALL_KL = FluxFeaturesConfig(architecture="kl", block_channels=(32, 32, 32, 32), shift=0.1159, scale=0.3611)
DEV = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def store(tmp_path):
    """One object whose pictures hold, at every pixel, its own place: red is x and green y over the side."""
    store = Store(tmp_path / "set")
    write_objects(store, [{"id": "a", "split": "train"}])
    views = sphere_views(VIEWS, SIZE, np.random.default_rng(0))
    place = np.stack(np.meshgrid(*[(np.arange(SIZE) + 0.5) / SIZE * 255] * 2), -1)
    picture = np.concatenate([place, np.full((SIZE, SIZE, 1), 128.0), np.full((SIZE, SIZE, 1), 255.0)], -1)
    png, bounds = encode_pngs(np.repeat(picture.round().astype(np.uint8)[None], VIEWS, 0))
    rendered = {"view_png": png, "view_bounds": bounds, "view_pose": views.world_to_camera}
    rendered |= {
        "view_intrinsics": views.intrinsics,
        "view_depth": np.full((VIEWS, SIZE // 4, SIZE // 4), 9, np.float16),
    }
    store.write("render", "a", rendered, {})
    coords = np.random.default_rng(1).integers(0, GRID, (20, 3)).astype(np.uint8)
    store.write("voxels", "a", {"coords": coords}, {"grid_size": GRID})
    return store


def features(store, *arguments):
    """Features of the object, after running the command."""
    options = ["--views", VIEWS, "--variants", 1, "--grid-size", GRID, "--device", "cpu", *arguments]
    result = CliRunner().invoke(cli, ["data", "features", str(store.root), *map(str, options)])
    if result.exception is not None:
        raise result.exception
    return store.read("features", "a")["features"]


@pytest.fixture
def small_paper(monkeypatch):
    """FLUX.1's layout a quarter as wide in the place of the real one, whose 84 M parameters take seconds."""
    monkeypatch.setitem(presets._PRESETS, "paper", SMALL_KL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxFeatures(SMALL_KL)


def test_tiny_is_the_embedded_pipelines(store):
    assert features(store, "--extractor", "tiny").shape == (1, 20, 16)
    own = Pipeline.from_pretrained("tiny", device="cpu").feature_extractor
    assert store.manifest("features")["settings"]["extractor"] == state_sha256(own)


def test_local_places(store, tmp_path, small_paper, micro_pipeline):
    """A single file, directories in several layouts, our own model folder, a pipeline."""
    from flux_features._weights import bfl_name

    bfl = {bfl_name(name): value.contiguous() for name, value in small_paper.autoencoder.state_dict().items()}
    save_file(bfl, tmp_path / "ae.safetensors")
    small_paper.autoencoder.save_pretrained(tmp_path / "diffusers")
    save_model(tmp_path / "own", SMALL_KL, small_paper.state_dict())
    found = [features(store, "--extractor", tmp_path / name) for name in ("ae.safetensors", "own")]
    np.testing.assert_array_equal(*found)
    assert features(store, "--extractor", tmp_path / "diffusers").shape == (1, 20, 16)
    assert features(store, "--extractor", micro_pipeline).shape == (1, 20, 16)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_dino(store, tmp_path, library):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip(library)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dino")
    assert features(store, "--extractor", tmp_path / "dino", "--library", library).shape == (1, 20, 32)
    extractor = open_extractor(ExtractorChoice(source=str(tmp_path / "dino"), library=library))
    assert extractor.config.library == library


@pytest.mark.parametrize("stride", [8, 14])
def test_pictures_that_cells_do_not_tile_are_resized(store, stride):
    """A voxel finds the place in the picture that it projects to, also with cells of 14 px on 64 px."""

    class Means(torch.nn.Module):
        channels, image_size = 3, 10 * stride

        def forward(self, images):
            sides = [-images.shape[-1] % stride] * 2
            return F.avg_pool2d(F.pad(images, (0, sides[0], 0, sides[1]), mode="replicate"), stride)

    extractor = Means()
    extractor.stride = stride
    work = Lifting(extractor, store, FeatureSettings(num_views=VIEWS, num_variants=1), GRID, torch.device("cpu"))
    lifted = torch.from_numpy(work("a")["features"][0]).float()
    rendered = store.read("render", "a")
    cameras = Camera(*(torch.from_numpy(rendered[f"view_{name}"]) for name in ("pose", "intrinsics")), SIZE, SIZE)
    points = (torch.from_numpy(store.read("voxels", "a")["coords"].astype(np.float32)) + 0.5) / GRID - 0.5
    pixels, _ = cameras.project(points)
    torch.testing.assert_close(lifted[:, :2], pixels.mean(0) / SIZE, atol=0.01, rtol=0)


@pytest.fixture
def hub(monkeypatch, tmp_path, small_paper):
    """A Hub without a network: FLUX's files in every repository, an empty cache, a note of what was downloaded."""
    small_paper.autoencoder.save_pretrained(tmp_path / "hub" / "vae")
    state = SimpleNamespace(downloaded=[])

    def download(repository, file, revision=None):
        state.downloaded.append(repository)
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    describe = SimpleNamespace(gated="manual", card_data={"license": "own-terms"})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: describe)
    return state


def test_gated_downloads_need_consent(store, hub):
    with pytest.raises(InputError, match=r"FLUX\.1 \[dev\] Non-Commercial License.*--accept-licence") as caught:
        features(store, "--extractor", DEV)
    assert "\n" not in str(caught.value)
    assert hub.downloaded == []
    assert not store.path("features", "a").exists()
    assert features(store, "--extractor", DEV, "--accept-licence").shape == (1, 20, 16)
    assert hub.downloaded == [DEV, DEV]


@pytest.mark.parametrize("answer", ["y", "no"])
def test_the_terminal_is_asked(store, hub, monkeypatch, answer):
    asked = []

    def ask(repository, terms):
        asked.append((repository, terms.licence))
        return answer == "y"

    monkeypatch.setattr("diff2to3.data._extractor.ask_on_terminal", ask)
    if answer == "y":
        features(store, "--extractor", "owner/flux", "--preset", "paper")
    else:
        with pytest.raises(InputError, match=r"owner/flux: not downloaded, .* \(own-terms\)"):
            features(store, "--extractor", "owner/flux", "--preset", "paper")
    assert asked == [("owner/flux", "own-terms")]
    assert bool(hub.downloaded) == (answer == "y")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/flux", "owner/flux: no such file or directory; of Hub ids known are black-forest-labs/FLUX"),
        ("missing.safetensors", "no such file or directory"),
        (".", "has no weights"),
    ],
)
def test_mistakes(store, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        features(store, "--extractor", source)

"""`diff2to3 data` from assets to latents."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diff2to3._cli import cli
from diff2to3.data._mesh import load_mesh
from diff2to3.data._store import Store, decode_png
from diff2to3.train._checkpoint import read_config, read_weights, save_model
from flux_features import FluxFeatures, FluxFeaturesConfig
from sparse_vae import GaussianConfig, SparseVAE, SparseVAEConfig

GRID = 16


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, ["data", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def save_random(folder, model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = model_class(config).state_dict()
        noisy = {name: value + 0.05 * torch.randn_like(value) for name, value in weights.items()}  # no layer stays zero
        save_model(folder, config, noisy)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three objects and a broken one, taken through all stages."""
    root = tmp_path_factory.mktemp("data")
    assets, out = root / "assets", root / "set"
    assert "3 objects" in invoke("synthesize", assets, "--count", 3, "--seed", 1).output
    (assets / "broken.glb").write_bytes(b"glTF, but not really")
    with (assets / "index.csv").open("a") as file:
        file.write("broken,train,nothing,none\n")
    rendering = ["--size", 64, "--views", 4, "--extra-views", 1, "--condition-views", 1, "--workers", 1]
    rendered = invoke("render", assets, out, *rendering)
    voxelized = invoke("voxelize", assets, out, "--grid-size", GRID, "--workers", 1)
    save_random(root / "extractor", FluxFeatures, FluxFeaturesConfig(image_size=64))
    gaussians = GaussianConfig(num_gaussians=2)
    vae = SparseVAEConfig(grid_size=GRID, width=32, num_blocks=1, num_heads=2, window_size=4, gaussians=gaussians)
    save_random(root / "vae", SparseVAE, vae)
    lift = ["features", out, "--extractor", root / "extractor", "--views", 4, "--variants", 2, "--grid-size", GRID]
    lifted = invoke(*lift, "--device", "cpu")
    encoded = invoke("latents", out, "--vae", root / "vae", "--device", "cpu")
    outputs = {"render": rendered, "voxels": voxelized, "features": lifted, "latents": encoded}
    return root, Store(out), outputs, rendering


def names(store):
    return [row["id"] for row in store.objects() if row["id"] != "broken"]


def test_every_stage_reports_what_it_did(dataset):
    _, store, outputs, _ = dataset
    for stage in ("render", "voxels"):
        assert f"{stage}: 3 objects done, 1 failed" in outputs[stage].output
        assert "broken.glb: its header announces" in outputs[stage].output
        manifest = json.loads((store.root / stage / "manifest.json").read_text())
        assert manifest["objects"] == 3
        assert "its header announces" in manifest["failures"]["broken"]
    for stage in ("features", "latents"):
        assert f"{stage}: 3 objects done, 0 failed" in outputs[stage].output


def test_rendered_views(dataset):
    _, store, _, _ = dataset
    for object_id in names(store):
        tensors = store.read("render", object_id)
        assert tensors["view_pose"].shape == (5, 4, 4)
        assert tensors["view_intrinsics"].shape == (5, 3, 3)
        assert tensors["view_depth"].shape == (5, 16, 16)
        assert tensors["condition_azimuth"].shape == (1,)
        for name, count in (("view", 5), ("condition", 1)):
            for index in range(count):
                picture = decode_png(tensors[f"{name}_png"], tensors[f"{name}_bounds"], index)
                assert picture.shape == (64, 64, 4)
                assert (picture[..., 3] == 255).mean() > 0.02
                assert (picture[0, :, 3] == 0).all()


def test_voxels_project_onto_the_silhouette(dataset):
    from flux_features import voxel_centres
    from gs_render import Camera

    _, store, _, _ = dataset
    for object_id in names(store):
        tensors, coords = store.read("render", object_id), store.read("voxels", object_id)["coords"]
        points = voxel_centres(torch.from_numpy(coords.astype(np.int64)), GRID)
        pose, intrinsics = (torch.from_numpy(tensors[f"view_{name}"]) for name in ("pose", "intrinsics"))
        pixels, _ = Camera(pose, intrinsics, 64, 64).project(points)
        for index in range(len(pose)):
            alpha = decode_png(tensors["view_png"], tensors["view_bounds"], index)[..., 3]
            rows, columns = np.nonzero(alpha)
            for axis, hit in ((0, columns), (1, rows)):  # half a voxel is about 2 pixels
                assert abs(pixels[index, :, axis].min() - hit.min()) < 5
                assert abs(pixels[index, :, axis].max() - hit.max()) < 5


def test_features_and_latents_have_a_row_a_voxel(dataset):
    _, store, _, _ = dataset
    for object_id in names(store):
        count = len(store.read("voxels", object_id)["coords"])
        features = store.read("features", object_id)
        assert features["features"].shape == (2, count, 16)
        assert features["features"].dtype == np.float16
        assert features["hue"][0] == 0
        np.testing.assert_array_equal(features["mirrored"], [0, 1])
        latents = store.read("latents", object_id)["latents"]
        assert latents.shape == (2, 4, count, 8)
        assert np.isfinite(latents.astype(np.float32)).all()


def test_features_equal_lifting_by_hand(dataset):
    from flux_features import lift_features, voxel_centres
    from gs_render import Camera

    root, store, _, _ = dataset
    config = read_config(root / "extractor", FluxFeaturesConfig)
    extractor = FluxFeatures(config).eval()
    extractor.load_state_dict(read_weights(root / "extractor"))
    object_id = names(store)[0]
    tensors = store.read("render", object_id)
    views = np.stack([decode_png(tensors["view_png"], tensors["view_bounds"], v) for v in range(4)]).astype(np.float32)
    images = torch.from_numpy(views[..., :3] * views[..., 3:] / 255 + 255 - views[..., 3:]).permute(0, 3, 1, 2) / 255
    pose, intrinsics, depth = (torch.from_numpy(tensors[f"view_{n}"][:4]) for n in ("pose", "intrinsics", "depth"))
    points = voxel_centres(torch.from_numpy(store.read("voxels", object_id)["coords"].astype(np.int64)), GRID)
    with torch.no_grad():
        expected = lift_features(
            extractor(images), Camera(pose, intrinsics, 64, 64), points, "depth", depth=depth.float()
        )
    np.testing.assert_allclose(store.read("features", object_id)["features"][0], expected, atol=5e-3, rtol=5e-3)


def test_statistics_land_in_the_config_of_the_vae(dataset):
    root, store, _, _ = dataset
    config = read_config(root / "vae", SparseVAEConfig)
    rows = [store.read("latents", i)["latents"][0].reshape(-1, 8).astype(np.float64) for i in names(store)]
    np.testing.assert_allclose(config.latent_mean, np.concatenate(rows).mean(0), atol=1e-9)
    np.testing.assert_allclose(config.latent_std, np.concatenate(rows).std(0), rtol=1e-6)


def test_a_second_run_changes_no_file(dataset):
    root, store, _, rendering = dataset
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*.safetensors")}
    assert len(before) == 12
    invoke("render", root / "assets", store.root, *rendering)
    invoke("latents", store.root, "--vae", root / "vae", "--device", "cpu")
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*.safetensors")} == before


def test_the_renderer_and_its_config_are_settings(dataset, tmp_path):
    root, _, _, rendering = dataset
    base = ["render", root / "assets", tmp_path, *rendering, "--limit", 1, "--condition-fov", 10, 70]
    assert "render: renderer cpu\n" in invoke(*base, "--renderer", "cpu").stderr
    settings = Store(tmp_path).manifest("render")["settings"]
    assert (settings["renderer"], settings["renderer_config"]) == ("cpu", {"samples": 3})
    assert settings["condition_fov"] == [10, 70]
    object_id = Store(tmp_path).objects()[0]["id"]
    first = Store(tmp_path).read("render", object_id)
    focal = first["condition_intrinsics"][:, 0, 0]
    fov = np.degrees(2 * np.arctan(96 / 2 / focal))  # the frame is half as large again as the picture of 64
    assert (first["condition_intrinsics"][:, 0, 2] == 48).all()
    assert ((fov > 10) & (fov < 70)).all()
    invoke(*base, "--renderer", "cpu", "--renderer-set", "samples=1")
    assert Store(tmp_path).manifest("render")["settings"]["renderer_config"] == {"samples": 1}
    assert Store(tmp_path).read("render", object_id)["view_png"].tobytes() != first["view_png"].tobytes()


def test_auto_takes_the_first_renderer_that_works_and_says_why(monkeypatch):
    from diff2to3._errors import ComponentError
    from diff2to3.data import _renderers
    from diff2to3.data._render_stage import RenderSettings, with_renderer

    asked, working = [], {"cpu"}

    def build(role, name, config):
        asked.append((name, dict(config)))
        if name not in working:
            raise ComponentError(f"{name} has no driver")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(_renderers, "build", build)
    assert _renderers.choose_renderer() == ("cpu", "gl has no driver")
    assert asked == [("gl", {"software": False}), ("cpu", {})]
    working.add("gl")
    assert _renderers.choose_renderer() == ("gl", "")
    working.clear()
    with pytest.raises(ComponentError, match="no mesh renderer works here: gl has no driver; cpu has no driver"):
        _renderers.choose_renderer()
    working.add("cpu")
    settings, reasons = with_renderer(RenderSettings(renderer="auto"))
    assert (settings.renderer, settings.renderer_config, reasons) == ("cpu", {"samples": 3}, "gl has no driver")


def test_software_opengl_is_told_from_a_gpu(mesh_renderer):
    from diff2to3._errors import ComponentError
    from diff2to3._plugins import MESH_RENDERER, build
    from diff2to3.data._renderers.gl import _SOFTWARE

    driver = mesh_renderer("gl").context.info["GL_RENDERER"].lower()
    if any(name in driver for name in _SOFTWARE):
        with pytest.raises(ComponentError, match="its driver draws on the CPU"):
            build(MESH_RENDERER, "gl", {"software": False})
    else:
        build(MESH_RENDERER, "gl", {"software": False}).close()


def test_rules_of_voxels(dataset, tmp_path):
    from diff2to3._errors import InputError
    from diff2to3.data._voxelize import voxelize

    root, store, _, _ = dataset
    object_id = names(store)[0]
    assert store.manifest("voxels")["settings"] == {"grid_size": GRID, "rule": "exact"}
    assert store.settings("voxels", object_id) == {"grid_size": GRID, "rule": "exact"}
    mesh = load_mesh(root / "assets" / f"{object_id}.glb")
    np.testing.assert_array_equal(store.read("voxels", object_id)["coords"], voxelize(mesh, GRID))
    arguments = ["voxelize", root / "assets", tmp_path, "--grid-size", GRID, "--workers", 1, "--rule", "sampled"]
    invoke(*arguments)
    sampled = Store(tmp_path)
    assert sampled.manifest("voxels")["settings"]["rule"] == "sampled"
    np.testing.assert_array_equal(sampled.read("voxels", object_id)["coords"], voxelize(mesh, GRID, "sampled"))
    invoke(*arguments[:-1], "exact")  # nothing stands on them yet
    np.testing.assert_array_equal(
        sampled.read("voxels", object_id)["coords"], store.read("voxels", object_id)["coords"]
    )
    before = store.path("voxels", object_id).read_bytes()
    result = CliRunner().invoke(cli, ["data", *map(str, [*arguments[:2], store.root, *arguments[3:]])])
    assert isinstance(result.exception, InputError)
    assert "3 objects have features on voxels of rule 'exact', got --rule sampled" in str(result.exception)
    assert store.path("voxels", object_id).read_bytes() == before


def test_voxels_from_before_there_were_rules_are_sampled(tmp_path):
    from diff2to3.data._render_stage import voxel_rule
    from safetensors.numpy import save_file

    store = Store(tmp_path)
    store.path("voxels", "a").parent.mkdir()
    save_file({"coords": np.zeros((1, 3), np.uint8)}, store.path("voxels", "a"), {"settings": "of that time"})
    assert voxel_rule(store, "a") == "sampled"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--views", 9, "--grid-size", GRID], "5 views were rendered, expected 9"),
        (["--views", 4, "--grid-size", 32], "not of grid size 32"),
    ],
)
def test_features_that_do_not_fit_the_other_stages(dataset, tmp_path, options, reason):
    from shutil import copytree

    root, store, _, _ = dataset
    copytree(store.root, tmp_path / "set", ignore=lambda folder, files: {"features", "latents"})
    result = invoke("features", tmp_path / "set", "--extractor", root / "extractor", *options, code=1)
    assert result.output.count(reason) == 3


def test_rendering_is_deterministic(dataset, tmp_path):
    root, store, _, rendering = dataset
    invoke("render", root / "assets", tmp_path / "again", *rendering, "--limit", 1)
    object_id = names(store)[0]
    again = Store(tmp_path / "again").read("render", object_id)
    for name, expected in store.read("render", object_id).items():
        np.testing.assert_array_equal(again[name], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["render", "EMPTY", "OUT"], "no .glb"),
        (["voxelize", "ASSETS", "OUT", "--split", "nope"], "--split nope"),
        (["render", "ASSETS", "OUT", "--size", "50"], "multiple of 32, got 50"),
        (["render", "ASSETS", "OUT", "--condition-fov", "60", "20"], "the smaller first"),
        (["render", "ASSETS", "OUT", "--renderer", "crayon"], "no mesh_renderer named 'crayon'; available: cpu"),
        (["render", "ASSETS", "OUT", "--renderer", "cpu", "--renderer-set", "samples=0"], "greater than or equal to 1"),
        (["render", "ASSETS", "OUT", "--renderer", "cpu", "--renderer-set", "samples"], "expected key=value"),
        (["features", "EMPTY", "--extractor", "EMPTY"], "not a data set"),
        (["features", "SET", "--extractor", "EMPTY"], "has no weights: neither"),
        (["features", "SET", "--extractor", "VAE"], "not the weights of an autoencoder: its first tensor is"),
        (["features", "SET", "--extractor", "nowhere"], "nowhere: no such file or directory; of Hub ids known are"),
        (["latents", "SET", "--vae", "VAE", "--shard", "3/2"], "expected I/N"),
    ],
)
def test_mistakes_are_input_errors(dataset, tmp_path, arguments, message):
    root, store, _, _ = dataset
    (tmp_path / "empty").mkdir()
    places = {
        "EMPTY": tmp_path / "empty",
        "OUT": tmp_path / "out",
        "ASSETS": root / "assets",
        "SET": store.root,
        "VAE": root / "vae",
    }
    from diff2to3._errors import InputError

    result = CliRunner().invoke(cli, ["data", *(str(places.get(a, a)) for a in arguments)])
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_nothing_done_is_exit_code_1(tmp_path):
    (tmp_path / "only.glb").write_bytes(b"nothing")
    result = invoke("voxelize", tmp_path, tmp_path / "set", "--workers", 1, code=1)
    assert "voxels: 0 objects done, 1 failed" in result.output

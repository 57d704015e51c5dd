"""Known data sets, on tiny folders in the layout each has once it was downloaded."""

import csv
import gzip
import hashlib
import json

import numpy as np
import pytest
import trimesh
from click.testing import CliRunner
from diff2to3._cli import cli
from diff2to3._errors import InputError
from diff2to3.data import _datasets
from diff2to3.data._datasets import frozen_subset, good_texture, index_dataset, texture_statistics
from diff2to3.data._mesh import load_mesh
from diff2to3.data._render_stage import asset_path, listed_paths, write_objects
from diff2to3.data._store import Store
from diff2to3.eval._protocol import freeze_protocol
from diff2to3.eval._truth import draw_truth, read_truth
from PIL import Image

HEX = [hashlib.sha1(str(i).encode()).hexdigest() for i in range(3)]
UUID = "0a1b2c3d-0000-4000-8000-0123456789ab"


def textured(path, side=300, noise=60, seed=0):
    """A textured box as a mesh file."""
    box = trimesh.creation.box((1, 1, 1))
    pixels = np.clip(np.random.default_rng(seed).normal(128, noise, (side, side, 3)), 0, 255).astype(np.uint8)
    uv = np.random.default_rng(1).random((len(box.vertices), 2))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(pixels))
    box.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".obj":
        box.visual = trimesh.visual.TextureVisuals(uv=uv, image=Image.fromarray(pixels))
        text, files = trimesh.exchange.obj.export_obj(
            box, include_texture=True, return_texture=True, mtl_name="model.mtl"
        )
        for name, content in files.items():
            (path.parent / name).write_bytes(content)
        path.write_text(text)
    else:
        box.export(path)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def abo(root):
    models = root / "3dmodels" / "original"
    touch(
        models / "0" / "B00XBC3BF0.glb",
        models / "A" / "B07DBHPZ9A.glb",
        root / "3dmodels" / "metadata" / "3dmodels.csv.gz",
    )
    return {"B00XBC3BF0": "3dmodels/original/0/B00XBC3BF0.glb", "B07DBHPZ9A": "3dmodels/original/A/B07DBHPZ9A.glb"}


def hssd(root):
    objects = root / "objects"
    touch(*(objects / h[0] / f"{h}.glb" for h in HEX), objects / "openings" / f"{HEX[0]}.glb")
    touch(objects / HEX[0][0] / f"{HEX[0]}.collider.glb", objects / "decomposed" / HEX[1] / f"{HEX[1]}_part_1.glb")
    return {h: f"objects/{h[0]}/{h}.glb" for h in HEX}


def future(root):
    folder = root / "3D-FUTURE-model"
    for name in ("raw_model.obj", "normalized_model.obj", "model.mtl", "texture.png", "image.jpg"):
        touch(folder / UUID / name)
    touch(folder / "model_info.json")
    return {UUID: f"3D-FUTURE-model/{UUID}/raw_model.obj"}


def objaverse(root):
    uid = HEX[0][:32]
    touch(
        root / "hf-objaverse-v1" / "glbs" / "000-012" / f"{uid}.glb", root / "smithsonian" / "objects" / f"{UUID}.glb"
    )
    touch(root / "github" / "repos" / "me" / "things" / "models" / "a.obj", root / "github" / "repos" / "me" / "b.zip")
    touch(root / "thingiverse" / "1.stl")
    metadata = root / "hf-objaverse-v1" / "metadata" / "000-012.json.gz"
    metadata.parent.mkdir(parents=True)
    metadata.write_bytes(gzip.compress(json.dumps({uid: {"license": "by-nc"}, "x": {}}).encode()))
    return {
        f"sketchfab/{uid}": f"hf-objaverse-v1/glbs/000-012/{uid}.glb",
        f"smithsonian/{UUID}": f"smithsonian/objects/{UUID}.glb",
        "github/me/things/models/a.obj": "github/repos/me/things/models/a.obj",
    }


def test_metadata_that_unpack_to_too_much(tmp_path, monkeypatch):
    objaverse(tmp_path)
    monkeypatch.setattr(_datasets, "_MAX_METADATA", 20)
    with pytest.raises(InputError, match=r"000-012\.json\.gz unpacks to more than 20 bytes"):
        _datasets._sketchfab_licences(tmp_path)


def toys4k(root):
    for number in range(5):
        name = f"apple_{number:03d}"
        touch(root / "toys4k_blend_files" / "apple" / name / f"{name}.blend")
        touch(root / "toys4k_obj_files" / "apple" / name / "mesh.obj")
    touch(root / "toys4k_blend_files" / "apple" / "apple_001" / "apple_001.glb")
    paths = {f"apple_{n:03d}": f"toys4k_obj_files/apple/apple_{n:03d}/mesh.obj" for n in range(5)}
    return paths | {"apple_001": "toys4k_blend_files/apple/apple_001/apple_001.glb"}


LAYOUTS = {"abo": abo, "hssd": hssd, "3d-future": future, "objaverse-xl": objaverse, "toys4k": toys4k}


def test_every_data_set_has_a_layout_here():
    assert set(LAYOUTS) == set(_datasets.DATASETS)


@pytest.mark.parametrize("inside", [".", "raw"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_assets_of_a_layout(tmp_path, name, inside):
    expected = LAYOUTS[name](tmp_path / inside)
    rows = index_dataset(name, tmp_path)
    prefix = "" if inside == "." else "raw/"
    assert {row["id"]: row["path"] for row in rows} == {i: prefix + path for i, path in expected.items()}
    assert [row["id"] for row in rows] == sorted(expected)
    assert {row["split"] for row in rows} == {"test" if name == "toys4k" else "train"}
    assert all(row["licence"] for row in rows)


def test_licences(tmp_path):
    abo(tmp_path / "abo")
    assert {row["licence"] for row in index_dataset("abo", tmp_path / "abo")} == {"CC-BY-4.0"}
    touch(tmp_path / "abo" / "LICENSE-CC-BY-NC-4.0.txt")
    assert {row["licence"] for row in index_dataset("abo", tmp_path / "abo")} == {"CC-BY-NC-4.0"}
    objaverse(tmp_path / "xl")
    licences = {row["id"].split("/")[0]: row["licence"] for row in index_dataset("objaverse-xl", tmp_path / "xl")}
    assert licences["sketchfab"] == "CC-BY-NC-4.0"
    assert licences["github"].startswith("ODC-By-1.0 for the collection")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_wrong_folder_says_what_is_expected(tmp_path, name):
    touch(tmp_path / "chair.glb")
    result = CliRunner().invoke(cli, ["data", "index", name, str(tmp_path)])
    assert isinstance(result.exception, InputError)  # one line and exit code 2 outside the test's runner
    assert _datasets.DATASETS[name].expected in str(result.exception)
    assert _datasets.DATASETS[name].terms in str(result.exception)


def test_the_frozen_subset_is_the_same_everywhere():
    ids = [f"toy_{i:04d}" for i in range(4000)]
    chosen = frozen_subset(ids, 1000, 4000)
    assert len(chosen) == 1000
    digest = hashlib.sha256("\n".join(sorted(chosen)).encode()).hexdigest()
    assert digest.startswith("4a311b4f85f7")
    assert frozen_subset(ids[::-1], 1000, 4000) == chosen
    assert len(chosen - frozen_subset(ids[40:], 1000, 4000)) < 40  # 1 % of the assets missing: few others move in
    assert frozen_subset(ids, 1000, 4001) != chosen


def test_toys4k_splits(tmp_path, monkeypatch):
    expected = toys4k(tmp_path)
    monkeypatch.setattr(_datasets, "TOYS4K_COUNT", 2)
    rows = index_dataset("toys4k", tmp_path)
    assert {row["id"] for row in rows if row["split"] == "test"} == frozen_subset(sorted(expected), 2, 4000)
    assert sorted(row["split"] for row in rows) == ["rest"] * 3 + ["test"] * 2


def test_texture_rule(tmp_path):
    cases = {"good": (300, 60), "small": (64, 60), "plain": (300, 0), "dull": (300, 5)}
    for number, (name, (side, noise)) in enumerate(cases.items()):
        textured(tmp_path / f"{name}.glb", side, noise, number)
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "bare.glb")
    found = {name: texture_statistics(load_mesh(tmp_path / f"{name}.glb")) for name in [*cases, "bare"]}
    assert [name for name, statistics in found.items() if good_texture(statistics)] == ["good"]
    assert found["good"]["texture_pixels"] == 300**2
    assert found["good"]["textured_area"] == pytest.approx(1)
    assert found["good"]["color_spread"] == pytest.approx(58, abs=4)  # 60, less what is cut at black and white
    assert found["plain"] == {
        "texture_pixels": 300**2,
        "textured_area": pytest.approx(1),
        "colors": 1,
        "color_spread": 0,
    }
    assert found["bare"]["textured_area"] == 0


def test_from_index_to_voxels(tmp_path):
    """3D-FUTURE's paths do not end in the id; one asset is dull, one is broken."""
    root, out, output = tmp_path / "future", tmp_path / "set", tmp_path / "kept.csv"
    for number, name in enumerate(("good", "dull", "broken")):
        textured(root / "3D-FUTURE-model" / name / "raw_model.obj", 300, 3 if name == "dull" else 60, number)
    (root / "3D-FUTURE-model" / "broken" / "model.mtl").unlink()
    run = CliRunner().invoke
    arguments = ["data", "index", "3d-future", str(root), "--output", str(output), "--workers", "1"]
    result = run(cli, [*arguments, "--texture-quality"])
    assert result.exit_code == 0, result.output
    assert "3 assets found, 1 kept, 1 with low-quality textures, 1 unreadable" in result.output
    assert "model.mtl" in result.output
    (row,) = csv.DictReader(output.open())
    assert (row["id"], row["path"]) == ("good", "3D-FUTURE-model/good/raw_model.obj")
    assert float(row["texture_pixels"]) == 300**2
    assert asset_path(root, "good", row["path"]).is_file()
    result = run(
        cli, ["data", "voxelize", str(root), str(out), "--index", str(output), "--grid-size", "16", "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    assert len(Store(out).read("voxels", "good")["coords"]) > 500
    assert run(cli, ["data", "index", "3d-future", str(root)]).exit_code == 0
    assert len(list(csv.DictReader((root / "index.csv").open()))) == 3


def test_an_index_path_stays_in_its_folder(tmp_path):
    textured(tmp_path / "secret.glb")
    (tmp_path / "assets").mkdir()
    for path in ("../secret.glb", str(tmp_path / "secret.glb")):
        with pytest.raises(ValueError, match="outside this folder"):
            asset_path(tmp_path / "assets", "x", path)
    with pytest.raises(ValueError, match="no mesh file"):
        asset_path(tmp_path / "assets", "x", "a/b.glb")


def test_a_column_of_a_later_index_is_kept(tmp_path):
    store = Store(tmp_path)
    write_objects(store, [{"id": "a", "split": "train"}])
    write_objects(store, [{"id": "b", "split": "val", "path": "x/b.glb"}])
    assert listed_paths(store) == {"b": "x/b.glb"}


def test_evaluation_finds_the_mesh_by_the_path_of_its_row(tmp_path):
    root, out = tmp_path / "assets", tmp_path / "set"
    textured(root / "models" / "first" / "raw.glb")
    (root / "index.csv").write_text("id,split,path\na,val,models/first/raw.glb\n")
    views = ["--size", "64", "--views", "1", "--extra-views", "0", "--condition-views", "1"]
    for stage in (["voxelize", "--grid-size", "16"], ["render", *views]):
        result = CliRunner().invoke(cli, ["data", stage[0], str(root), str(out), *stage[1:], "--workers", "1"])
        assert result.exit_code == 0, result.output
    (row,) = Store(out).objects("val")
    protocol = freeze_protocol(Store(out), "val", 1, 64)
    draw_truth(Store(out), root, protocol, "cpu")
    truth = read_truth(Store(out), protocol, protocol.objects[0], row)
    assert float((truth.alpha > 0.5).float().mean()) > 0.02

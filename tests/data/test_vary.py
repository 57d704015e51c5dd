"""Stretched copies of assets."""

import csv

import numpy as np
import pytest
from click.testing import CliRunner
from diff2to3._cli import cli
from diff2to3.data._limits import RefusedAsset
from diff2to3.data._mesh import load_mesh_parts
from diff2to3.data._synthesize import synthesize
from diff2to3.data._vary import stretched


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    synthesize(folder, 2, 0)
    rows = list(csv.DictReader((folder / "index.csv").open()))
    rows[1]["split"] = "val"
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli, ["data", "vary", *map(str, arguments)])


def rows_of(folder):
    return list(csv.DictReader((folder / "index.csv").open()))


def test_a_stretched_file_is_the_same_mesh_scaled(assets):
    path = next(assets.glob("*.glb"))
    twin = path.with_name("twin.glb")
    twin.write_bytes(stretched(path.read_bytes(), (2.0, 0.5, 1.5)))
    try:
        before, after = load_mesh_parts(path), load_mesh_parts(twin)
    finally:
        twin.unlink()
    assert len(before) == len(after)
    for one, two in zip(before, after, strict=True):
        np.testing.assert_allclose(two.vertices, one.vertices * (2.0, 0.5, 1.5), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(two.faces, one.faces)


def test_copies_of_the_objects_to_learn_from(assets, tmp_path):
    out = tmp_path / "out"
    result = run(assets, out, "--copies", 3)
    assert result.exit_code == 0, result.output
    rows = rows_of(out)
    first, second = rows_of(assets)
    copies = [f"{first['id']}-stretched-{n}" for n in (1, 2, 3)]
    assert [row["id"] for row in rows] == [first["id"], *copies, second["id"]]
    assert [row["stretched_from"] for row in rows] == ["", *[first["id"]] * 3, ""]
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val"]
    original = (assets / f"{first['id']}.glb").read_bytes()
    assert (out / "objects" / f"{first['id']}.glb").read_bytes() == original
    files = {path.name: path.read_bytes() for path in (out / "objects").iterdir()}
    assert len(set(files.values())) == 5
    again = run(assets, tmp_path / "again", "--copies", 3)
    assert again.exit_code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "again" / "objects").iterdir()} == files
    other = run(assets, tmp_path / "other", "--copies", 1, "--seed", 1)
    assert other.exit_code == 0
    assert (tmp_path / "other" / "objects" / f"{copies[0]}.glb").read_bytes() != files[f"{copies[0]}.glb"]


def test_proportions_stay_within_the_stretch(assets, tmp_path):
    run(assets, tmp_path, "--copies", 8, "--stretch", 0.2)

    def size(path):
        corners = np.concatenate([part.vertices for part in load_mesh_parts(path)])
        return np.ptp(corners, axis=0)

    first = rows_of(assets)[0]["id"]
    plain = size(tmp_path / "objects" / f"{first}.glb")
    factors = np.stack([size(tmp_path / "objects" / f"{first}-stretched-{n}.glb") / plain for n in range(1, 9)])
    assert factors.min() >= 1 / 1.2 - 1e-4
    assert factors.max() <= 1.2 + 1e-4
    assert factors.std(axis=0).min() > 0.02


def test_what_cannot_be_stretched_is_said_and_left_out(assets, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.glb").write_bytes(next(assets.glob("*.glb")).read_bytes())
    (source / "text.obj").write_text("v 0 0 0\n")
    (source / "cut.glb").write_bytes(next(assets.glob("*.glb")).read_bytes()[:30])
    result = run(source, tmp_path / "out")
    assert result.exit_code == 0
    assert "vary: 1 objects done, 2 failed" in result.output
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["good", "good-stretched-1", "good-stretched-2"]
    result = run(assets, tmp_path / "none", "--split", "test")
    assert result.exit_code != 0
    assert "no object" in str(result.exception)
    with pytest.raises(RefusedAsset, match="glTF"):
        stretched(b"solid", (1, 1, 1))

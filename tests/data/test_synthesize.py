"""Procedural objects: deterministic, loadable, of every family."""

import csv

import numpy as np
import pytest
from diff2to3.data import _synthesize
from diff2to3.data._mesh import load_mesh
from diff2to3.data._procedural._families import FAMILIES
from diff2to3.data._procedural._patterns import noise, trilinear
from diff2to3.data._procedural._surfaces import Builder, box_charts, lathe_chart, slab_charts, tube_chart
from diff2to3.data._store import Store
from diff2to3.data._synthesize import make_object, synthesize


def test_files_and_index(tmp_path):
    rows = synthesize(tmp_path, 2, seed=3)
    with (tmp_path / "index.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert list(rows[0]) == ["id", "split", "family", "licence"]
    for row in rows:
        mesh = load_mesh(tmp_path / f"{row['id']}.glb")
        texture = mesh.parts[0].texture
        assert texture.shape[0] > 64
        assert texture[..., :3].std() > 10
        assert (mesh.parts[0].uv >= 0).all()
        assert (mesh.parts[0].uv <= 1).all()


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    made = []

    def stopped(family, seed, number):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return make_object(family, seed, number)

    monkeypatch.setattr(_synthesize, "make_object", stopped)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "a", 3, seed=3)
    assert not (tmp_path / "a" / "index.csv").exists()
    made.clear()
    synthesize(tmp_path / "a", 3, seed=3)
    assert made == [2]
    made.clear()
    monkeypatch.undo()
    synthesize(tmp_path / "b", 3, seed=3)
    manifests = [Store(tmp_path / folder).manifest("synthesize") for folder in "ab"]
    assert manifests[0] == manifests[1]
    assert manifests[0]["objects"] == 3
    assert manifests[0]["settings"] == {"count": 3, "seed": 3}
    (tmp_path / "b" / "chair-3-00000.glb").write_bytes(b"changed")
    synthesize(tmp_path / "b", 3, seed=3)
    assert Store(tmp_path / "b").manifest("synthesize")["outputs"] != manifests[0]["outputs"]


def test_same_seed_same_bytes_and_another_seed_another_object():
    first, again, other = (make_object("lamp", seed, 7).export(file_type="glb") for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_builds_finite_patches_of_unit_normals(family):
    for number in range(2):
        builder = Builder()
        FAMILIES[family](builder, np.random.default_rng(number))
        assert len(builder.patches) >= 2
        for patch in builder.patches:
            points, normals, uv = patch.chart(*np.meshgrid(patch.columns, patch.rows))
            assert np.isfinite(points).all()
            assert np.abs(points).max() < 1.6
            np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-6)
            colours = patch.pattern(points, uv)
            assert colours.shape == points.shape
            assert colours.min() > -0.1
            assert colours.max() < 1.3


def numeric_normal(chart, s, t, step=1e-4):
    first = chart(s + step, t)[0] - chart(s - step, t)[0]
    second = chart(s, t + step)[0] - chart(s, t - step)[0]
    normal = np.cross(first, second)
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ["box", "lathe", "tube", "slab"])
def test_normals_are_those_of_the_surface(kind):
    charts = {
        "box": [chart for chart, _, _ in box_charts((0.4, 0.7, 0.2), 0.05)],
        "lathe": [lathe_chart(np.array([[0.3, 0.0], [0.5, 0.4], [0.1, 0.9]]))[0]],
        "tube": [tube_chart(np.array([[0, 0, 0], [0, 0, 0.5], [0, 0, 1.0]]), 0.1)[0]],
        "slab": slab_charts(np.stack(np.meshgrid([0, 1.0], [0, 2.0], [0, 3.0], indexing="ij"), -1)),
    }[kind]
    s, t = np.random.default_rng(0).uniform(0.06, 0.94, (2, 50))
    for chart in charts:
        normal = chart(s, t)[1]
        agreement = np.einsum("nd,nd->n", numeric_normal(chart, s, t), normal)
        np.testing.assert_allclose(np.abs(agreement), 1, atol=2e-3)


@pytest.mark.parametrize("kind", ["box", "slab"])
def test_normals_point_out_of_closed_bodies(kind):
    corners = np.stack(np.meshgrid([-1, 1.0], [-2, 2.0], [-3, 3.0], indexing="ij"), -1)
    charts = [c for c, _, _ in box_charts((2, 4, 6), 0.3)] if kind == "box" else slab_charts(corners)
    s, t = np.random.default_rng(0).random((2, 50))
    for chart in charts:
        points, normals, _ = chart(s, t)
        assert (np.einsum("nd,nd->n", points, normals) > 0).all()


def test_trilinear_interpolates_and_repeats():
    grid = np.random.default_rng(0).random((3, 4, 5))
    place = np.array([[1, 2, 3], [0.5, 0, 0], [2.5, 3.5, 4.5], [-1, -1, -1]], float)
    expected = [
        grid[1, 2, 3],
        grid[:2, 0, 0].mean(),
        np.mean([grid[x, y, z] for x in (2, 0) for y in (3, 0) for z in (4, 0)]),
        grid[2, 3, 4],
    ]
    np.testing.assert_allclose(trilinear(grid, place), expected, atol=1e-6)


def test_noise_is_smooth_and_within_bounds():
    points = np.random.default_rng(0).uniform(-1, 1, (2000, 3))
    values = noise(points, 5, seed=1)
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.std() > 0.05
    assert np.abs(noise(points + 1e-4, 5, seed=1) - values).max() < 0.02

"""Assets of other methods: one known asset, written as each method would, gets the same scores back."""

import numpy as np
import pytest
import torch
import trimesh
from diff2to3._errors import InputError
from diff2to3.data._mesh import load_mesh
from diff2to3.eval._generation import Made, evaluate_generation, gaussian_drawing
from diff2to3.eval._methods import _mesh_drawing, asset_maker, find_method, is_gaussian_ply, methods
from diff2to3.eval._protocol import freeze_protocol
from diff2to3.eval._truth import draw_truth
from gs_render import Gaussians, save

CASES = [(name, suffix) for name, method in methods().items() for suffix in method.files]
AXES = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}


@pytest.fixture(scope="module")
def protocol(eval_data, eval_assets):
    frozen = freeze_protocol(eval_data, "val", 2, 32)
    draw_truth(eval_data, eval_assets, frozen, "cpu")
    return frozen


@pytest.fixture(scope="module")
def known():
    """Lopsided Gaussians whose box is centred and has the longest side 0.95."""
    rng = np.random.default_rng(3)
    means = rng.uniform(-1, 1, (60, 3)) * (0.475, 0.3, 0.4)
    low, high = means.min(0), means.max(0)
    means = (means - (low + high) / 2) * 0.95 / (high - low).max()
    tensor = lambda x: torch.from_numpy(np.asarray(x, np.float32))  # noqa: E731
    return Gaussians.from_rgb(
        means=tensor(means),
        scales=tensor(rng.uniform(0.02, 0.08, (60, 3))),
        quaternions=tensor(rng.normal(size=(60, 4))),
        opacities=tensor(rng.uniform(0.3, 0.99, 60)),
        rgb=tensor(rng.uniform(0, 1, (60, 3))),
    )


def written_as(method, axes, condition, size):
    """True object -> file, from the words of the table: what the front is turned to, then which axis is which."""
    up, front = (np.array(AXES[name[1]]) * (1 if name[0] == "+" else -1) for name in (axes.up, axes.front))
    a, e = np.radians(condition.azimuth), np.radians(condition.elevation)
    to_camera = np.array([np.sin(a), -np.cos(a), 0])
    forward, top = {
        "canonical": (np.array([0, -1, 0]), np.array([0, 0, 1])),
        "view": (to_camera, np.array([0, 0, 1])),
        "camera": (
            np.cos(e) * to_camera + np.array([0, 0, np.sin(e)]),
            np.array([0, 0, np.cos(e)]) - np.sin(e) * to_camera,
        ),
        "view-snapped": (
            min(
                (np.array(v) for v in ((0, -1, 0), (1, 0, 0), (0, 1, 0), (-1, 0, 0))),
                key=lambda v: -float(v @ to_camera),
            ),
            np.array([0, 0, 1]),
        ),
    }[method.frame]
    rotation = np.stack([np.cross(up, front), front, up], 1) @ np.stack([np.cross(top, forward), forward, top])
    scale = size if method.scale == "fit" else 1 / method.scale
    return rotation, scale


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_known_asset_gets_its_scores_back(
    name, suffix, known, protocol, eval_data, eval_assets, mesh_renderer, tmp_path
):
    method = find_method(name)
    as_gaussians = suffix in (".ply", ".spz") and name != "Shap-E"
    for number, entry in enumerate(protocol.objects):
        rotation, scale = written_as(method, method.files[suffix], entry, size=1.7 + number)
        shift = (0.3, -0.2, 0.1) if method.scale == "fit" else (0.0, 0.0, 0.0)
        if as_gaussians:
            save(known.transform(rotation.tolist(), shift, scale), tmp_path / f"{entry.id}{suffix}", up="z")
        else:
            part = load_mesh(eval_assets / "a.glb").parts[0]
            vertices = scale * part.vertices @ rotation.T + shift
            colors = part.colors
            mesh = trimesh.Trimesh(vertices, part.faces, vertex_colors=colors, process=False)
            mesh.export(tmp_path / f"{entry.id}{suffix}")
    if as_gaussians:
        drawing = gaussian_drawing(known, filter_2d=method.filter_2d, antialias=method.antialias)
        expected = lambda truths: [Made(drawing) for _ in truths]  # noqa: E731
    else:
        mesh = load_mesh(eval_assets / "a.glb")
        expected = lambda truths: [Made(_mesh_drawing(mesh, mesh_renderer("cpu"), protocol)) for _ in truths]  # noqa: E731
    make = asset_maker(tmp_path, method, protocol, lambda: mesh_renderer("cpu"))
    found, wanted = (evaluate_generation(m, eval_data, protocol) for m in (make, expected))
    tolerance = 0.3 if suffix == ".spz" else 0.02  # .spz keeps positions to 12 bits
    for own, other in zip(found.objects, wanted.objects, strict=True):
        for figure in ("psnr", "novel psnr", "novel psnr_foreground"):
            assert own[figure] == pytest.approx(other[figure], abs=tolerance), figure


def test_another_frame_is_seen(known, protocol, eval_data, tmp_path):
    """The comparison above can fail: read with a wrong front, the scores are others."""
    for entry in protocol.objects:
        save(known, tmp_path / f"{entry.id}.ply")
    right, wrong = (
        evaluate_generation(asset_maker(tmp_path, m, protocol, lambda: None), eval_data, protocol).objects
        for m in (find_method("trellis"), find_method("TRELLIS", ("front=+x",)))
    )
    assert all(abs(a["novel psnr"] - b["novel psnr"]) > 0.05 for a, b in zip(right, wrong, strict=True))


def test_refusals(protocol, tmp_path):
    with pytest.raises(InputError, match=r"expected one of diff2to3, TRELLIS, Shap-E"):
        find_method("nothing")
    with pytest.raises(InputError, match=r"no asset for 2 of 2 objects, first d; expected <id> with .ply"):
        asset_maker(tmp_path, find_method("lgm"), protocol, lambda: None)


def test_ply_of_a_mesh_and_of_gaussians(known, tmp_path):
    save(known, tmp_path / "g.ply")
    trimesh.creation.box().export(tmp_path / "m.ply")
    assert is_gaussian_ply(tmp_path / "g.ply")
    assert not is_gaussian_ply(tmp_path / "m.ply")

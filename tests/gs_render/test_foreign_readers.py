"""Our files in other people's readers and theirs in ours. Each is skipped where that program is not installed.

plyfile, gsply and gaussforge come from PyPI, `splat-transform` (npm @playcanvas/splat-transform) is looked up on PATH.
"""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from gs_render import Gaussians, load, save


def scene(make_gaussians, degree: int = 0, count: int = 400) -> Gaussians:
    made = make_gaussians(count, seed=7, degree=degree)
    return Gaussians(made.means, made.scales, made.quaternions, made.opacities, made.sh.clamp(-0.5, 0.5))


def assert_same(ours: Gaussians, theirs: Gaussians, covariance: float, color: float, position: float = 6e-4) -> None:
    """The same Gaussians in any order; rotations are compared as covariances, which have no symmetric twins."""
    assert len(ours) == len(theirs)
    theirs = theirs[torch.cdist(ours.means.double(), theirs.means.double()).argmin(dim=1)]
    assert (ours.means - theirs.means).abs().max() <= position
    error = (ours.covariances - theirs.covariances).flatten(1).norm(dim=1)
    assert (error / ours.covariances.flatten(1).norm(dim=1)).max() <= covariance
    assert (ours.opacities - theirs.opacities).abs().max() <= 4.1e-3
    degree = min(ours.sh_degree, theirs.sh_degree)
    assert (ours.with_sh_degree(degree).sh - theirs.with_sh_degree(degree).sh).abs().max() <= color


def test_plyfile_reads_our_ply(make_gaussians, tmp_path):
    plyfile = pytest.importorskip("plyfile")
    original = scene(make_gaussians, degree=2)
    vertex = plyfile.PlyData.read(str(save(original, tmp_path / "a.ply", up="z")))["vertex"]
    assert np.array_equal(np.stack([vertex[name] for name in "xyz"], axis=1), original.means.numpy())
    assert np.allclose(1 / (1 + np.exp(-vertex["opacity"])), original.opacities.numpy(), atol=1e-6)
    assert np.allclose(vertex["f_rest_8"], original.sh[:, 1, 1].numpy())  # the first coefficient of green
    assert np.allclose(np.exp(vertex["scale_2"]), original.scales[:, 2].numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("suffix", "covariance", "color"), [(".ply", 1e-5, 1e-6), (".compressed.ply", 0.02, 0.04), (".spz", 0.07, 0.015)]
)
def test_gsply_reads_ours_and_writes_for_us(make_gaussians, tmp_path, suffix, covariance, color):
    gsply = pytest.importorskip("gsply")
    original = scene(make_gaussians, degree=3)
    path = str(save(original, tmp_path / f"a{suffix}", up="z"))
    data = gsply.read_spz(path) if suffix == ".spz" else gsply.plyread(path)
    fields = {name: torch.from_numpy(np.array(getattr(data, name))) for name in ("means", "scales", "quats")}
    theirs = Gaussians(
        means=fields["means"],
        scales=fields["scales"].exp(),
        quaternions=fields["quats"],
        opacities=torch.from_numpy(np.array(data.opacities)).flatten().sigmoid(),
        sh=torch.from_numpy(np.concatenate([data.sh0[:, None], data.shN], axis=1)),
    )
    assert_same(original, theirs, covariance, color)
    if suffix == ".spz":
        gsply.write_spz(str(tmp_path / "b.spz"), data)
    else:
        gsply.plywrite(str(tmp_path / "b.ply"), data, compressed=suffix == ".compressed.ply")
    written = next(tmp_path.glob("b*"))
    assert_same(theirs, load(written, up="z"), covariance, color)


@pytest.mark.parametrize(
    ("suffix", "kind", "covariance", "color"),
    [
        (".ply", "ply", 1e-5, 1e-6),
        (".compressed.ply", "compressed.ply", 0.02, 0.01),
        (".splat", "splat", 0.06, 0.0145),  # it cuts bytes off where we round
        (".spz", "spz", 0.07, 0.015),
    ],
)
def test_gaussforge_reads_ours_and_writes_for_us(make_gaussians, tmp_path, suffix, kind, covariance, color):
    gaussforge = pytest.importorskip("gaussforge")
    forge = gaussforge.GaussForge()
    original = scene(make_gaussians)
    for source, target in ((suffix, "ply"), (".ply", kind)):
        data = save(original, tmp_path / f"a{source}", up="z").read_bytes()
        source_kind = kind if source == suffix else "ply"
        converted = forge.convert(data, source_kind, target)
        assert "error" not in converted, converted
        path = tmp_path / f"b{'.ply' if target == 'ply' else suffix}"
        path.write_bytes(converted["data"])
        assert_same(original, load(path, up="z"), covariance, color)


@pytest.mark.parametrize(
    ("suffix", "writes", "covariance", "color"),
    [
        (".ply", True, 1e-5, 1e-6),
        (".compressed.ply", True, 0.02, 0.025),
        (".splat", False, 0.06, 0.01),
        (".spz", True, 0.1, 0.12),  # it writes harmonics in 4 and 5 bits
        (".glb", True, 1e-5, 1e-6),
        (".sog", False, 0.06, 0.012),
    ],
)
def test_splat_transform_reads_ours_and_writes_for_us(make_gaussians, tmp_path, suffix, writes, covariance, color):
    program = shutil.which("splat-transform")
    if program is None:
        pytest.skip("splat-transform is not on PATH: npm install -g @playcanvas/splat-transform")

    def run(source, target):
        subprocess.run([program, "-q", "-w", str(source), str(target)], check=True, capture_output=True, timeout=120)
        return target

    original = scene(make_gaussians, degree=0 if suffix in (".splat", ".sog") else 3)
    if suffix != ".glb":  # it does not read glTF
        theirs = load(run(save(original, tmp_path / f"a{suffix}"), tmp_path / "a_back.ply"))
        assert_same(original, theirs, covariance, color)
    if writes:
        if suffix == ".spz":
            pytest.importorskip("zstandard")
        theirs = load(run(save(original, tmp_path / "b.ply"), tmp_path / f"b{suffix}"))
        if suffix == ".glb":  # it turns the front of a .ply to -z, glTF says +z
            theirs = theirs.transform([0.0, 0.0, 0.0, 1.0])
        assert_same(original, theirs, covariance, color)

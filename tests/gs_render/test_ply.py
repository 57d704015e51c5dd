"""The .ply of 3DGS: exact layout, round trips, damaged files."""

import math
import struct

import pytest
import torch
from gs_render import Gaussians, load, save

FIELDS = ("means", "scales", "opacities", "sh")


def same_rotation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between unit quaternions, 1 if they are the same rotation."""
    unit = torch.nn.functional.normalize
    return (unit(a, dim=-1) * unit(b, dim=-1)).sum(-1).abs()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("up", [None, "z", "y", "-y"])
def test_round_trip(make_gaussians, tmp_path, degree, up):
    scene = make_gaussians(40, seed=degree, degree=degree)
    again = load(save(scene, tmp_path / "a.ply", up=up), up=up)
    for name in FIELDS:
        assert torch.allclose(getattr(again, name), getattr(scene, name), rtol=2e-6, atol=2e-6), name
    assert same_rotation(again.quaternions, scene.quaternions).min() > 1 - 1e-6


def test_layout_is_the_one_of_3dgs(tmp_path):
    """Read by hand: column order, logit, logarithm, y down."""
    scene = Gaussians(
        torch.tensor([[0.1, 0.2, 0.3]]),
        torch.tensor([[0.5, 0.25, 0.125]]),
        torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        torch.tensor([0.75]),
        torch.arange(12.0).reshape(1, 4, 3),
    )
    data = save(scene, tmp_path / "a.ply", up="z").read_bytes()
    head, body = data.split(b"end_header\n")
    names = [line.split()[2].decode() for line in head.splitlines() if line.startswith(b"property float ")]
    row = dict(zip(names, struct.unpack(f"<{len(names)}f", body), strict=True))
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[-8:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert [row[f"f_rest_{i}"] for i in range(9)] == [3, 6, 9, 4, 7, 10, 5, 8, 11]  # all red ones come first
    assert math.isclose(row["opacity"], math.log(3), rel_tol=1e-6)
    assert math.isclose(row["scale_1"], math.log(0.25), rel_tol=1e-6)
    down = save(scene, tmp_path / "b.ply").read_bytes().split(b"end_header\n")[1]
    assert struct.unpack("<3f", down[:12]) == pytest.approx((0.1, -0.3, 0.2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a PLY"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:100], "end_header"),
        (lambda data: data.replace(b"element vertex 5", b"element vertex 999999999999999"), "truncated"),
        (lambda data: data.replace(b"element vertex 5", b"element vertex -5"), "header line"),
        (lambda data: data.replace(b"property float x", b"property float w"), "columns x are missing"),
        (lambda data: data.replace(b"property float y", b"property float x"), "twice"),
        (lambda data: data.replace(b"property float x", b"property list uchar int x"), "element 'vertex'"),
        (lambda data: data.replace(b"binary_little_endian", b"ascii"), "ascii"),
        (lambda data: data[:-4] + b"\x00\x00\xc0\x7f", "not finite"),
    ],
)
def test_damage_is_named(make_gaussians, tmp_path, damage, message):
    path = save(make_gaussians(5), tmp_path / "a.ply")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_unknown_suffix_and_missing_file(make_gaussians, tmp_path):
    with pytest.raises(ValueError, match=r"unknown file type '.xyz'; known are .*\.ply"):
        save(make_gaussians(1), tmp_path / "a.xyz")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.ply")


def test_a_failed_save_leaves_the_old_file(make_gaussians, tmp_path):
    path = save(make_gaussians(3), tmp_path / "a.ply")
    before = path.read_bytes()
    broken = make_gaussians(3)
    broken.means[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"means: 1 values are not finite, the first in row 0"):
        save(broken, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.ply"]

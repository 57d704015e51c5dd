"""Round trips within each format's stated precision, empty scenes, hostile files, what is lost."""

import gzip
import io
import json
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from gs_render import FORMATS, Gaussians, LossWarning, convert, describe, load, save
from gs_render._formats._glb import join_glb
from PIL import Image

# position, log-scale, covariance (relative), opacity, sh0, higher harmonics
PRECISION = {
    ".ply": (1e-6, 1e-6, 1e-5, 1e-6, 1e-6, 2e-6),
    ".compressed.ply": (6e-4, 3e-3, 0.02, 2.1e-3, 9e-3, 0.017),
    ".splat": (1e-6, 1e-6, 0.04, 2.1e-3, 7.1e-3, None),
    ".spz": (1e-6, 0.032, 0.07, 2.1e-3, 0.0132, 4e-3),
    ".sog": (2e-5, 0.012, 0.06, 2.1e-3, 0.01, None),
    ".glb": (1e-6, 1e-6, 1e-5, 1e-6, 1e-6, 2e-6),
}


def scene(make_gaussians, degree: int) -> Gaussians:
    """Harmonics within the range of every format, colours within 0..1."""
    made = make_gaussians(500, seed=degree, degree=degree)
    sh = made.sh.clamp(-0.9, 0.9)
    sh[:, 0].clamp_(-1.7, 1.7)
    return Gaussians(made.means, made.scales, made.quaternions, made.opacities, sh)


def matched(reference: Gaussians, other: Gaussians) -> Gaussians:
    """`other` in the order of `reference`; some formats reorder."""
    nearest = torch.cdist(reference.means.double(), other.means.double()).argmin(dim=1)
    assert len(nearest.unique()) == len(reference)
    return other[nearest]


def assert_close(reference: Gaussians, other: Gaussians, suffix: str) -> None:
    position, log_scale, covariance, opacity, base, rest = PRECISION[suffix]
    other = matched(reference, other)
    assert (reference.means - other.means).abs().max() <= position
    assert (reference.scales.log() - other.scales.log()).abs().max() <= log_scale
    error = (reference.covariances - other.covariances).flatten(1).norm(dim=1)
    assert (error / reference.covariances.flatten(1).norm(dim=1)).max() <= covariance
    assert (reference.opacities - other.opacities).abs().max() <= opacity
    assert (reference.sh[:, 0] - other.sh[:, 0]).abs().max() <= base
    if rest is not None:
        assert (reference.sh - other.sh).abs().max() <= max(rest, base)


@pytest.mark.parametrize("suffix", PRECISION)
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_round_trip(make_gaussians, tmp_path, suffix, degree):
    original = scene(make_gaussians, degree)
    limit = next(known.max_sh_degree for known in FORMATS if known.suffix == suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if degree <= limit else "ignore")
        # No change of axes: turned harmonics would mix the errors of several coefficients.
        path = save(original, tmp_path / f"a{suffix}", up="z")
    again = load(path, up="z")
    assert again.sh_degree == min(degree, limit)
    assert_close(original.with_sh_degree(again.sh_degree), again, suffix)


@pytest.mark.parametrize("suffix", PRECISION)
def test_empty_scene(tmp_path, suffix):
    assert len(load(save(Gaussians.empty(), tmp_path / f"a{suffix}"))) == 0


@pytest.mark.parametrize("suffix", [".splat", ".sog", ".html"])
def test_loss_of_harmonics_is_said(make_gaussians, tmp_path, suffix):
    with pytest.warns(LossWarning, match="up to degree 0; degree 2 was cut"):
        save(make_gaussians(20, degree=2), tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("suffix", "messages"),
    [
        (".ply", []),
        (".glb", []),
        (".sog", []),
        (".compressed.ply", ["higher harmonics of -4 .. 4; 2 of 3"]),
        (".splat", ["colours of 0 .. 1; 1 of 3"]),
        (
            ".spz",
            ["colours of -0.44 .. 1.44; 1 of 3", "harmonics of -1 .. 1; 2 of 3", "scales of 4.53e-05 .. 379; 1 of 3"],
        ),
    ],
)
def test_clipping_is_said(make_gaussians, tmp_path, suffix, messages):
    degree = 0 if suffix in (".splat", ".sog") else 1
    made = make_gaussians(3, degree=1)
    sh, scales = torch.zeros(3, 4, 3), torch.full((3, 3), 0.1)
    sh[0, 0], sh[1:, 2], scales[2, 1] = 9.0, -5.0, 1e-6
    edge = Gaussians(made.means, scales, made.quaternions, made.opacities, sh).with_sh_degree(degree)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(edge, tmp_path / f"a{suffix}", up="z")
    assert len(caught) == len(messages)
    for warning, message in zip(caught, messages, strict=True):
        assert warning.category is LossWarning
        assert message in str(warning.message)


@pytest.mark.parametrize("suffix", PRECISION)
def test_values_at_the_ends_of_a_range_are_not_clipped(make_gaussians, tmp_path, suffix):
    """The ranges that the table of formats states are the true ones."""
    known = next(item for item in FORMATS if item.suffix == suffix)
    made = make_gaussians(8, degree=1)
    sh, scales = torch.zeros(8, 4, 3), torch.full((8, 3), 0.1)
    low, high = known.rgb_range or (-3.0, 4.0)
    sh[:4, 0], sh[4:, 0] = (low - 0.5) / 0.28209479, (high - 0.5) / 0.28209479
    sh[:4, 1:], sh[4:, 1:] = -(known.sh_limit or 6.0), known.sh_limit or 6.0
    least, most = known.scale_range or (1e-6, 1e3)
    scales[:4], scales[4:] = 1.01 * least, 0.99 * most
    edge = Gaussians(made.means, scales, made.quaternions, made.opacities, sh).with_sh_degree(known.max_sh_degree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(edge.with_sh_degree(min(1, known.max_sh_degree)), tmp_path / f"a{suffix}", up="z")
    again = matched(edge, load(tmp_path / f"a{suffix}", up="z"))
    assert (again.rgb - edge.rgb).abs().max() < 0.01
    assert (again.scales.log() - edge.scales.log()).abs().max() < 0.04
    if known.max_sh_degree:
        assert (again.with_sh_degree(1).sh - edge.with_sh_degree(1).sh)[:, 1:].abs().max() < 0.02


def test_edges_of_the_value_ranges(tmp_path):
    rows = torch.zeros(2, 3), torch.tensor([[0.0] * 3, [1e-12] * 3]), torch.tensor([[1.0, 0, 0, 0]] * 2)
    edge = Gaussians(*rows, torch.tensor([0.0, 1.0]), torch.full((2, 1, 3), 50.0))
    for suffix in PRECISION:
        again = load(save(edge, tmp_path / f"a{suffix}"))
        assert torch.allclose(again.opacities.sort().values, torch.tensor([0.0, 1.0]), atol=1e-6)


def test_up_axes(make_gaussians, tmp_path):
    """A .ply that was written y up, as TRELLIS does, read as such."""
    original = make_gaussians(30, degree=1)
    path = save(original, tmp_path / "a.ply", up="y")
    assert torch.allclose(load(path, up="y").means, original.means, atol=1e-6)
    assert not torch.allclose(load(path).means, original.means, atol=1e-1)
    with pytest.raises(ValueError, match="expected 'z', 'y' or '-y'"):
        load(path, up="x")


def spz(count: int, payload: bytes, degree: int = 0, version: int = 3) -> bytes:
    return gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, version, count, degree, 12, 0, 0) + payload, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.spz", b"not gzip", "not an SPZ"),
        ("a.spz", spz(10, b"\0" * 10), "truncated"),
        ("a.spz", spz(4_000_000_000, b"\0" * 200_000_000), "would unpack"),
        ("a.spz", spz(1, b"\0" * 20, degree=9), "degree 9"),
        ("a.spz", spz(1, b"\0" * 20, version=7), "version 7"),
        ("a.spz", spz(1, b"\0" * 20)[:-14], "damaged|truncated"),
        ("a.splat", b"\0" * 33, "33 bytes"),
        ("a.glb", b"glTF" + b"\0" * 30, "damaged"),
        ("a.sog", b"PK\x03\x04", "damaged SOG archive"),
    ],
)
def test_hostile_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_sog_that_claims_too_much(make_gaussians, tmp_path):
    path = save(make_gaussians(20), tmp_path / "a.sog")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for count, message in (
        (500, "pixels for 500 entries"),
        (10**9, "1000000000 Gaussians claimed"),
        (-1, "-1 Gaussians"),
    ):
        meta = json.loads(members["meta.json"]) | {"count": count}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, json.dumps(meta) if name == "meta.json" else data)
        with pytest.raises(ValueError, match=message):
            load(path)


def test_sog_of_empty_pictures_stays_small(make_gaussians, tmp_path):
    """Lossless pictures of one colour cost nothing, so the count alone must be bounded."""
    path = save(make_gaussians(20), tmp_path / "a.sog")
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read("meta.json")) | {"count": 1 << 20}
    buffer = io.BytesIO()
    Image.new("RGBA", (1024, 1024), (0, 0, 0, 252)).save(buffer, "WEBP", lossless=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("means_l", "means_u", "quats", "scales", "sh0"):
            archive.writestr(f"{name}.webp", buffer.getvalue())
        archive.writestr("meta.json", json.dumps(meta))
    with pytest.raises(ValueError, match="1048576 Gaussians claimed"):
        load(path)


def rewrite_glb(path: Path, change) -> Path:
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    document = json.loads(data[20 : 20 + length])
    change(document)
    path.write_bytes(join_glb(document, data[28 + length :]))
    return path


@pytest.mark.parametrize("count", [300, 0])
def test_glb_that_shows_one_mesh_without_end(make_gaussians, tmp_path, count):
    """Thousands of nodes may share one mesh: a small file must not become gigabytes."""

    def repeat(document):
        document["nodes"] = [{"mesh": 0}] * 5000
        document["scenes"] = [{"nodes": list(range(5000))}]
        for accessor in document["accessors"]:
            accessor["count"] = count

    path = rewrite_glb(save(make_gaussians(300), tmp_path / "a.glb"), repeat)
    tracemalloc.start()
    with pytest.raises(ValueError, match="primitives"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_glb_may_show_one_mesh_a_few_times(make_gaussians, tmp_path):
    def place(document):
        document["nodes"] = [{"mesh": 0}, {"mesh": 0, "translation": [1, 0, 0], "scale": [2, 2, 2]}]
        document["scenes"] = [{"nodes": [0, 1]}]

    original = make_gaussians(30, degree=1)
    both = load(rewrite_glb(save(original, tmp_path / "a.glb", up="z"), place), up="z")
    assert len(both) == 60
    assert torch.allclose(both[:30].means + both[30:].means, 3 * original.means + torch.tensor([1.0, 0, 0]), atol=1e-5)


def test_convert_and_describe(make_gaussians, tmp_path):
    source = save(make_gaussians(60, degree=1), tmp_path / "a.ply")
    target = convert(source, tmp_path / "b.spz")
    facts = describe(target)
    assert (facts["format"], facts["gaussians"], facts["sh_degree"]) == (".spz", 60, 1)
    assert json.loads(json.dumps(facts)) == facts
    with pytest.raises(ValueError, match="unknown file type"):
        convert(source, tmp_path / "b.xyz")
    (tmp_path / "c.png").touch()
    with pytest.raises(ValueError, match="can be written but not read"):
        load(tmp_path / "c.png")

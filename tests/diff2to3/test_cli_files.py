"""`view`, `convert` and `info` on files, disks and folders that are not as they should be."""

import functools
import resource
import signal
import struct
import subprocess
import sys
import urllib.request

import pytest
import torch
from click.testing import CliRunner
from diff2to3._cli import cli
from diff2to3._errors import InputError
from gs_render import Gaussians, load, save
from PIL import Image, ImageDraw


@pytest.fixture
def splat(tmp_path):
    """400 Gaussians as ball.ply, 30 kB."""
    direction = torch.nn.functional.normalize(torch.randn(400, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    rotation = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(400, 4)
    opacities, color = torch.full((400,), 0.9), direction / 2 + 0.5
    ball = Gaussians.from_rgb(direction * 0.4, torch.full((400, 3), 0.03), rotation, opacities, color)
    return save(ball, tmp_path / "ball.ply")


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refuses(*arguments):
    """The message of the refusal: `main` prints an InputError as one line and leaves with 2."""
    result = run(*arguments)
    assert isinstance(result.exception, InputError), (result.exception, result.output)
    assert result.stdout == ""
    return str(result.exception)


def damaged(kind, data):
    """What is wrong with a file, done to a good one."""
    body = data.index(b"end_header\n") + 11
    return {
        "empty": b"",
        "text": b"hello",
        "truncated": data[: len(data) // 2],
        "endless": data.replace(b"element vertex 400", b"element vertex 99999999999"),
        "nan": data[:body] + struct.pack("<f", float("nan")) + data[body + 4 :],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "endless", "nan"])
def test_damaged_files_are_refused_by_name(splat, tmp_path, kind):
    bad = tmp_path / "bad.ply"
    bad.write_bytes(damaged(kind, splat.read_bytes()))
    for command in (("info", bad), ("convert", bad, tmp_path / "x.spz"), ("view", bad, "-o", tmp_path / "x.html")):
        assert "bad.ply" in refuses(*command)
    assert {path.name for path in tmp_path.iterdir()} == {"ball.ply", "bad.ply"}


@pytest.mark.parametrize("suffix", ["spz", "glb", "sog", "splat"])
def test_files_of_another_type_are_refused(splat, tmp_path, suffix):
    wrong = splat.rename(tmp_path / f"wrong.{suffix}")
    assert wrong.name in refuses("info", wrong)


def test_a_folder_is_no_file(splat, tmp_path):
    (tmp_path / "folder.ply").mkdir()
    assert "folder.ply is a folder" in refuses("convert", tmp_path / "folder.ply", tmp_path / "x.spz")
    assert "folder.ply is a folder" in refuses("view", tmp_path / "folder.ply")
    assert "folder.ply" in refuses("convert", splat, tmp_path / "folder.ply")
    assert "not a folder" in refuses("convert", splat, splat / "x.spz")
    assert "not a folder" in refuses("view", splat, "-o", tmp_path / "none" / "x.html")


def test_what_a_format_cannot_hold_is_refused(splat, tmp_path):
    ball = load(splat)
    far = save(ball.transform(scale=1e8), tmp_path / "far.ply")
    assert "x.spz cannot be written: .spz keeps positions up to" in refuses("convert", far, tmp_path / "x.spz")
    nothing = save(Gaussians.empty(), tmp_path / "nothing.ply")
    assert "expected Gaussians with an opacity" in refuses("convert", nothing, tmp_path / "x.obj")
    assert {path.name for path in tmp_path.iterdir()} == {"ball.ply", "far.ply", "nothing.ply"}


def test_convert_says_what_the_format_keeps(splat, tmp_path):
    lines = run("convert", splat, tmp_path / "x.splat").stdout.splitlines()
    assert lines[0].endswith("x.splat: 400 Gaussians, 12,800 bytes")
    assert lines[1].startswith("kept: position and scale exactly")


def test_view_writes_pages_only(splat, tmp_path):
    assert "expected a file name that ends in .html" in refuses("view", splat, "-o", tmp_path / "x.ply")


@pytest.fixture
def small_disk(monkeypatch):
    """Files may have 4 kB: for a writer the same as a disk that is full."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut off too, and break imports from then on
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", ["ply", "compressed.ply", "splat", "spz", "sog", "glb", "html", "png", "mp4", "gif"])
def test_a_full_disk_leaves_nothing_half_written(splat, tmp_path, small_disk, suffix):
    target = tmp_path / f"x.{suffix}"
    target.write_text("what was there before")
    assert f"{target} cannot be written" in refuses("convert", splat, target)
    assert target.read_text() == "what was there before"
    assert {path.name for path in tmp_path.iterdir()} == {"ball.ply", target.name}


def test_view_without_viser_shows_the_offline_page(splat, monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    result = run("view", splat, "--no-browser")
    assert result.exit_code == 0
    assert result.stdout.strip().endswith("ball.html")
    assert result.stderr.count("\n") == 1
    assert "diff2to3[view]" in result.stderr


def test_viewer_serves_this_machine_until_interrupted(splat):
    pytest.importorskip("viser", reason="NO VISER: pip install 'diff2to3[view]'")
    command = [sys.executable, "-m", "diff2to3", "view", str(splat), "--no-browser", "--port", "8472"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A suite started in the background of a shell ignores SIGINT, and so would its children.
    hear_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **pipes, preexec_fn=hear_interrupts) as viewer:
        try:
            address = viewer.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(address, timeout=20) as page:
                assert b"<html" in page.read()
            viewer.send_signal(signal.SIGINT)
            rest, errors = viewer.communicate(timeout=30)
        finally:
            viewer.kill()
    assert (viewer.returncode, rest) == (0, "")
    assert "Traceback" not in errors


def test_generate_on_a_full_disk_leaves_nothing(micro_pipeline, tmp_path, small_disk):
    picture = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(picture).ellipse((10, 10, 50, 50), fill=(200, 30, 40, 255))
    picture.save(tmp_path / "ball.png")
    options = ("--pipeline", micro_pipeline, "--format", "ply", "-o", tmp_path / "out")
    assert "cannot be written: File too large" in refuses("generate", tmp_path / "ball.png", *options)
    assert not (tmp_path / "out").exists()

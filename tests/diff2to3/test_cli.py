"""The command line as a user meets it: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from diff2to3._cli import cli
from PIL import Image, ImageDraw

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def diff2to3(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "diff2to3", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=280,
    )


def within(*arguments):
    """A command that succeeds, run in this process, which has PyTorch loaded already."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def ball(tmp_path):
    image = Image.new("RGBA", (96, 80))
    ImageDraw.Draw(image).ellipse((20, 10, 70, 60), fill=(200, 30, 40, 255))
    image.save(tmp_path / "ball.png")
    return tmp_path / "ball.png"


def refuses(result, *words):
    """Exit code 2, one line on stderr that has the words, nothing on stdout."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("diff2to3: error: ")
    for word in words:
        assert word in result.stderr


def make_bad_pictures(folder):
    whole = folder / "whole.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    (folder / "text.png").write_text("I am no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    noise[..., 3] = 0
    Image.fromarray(noise).save(folder / "clear.png")
    Image.new("1", (10001, 10000)).save(folder / "bomb.png")
    (folder / "folder.png").mkdir()
    whole.unlink()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text.png", ["not a picture"]),
        ("empty.png", ["0 bytes"]),
        ("truncated.png", ["truncated"]),
        ("clear.png", ["shows no object"]),
        ("bomb.png", ["10001 x 10000", "expected at most"]),
        ("missing.png", ["no such file"]),
        ("folder.png", ["is a folder"]),
    ],
)
def test_bad_pictures(tmp_path, micro_pipeline, name, words):
    make_bad_pictures(tmp_path)
    result = diff2to3(
        "generate", tmp_path / name, "--pipeline", micro_pipeline, "-o", tmp_path / "out", "--format", "ply"
    )
    refuses(result, str(tmp_path / name), *words)
    assert not (tmp_path / "out").exists()


def test_one_bad_picture_among_good_ones_stops_before_anything_is_made(tmp_path, micro_pipeline, ball):
    result = diff2to3("generate", ball, "missing.png", "--pipeline", micro_pipeline, "-o", tmp_path / "out")
    refuses(result, "missing.png")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no picture given"]),
        (["--nonsense"], ["No such option", "--nonsense"]),
        (["--steps", "0"], ["--steps"]),
        (["--seed", "x"], ["--seed"]),
        (["--dtype", "int8"], ["int8", "bfloat16"]),
        (["--feature-extractor", "nope"], ["no feature_extractor named 'nope'", "available: ", "flux (flux-features"]),
        (["--matting", "magic"], ["no matting named 'magic'", "border"]),
        (["--renderer", "gsplat:auto"], ["no renderer named 'gsplat:auto'"]),
        (["--format", "ply,xyz"], ["no exporter named 'xyz'", "ply"]),
        (["--format", ","], ["--format is empty"]),
        (["--pipeline", "nonsense"], ["no pipeline 'nonsense'"]),
        (["--from-manifest", "none.json"], ["none.json"]),
    ],
)
def test_bad_usage(ball, micro_pipeline, arguments, words):
    base = [ball, "--format", "ply", "--pipeline", micro_pipeline] if arguments else []
    refuses(diff2to3("generate", *base, *arguments, cwd=ball.parent), *words)
    assert sorted(p.name for p in ball.parent.iterdir()) == ["ball.png"]


def test_output_folder_that_cannot_be(ball, micro_pipeline, tmp_path):
    (tmp_path / "file").write_text("")
    base = ["generate", ball, "--format", "ply", "--pipeline", micro_pipeline, "-o"]
    refuses(diff2to3(*base, tmp_path / "file"), "a file is in the way")
    refuses(diff2to3(*base, tmp_path / "file" / "below"), "a file is in the way")
    if Path("/proc/self").is_dir():  # even root cannot write there
        refuses(diff2to3(*base, "/proc/out"), "not writable")


def test_broken_pipeline_folders(ball, micro_pipeline, tmp_path):
    import shutil

    for name in ("truncated", "no-config"):
        shutil.copytree(micro_pipeline, tmp_path / name)
    weights = tmp_path / "truncated" / "backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (tmp_path / "no-config" / "pipeline.json").unlink()
    for name, words in (("truncated", ["backbone.safetensors", "truncated"]), ("no-config", ["no pipeline.json"])):
        result = diff2to3("generate", ball, "--pipeline", tmp_path / name, "-o", tmp_path / "out", "--format", "ply")
        refuses(result, *words)
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def made(micro_pipeline, tmp_path_factory):
    """One real run with every kind of file, two samples, JSON."""
    folder = tmp_path_factory.mktemp("made")
    for name, shape in (("ball", "ellipse"), ("box", "rectangle")):
        image = Image.new("RGB", (96, 80), (255, 255, 255))
        getattr(ImageDraw.Draw(image), shape)((20, 10, 70, 60), fill=(200, 30, 40))
        image.save(folder / f"{name}.png")
    options = ["--pipeline", micro_pipeline, "-o", folder / "out", "--samples", "2", "--seed", "7", "--json"]
    return folder, diff2to3("generate", folder / "ball.png", *options)


def test_everything_is_written(made):
    folder, result = made
    assert result.returncode == 0, result.stderr
    suffixes = ("ply", "png", "mp4", "html", "json")
    expected = {f"ball-{sample}.{suffix}" for sample in (0, 1) for suffix in suffixes}
    assert {path.name for path in (folder / "out").iterdir()} == expected
    assert "structure" in result.stderr  # progress
    import gs_render

    assert len(gs_render.load(folder / "out" / "ball-0.ply")) > 0
    assert Image.open(folder / "out" / "ball-0.png").width >= 256
    assert b"ftyp" in (folder / "out" / "ball-0.mp4").read_bytes()[:32]
    page = (folder / "out" / "ball-0.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page


def test_json_has_one_object_a_result(made):
    folder, result = made
    results = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["name"] for r in results] == ["ball-0", "ball-1"]
    first = results[0]
    assert {"seed", "config", "weights", "versions", "timings", "files"} <= set(first)
    assert (first["seed"], first["sample"]) == (7, 0)
    assert all(Path(path).is_file() for path in first["files"].values())
    manifest = json.loads((folder / "out" / "ball-0.json").read_text())
    assert manifest == {**first, "files": manifest["files"]}
    assert set(manifest["weights"]) == {"feature_extractor", "structure", "backbone", "latent_decoder"}
    assert manifest["versions"]["torch"]


def test_from_manifest_makes_the_same_bytes_again(made):
    folder, _ = made
    manifest = folder / "out" / "ball-1.json"
    result = diff2to3("generate", "--from-manifest", manifest, "-o", folder / "again", "--format", "ply")
    assert result.returncode == 0, result.stderr  # in a process of its own: nothing may hang on what ran before
    assert (folder / "again" / "ball.ply").read_bytes() == (folder / "out" / "ball-1.ply").read_bytes()
    assert "ball" in result.stdout


def test_results_stay_on_stdout_while_a_terminal_shows_progress():
    pty = pytest.importorskip("pty")
    terminal, side = pty.openpty()
    code = "from diff2to3._progress import progress\nwith progress() as bars, bars.step('work'):\n    print('result')"
    environment = {**ENVIRONMENT, "TERM": "xterm"}
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=side, env=environment, text=True
    )
    os.close(side)
    shown = os.read(terminal, 100_000)
    os.close(terminal)
    assert result.stdout == "result\n"
    assert b"result" not in shown


def test_several_pictures_with_one_name(made, micro_pipeline, tmp_path):
    folder, _ = made
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ball.png").write_bytes((folder / "box.png").read_bytes())
    options = ["--pipeline", micro_pipeline, "--format", "ply", "-o", tmp_path / "out", "--seed", "7"]
    within("generate", folder / "ball.png", tmp_path / "other" / "ball.png", *options)
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["ball-2.json", "ball-2.ply", "ball.json", "ball.ply"]


def test_several_views_of_one_object(made, micro_pipeline, tmp_path):
    folder, _ = made
    pictures = [folder / "ball.png", folder / "box.png"]
    options = ["--pipeline", micro_pipeline, "--format", "ply,splat", "-o", tmp_path, "--multi-view", "--json"]
    [line] = [line for line in within("generate", *pictures, *options).output.splitlines() if line.startswith("{")]
    assert [Path(picture["path"]) for picture in json.loads(line)["pictures"]] == pictures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ball.json", "ball.ply", "ball.splat"]


def test_manifest_whose_picture_changed(made, tmp_path):
    folder, _ = made
    manifest = json.loads((folder / "out" / "ball-0.json").read_text())
    manifest["pictures"][0]["path"] = str(folder / "box.png")
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    command = ["generate", "--from-manifest", tmp_path / "m.json", "-o", tmp_path]
    refuses(diff2to3(*command), "not the picture of the manifest")
    (tmp_path / "m.json").write_text('{"seed": 1}')
    refuses(diff2to3(*command), "not a manifest")


def test_manifest_of_other_versions(made, tmp_path):
    """Said in one line, and made all the same."""
    folder, _ = made
    manifest = json.loads((folder / "out" / "ball-0.json").read_text())
    here = manifest["versions"]["torch"]
    manifest["versions"] |= {"torch": "1.2.3"}
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    result = within("generate", "--from-manifest", tmp_path / "m.json", "-o", tmp_path, "--format", "ply")
    [line] = [line for line in result.output.splitlines() if "may differ" in line]
    assert (
        line == f"diff2to3: the result may differ a little: {tmp_path}/m.json was made with torch 1.2.3 (here {here})"
    )
    assert (tmp_path / "ball.ply").is_file()


def test_manifest_whose_pipeline_changed(made, tmp_path):
    """Other settings or weights in the pipeline's place are refused before anything is written."""
    folder, _ = made
    manifest = json.loads((folder / "out" / "ball-0.json").read_text())
    command = ["generate", "--from-manifest", tmp_path / "m.json", "-o", tmp_path / "out", "--format", "ply"]
    for change, words in (
        ({"config": manifest["config"] | {"condition_background": 0.5}}, "the pipeline's condition_background is not"),
        ({"weights": manifest["weights"] | {"backbone": "0" * 64}}, "the weights of backbone are not those"),
    ):
        (tmp_path / "m.json").write_text(json.dumps(manifest | change))
        result = CliRunner().invoke(cli, [str(argument) for argument in command])
        assert words in str(result.exception)
        assert not (tmp_path / "out").exists()


def test_picture_of_a_manifest_that_moved_with_it(made, tmp_path):
    folder, _ = made
    manifest = json.loads((folder / "out" / "ball-0.json").read_text())
    manifest["pictures"][0]["path"] = "pictures/ball.png"  # as given, from another working directory
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    command = ["generate", "--from-manifest", tmp_path / "m.json", "-o", tmp_path / "out", "--format", "ply"]
    refused = CliRunner().invoke(cli, [str(argument) for argument in command]).exception
    assert str(refused).startswith(
        f"pictures/ball.png: no such file; the manifest was made from it: put it into {tmp_path}"
    )
    for place in (tmp_path / "ball.png", tmp_path / "pictures" / "ball.png"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes((folder / "ball.png").read_bytes())
        within(*command)
        place.unlink()
    assert (tmp_path / "out" / "ball.ply").read_bytes() == (folder / "out" / "ball-0.ply").read_bytes()


def test_convert_and_info(made, tmp_path):
    folder, _ = made
    source = folder / "out" / "ball-0.ply"
    assert "Gaussians" in within("convert", source, tmp_path / "ball.splat").output
    facts = json.loads(within("info", tmp_path / "ball.splat", "--json").output)
    assert facts["gaussians"] == json.loads((folder / "out" / "ball-0.json").read_text())["num_gaussians"]
    (tmp_path / "bad.ply").write_bytes(source.read_bytes()[:500])
    refuses(diff2to3("convert", tmp_path / "bad.ply", tmp_path / "x.splat"), "bad.ply")
    refuses(diff2to3("convert", tmp_path / "none.ply", tmp_path / "x.splat"), "no such file")
    refuses(diff2to3("convert", source, tmp_path / "x.docx"), "no exporter named 'docx'")
    refuses(diff2to3("info", tmp_path / "none.ply"), "no such file")
    assert not (tmp_path / "x.splat").exists()


def test_view_writes_a_page(made, tmp_path):
    folder, _ = made
    result = within("view", folder / "out" / "ball-0.ply", "--no-browser", "-o", tmp_path / "ball.html")
    assert result.output.strip() == str(tmp_path / "ball.html")
    assert (tmp_path / "ball.html").stat().st_size > 1000


def test_info_of_a_pipeline(micro_pipeline):
    facts = json.loads(within("info", micro_pipeline, "--json").output)
    assert facts["pipeline"] == "micro"
    assert facts["parameters"] == sum(role.get("parameters", 0) for role in facts["roles"].values()) > 1000
    assert len(facts["roles"]["backbone"]["sha256"]) == 64


def hear_interrupts():
    """A suite started in the background of a shell ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(ball, micro_pipeline, tmp_path, how):
    command = [sys.executable, "-m", "diff2to3", "generate", ball, "--pipeline", micro_pipeline, "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--format", "ply", "-o", tmp_path / "out"],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=hear_interrupts,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(how)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + how, errors
    assert errors.strip() == ("diff2to3: interrupted" if how == signal.SIGINT else "")
    assert not (tmp_path / "out").exists()


def test_a_fault_is_no_bad_input(micro_pipeline, ball, tmp_path):
    """Exit code 1 and a traceback: the user did nothing wrong."""
    code = (
        "import sys, diff2to3._cli as cli, diff2to3._cli._generate as generate;"
        "generate.run = lambda *arguments: 1 / 0;"
        f"sys.argv = ['diff2to3', 'generate', {str(ball)!r}, '--pipeline', {str(micro_pipeline)!r}, '-o', "
        f"{str(tmp_path / 'out')!r}, '--format', 'ply']; cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_and_version():
    overview = diff2to3("--help")
    assert overview.returncode == 0
    for command in (
        "generate",
        "view",
        "convert",
        "info",
        "import-trellis",
        "plugins",
        "doctor",
        "data",
        "train",
        "eval",
    ):
        assert command in overview.stdout
    assert "diff2to3, version" in diff2to3("--version").stdout
    nothing = diff2to3()
    assert nothing.returncode == 2
    assert "Usage" in nothing.stderr
    refuses(diff2to3("nonsense"), "nonsense")

"""The documentation is true: its code runs, its commands exist, its reference is complete, its figures fit the code."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from diff2to3._cli import cli as command_line

_SCRIPT = Path(__file__).with_name("pages.py")
_SPEC = importlib.util.spec_from_file_location("pages", _SCRIPT)
pages = sys.modules.setdefault("pages", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(pages)
ROOT = pages.ROOT

BLOCKS = {page.relative_to(ROOT).as_posix(): pages.blocks(page) for page in pages.PAGES}
RUNS = [
    name
    for name, blocks in BLOCKS.items()
    if any(b.language in ("python", "sh", "console") and not b.why_not for b in blocks)
]


@pytest.fixture(scope="session")
def path_with_pip(tmp_path_factory):
    """A folder for PATH whose `pip` installs with uv, and the folder that it installs into."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.fail("uv is needed to run the commands of the documentation: pip install uv")
    programs, site = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("site")
    pip = programs / "pip"
    options = f"--quiet --no-deps --python {shlex.quote(sys.executable)} --target {shlex.quote(str(site))}"
    pip.write_text(f'#!/bin/sh\n[ "$1" = install ] && shift\nexec {shlex.quote(uv)} pip install {options} "$@"\n')
    pip.chmod(0o755)
    return programs, site


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
def test_code_runs(name, path_with_pip, tmp_path):
    """In a folder with the example pictures and the repository's folders that pages speak of."""
    programs, site = path_with_pip
    for picture in (ROOT / "examples").glob("*.png"):
        shutil.copy(picture, tmp_path)
    for folder in ("examples", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(site)}
    command = [sys.executable, _SCRIPT, ROOT / name]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=880)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_of_a_known_kind(name):
    for block in BLOCKS[name]:
        where = f"{name}:{block.line}"
        assert not block.why_not or block.why_not in pages.WHY_NOT, f"{where}: unknown reason {block.why_not!r}"
        if block.language == "python":
            compile(block.code, where, "exec")
        elif block.language == "yaml":
            yaml.safe_load(block.code)
        elif block.language == "toml":
            tomllib.loads(block.code)
        else:
            assert block.language in ("sh", "console", "text"), (
                f"{where}: {block.language!r}, expected sh, console, python, yaml, toml or text"
            )


@pytest.mark.parametrize("name", BLOCKS)
def test_commands_exist(name):
    """Those of blocks that do not run too: every command of ours, its options, and the scripts and configs it names."""
    for block in BLOCKS[name]:
        if block.language not in ("sh", "console"):
            continue
        for line, _ in block.commands():
            words = shlex.split(line, comments=True)
            for file in (word for word in words if word.startswith(("configs/", "examples/", "benchmarks/"))):
                assert (ROOT / file).exists(), f"{name}:{block.line}: no {file}"
            if "diff2to3" in words and "install" not in words:
                check_command(words[words.index("diff2to3") + 1 :], f"{name}:{block.line}")


def check_command(words, where):
    """Parse as the command line would, without doing anything."""
    words = words[: min((words.index(end) for end in ("|", "&&", ">") if end in words), default=len(words))]
    command, context = command_line, click.Context(command_line)
    while isinstance(command, click.Group):
        assert words, f"{where}: no command"
        found = command.get_command(context, words[0])
        assert found is not None, f"{where}: no command {words[0]!r}"
        command, words = found, words[1:]
        context = click.Context(command, parent=context)
    try:
        command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        pytest.fail(f"{where}: {error.format_message()}")


@pytest.mark.parametrize("page", [page for page in pages.PAGES if page.name == "README.md"], ids=str)
def test_links_of_readmes_lead_somewhere(page):
    """mkdocs checks those of docs/."""
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: no {link}"


def test_shapes_in_the_figures_are_those_of_the_models():
    """Of the embedded pipeline, of the preset `tiny` (autoencoders) and of `paper` (features)."""
    from diff2to3._locate import locate
    from diff2to3._store import read_config
    from flux_features import FluxFeatures, FluxFeaturesConfig
    from smdit import SMDiTConfig, StructureFlowConfig
    from sparse_vae import SparseVAEConfig, StructureVAEConfig

    def shows(figure, *shapes):
        text = (ROOT / "docs" / "figures" / f"{figure}.svg").read_text(encoding="utf-8").replace(" ", "")
        for shape in shapes:
            assert "[" + ",".join(map(str, shape)) + "]" in text, f"{figure}.svg: no {shape}"

    roles = {name: role.config for name, role in read_config(locate(None)).roles.items()}
    features = FluxFeaturesConfig.model_validate(roles["feature_extractor"])
    structure = StructureFlowConfig.model_validate(roles["structure"])
    backbone = SMDiTConfig.model_validate(roles["backbone"])
    decoder = SparseVAEConfig.model_validate(roles["latent_decoder"])
    side, channels, latents = features.image_size // 8, features.latent_channels, backbone.latent_channels
    tokens = (side // 2, side // 2, 4 * channels)
    coarse = structure.decoder.latent_size
    shows("pipeline", ("B", channels, side, side), ("B", "images", *tokens), ("L", latents))
    shows("pipeline", (structure.decoder.latent_channels, coarse, coarse, coarse))
    shows("smdit", ("B", 1, *tokens), ("N", latents))
    assert f"{decoder.gaussians.num_gaussians} a voxel" in (ROOT / "docs/figures/pipeline.svg").read_text()

    vae, dense = SparseVAEConfig.preset("tiny"), StructureVAEConfig.preset("tiny")
    shows("sparse_vae", ("N", vae.in_channels), ("B", 1, *3 * [dense.grid_size]))
    shows("sparse_vae", ("B", dense.latent_channels, *3 * [dense.latent_size]))
    figure = (ROOT / "docs/figures/sparse_vae.svg").read_text()
    assert f"[N, {vae.latent_channels}]" in figure
    assert f"{vae.gaussians.num_gaussians} N" in figure
    assert f"windows of {vae.window_size}^3" in figure

    paper = FluxFeaturesConfig.preset("paper")
    side, channels = paper.image_size // 8, paper.latent_channels
    shows("flux_features", ("V", 3, *2 * [paper.image_size]), ("V", channels, side, side), ("L", channels))
    shows("flux_features", ("V", side // 2, side // 2, 4 * channels))
    assert FluxFeatures(FluxFeaturesConfig.preset("tiny")).stride == 8


def test_the_checks_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: laziness -->\n```sh\ntrue\n```\n```console\n$ echo 3 cats\n4 cats\n$ echo dog\ncat\n```\n"
    )
    first, second = pages.blocks(page)
    assert (first.why_not, first.line) == ("laziness", 2)
    assert first.why_not not in pages.WHY_NOT
    assert second.commands() == [("echo 3 cats", "4 cats\n"), ("echo dog", "cat\n")]
    assert pages.same_but_for_numbers("4 cats\n", "3 cats\n")
    assert not pages.same_but_for_numbers("cat\n", "dog\n")
    for words in (["generate", "x.png", "--sed", "1"], ["generat"], ["data"], ["data", "voxelise"]):
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            check_command(words, "here")
    check_command(["generate", "x.png", "--seed", "1", "|", "grep", "--nonsense"], "here")

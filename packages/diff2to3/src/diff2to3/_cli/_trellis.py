"""``diff2to3 import-trellis``: TRELLIS's published models as a pipeline directory."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--dino",
    metavar="DIR|HUB",
    help="DINOv2 with registers, in transformers' layout.  [default: the Hub id of the one that SRC names]",
)
def import_trellis(source: str, target: str, dino: str | None) -> None:
    """Make the pipeline directory DST from SRC, a directory like microsoft/TRELLIS-image-large.

    SRC holds pipeline.json and ckpts/*.{json,safetensors}. DST is then what 'diff2to3 generate --pipeline DST' runs. It
    holds all weights but DINOv2's, which stay where --dino says and are not downloaded here.
    """
    from diff2to3._atomic import expect_new
    from diff2to3._progress import progress
    from diff2to3._trellis_file import read_description

    read_description(Path(source))  # what can be refused without loading PyTorch
    expect_new(Path(target))
    with progress() as bars:
        with bars.step("loading"):
            from diff2to3._trellis import import_trellis as convert

        report = bars.callback(Path(source).name)
        made = convert(Path(source), Path(target), dino, lambda done, total: report("importing", done, total))
    click.echo(f"{target}: {made.num_parameters / 1e6:,.1f} M parameters, {made.config.description}")
    if made.left_out:
        click.echo(f"diff2to3: left out {', '.join(made.left_out)}: only Gaussians are made here", err=True)
    if made.missing is not None:
        click.echo(f"diff2to3: before generating: {made.missing}", err=True)

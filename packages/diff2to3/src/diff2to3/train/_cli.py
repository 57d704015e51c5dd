"""``diff2to3 train``."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def train() -> None:
    """Train the components: autoencoder, vae, structure-vae, structure-flow, flow (in that order)."""


def _command(name: str, help_text: str) -> None:
    @train.command(name, help=help_text)
    @click.argument("config", type=click.Path(path_type=Path))
    @click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting (dotted keys, YAML values)."
    )
    @click.option("--resume", is_flag=True, help="Continue from the run's last checkpoint.")
    def command(config: Path, overrides: tuple[str, ...], resume: bool) -> None:
        from diff2to3.train._config import load_config

        settings = load_config(config, overrides)
        from diff2to3.train._engine import train as run
        from diff2to3.train.stages import build_stage

        run(build_stage(name, settings), settings, resume)


_command("autoencoder", "The FLUX-shaped tiny autoencoder (feature extractor).")
_command("vae", "The 2to3-VAE: lifted features to Gaussians.")
_command("structure-vae", "Stage 1: occupancy autoencoder.")
_command("structure-flow", "Stage 1: flow over structure latents, conditioned on a picture.")
_command("flow", "Stage 2: SMDiT over the 2to3-VAE's latents, conditioned on a picture.")


@train.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--name", default="tiny", show_default=True, help="Name of the pipeline.")
@click.option(
    "--threshold", type=float, default=0.0, show_default=True, help="Occupancy logit above which a voxel is active."
)
@click.option(
    "--structure-sampler",
    multiple=True,
    metavar="KEY=VALUE",
    help="How stage 1 samples unless told otherwise (repeatable): method (euler, heun, multistep), steps, guidance,"
    " interval, shift, rescale.  [default: Euler, 25 steps, guidance 2]",
)
@click.option("--sampler", multiple=True, metavar="KEY=VALUE", help="The same of stage 2.")
@click.option(
    "--flow",
    type=click.Path(path_type=Path),
    metavar="CONFIG.yaml",
    help="Settings of stage flow, where they name a backbone, an extractor or a frame of their own.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of --flow.")
def assemble(
    runs: Path,
    out: Path,
    name: str,
    threshold: float,
    structure_sampler: tuple[str, ...],
    sampler: tuple[str, ...],
    flow: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Put the trained stages under RUNS together into a pipeline directory OUT (fp16 weights, fp32 statistics)."""
    from diff2to3.train._config import load_config

    settings = load_config(flow, overrides) if flow else None
    from smdit import SamplerConfig

    from diff2to3._errors import InputError
    from diff2to3._settings import build_settings
    from diff2to3.train._assemble import assemble as run

    def said(option: str, given: tuple[str, ...]) -> SamplerConfig:
        return build_settings({"guidance": 2.0}, given, SamplerConfig, source=option, option=option)

    samplers = said("--structure-sampler", structure_sampler), said("--sampler", sampler)
    try:
        count = run(runs, out, name, threshold, *samplers, flow=settings)
    except (ValueError, RuntimeError) as error:  # torch reports missing and unexpected weights as RuntimeError
        raise InputError(" ".join(str(error).split())) from error
    click.echo(f"{out}: {count / 1e6:.2f} M parameters")


@train.command()
@click.argument("pipeline", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("runs", type=click.Path(path_type=Path))
def unpack(pipeline: Path, runs: Path) -> None:
    """Take a PIPELINE directory apart into model folders under RUNS, to train on from (init: FOLDER)."""
    from diff2to3.train._assemble import unpack as run

    click.echo(f"{runs}: {', '.join(run(pipeline, runs))}")

"""``diff2to3 app``."""

from __future__ import annotations

import importlib.util
import threading
import webbrowser
from typing import Any

import click

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds, too long for --help
    raise ModuleNotFoundError("No module named 'gradio'", name="gradio")  # the command line says what to install


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at: this machine only.")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: the first free one from 7860 on]")
@click.option("--pipeline", metavar="NAME|DIR|HUB", help="Pipeline to use.  [default: the embedded one]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a pipeline from the Hub.")
@click.option("--device", metavar="D", help="cpu, cuda, cuda:1, mps ...  [default: a GPU if there is one]")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--low-vram", is_flag=True, help="Keep on the device only the model that is at work.")
@click.option("--matting", metavar="NAME", help="Component that removes the background.")
@click.option("--max-upload", default=20, show_default=True, type=click.IntRange(1), help="Megabytes of a picture.")
@click.option("--max-pixels", default=25.0, show_default=True, type=click.FloatRange(0.01, 64), help="In millions.")
@click.option("--max-samples", default=4, show_default=True, type=click.IntRange(1), help="Variants in one call.")
@click.option("--max-queue", default=16, show_default=True, type=click.IntRange(1), help="Calls that may wait.")
@click.option("--keep", default=60, show_default=True, type=click.IntRange(1), help="Minutes that files are kept.")
@click.option("--no-browser", is_flag=True, help="Open nothing, only print where to look.")
def app(host: str, port: int | None, no_browser: bool, **given: Any) -> None:
    """Run the pipeline as a page in the browser and as an API, until Ctrl-C.

    Only this machine can reach it, unless --host says otherwise: 0.0.0.0 lets everybody in who can reach this machine.
    """
    from diff2to3._locate import locate

    locate(given["pipeline"], given["revision"])  # refuse an unknown one before the work of loading
    click.echo("diff2to3: loading ...", err=True)
    from diff2to3._pipeline import Pipeline
    from diff2to3.app._limits import Limits
    from diff2to3.app._server import serving

    options = {name: given[name] for name in ("revision", "device", "dtype", "low_vram", "matting")}
    pipeline = Pipeline.from_pretrained(given["pipeline"], **options)
    limits = Limits(
        upload_megabytes=given["max_upload"],
        pixels=int(given["max_pixels"] * 1e6),
        samples=given["max_samples"],
        queue=given["max_queue"],
        minutes=given["keep"],
    )
    with serving(pipeline, limits, host, port) as address:
        click.echo(address)
        click.echo("diff2to3: Ctrl-C ends the app", err=True)
        if not no_browser and not webbrowser.open(address):
            click.echo("diff2to3: no browser could be started; open the address above in one", err=True)
        threading.Event().wait()

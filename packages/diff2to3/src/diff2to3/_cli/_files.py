"""``diff2to3 view``, ``convert`` and ``info``: work on files that exist."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from diff2to3._atomic import writing
from diff2to3._errors import InputError

if TYPE_CHECKING:
    from gs_render import Gaussians

Up = Literal["y", "-y", "z"]
_UP = click.option(
    "--up", type=click.Choice(["y", "-y", "z"]), help="Up axis of the file, where its format's own is wrong."
)


@click.command()
@click.argument("file")
@click.option("-o", "--out", metavar="FILE.html", help="Write a page that works offline, and show that one.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535), help="Port of the viewer.")
@click.option("--no-browser", is_flag=True, help="Open nothing, only print where to look.")
@_UP
def view(file: str, out: str | None, port: int, no_browser: bool, up: Up | None) -> None:
    """Show a splat file in the browser, until Ctrl-C.

    The viewer (viser, 'diff2to3[view]') can be reached from this machine only. Without it, or with -o, the file becomes
    one page that works offline.
    """
    source = Path(file)
    if out is not None and Path(out).suffix.lower() != ".html":
        raise InputError(f"{out} is no page; expected a file name that ends in .html")
    if source.suffix.lower() != ".html" and out is None and importlib.util.find_spec("viser") is not None:
        _serve(source, port, no_browser, up)
        return
    if source.suffix.lower() == ".html":
        with _reading(source):
            page = source
    else:
        from diff2to3._asset import export

        gaussians = _load(source, up)
        if out is None:
            click.echo("diff2to3: viser is not installed (pip install 'diff2to3[view]'): an offline page", err=True)
        page = Path(out) if out else Path(tempfile.mkdtemp(prefix="diff2to3-")) / f"{source.stem}.html"
        with _writing(page):
            export(gaussians, page)
    click.echo(str(page))
    _open(page.resolve().as_uri(), no_browser)


def _serve(source: Path, port: int, no_browser: bool, up: Up | None) -> None:
    def announce(address: str) -> None:
        click.echo(address)
        click.echo("diff2to3: Ctrl-C ends the viewer", err=True)
        _open(address, no_browser)

    with _reading(source):
        import gs_render

        gs_render.view(source, port, up, announce=announce)


def _open(address: str, no_browser: bool) -> None:
    if not no_browser and not webbrowser.open(address):
        click.echo("diff2to3: no browser could be started; open the address above in one", err=True)


@click.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@_UP
def convert(source: str, target: str, up: Up | None) -> None:
    """Write the splat file IN in the format of OUT's suffix."""
    from diff2to3._plugins import EXPORTER, registry

    path = Path(target)
    if path.suffix:
        registry().find(EXPORTER, path.suffix[1:].lower())  # refuse an unknown type before the work of reading
    gaussians = _load(Path(source), up)
    from diff2to3._asset import export

    with _writing(path):
        export(gaussians, path)
    click.echo(f"{path}: {len(gaussians):,} Gaussians, {path.stat().st_size:,} bytes")
    keeps = _kept(path)
    if keeps:
        click.echo(f"kept: {keeps}")


@click.command()
@click.argument("path", metavar="FILE|DIR")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def info(path: str, as_json: bool) -> None:
    """Describe a splat file or a pipeline directory."""
    facts = _pipeline_facts(Path(path)) if Path(path).is_dir() else _splat_facts(Path(path))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        click.echo(f"{name}: {json.dumps(value) if isinstance(value, dict | list) else value}")


def _splat_facts(path: Path) -> dict[str, Any]:
    with _reading(path):
        import gs_render

        return gs_render.describe(path)


def _pipeline_facts(directory: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    from diff2to3._errors import PipelineFormatError
    from diff2to3._locate import file_sha256
    from diff2to3._store import read_config, weights_path

    config = read_config(directory)
    roles: dict[str, Any] = {}
    for role, component in config.roles.items():
        roles[role] = {"name": component.name}
        path = weights_path(directory, role)
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="np") as file:
                count = sum(_size(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise PipelineFormatError(f"{path} is damaged or truncated: {' '.join(str(error).split())}") from error
        roles[role] |= {"parameters": count, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return {
        "pipeline": config.name,
        "description": config.description,
        "frame": config.frame,
        "sampler": config.sampler.model_dump(mode="json"),
        "parameters": sum(role.get("parameters", 0) for role in roles.values()),
        "roles": roles,
    }


def _size(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _load(path: Path, up: Up | None = None) -> Gaussians:
    with _reading(path):
        import gs_render

        return gs_render.load(path, up=up)


def _kept(path: Path) -> str | None:
    """What the format of a written file keeps of Gaussians; None for a third party's."""
    import gs_render

    name = path.name.lower()
    known = [item for item in gs_render.FORMATS if name.endswith(item.suffix)]
    return max(known, key=lambda item: len(item.suffix)).keeps if known else None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the disk or the format refuses into an `InputError` that names the target."""
    try:
        with writing(path):
            yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong with the user's file into an `InputError` that names it."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a splat file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a splat file")
    try:
        yield
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        raise InputError(message if path.name in message else f"{path}: {message}") from error

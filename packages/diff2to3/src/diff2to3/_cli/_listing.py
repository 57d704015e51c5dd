"""``diff2to3 plugins`` and ``diff2to3 doctor``."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from diff2to3._plugins import registry

_PACKAGES = ("diff2to3", "marope", "smdit", "sparse-vae", "flux-features", "gs-render")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def plugins(as_json: bool) -> None:
    """List the components that can be chosen, by role; unusable ones with the reason."""
    rows = registry().table()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [("ROLE", "NAME", "DISTRIBUTION", "AVAILABLE")]
    table += [
        (row["role"] or "-", row["name"] or "-", _owner(row), "yes" if row["available"] else f"no: {row['reason']}")
        for row in rows
    ]
    _print_table(table)
    licences = [
        (f"{row['role']} {row['name']}", weights, licence)
        for row in rows
        for weights, licence in row.get("licence", {}).items()
    ]
    if licences:
        click.echo()
        _print_table([("COMPONENT", "WEIGHTS", "LICENCE"), *licences])


def _print_table(lines: Sequence[tuple[str, ...]]) -> None:
    """Columns aligned to the left; the last one is as long as it is."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    for line in lines:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def doctor(as_json: bool) -> None:
    """Say what works on this machine, and what does not and why."""
    report = _report()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for section, entries in report.items():
        click.echo(f"{section}:")
        for name, value in entries.items():
            click.echo(f"  {name}: {value}")


def _report() -> dict[str, dict[str, Any]]:
    broken = {f"{f.distribution} {f.version}": f.error for f in registry().failures}
    return {
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "torch": _torch_facts(),
        **{f"{kind} backends": found for kind, found in _backends().items()},
        "pipelines": _pipelines(),
        "plugins": {"loaded": len(registry().components), **broken},
    }


def _backends() -> dict[str, dict[str, str]]:
    import gs_render
    import sparse_vae

    found = {**gs_render.backend_report(), **sparse_vae.backend_report()}
    return {
        kind: {name: "available" if reason is None else f"no: {reason}" for name, reason in status.items()}
        for kind, status in found.items()
    }


def _torch_facts() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or "not built in",
    }
    if not torch.cuda.is_available():
        return {**facts, "device": "cpu only: no CUDA device is visible"}
    names = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return {**facts, **names}


def _pipelines() -> dict[str, str]:
    from diff2to3._errors import PipelineFormatError
    from diff2to3._locate import EMBEDDED, embedded_names
    from diff2to3._store import read_config, weights_path

    found = {}
    for name in embedded_names():
        try:
            config = read_config(EMBEDDED / name)
        except PipelineFormatError as error:
            found[name] = f"broken: {error}"
            continue
        sizes = [weights_path(EMBEDDED / name, role) for role in config.roles]
        total = sum(path.stat().st_size for path in sizes if path.is_file())
        found[name] = f"embedded, {total / 1e6:.1f} MB of weights"
    return found or {"none": "this installation has no embedded pipeline"}


def _owner(row: dict[str, Any]) -> str:
    return f"{row['distribution']} {row['version']}".strip()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed" if distribution not in sys.modules else "unknown"

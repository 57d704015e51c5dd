"""``diff2to3 plugins``, and tables for it and others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from diff2to3._plugins import registry


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
    print_table(table)
    licences = [
        (f"{row['role']} {row['name']}", weights, licence)
        for row in rows
        for weights, licence in row.get("licence", {}).items()
    ]
    if licences:
        click.echo()
        print_table([("COMPONENT", "WEIGHTS", "LICENCE"), *licences])


def print_table(lines: Sequence[tuple[str, ...]]) -> None:
    """Columns aligned to the left; the last one is as long as it is."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    for line in lines:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]))


def _owner(row: dict[str, Any]) -> str:
    return f"{row['distribution']} {row['version']}".strip()

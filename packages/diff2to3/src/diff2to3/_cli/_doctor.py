"""``diff2to3 doctor``."""

from __future__ import annotations

import json
from typing import Any

import click

from diff2to3._cli._listing import print_table


@click.command()
@click.option("--device", metavar="D", help="Where the self test runs.  [default: a GPU if there is one]")
@click.option("--no-test", is_flag=True, help="Leave the self test out.")
@click.option("--licenses", is_flag=True, help="List the licences of all that diff2to3 needs instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, device: str | None, no_test: bool, licenses: bool, as_json: bool) -> None:
    """Say what works on this machine, and what does not and why.

    The self test runs every part of the embedded pipeline shortly and compares with stored numbers; where one differs,
    the exit code is 1.
    """
    if licenses:
        _print_licenses(as_json)
        return
    from diff2to3._doctor import report

    found: dict[str, dict[str, Any]] = report()
    if not as_json:
        _print_sections(found)
    passed = True
    if not no_test:
        passed = _add_self_test(found, device, as_json)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    if not passed:
        ctx.exit(1)


def _add_self_test(found: dict[str, dict[str, Any]], device: str | None, as_json: bool) -> bool:
    from diff2to3._self_test import TOLERANCE, self_test

    if not as_json:
        click.echo("self test:")
    section = found["self test"] = {}
    passed = True
    for check in self_test(device):
        verdict = "ok" if check.passed else f"WRONG, more than {TOLERANCE}"
        section[check.name] = f"{verdict}: differs by {check.error:.1e} in {check.seconds:.2f} s"
        passed &= check.passed
        if not as_json:
            click.echo(f"  {check.name}: {section[check.name]}")
    return passed


def _print_sections(found: dict[str, dict[str, Any]]) -> None:
    for section, entries in found.items():
        click.echo(f"{section}:")
        for name, value in entries.items():
            click.echo(f"  {name}: {value}")


def _print_licenses(as_json: bool) -> None:
    from diff2to3._licenses import licenses

    rows = licenses()
    if as_json:
        click.echo(json.dumps([dict(zip(("name", "version", "license"), row, strict=True)) for row in rows], indent=2))
    else:
        print_table([("PACKAGE", "VERSION", "LICENCE"), *rows])

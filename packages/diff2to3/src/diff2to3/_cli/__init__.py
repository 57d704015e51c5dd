"""The command ``diff2to3``. Commands are imported when they run, so that ``--help`` costs no PyTorch."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from typing import TextIO

import click

import diff2to3
from diff2to3._cli._signals import hear_signals, ignore_signals
from diff2to3._errors import InputError

_COMMANDS = {
    "generate": ("diff2to3._cli._generate:generate", "Make 3D Gaussians from pictures."),
    "view": ("diff2to3._cli._files:view", "Show a splat file in the browser."),
    "app": ("diff2to3.app._cli:app", "Run the pipeline as a page in the browser and as an API."),
    "convert": ("diff2to3._cli._files:convert", "Write a splat file in another format."),
    "info": ("diff2to3._cli._files:info", "Describe a splat file or a pipeline directory."),
    "import-trellis": ("diff2to3._cli._trellis:import_trellis", "Make a pipeline of TRELLIS's published models."),
    "plugins": ("diff2to3._cli._listing:plugins", "List the components that can be chosen."),
    "doctor": ("diff2to3._cli._doctor:doctor", "Say what works on this machine, and what not and why."),
    "data": ("diff2to3.data._cli:data", "Prepare training data."),
    "train": ("diff2to3.train._cli:train", "Train the models."),
    "eval": ("diff2to3.eval._cli:evaluate", "Measure reconstruction and generation."),
}
_EXTRAS = {"app": "app", "data": "data", "train": "train", "eval": "eval"}


class _LazyGroup(click.Group):
    """A group that imports a command only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if cmd_name not in _EXTRAS:
                raise
            extra = _EXTRAS[cmd_name]
            raise click.UsageError(
                f"'diff2to3 {cmd_name}' needs the module {error.name}: pip install 'diff2to3[{extra}]'"
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(diff2to3.__version__, prog_name="diff2to3")
def cli() -> None:
    """One picture in, a 3D Gaussian splatting asset out.

    Exit codes: 0 done, 2 wrong usage or bad input, 1 a fault.
    """


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        hear_signals()
        speak_plainly()
        code = _run()
    except (click.Abort, KeyboardInterrupt):
        ignore_signals()
        click.echo("diff2to3: interrupted", err=True)
        code = 130
    finally:
        ignore_signals()
    sys.exit(code)


def _run() -> int:
    """Run the command line; its exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _fail(error.format_message())
    except InputError as error:
        return _fail(str(error))
    return code if isinstance(code, int) else 0


def speak_plainly() -> None:
    """What warns and what libraries note become single lines on stderr."""
    warnings.showwarning = _warn
    _show_log("gs_render")
    _show_log("flux_features")


def _fail(message: str) -> int:
    """One line on stderr; exit code 2."""
    click.echo(f"diff2to3: error: {' '.join(message.split())}", err=True)
    return 2


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own users' warnings in one line; those about code are for developers."""
    if issubclass(category, UserWarning):
        click.echo(f"diff2to3: warning: {' '.join(str(message).split())}", err=True)


class _Notes(logging.Handler):
    """What a library has to say about a wait, in one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"diff2to3: {record.getMessage()}", err=True)


def _show_log(name: str) -> None:
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.addHandler(_Notes())

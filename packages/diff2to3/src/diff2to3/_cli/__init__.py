"""The command ``diff2to3``. Commands are imported when they run, so that ``--help`` costs no PyTorch."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import signal
import sys
import warnings
from types import FrameType
from typing import TextIO

import click

import diff2to3
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
    hear_signals()
    speak_plainly()
    atexit.register(gc.freeze)  # the end of a process need not search PyTorch's modules for garbage: half a second
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except InputError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        click.echo("diff2to3: interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def hear_signals() -> None:
    """SIGTERM unwinds the stack, and it does as Ctrl-C does even where Python drops what a signal raises."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _raise_again


def speak_plainly() -> None:
    """What warns and what libraries note become single lines on stderr."""
    warnings.showwarning = _warn
    _show_log("gs_render")
    _show_log("flux_features")


def _fail(message: str) -> None:
    """One line on stderr, exit code 2."""
    click.echo(f"diff2to3: error: {' '.join(message.split())}", err=True)
    sys.exit(2)


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


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)  # unwinds the stack, so that half-written files are removed


def _raise_again(dropped: sys.UnraisableHookArgs) -> None:
    """A signal that comes inside a destructor or a callback (imports have many) would be lost: raise it after that."""
    end = dropped.exc_value
    if not isinstance(end, SystemExit | KeyboardInterrupt) or not hasattr(signal, "setitimer"):
        sys.__unraisablehook__(dropped)
        return

    def raise_end(signum: int, frame: FrameType | None) -> None:
        raise end

    signal.signal(signal.SIGALRM, raise_end)
    signal.setitimer(signal.ITIMER_REAL, 0.02)

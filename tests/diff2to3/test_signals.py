"""SIGINT and SIGTERM end a command with one exit code, in one line or none, at whatever moment they come."""

import functools
import os
import signal
import subprocess
import sys

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# a suite started in the background of a shell ignores SIGINT, and so would its children
HEAR_INTERRUPTS = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
MOMENTS = {
    "before the command": "cli.speak_plainly = lambda: end()\n",
    "in a callback": (  # Python drops what is raised there
        "class Held: pass\n"
        "def command(**options):\n"
        "    held = Held()\n"
        "    seen = weakref.ref(held, lambda _: end())\n"
        "    del held\n"
        "    time.sleep(20)\n"
    ),
    "in text that is executed": "def command(**options): exec('end()')\n",
    "in an import": (  # many of which catch all there is; PyTorch's callbacks in C++ abort
        "def command(**options):\n    import swallowing\n    assert swallowing.whole\n    time.sleep(20)\n"
    ),
    "twice": ("def command(**options):\n    try:\n        end()\n    finally:\n        end()\n"),
    "when it was heard": (
        "echo = cli.click.echo\ncli.click.echo = lambda *a, **k: (end(), echo(*a, **k))\ncommand = end\n"
    ),
}


def dying(folder, how, code):
    """`code` as ``python -m`` with a function end() that sends a signal to itself; what it left behind."""
    head = (
        "import atexit, os, sys, time, weakref, diff2to3._cli as cli\n"
        f"def end(**options): os.kill(os.getpid(), {int(how)}), time.sleep(0.1)\n"
        "command = cli.cli.main\n"
    )
    (folder / "dying.py").write_text(f"{head}{code}\ncli.cli.main = command\ncli.main()")
    (folder / "swallowing.py").write_text(
        "from __main__ import end\ntry:\n    end()\nexcept BaseException:\n    pass\nelse:\n    whole = True\n"
    )
    command, environment = [sys.executable, "-m", "dying"], {**ENVIRONMENT, "PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=HEAR_INTERRUPTS)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_heard_at_any_moment(tmp_path, moment):
    result = dying(tmp_path, signal.SIGINT, MOMENTS[moment])
    assert result.returncode == 130, result.stderr
    assert result.stderr.strip() == "diff2to3: interrupted"


@pytest.mark.parametrize("moment", ["in a callback", "in text that is executed", "in an import", "twice"])
def test_sigterm_is_heard_at_any_moment(tmp_path, moment):
    result = dying(tmp_path, signal.SIGTERM, MOMENTS[moment])
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert result.stderr == ""


def test_ctrl_c_after_the_work_changes_nothing(tmp_path):
    """While Python closes down, which it says nothing about."""
    result = dying(tmp_path, signal.SIGINT, "command = lambda **options: atexit.register(end)\n")
    assert (result.returncode, result.stderr) == (0, "")

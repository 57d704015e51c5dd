"""Importing does nothing that can be observed, and optional parts stay optional."""

import subprocess
import sys

CODE = """
import os, sys
before = dict(os.environ)
import gs_render
assert dict(os.environ) == before
for name in ("numba", "av", "gsplat", "viser", "zstandard", "diff2to3"):
    assert name not in sys.modules, name
import torch
assert not torch.cuda.is_initialized()
gs_render.backend_report()
assert "numba" not in sys.modules
"""


def test_import_is_silent_and_light():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""

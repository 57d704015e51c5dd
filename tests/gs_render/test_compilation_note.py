"""The first render of an installation waits for the compiler, and says so once."""

import os
import subprocess
import sys

PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
import numpy as np
from gs_render._backends import cpu
for dtype in (np.int32, np.int64):  # two compilations, one note
    ids = cpu._kernels().sort_by_depth(np.array([2, 1], np.float32), np.arange(2, dtype=dtype))
    assert ids.tolist() == [1, 0]
"""


def test_note_comes_with_a_cold_cache_only(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    notes = []
    for _ in ("cold", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=200
        )
        notes.append(done.stderr.splitlines())
    assert len(notes[0]) == 1
    assert "gs_render" in notes[0][0]
    assert "compiling the CPU renderer" in notes[0][0]
    assert notes[1] == []

"""The first render of an installation waits for the compiler, and says so once."""

import os
import subprocess
import sys

import pytest

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


def test_without_any_writable_folder_it_compiles_in_memory(monkeypatch, caplog):
    """numba itself raises RuntimeError: a read-only installation, and a user without a home."""
    caching = pytest.importorskip("numba.core.caching")
    from gs_render._backends import _compile

    def no_folder(self, function):
        raise RuntimeError(f"cannot cache function {function.__name__!r}: no locator available for file '...'")

    monkeypatch.setattr(caching.CacheImpl, "__init__", no_folder)
    _compile._say_uncached.cache_clear()
    with caplog.at_level("INFO", "gs_render"):
        functions = [_compile.compiled(nogil=True)(lambda x: x + 1) for _ in range(2)]
    assert [function(2) for function in functions] == [3, 3]
    assert [record.message[:40] for record in caplog.records] == ["no folder for compiled code can be writt"]

"""Running one stage over many objects: resumable, in worker processes, with failures recorded instead of raised.

Where the work is done is an engine's matter (``diff2to3._engines``). Files and the manifest are written by this process
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import numpy as np

from diff2to3._engines import Workers, outcomes
from diff2to3._progress import track
from diff2to3.data._store import Store

Tensors = Mapping[str, np.ndarray]


def run_stage(
    store: Store,
    stage: str,
    ids: list[str],
    work: Callable[[str], Tensors],
    settings: Mapping[str, Any],
    workers: Workers | None = None,
) -> dict[str, str]:
    """Runs ``work(object id) -> tensors`` for every object that lacks this stage; a failure is recorded, not fatal.

    An object whose file was made with the same ``settings`` is left alone, so a run that was stopped goes on where it
    was, and a finished one does nothing.

    Returns:
        Reason per failed object; it also stands in the stage's manifest.
    """
    workers = workers or Workers()
    done = store.finished(stage, settings, ids)
    todo = [i for i in dict.fromkeys(ids) if i not in done]
    failures: dict[str, str] = {}
    with closing(outcomes(work, todo, workers)) as found:
        for object_id, outcome in track(found, stage, total=len(todo)):
            try:
                tensors = outcome()
            except (ValueError, RuntimeError) as error:
                failures[object_id] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            else:
                done[object_id] = store.write(stage, object_id, tensors, settings)
    store.write_manifest(stage, settings, done, failures)
    return failures

"""Where work on many items is done: in this process, in processes of this machine, or on a Ray cluster.

A worker has one item under way. When it dies another takes its place and the item is tried again, up to three times in
all; the others go on. So no item is lost, and none comes twice. How items are dealt out is in `_spread`; `_local` and
`_ray` know how to start a worker, ask it and end it.
"""

from diff2to3._engines._spread import Outcome, Workers, outcomes, using_engine

__all__ = ["Outcome", "Workers", "outcomes", "using_engine"]

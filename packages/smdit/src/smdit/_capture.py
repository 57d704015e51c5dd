"""A model's forward recorded as a CUDA graph, so that sampling steps cost the device's time and not Python's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparse_vae import SparseTensor, Topology
from torch import Tensor, nn

from smdit._blocks import DoubleStreamBlock, SingleStreamBlock
from smdit._cross_blocks import CrossBlock
from smdit._flow import Velocity, _features, _replace


def can_capture(model: object, device: torch.device) -> bool:
    """Whether to record `model` on `device`.

    A model says by an attribute `capturable = True` that its forward does nothing but launch work on the device that
    depends on its arguments' shapes and topology alone, once it has seen that topology. Autocast keeps copies of
    weights that a recording would not refresh, so under autocast nothing is recorded.
    """
    return device.type == "cuda" and getattr(model, "capturable", False) and not torch.is_autocast_enabled("cuda")


def compile_blocks(model: nn.Module, *, cpp_wrapper: bool = False) -> None:
    """Let PyTorch compile every transformer block of a model, in place.

    It is meant for training, where nothing is recorded; sampling steps are recorded anyway (`EulerSampler.capture`) and
    gain nothing. `benchmarks/smdit.py` has figures of both.

    Args:
        model: whose blocks are compiled.
        cpp_wrapper: launch the kernels from C++ instead of Python (Inductor's option of that name): half the host's
            time in a training step, against a first step of a minute or two instead of half a minute. Under autocast
            PyTorch 2.11 cannot build the backward this way; train with `MasterWeights`.

    The first forward with another number of tokens compiles once more; after that any number goes.
    """
    options = {"cpp_wrapper": True} if cpp_wrapper else None
    for module in model.modules():
        if isinstance(module, DoubleStreamBlock | SingleStreamBlock | CrossBlock):
            module.compile(options=options)


@dataclass(frozen=True, eq=False)
class _Recording:
    graph: torch.cuda.CUDAGraph
    x: Tensor | SparseTensor
    t: Tensor
    condition: Tensor
    out: Tensor | SparseTensor


class CapturedVelocity:
    """`model(x, t, condition)`, from the second call on by replaying a recording of it.

    There is one recording for every topology and shapes of the arguments. Recordings and their memory live as long as
    this object, which a sampling run makes for itself. Weights must not change in between.
    """

    def __init__(self, model: Velocity) -> None:
        self.model = model
        self._recordings: dict[tuple, _Recording | None] = {}

    def __call__(self, x: Tensor | SparseTensor, t: Tensor, condition: Tensor) -> Tensor | SparseTensor:
        topology: Topology | None = x.topology if isinstance(x, SparseTensor) else None
        features = _features(x)
        # Topologies compare by identity; the key keeps them alive, so that no other can take the place of one.
        key = (topology, features.shape, features.dtype, condition.shape, condition.dtype)
        if key not in self._recordings:
            # The first call runs as ever: it builds kernels, tables and workspaces, which a recording cannot.
            self._recordings[key] = None
            return self.model(x, t, condition)
        recording = self._recordings[key]
        if recording is None:
            recording = self._recordings[key] = self._record(x, t, condition)
        _features(recording.x).copy_(features)
        recording.t.copy_(t)
        recording.condition.copy_(condition)
        recording.graph.replay()
        return _replace(x, _features(recording.out).clone())

    def _record(self, x: Tensor | SparseTensor, t: Tensor, condition: Tensor) -> _Recording:
        x, t, condition = _replace(x, _features(x).clone()), t.clone(), condition.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.model(x, t, condition)
        return _Recording(graph, x, t, condition, out)

"""A model is no larger than the file of its weights, whatever its config asks for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _gs_render_reading import why_unreadable
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diff2to3._errors import PipelineFormatError


class TooManyParametersError(PipelineFormatError):
    """A config asks for a model that the weights beside it cannot fill."""


@contextmanager
def no_larger_than(weights: Path) -> Iterator[None]:
    """Models built in this block may have as many parameters as a safetensors file has bytes.

    A number takes a byte at least. Layers announce a parameter before they fill it, so what is refused was asked of
    the system and never touched.

    Raises:
        PipelineFormatError: the file is damaged or a pickle.
        TooManyParametersError: from inside the block, when a parameter passes the limit.
    """
    try:
        with safe_open(weights, framework="pt"):  # compares the header with the size
            limit = weights.stat().st_size
    except (SafetensorError, OSError) as error:
        raise PipelineFormatError(why_unreadable(weights, error)) from error
    thread, total = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal total
        if parameter is None or threading.get_ident() != thread:
            return
        total += parameter.numel()
        if total > limit:
            raise TooManyParametersError(
                f"{weights} has {limit:,} bytes, but the config asks for a model of more than {total - 1:,} parameters"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()

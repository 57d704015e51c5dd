"""What is said when a device runs out of memory, or a component gives numbers that are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3._errors import DeviceMemoryError, NonFiniteError


def device_memory_error(device: torch.device, what: str, error: Exception, ways: Sequence[str]) -> DeviceMemoryError:
    """The error for work that does not fit into a device's memory, with what to lower."""
    said = ". ".join(" ".join(str(error).split()).rstrip(".").split(". ")[:2])
    return DeviceMemoryError(f"{device} has too little memory for {what} ({said}); try {', '.join(ways)}")


def check_finite(role: str, component: Any, *values: Tensor) -> None:
    """Refuse what a component gave if it is not finite.

    Raises:
        NonFiniteError: with the component's first tensor that is not finite either, or that none is.
    """
    if not all(bool(torch.isfinite(value).all()) for value in values):
        if not (broken := broken_tensors(component)):
            raise NonFiniteError(
                f"the {role} gave NaN or infinite numbers, though its weights are finite: the dtype may be too narrow "
                "for it; try bfloat16 or float32"
            )
        check_weights(role, broken)


def check_weights(role: str, broken: Sequence[str]) -> None:
    """Refuse a component with broken tensors, by the name of the first."""
    if broken:
        raise NonFiniteError(
            f"{len(broken)} tensors of the {role} hold NaN or infinite numbers, the first: {broken[0]}"
        )


def broken_tensors(component: Any) -> list[str]:
    """Names of a component's parameters and buffers that are not finite."""
    state = component.state_dict().items() if isinstance(component, nn.Module) else ()
    return [name for name, value in state if value.is_floating_point() and not bool(value.isfinite().all())]

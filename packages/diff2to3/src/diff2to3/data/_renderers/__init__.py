"""Components of the role ``mesh_renderer``: pictures of meshes by OpenGL, by numba, by Blender."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diff2to3._errors import ComponentError, ComponentNotFoundError
from diff2to3._plugins import MESH_RENDERER, MeshRenderer, build

AUTO = "auto"
#: What `auto` tries, in this order. Without a GPU, numba draws faster than OpenGL does.
_PREFERRED: tuple[tuple[str, dict[str, Any]], ...] = (("gl", {"software": False}), ("cpu", {}))


def choose_renderer() -> tuple[str, str]:
    """Name of the first of `gl` (on a GPU) and `cpu` that works here, and why those before it do not.

    Raises:
        ComponentError: none works; the message has every reason.
    """
    reasons: list[str] = []
    for name, config in _PREFERRED:
        try:
            build(MESH_RENDERER, name, config).close()
        except (ComponentError, ComponentNotFoundError) as error:
            reasons.append(str(error))
        else:
            return name, "; ".join(reasons)
    raise ComponentError(f"no mesh renderer works here: {'; '.join(reasons)}")


def open_renderer(name: str = AUTO, config: Mapping[str, Any] | None = None) -> MeshRenderer:
    """A renderer by name, ``"auto"`` for the one that :func:`choose_renderer` names.

    Raises:
        InputError: it is not installed, does not work here, or refuses its config.
    """
    return build(MESH_RENDERER, choose_renderer()[0] if name == AUTO else name, config)

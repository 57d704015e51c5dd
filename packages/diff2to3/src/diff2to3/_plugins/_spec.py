"""What a plugin announces: component specs, through one pluggy hook. Imports no component and no PyTorch."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

import pluggy

#: Version of the component contract. A spec that announces another one is refused.
API_VERSION = 1
#: Entry-point group and pluggy project name.
GROUP = "diff2to3"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """One component that a distribution offers, named without importing it.

    Args:
        role: name of the role it plays, for example ``"feature_extractor"``.
        name: name that users select it by: lower-case letters, digits, ``.``, ``_`` and ``-``.
        target: ``"package.module:Attribute"``, the class of the component (for the roles ``exporter`` and ``metric``
            the function itself).
        config: ``"package.module:Config"``, the pydantic model (frozen, extra=forbid) that the class takes as its only
            argument; None when the class takes no argument.
        api: version of the component contract it was written for.
        requires: import names of optional modules that it cannot run without; it is listed as unavailable then.
        check: ``"module:function"`` of a light function that takes nothing and says why the component cannot run on
            this machine (a system library, a driver), or None; it may stand in the manifest. Called when components are
            listed or selected.
        install: what ``pip install`` adds those, for example ``"diff2to3[matting]"``; shown to the user.
        weights: ``"pipeline"`` when its parameters come from the pipeline's directory, ``"own"`` when it finds them
            itself. A component of the first kind is refused where the directory has none for it: it would be random.
        licence: pairs of published weights that it runs with and their licence; listed by ``diff2to3 plugins``.

    Raises:
        ValueError: a field is malformed. Whether the role exists is checked by the loader.
    """

    role: str
    name: str
    target: str
    config: str | None = None
    api: int = API_VERSION
    requires: tuple[str, ...] = ()
    check: str | None = None
    install: str = ""
    weights: Literal["pipeline", "own"] = "pipeline"
    licence: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            optional = (str, type(None))
            expected = {"config": optional, "check": optional, "api": int, "requires": tuple, "licence": tuple}.get(
                field.name, str
            )
            if not isinstance(value, expected):  # type: ignore[arg-type]
                raise ValueError(f"ComponentSpec.{field.name}: got {value!r} of type {type(value).__name__}")
        for pair in self.licence:
            if not isinstance(pair, tuple) or [type(text) for text in pair] != [str, str] or not all(pair):
                raise ValueError(f"ComponentSpec.licence: got {pair!r}, expected pairs (weights, licence)")
        if self.weights not in ("pipeline", "own"):
            raise ValueError(f"ComponentSpec.weights: got {self.weights!r}, expected 'pipeline' or 'own'")
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"ComponentSpec.name: got {self.name!r}, expected lower-case letters, digits, '.', '_' or '-'"
            )
        for label, target in (("target", self.target), ("config", self.config), ("check", self.check)):
            if target is not None and not _TARGET.fullmatch(target):
                raise ValueError(f"ComponentSpec.{label}: got {target!r}, expected 'package.module:Attribute'")


class Hooks:
    """The one hook of diff2to3."""

    @hookspec
    def diff2to3_components(self) -> list[ComponentSpec]:
        """Announce the components of this distribution.

        Called once, when plugins are first needed. It must be cheap: name targets as strings, import nothing heavy.
        """
        raise NotImplementedError

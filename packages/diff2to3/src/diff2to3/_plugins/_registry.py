"""Finding components: pluggy announces them, this registry selects one by role and name.

Nothing here imports a component: that happens in `Registry.build`, for the selected one only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from diff2to3._errors import ComponentNotFoundError, DuplicateComponentError
from diff2to3._plugins._roles import ROLES, Role
from diff2to3._plugins._spec import API_VERSION, GROUP, ComponentSpec, Hooks

#: Distribution name of components registered with `diff2to3.register`.
IN_PROCESS = "in-process"


@dataclass(frozen=True, kw_only=True)
class Component:
    """An announced component and who announced it.

    `provided` is the object given to `diff2to3.register`; None for components of installed distributions.
    """

    spec: ComponentSpec
    distribution: str
    version: str
    provided: Any = None
    provided_config: Any = None

    @property
    def label(self) -> str:
        return f"{self.spec.name} ({self.distribution} {self.version})".replace(" )", ")")

    def unavailable_reason(self) -> str | None:
        """Why it cannot be used here, judged without importing it; None when nothing speaks against it."""
        if self.provided is not None:
            return None
        modules = [self.spec.target.split(":")[0], *self.spec.requires]
        missing = [module for module in modules if not _is_installed(module)]
        advice = f": pip install '{self.spec.install}'" if self.spec.install else ""
        reasons = [f"needs the module {', '.join(missing)}{advice}"] if missing else []
        if (reason := self._checked()) is not None:
            reasons.append(reason)
        return "; ".join(reasons) or None

    def _checked(self) -> str | None:
        if self.spec.check is None:
            return None
        module, _, attribute = self.spec.check.partition(":")
        try:
            reason = getattr(importlib.import_module(module), attribute)()
        except Exception as error:  # a third party's check must not break the listing
            return f"its check {self.spec.check} failed: {type(error).__name__}: {_one_line(error)}"
        return None if reason is None else str(reason)

    def as_dict(self) -> dict[str, Any]:
        """The row that ``diff2to3 plugins --json`` prints; ``licence`` only where published weights have one."""
        reason = self.unavailable_reason()
        row = {
            "role": self.spec.role,
            "name": self.spec.name,
            "distribution": self.distribution,
            "version": self.version,
            "target": self.spec.target,
            "available": reason is None,
            "reason": reason,
        }
        return row | ({"licence": dict(self.spec.licence)} if self.spec.licence else {})


@dataclass(frozen=True)
class Failure:
    """A distribution whose plugin could not be loaded, and why."""

    distribution: str
    version: str
    entry_point: str
    error: str

    @property
    def label(self) -> str:
        return f"{self.distribution} {self.version} ({self.error})"


class Registry:
    """Components by role and name.

    Args:
        plugins: entry points to load. A broken one does not disturb the others: it is kept in `failures`.
    """

    def __init__(self, plugins: Iterable[EntryPoint] = ()) -> None:
        self.components: list[Component] = []
        self.failures: list[Failure] = []
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(Hooks)
        for entry_point in plugins:
            self._load(entry_point)

    def register(self, component: Any, *, role: str, name: str, config: Any = None) -> None:
        """Offer an object or class of this process under a name; see `diff2to3.register`."""
        _role(role)
        kind = component if hasattr(component, "__qualname__") else type(component)
        attribute = kind.__qualname__.rpartition(".")[2]
        target = f"{kind.__module__}:{attribute if attribute.isidentifier() else 'component'}"
        spec = ComponentSpec(role=role, name=name, target=target, weights="own")
        new = Component(spec=spec, distribution=IN_PROCESS, version="", provided=component, provided_config=config)
        # A notebook cell that runs twice registers twice: the newer one counts.
        self.components = [c for c in self.components if not _same_slot(c, new)] + [new]

    def find(self, role: Role[Any] | str, name: str) -> Component:
        """The component selected by ``"name"`` or ``"distribution:name"``.

        Raises:
            ComponentNotFoundError: none of that name, or it lacks an optional module.
            DuplicateComponentError: several distributions announce the name, and none was chosen.
        """
        role_name = role if isinstance(role, str) else role.name
        distribution, _, bare = name.rpartition(":")
        found = [
            c
            for c in self.components
            if c.spec.role == role_name
            and c.spec.name == bare
            and (not distribution or _normal(c.distribution) == _normal(distribution))
        ]
        if not found:
            raise ComponentNotFoundError(self._not_found(role_name, name))
        if len(found) > 1:
            owners = " and ".join(f"{c.distribution} {c.version}".strip() for c in found)
            choices = " or ".join(repr(f"{c.distribution}:{bare}") for c in found)
            raise DuplicateComponentError(f"{role_name} {bare!r} is announced by {owners}: choose {choices}")
        if (reason := found[0].unavailable_reason()) is not None:
            raise ComponentNotFoundError(f"{role_name} {name!r} of {found[0].distribution} is not available: {reason}")
        return found[0]

    def table(self) -> list[dict[str, Any]]:
        """Every announced component, then every plugin that failed to load, as rows of ``diff2to3 plugins --json``."""
        order = list(ROLES)
        rows = [c.as_dict() for c in self.components]
        rows.sort(key=lambda row: (order.index(row["role"]), row["name"], row["distribution"]))
        return rows + [
            {
                "role": None,
                "name": None,
                "distribution": f.distribution,
                "version": f.version,
                "target": f.entry_point,
                "available": False,
                "reason": f"failed to load: {f.error}",
            }
            for f in self.failures
        ]

    def _load(self, entry_point: EntryPoint) -> None:
        distribution = entry_point.dist.name if entry_point.dist else entry_point.name
        version = entry_point.dist.version if entry_point.dist else ""
        module = None
        try:
            module = entry_point.load()
            self._manager.register(module, name=f"{distribution}:{entry_point.name}")
            self._manager.check_pending()
            specs = self._announced(module)
        except (Exception, SystemExit) as error:  # whatever a third party's module does must not break the others
            if module is not None and self._manager.is_registered(module):
                self._manager.unregister(module)
            reason = f"{type(error).__name__}: {_one_line(error)}"
            self.failures.append(Failure(distribution, version, entry_point.value, reason))
        else:
            self.components += [Component(spec=s, distribution=distribution, version=version) for s in specs]

    def _announced(self, plugin: object) -> list[ComponentSpec]:
        """What one plugin's hook returns, checked."""
        implementations = [i for i in self._manager.hook.diff2to3_components.get_hookimpls() if i.plugin is plugin]
        if not implementations:
            raise TypeError("it has no function diff2to3_components marked with diff2to3.hookimpl")
        specs = implementations[0].function()
        if not isinstance(specs, list) or not all(isinstance(spec, ComponentSpec) for spec in specs):
            raise TypeError(f"diff2to3_components() must return a list of ComponentSpec, got {specs!r}")
        for spec in specs:
            _role(spec.role)
            if spec.api != API_VERSION:
                raise ValueError(f"{spec.role} {spec.name!r} is for api {spec.api}, this diff2to3 has {API_VERSION}")
        slots = [(spec.role, spec.name) for spec in specs]
        if twice := sorted({slot for slot in slots if slots.count(slot) > 1}):
            raise ValueError(f"announced twice: {twice}")
        return specs

    def _not_found(self, role: str, name: str) -> str:
        same_role = [c for c in self.components if c.spec.role == role]
        usable = sorted(c.label for c in same_role if c.unavailable_reason() is None)
        parts = [f"no {role} named {name!r}; available: {', '.join(usable) or 'none'}"]
        lacking = sorted(f"{c.label} {reason}" for c in same_role if (reason := c.unavailable_reason()))
        if lacking:
            parts.append(f"not usable here: {', '.join(lacking)}")
        if self.failures:
            parts.append(f"failed to load: {', '.join(f.label for f in self.failures)}")
        parts.append("install a package that provides it, then look with 'diff2to3 plugins'")
        return "; ".join(parts)


@functools.cache
def registry() -> Registry:
    """The registry of this process: installed plugins, loaded once, and what `diff2to3.register` added."""
    return Registry(sorted(entry_points(group=GROUP), key=lambda e: (e.dist.name if e.dist else "", e.name)))


def _role(name: str) -> Role[Any]:
    if name not in ROLES:
        raise ValueError(f"unknown role {name!r}, expected one of {', '.join(ROLES)}")
    return ROLES[name]


def _same_slot(a: Component, b: Component) -> bool:
    return (a.spec.role, a.spec.name, a.distribution) == (b.spec.role, b.spec.name, b.distribution)


def _is_installed(module: str) -> bool:
    # Only the top-level package: looking for a submodule would import its parents.
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"

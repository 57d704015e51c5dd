"""From a name and a config to a working component."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from diff2to3._errors import ComponentError, ComponentNotFoundError
from diff2to3._plugins._registry import Component, Registry, registry
from diff2to3._plugins._roles import ROLES, Role

T = TypeVar("T")


def build(role: Role[T], name: str, config: Mapping[str, Any] | None = None, *, source: Registry | None = None) -> T:
    """Import and build the component that plays a role under a name.

    Args:
        role: one of the roles of `diff2to3.plugins`.
        name: ``"name"`` or ``"distribution:name"``.
        config: fields of the component's config model; validated by that model. None means its defaults.
        source: registry to look in; None is the one of this process.

    Raises:
        ComponentNotFoundError, DuplicateComponentError: see `Registry.find`.
        ComponentError: it cannot be imported, its config is refused, or it lacks what the role asks for.
    """
    component = (source or registry()).find(role, name)
    target = load_target(component)
    if role.is_function or not isinstance(target, type):
        built = target
    else:
        model = load_config_model(component)
        arguments = () if model is None else (validate_config(component, model, config),)
        if model is None and config:
            raise ComponentError(f"{role.name} {name!r} takes no config, got {sorted(config)}")
        try:
            built = target(*arguments)
        except Exception as error:
            raise ComponentError(f"{role.name} {name!r} could not be built: {_describe(error)}") from error
    return check(role, built, name)


def check(role: Role[T], component: Any, name: str) -> T:
    """The component itself, after checking that it has what its role asks for."""
    if missing := role.missing(component):
        kind = type(component).__qualname__
        raise ComponentError(f"{kind} cannot be the {role.name} {name!r}: it lacks {', '.join(missing)}")
    return component


def load_target(component: Component) -> Any:
    """The class, function or object behind a component."""
    return component.provided if component.provided is not None else _load(component, component.spec.target)


def load_config_model(component: Component) -> Any:
    """The pydantic model of a component's config, or None when it takes none."""
    if component.provided is not None:
        return component.provided_config
    return None if component.spec.config is None else _load(component, component.spec.config)


def validate_config(component: Component, model: Any, config: Mapping[str, Any] | None) -> Any:
    """An instance of the config model, with refusals worded for people."""
    from pydantic import ValidationError

    try:
        return model.model_validate(dict(config or {}))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']} (got {_short(e['input'])})" for e in error.errors()
        )
        raise ComponentError(f"config of {component.spec.role} {component.spec.name!r}: {problems}") from error


def _load(component: Component, target: str) -> Any:
    module, _, attribute = target.partition(":")
    where = f"{component.spec.role} {component.spec.name!r} of {component.distribution} {component.version}"
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        advice = f": pip install '{component.spec.install}'" if component.spec.install else ""
        raise ComponentNotFoundError(f"{where} needs the module {error.name!r}{advice}") from error
    except Exception as error:
        raise ComponentError(f"{where}: cannot import {target!r}: {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def register(component: Any, *, role: str, name: str, config: Any = None) -> None:
    """Offer a component of this process under a name, without packaging it.

    Args:
        component: an object, used as it is; or a class, built anew for each pipeline; for the roles ``exporter`` and
            ``metric`` a function.
        role: name of a role, for example ``"feature_extractor"``.
        name: the name to select it by. Registering a name again replaces the earlier component.
        config: pydantic model that the class takes as its only argument; None when it takes none.

    Raises:
        ValueError: unknown role or malformed name.
        ComponentError: an object that lacks what the role asks for.
    """
    if role in ROLES and not isinstance(component, type):
        check(ROLES[role], component, name)
    registry().register(component, role=role, name=name, config=config)

"""Building the components of a pipeline directory, and checking that they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _gs_render_reading import why_missing
from torch import nn

from diff2to3._errors import ComponentError, PipelineFormatError
from diff2to3._parameter_limit import TooManyParametersError, no_larger_than
from diff2to3._pipeline_config import ComponentConfig, PipelineConfig
from diff2to3._plugins import (
    FEATURE_EXTRACTOR,
    PIPELINE_ROLES,
    Role,
    build,
    check,
    load_config_model,
    registry,
    validate_config,
)
from diff2to3._store import load_weights, weights_path


@dataclass(frozen=True)
class Assembly:
    """Built components by role, the config that describes them, and the SHA-256 of each weights file among them."""

    config: PipelineConfig
    components: dict[str, Any]
    weight_hashes: dict[str, str]


def assemble(directory: Path, config: PipelineConfig, overrides: Mapping[str, Any]) -> Assembly:
    """Build the components of a pipeline and load their weights.

    Args:
        directory: where the weights are.
        config: the directory's config.
        overrides: role -> name or object that replaces the directory's component; None keeps it.
    """
    components: dict[str, Any] = {}
    chosen: dict[str, ComponentConfig] = {}
    hashes: dict[str, str] = {}
    for role in PIPELINE_ROLES:
        override, own = overrides.get(role.name), config.roles[role.name]
        if override is None or (isinstance(override, str) and _is_same(role, override, own.name)):
            components[role.name], sha256 = from_directory(role, config, directory)
            chosen[role.name] = own
            if sha256 is not None:
                hashes[role.name] = sha256
        elif isinstance(override, str):
            replacement = ComponentConfig(name=override, config=_shared_settings(role, override, own))
            components[role.name], chosen[role.name] = from_plugin(role, replacement), replacement
        else:
            kind = type(override)
            name = f"{kind.__module__}.{kind.__qualname__}"
            components[role.name], chosen[role.name] = check(role, override, name), ComponentConfig(name=name)
    return Assembly(config.model_copy(update={"roles": chosen, "weights": {}}), components, hashes)


def check_fit(components: Mapping[str, Any]) -> dict[str, Any]:
    """The components by role, after checking that each plays its role and that their channels and grids agree.

    Raises:
        ComponentError: what does not fit, with both numbers.
    """
    expected = [role.name for role in PIPELINE_ROLES]
    if sorted(components) != sorted(expected):
        raise ComponentError(f"got components for {sorted(components)}; expected one for each of {expected}")
    checked = {role.name: check(role, components[role.name], role.name) for role in PIPELINE_ROLES}
    extractor, structure, backbone = checked["feature_extractor"], checked["structure"], checked["backbone"].config
    channels = _token_channels(extractor)
    for role, wanted in (("structure", structure.condition_channels), ("backbone", backbone.condition_channels)):
        if wanted != channels:
            raise ComponentError(
                f"the feature extractor {type(extractor).__name__} gives tokens of {channels} channels, but the {role} "
                f"{type(checked[role]).__name__} was made for {wanted}; use the one it was trained with"
            )
    check_models_fit(structure, backbone, checked["latent_decoder"].config)
    return checked


def check_models_fit(structure: Any, backbone: Any, decoder: Any) -> None:
    """Raise a `ComponentError` where stage 1, stage 2's config and the latent decoder's do not fit together."""
    for what, left, right in (
        ("condition channels: structure and backbone", structure.condition_channels, backbone.condition_channels),
        ("grid size: structure and backbone", structure.grid_size, backbone.grid_size),
        ("grid size: backbone and latent decoder", backbone.grid_size, decoder.grid_size),
        ("latent channels: backbone and latent decoder", backbone.latent_channels, decoder.latent_channels),
    ):
        if left != right:
            raise ComponentError(f"{what} do not fit together: {left} and {right}")


def from_directory(role: Role[Any], config: PipelineConfig, directory: Path) -> tuple[Any, str | None]:
    """The component of a pipeline directory that plays a role, with its weights, and the SHA-256 of their file."""
    own, sha256 = config.roles[role.name], None
    path = weights_path(directory, role.name)
    has_weights = registry().find(role, own.name).spec.weights == "pipeline"
    try:
        with no_larger_than(path) if has_weights and path.is_file() else nullcontext():
            component = _build_quietly(role, own)
    except ComponentError as error:
        if isinstance(error.__cause__, TooManyParametersError):
            raise error.__cause__ from None
        raise
    if path.is_file():
        if not isinstance(component, nn.Module):
            raise PipelineFormatError(f"{path}: the {role.name} {own.name!r} takes no weights")
        sha256 = load_weights(component, path, config)
    elif _needs_weights(role, own.name, component):
        reason = why_missing(path) or f"{path}: no such file"
        raise PipelineFormatError(f"{reason}; the {role.name} {own.name!r} needs its weights")
    return component, sha256


def from_plugin(role: Role[Any], replacement: ComponentConfig) -> Any:
    """A component that a pipeline directory has no weights for; refused where it needs some."""
    component = _build_quietly(role, replacement)
    if _needs_weights(role, replacement.name, component):
        raise ComponentError(
            f"the {role.name} {replacement.name!r} has no weights of its own, and this pipeline has none for it; "
            "give a pipeline directory that contains it, or pass a loaded object to Pipeline.from_pretrained"
        )
    return component


def _is_same(role: Role[Any], override: str, own: str) -> bool:
    """Whether two names, possibly with and without the distribution, select the same component."""
    return override == own or registry().find(role, override) == registry().find(role, own)


def _build_quietly(role: Role[Any], choice: ComponentConfig) -> Any:
    # Layers draw their initial weights from the global generator; loading a pipeline must leave it as it was.
    with torch.random.fork_rng(devices=[]):
        return build(role, choice.name, choice.config)


def _needs_weights(role: Role[Any], name: str, component: Any) -> bool:
    has_state = isinstance(component, nn.Module) and bool(component.state_dict())
    return has_state and registry().find(role, name).spec.weights == "pipeline"


def _shared_settings(role: Role[Any], name: str, own: ComponentConfig) -> dict[str, Any]:
    """What a replacement takes over from the pipeline's own component.

    All settings when both take the same kind of config; of feature extractors at least the size of the condition image,
    because the other models know the token grid that it makes.
    """
    replaced = registry().find(role, own.name)
    model, own_model = load_config_model(registry().find(role, name)), load_config_model(replaced)
    if model is None or own_model is None:
        return {}
    if model is own_model:
        return dict(own.config)
    if role is FEATURE_EXTRACTOR and "image_size" in model.model_fields and "image_size" in own_model.model_fields:
        return {"image_size": validate_config(replaced, own_model, own.config).image_size}
    return {}


def _token_channels(extractor: Any) -> int:
    """Channels of the condition tokens, found by tokenising a feature map of zeros of the right size."""
    side = extractor.image_size // extractor.stride
    own = next(iter(extractor.parameters()), None) if isinstance(extractor, nn.Module) else None
    feature_map = torch.zeros(1, extractor.channels, side, side)
    with torch.no_grad():
        tokens = extractor.tokens(feature_map if own is None else feature_map.to(own))
    if tokens.ndim != 4:
        raise ComponentError(
            f"the feature extractor {type(extractor).__name__} gives tokens of shape {list(tokens.shape)}; "
            "expected [B, rows, columns, channels]"
        )
    return int(tokens.shape[-1])

"""What a pipeline is made of: the contents of ``pipeline.json``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from smdit import SamplerConfig

from diff2to3._plugins import PIPELINE_ROLES

FORMAT_VERSION: Literal[1] = 1
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class ComponentConfig(BaseModel):
    """Which component plays a role.

    Args:
        name: ``"name"`` or ``"distribution:name"`` of an installed component.
        config: fields of that component's own config model, which validates them when it is built.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    config: dict[str, Any] = Field(default_factory=dict)


class PipelineConfig(BaseModel):
    """A pipeline directory's ``pipeline.json``.

    Args:
        format_version: version of this format.
        name: what the pipeline calls itself.
        description: a sentence for people.
        frame: frame the objects were trained in: ``"canonical"``, or ``"view-snapped"`` (yaw turned by multiples of 90
            degrees so that the condition camera is within 45 degrees of the front).
        condition_background: grey behind the object in the condition image, 0 black to 1 white, as in training.
        roles: role -> component. Matting and renderer may be left out; the models may not.
        sampler: integration of the latent flow; stage 1 keeps its own in its config.
        weights: SHA-256 of every weights file by its name, compared when it is loaded. A directory without any is
            loaded unchecked; a loaded pipeline's own config has none, because they describe files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    name: str
    description: str = ""
    frame: Literal["canonical", "view-snapped"] = "canonical"
    condition_background: float = Field(default=1.0, ge=0, le=1)
    roles: dict[str, ComponentConfig]
    sampler: SamplerConfig = SamplerConfig()
    weights: dict[str, Sha256] = Field(default_factory=dict)

    @field_validator("roles")
    @classmethod
    def _complete(cls, roles: dict[str, ComponentConfig]) -> dict[str, ComponentConfig]:
        names = [role.name for role in PIPELINE_ROLES]
        if unknown := sorted(set(roles) - set(names)):
            raise ValueError(f"unknown roles {', '.join(unknown)}; expected {', '.join(names)}")
        defaults = {"matting": ComponentConfig(name="border"), "renderer": ComponentConfig(name="auto")}
        roles = {**defaults, **roles}
        if missing := [name for name in names if name not in roles]:
            raise ValueError(f"no component for {', '.join(missing)}")
        return {name: roles[name] for name in names}

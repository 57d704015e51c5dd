"""What `diff2to3 eval ablation` trains and scores: one YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diff2to3._settings import load_settings
from diff2to3.data._extractor import ExtractorChoice
from diff2to3.data._feature_stage import FeatureSettings
from diff2to3.data._store import settings_hash


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Config):
    """A row of the table: what its flow is made of.

    Attributes:
        features: name of the extractor whose features the 2to3-VAE encodes, and which sees the input picture.
        backbone: any installed component of the role ``backbone``.
        model: fields of its config; channels and grid follow from features and VAE.
        marks: ticks of the paper's columns, for the table.
    """

    features: str
    backbone: str
    model: dict[str, Any] = Field(default_factory=dict)
    marks: tuple[str, ...] = ()


class Scoring(_Config):
    """How a row is scored.

    Attributes:
        limit: objects of the split, each with one input picture.
        steps, guidance: of the sampler.
        lpips: file with LPIPS-VGG weights.
        networks: weights by network, as ``eval generation --weights`` takes them.
        shown: objects on the page.
    """

    split: str = "val"
    limit: int = Field(default=64, ge=1)
    size: int = 256
    steps: int = Field(default=50, ge=1)
    guidance: float = 2.0
    lpips: Path | None = None
    networks: dict[str, str] = Field(default_factory=dict)
    renderer: str = "auto"
    shown: int = 16


class AblationConfig(_Config):
    """The experiments of the paper's table 3: the same data, seeds and budget for every row.

    Attributes:
        data: data set with stages render and voxels.
        source: folder of its meshes, which the truth is drawn from.
        out: run folder.
        tables: folder in it for the tables, where several configurations share what they train.
        seeds: each row is trained and scored once with each; a VAE is shared by the rows of its features and seed.
        grid_size: of voxels and latents.
        frame: of the objects that the flows are trained on.
        extractors: by name, as ``data features --extractor`` takes them.
        lift: how features are lifted.
        vae, flow: settings of ``train vae`` and ``train flow`` but for data, out, parts and seed; the flow's model is
            the row's.
        rows: by name, in order.
    """

    data: Path
    source: Path | None = None
    out: Path
    tables: str = "."
    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1)
    device: str | None = None
    grid_size: int = 32
    frame: Literal["canonical", "view-snapped"] = "view-snapped"
    extractors: dict[str, ExtractorChoice]
    lift: FeatureSettings = FeatureSettings(num_variants=1)
    vae: dict[str, Any]
    flow: dict[str, Any]
    rows: dict[str, Row] = Field(min_length=1)
    scoring: Scoring = Scoring()

    @model_validator(mode="after")
    def _known_extractors(self) -> AblationConfig:
        for name, row in self.rows.items():
            if row.features not in self.extractors:
                raise ValueError(f"{name} has features {row.features!r}; extractors has {', '.join(self.extractors)}")
        return self

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of what a result depends on besides its row, its seed and the objects."""
        places = {"data", "source", "out", "tables", "seeds", "device", "extractors", "rows"}
        kept = self.model_dump(mode="json", exclude=places)
        return settings_hash(kept | {"scoring": self.scored(kept["scoring"])})

    @staticmethod
    def scored(scoring: dict[str, Any]) -> dict[str, Any]:
        """What figures depend on, of a dumped :class:`Scoring`: not where weights are, and how much is shown."""
        kept = {key: value for key, value in scoring.items() if key not in ("renderer", "shown")}
        return kept | {"lpips": kept["lpips"] is not None, "networks": sorted(kept["networks"])}


def row_digest(config: AblationConfig, name: str) -> str:
    """Changes with what a row is made of; empty for what is no row."""
    return settings_hash(config.rows[name].model_dump(mode="json", exclude={"marks"})) if name in config.rows else ""


def load_ablation(path: Path, overrides: Sequence[str] = ()) -> AblationConfig:
    """The configuration in a YAML file, see `load_settings`."""
    return load_settings(path, overrides, AblationConfig)

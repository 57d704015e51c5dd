"""Models that the stages ``features`` and ``latents`` run, loaded here or by a worker on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_vae import SparseVAE, SparseVAEConfig

from diff2to3._device import usable_device
from diff2to3._store import state_sha256
from diff2to3.data._extractor import ExtractorChoice, open_extractor
from diff2to3.data._feature_stage import Encoding, FeatureSettings, Lifting
from diff2to3.data._store import Store
from diff2to3.train._checkpoint import load_model


def load_lifting(
    choice: ExtractorChoice, device: str | None, store: Store, settings: FeatureSettings, grid_size: int
) -> tuple[Lifting, str]:
    """The work of stage ``features``, and the hash of its weights."""
    model: Any = open_extractor(choice)
    digest, place = str(state_sha256(model)), usable_device(device)
    return Lifting(model.to(place) if hasattr(model, "to") else model, store, settings, grid_size, place), digest


def load_encoding(vae: Path, device: str | None, store: Store) -> tuple[Encoding, str]:
    """The work of stage ``latents``, and the hash of its weights."""
    model = load_model(vae, SparseVAEConfig, SparseVAE)
    digest = str(state_sha256(model))
    return Encoding(model.to(usable_device(device)).eval(), store), digest

"""The feature extractor and the whole 2to3-VAE, of a pipeline or as they were trained."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from flux_features import FluxFeatures, FluxFeaturesConfig
from sparse_vae import SparseVAE, SparseVAEConfig

from diff2to3._device import usable_device
from diff2to3._errors import InputError
from diff2to3._pipeline import Pipeline
from diff2to3._store import ENCODER, load_weights, locate, weights_path
from diff2to3._store import read_config as read_pipeline_config
from diff2to3.train._checkpoint import load_model


def pipeline_models(source: str | PathLike[str] | None, device: str | None) -> tuple[FluxFeatures, SparseVAE]:
    """A pipeline's extractor, and its decoder with the encoder of ``latent_encoder.safetensors`` in its directory.

    Raises:
        InputError: the directory has no encoder or a damaged one, or its models are of another kind.
    """
    pipeline = Pipeline.from_pretrained(source, device=device)
    config, extractor = pipeline.latent_decoder.config, pipeline.feature_extractor
    if not isinstance(config, SparseVAEConfig) or not isinstance(extractor, FluxFeatures):
        raise InputError(f"{source or 'the embedded pipeline'}: expected FLUX features and the 2to3-VAE's own decoder")
    vae, directory = SparseVAE(config), locate(source)
    load_weights(vae.encoder, weights_path(directory, ENCODER), read_pipeline_config(directory))
    vae.decoder.load_state_dict(pipeline.latent_decoder.state_dict())  # type: ignore[attr-defined]
    return extractor, vae.to(pipeline.device).eval()


def trained_models(extractor: Path, vae: Path, device: str | None) -> tuple[FluxFeatures, SparseVAE]:
    """The same from the model folders of `train autoencoder` and `train vae`."""
    features = load_model(extractor, FluxFeaturesConfig, FluxFeatures)
    model = load_model(vae, SparseVAEConfig, SparseVAE)
    place = usable_device(device)
    return features.to(place).eval(), model.to(place).eval()

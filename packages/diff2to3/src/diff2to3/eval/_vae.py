"""The whole 2to3-VAE of a pipeline: its decoder, and the encoder that lies beside it."""

from __future__ import annotations

from os import PathLike

from sparse_vae import SparseVAE

from diff2to3._pipeline import Pipeline
from diff2to3._store import load_weights, locate, weights_path

ENCODER = "latent_encoder"  # file stem; generating does not need it, encoding an object does


def pipeline_vae(pipeline: Pipeline, source: str | PathLike[str] | None) -> SparseVAE:
    """The pipeline's decoder with the encoder of its directory's ``latent_encoder.safetensors``.

    Raises:
        PipelineFormatError: the directory has no encoder, or a damaged one.
    """
    vae = SparseVAE(pipeline.latent_decoder.config)  # type: ignore[attr-defined]
    load_weights(vae.encoder, weights_path(locate(source), ENCODER))
    vae.decoder = pipeline.latent_decoder
    return vae.to(pipeline.device).eval()

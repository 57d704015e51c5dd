"""Component manifest of sparse-vae; listing plugins imports nothing heavier than this file."""

from diff2to3 import ComponentSpec, hookimpl


@hookimpl
def diff2to3_components() -> list[ComponentSpec]:
    """The Gaussian decoder of the 2to3-VAE."""
    return [
        ComponentSpec(
            role="latent_decoder",
            name="gaussian",
            target="sparse_vae:GaussianDecoder",
            config="sparse_vae:SparseVAEConfig",
        )
    ]

"""Published weights that flux-features loads, and their licences. Imports nothing heavy: listing plugins reads it.

Sources of the licences: the model cards on the Hugging Face Hub; for FLUX.2's autoencoder also the README of
github.com/black-forest-labs/flux2 ("The autoencoder is released under Apache 2.0").
"""

from typing import NamedTuple


class PublishedWeights(NamedTuple):
    """One place that has weights.

    Attributes:
        component: name of the plugin, ``flux`` or ``dino``.
        preset: preset of ``FluxFeaturesConfig`` that has their layout; for ``dino`` the library whose layout.
        source: id on the Hugging Face Hub.
        licence: terms of these weights.
        gated: the Hub hands them out only to accounts that accepted those terms there.
    """

    component: str
    preset: str
    source: str
    licence: str
    gated: bool


#: Terms of the weights that this project trained and diff2to3 embeds.
OWN_LICENCE = "Apache-2.0"

PUBLISHED = (
    PublishedWeights("flux", "paper", "black-forest-labs/FLUX.1-schnell", "Apache-2.0", True),
    PublishedWeights("flux", "paper", "black-forest-labs/FLUX.1-dev", "FLUX.1 [dev] Non-Commercial License", True),
    PublishedWeights(
        "flux", "flux2", "black-forest-labs/FLUX.2-dev", "Apache-2.0 for its autoencoder, else non-commercial", True
    ),
    PublishedWeights("flux", "flux2", "black-forest-labs/FLUX.2-klein-4B", "Apache-2.0", False),
    PublishedWeights("flux", "taef1", "madebyollin/taef1", "MIT", False),
    PublishedWeights("flux", "taef2", "madebyollin/taef2", "MIT", False),
    PublishedWeights("dino", "transformers", "facebook/dinov2-with-registers-large", "Apache-2.0", False),
    PublishedWeights("dino", "timm", "timm/vit_large_patch14_reg4_dinov2.lvd142m", "Apache-2.0", False),
)


def licence_rows(component: str) -> tuple[tuple[str, str], ...]:
    """Pairs (weights, licence) of a component, as ``ComponentSpec.licence`` takes them."""
    rows = [
        (f"{entry.preset}: {entry.source}", entry.licence + ("; gated on the Hub, asks first" if entry.gated else ""))
        for entry in PUBLISHED
        if entry.component == component
    ]
    embedded = [("tiny: embedded in diff2to3", OWN_LICENCE)] if component == "flux" else []
    return tuple(embedded + rows)

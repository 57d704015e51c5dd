"""Component manifest of flux-features; listing plugins imports nothing heavier than this file."""

from importlib.util import find_spec

from _flux_features_weights import licence_rows
from diff2to3 import ComponentSpec, hookimpl


@hookimpl
def diff2to3_components() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            role="feature_extractor",
            name="flux",
            target="flux_features:FluxFeatures",
            config="flux_features:FluxFeaturesConfig",
            licence=licence_rows("flux"),
        ),
        ComponentSpec(
            role="feature_extractor",
            name="dino",
            target="flux_features:DinoFeatures",
            config="flux_features:DinoFeaturesConfig",
            requires=() if find_spec("timm") else ("transformers",),  # either of the two runs it
            install="flux-features[dino]",
            weights="own",
            licence=licence_rows("dino"),
        ),
        ComponentSpec(
            role="feature_extractor",
            name="vgg16",
            target="flux_features:VGGFeatures",
            config="flux_features:VGGFeaturesConfig",
            weights="own",
        ),
    ]

"""Component manifest of flux-features; listing plugins imports nothing heavier than this file."""

from diff2to3 import ComponentSpec, hookimpl


@hookimpl
def diff2to3_components() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            role="feature_extractor",
            name="flux",
            target="flux_features:FluxFeatures",
            config="flux_features:FluxFeaturesConfig",
            api=1,
        ),
    ]

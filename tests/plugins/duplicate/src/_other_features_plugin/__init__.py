"""Manifest: the same role and name as acme-features."""

from diff2to3 import ComponentSpec, hookimpl


@hookimpl
def diff2to3_components():
    return [
        ComponentSpec(
            role="feature_extractor",
            name="acme-dct",
            target="other_features:CoarseDctFeatures",
            config="acme_features:DctFeaturesConfig",
        )
    ]

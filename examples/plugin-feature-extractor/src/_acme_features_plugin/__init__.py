"""Manifest: what acme-features offers to diff2to3."""

from diff2to3 import ComponentSpec, hookimpl


@hookimpl
def diff2to3_components():
    return [
        ComponentSpec(
            role="feature_extractor",
            name="acme-dct",
            target="acme_features:DctFeatures",
            config="acme_features:DctFeaturesConfig",
        )
    ]

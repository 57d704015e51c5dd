"""Manifest: what acme-flow offers to diff2to3."""

from diff2to3 import ComponentSpec, hookimpl


@hookimpl
def diff2to3_components():
    return [
        ComponentSpec(
            role="backbone", name="acme-deepset", target="acme_flow:DeepSetFlow", config="acme_flow:DeepSetFlowConfig"
        )
    ]

"""Component manifest of smdit; listing plugins imports nothing heavier than this file."""

from diff2to3 import ComponentSpec, hookimpl


@hookimpl
def diff2to3_components() -> list[ComponentSpec]:
    """The flow models of both stages."""
    return [
        ComponentSpec(role="backbone", name="smdit", target="smdit:SMDiT", config="smdit:SMDiTConfig"),
        ComponentSpec(role="backbone", name="cross-dit", target="smdit:CrossDiT", config="smdit:CrossDiTConfig"),
        ComponentSpec(
            role="structure",
            name="structure-flow",
            target="smdit:StructureFlow",
            config="smdit:StructureFlowConfig",
        ),
    ]

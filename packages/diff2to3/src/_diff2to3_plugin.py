"""Component manifest of diff2to3; listing plugins imports nothing heavier than this file."""

from diff2to3 import ComponentSpec, hookimpl


@hookimpl
def diff2to3_components() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            role="matting",
            name="border",
            target="diff2to3._matting:BorderMatting",
            config="diff2to3._matting:BorderMattingConfig",
        ),
        ComponentSpec(
            role="matting",
            name="rembg",
            target="diff2to3._matting:RembgMatting",
            config="diff2to3._matting:RembgMattingConfig",
            requires=("rembg",),
            install="diff2to3[matting]",
        ),
    ]

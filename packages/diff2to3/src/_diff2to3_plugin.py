"""Component manifest of diff2to3; listing plugins imports nothing heavier than this file."""

import ctypes
import sys

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
        ComponentSpec(
            role="mesh_renderer",
            name="gl",
            target="diff2to3.data._renderers.gl:GlMeshRenderer",
            config="diff2to3.data._renderers.gl:GlMeshRendererConfig",
            requires=("moderngl",),
            check="_diff2to3_plugin:without_opengl",
            install="diff2to3[data]",
        ),
        ComponentSpec(
            role="mesh_renderer",
            name="cpu",
            target="diff2to3.data._renderers.cpu:CpuMeshRenderer",
            config="diff2to3.data._renderers.cpu:CpuMeshRendererConfig",
            requires=("numba",),
            install="diff2to3[data]",
        ),
        ComponentSpec(
            role="mesh_renderer",
            name="blender",
            target="diff2to3.data._renderers.blender:BlenderMeshRenderer",
            config="diff2to3.data._renderers.blender:BlenderMeshRendererConfig",
            requires=("bpy",),
            check="_diff2to3_plugin:without_blender",
            install="diff2to3[blender]",
        ),
    ]


def without_opengl() -> str | None:
    """Which libraries of OpenGL through EGL this machine lacks; whether a driver works shows when one is asked."""
    missing = _missing_libraries("libEGL.so.1", "libGL.so.1")
    return f"{missing} (Debian: apt install libegl1 libgl1 libgl1-mesa-dri)" if missing else None


def without_blender() -> str | None:
    """Why the module `bpy` cannot be installed or loaded here."""
    if sys.version_info[:2] not in ((3, 11), (3, 13)):
        return f"bpy is for Python 3.11 and 3.13, this is {sys.version_info[0]}.{sys.version_info[1]}"
    if sys.platform != "linux":
        return None
    missing = _missing_libraries(
        "libGL.so.1", "libSM.so.6", "libXfixes.so.3", "libXi.so.6", "libXrender.so.1", "libxkbcommon.so.0"
    )
    return (
        f"{missing} (Debian: apt install libgl1 libsm6 libxfixes3 libxi6 libxrender1 libxkbcommon0)"
        if missing
        else None
    )


def _missing_libraries(*names: str) -> str:
    missing = []
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return f"needs the system library {', '.join(missing)}" if missing else ""

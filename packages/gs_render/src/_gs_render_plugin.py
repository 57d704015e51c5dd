"""Component manifest of gs-render; listing plugins imports nothing heavier than this file."""

from diff2to3 import ComponentSpec, hookimpl

_RENDERERS = (
    ("auto", "AutoRenderer", (), ""),
    ("cpu", "CpuRenderer", ("numba",), "gs-render[cpu]"),
    ("torch", "TorchRenderer", (), ""),
    ("gsplat", "GsplatRenderer", ("gsplat",), "gs-render[gsplat]"),
)
# Suffixes without the dot, with the optional modules that writing them needs.
_EXPORTERS = (
    ("ply", (), ""),
    ("splat", (), ""),
    ("spz", (), ""),
    ("sog", (), ""),
    ("glb", (), ""),
    ("html", (), ""),
    ("obj", (), ""),
    ("png", (), ""),
    ("gif", (), ""),
    ("webp", (), ""),
    ("mp4", ("av",), "gs-render[cpu]"),
)


@hookimpl
def diff2to3_components() -> list[ComponentSpec]:
    renderers = [
        ComponentSpec(
            role="renderer",
            name=name,
            target=f"gs_render:{target}",
            config="gs_render:RendererConfig",
            requires=requires,
            install=install,
        )
        for name, target, requires, install in _RENDERERS
    ]
    exporters = [
        ComponentSpec(role="exporter", name=name, target="gs_render:save", requires=requires, install=install)
        for name, requires, install in _EXPORTERS
    ]
    metrics = [ComponentSpec(role="metric", name=name, target=f"gs_render.metrics:{name}") for name in ("psnr", "ssim")]
    return renderers + exporters + metrics

"""One picture in, a 3D Gaussian splatting asset out.

Public names are loaded on first use, so `import diff2to3` costs neither PyTorch nor any component.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diff2to3._asset import Asset as Asset
    from diff2to3._image import condition_image as condition_image
    from diff2to3._image import object_crop as object_crop
    from diff2to3._inputs import read_image as read_image
    from diff2to3._pipeline import Pipeline as Pipeline
    from diff2to3._pipeline_config import PipelineConfig as PipelineConfig
    from diff2to3._plugins import ComponentSpec as ComponentSpec
    from diff2to3._plugins import hookimpl as hookimpl
    from diff2to3._plugins import register as register
    from diff2to3._store import save_pipeline as save_pipeline

__version__ = "0.1.0"

_HOME = {
    "Asset": "diff2to3._asset",
    "ComponentSpec": "diff2to3._plugins",
    "Pipeline": "diff2to3._pipeline",
    "PipelineConfig": "diff2to3._pipeline_config",
    "condition_image": "diff2to3._image",
    "hookimpl": "diff2to3._plugins",
    "object_crop": "diff2to3._image",
    "read_image": "diff2to3._inputs",
    "register": "diff2to3._plugins",
    "save_pipeline": "diff2to3._store",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diff2to3' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""One picture in, a 3D Gaussian splatting asset out.

Public names are loaded on first use, so `import diff2to3` costs neither PyTorch nor any component.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diff2to3._image import condition_image as condition_image
    from diff2to3._image import object_crop as object_crop

__version__ = "0.1.0"

_HOME = {
    "condition_image": "diff2to3._image",
    "object_crop": "diff2to3._image",
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

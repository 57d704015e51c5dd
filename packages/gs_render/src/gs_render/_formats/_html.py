"""One self-contained .html that shows the splat offline: the viewer of `gs_render/_viewer` with the data inside."""

from __future__ import annotations

import base64
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gs_render._formats._arrays import pack_rotation
from gs_render._gaussians import Gaussians
from gs_render._pictures import FOV_DEGREES, framing, viewing_distance


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians of the world frame (the viewer is z up) with the renderer's default options."""
    path.write_text(viewer_page(gaussians, title=path.stem), encoding="utf-8")


def viewer_page(
    gaussians: Gaussians,
    title: str,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    filter_2d: float = 0.3,
    antialias: bool = False,
) -> str:
    """The page as text. It opens with the first camera of `turntable_cameras`."""
    centre, radius = framing(gaussians)
    scene, data = _pack(gaussians)
    scene |= {
        "camera": {
            "target": centre.tolist(),
            "radius": viewing_distance(radius),
            "azimuth": 0.0,
            "elevation": 20.0,
            "fov": FOV_DEGREES,
        },
        "background": list(background),
        "filter": filter_2d,
        "antialias": antialias,
        "data": base64.b64encode(data).decode("ascii"),
    }
    viewer = resources.files("gs_render") / "_viewer"
    fields = {
        "title": html.escape(title),
        "background": "#" + "".join(f"{round(255 * value):02x}" for value in background),
        "scene": json.dumps(scene, allow_nan=False).replace("<", "\\u003c"),
        "script": (viewer / "viewer.js").read_text(encoding="utf-8"),
    }
    page = (viewer / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], page)


def _pack(gaussians: Gaussians) -> tuple[dict[str, Any], bytes]:
    """(bounds, 20 bytes a Gaussian: uint16 position and log-scale, uint32 rotation, uint8 rgba, one after another).

    Positions are kept to 1/65535 of the extent; about 1/50 of a pixel for an object that fills a large screen.
    """
    means = gaussians.means.numpy().astype(np.float64)
    logs = np.log(np.maximum(gaussians.scales.numpy().astype(np.float64), 1e-9))
    color = np.concatenate([gaussians.rgb.numpy(), gaussians.opacities.numpy()[:, None]], axis=1)
    low, high = (means.min(axis=0), means.max(axis=0)) if len(means) else (np.zeros(3), np.ones(3))
    small, large = (float(logs.min()), float(logs.max())) if len(means) else (0.0, 1.0)
    arrays = (
        _steps((means - low) / np.maximum(high - low, 1e-30)),
        _steps((logs - small) / max(large - small, 1e-30)),
        pack_rotation(gaussians.quaternions.numpy()).astype("<u4"),
        np.rint(color.clip(0, 1) * 255).astype(np.uint8),
    )
    bounds = {"count": len(means), "low": low.tolist(), "high": high.tolist(), "scales": [small, large]}
    return bounds, b"".join(array.tobytes() for array in arrays)


def _steps(unit: np.ndarray) -> np.ndarray:
    return np.rint(unit.clip(0, 1) * 65535).astype("<u2")

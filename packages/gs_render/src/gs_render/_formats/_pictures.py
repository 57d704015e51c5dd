"""Writers of pictures with default cameras: contact sheet and turntable."""

from __future__ import annotations

from pathlib import Path

from gs_render._gaussians import Gaussians
from gs_render._pictures import contact_sheet, save_video


def write(gaussians: Gaussians, path: Path) -> None:
    """A .png contact sheet, or a turntable in the format of the suffix."""
    if path.suffix.lower() == ".png":
        contact_sheet(gaussians).save(path)
    else:
        save_video(gaussians, path)

"""The self-contained page of a splat inside another page."""

from __future__ import annotations

import html
from pathlib import Path


def splat_frame(page: Path, label: str, **attributes: str) -> str:
    """HTML of a frame that shows a page written as .html; it runs apart from the page around it (sandbox).

    Args:
        page: the file; its text goes into the frame, so it may be deleted afterwards.
        label: what a screen reader says.
        attributes: more of the frame, such as ``style``.
    """
    given = {"title": label, "sandbox": "allow-scripts", "srcdoc": page.read_text(encoding="utf-8"), **attributes}
    written = " ".join(f'{name}="{html.escape(value)}"' for name, value in given.items())
    return f"<iframe {written}></iframe>"

"""The server of the app: where it listens, what it keeps and for how long."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diff2to3._errors import InputError
from diff2to3._pipeline import Pipeline
from diff2to3.app._limits import Limits

if TYPE_CHECKING:
    import gradio as gr


@contextmanager
def serving(pipeline: Pipeline, limits: Limits, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Run the app in the background; gives its address.

    Everything that users upload and make is in one temporary folder, which goes when the block ends.

    Args:
        pipeline: makes the objects.
        limits: of what users may ask.
        host: address to listen at; the default can be reached from this machine only.
        port: None takes a free one from 7860 on.

    Raises:
        InputError: the port is taken, or the host is not an address of this machine.
    """
    with tempfile.TemporaryDirectory(prefix="diff2to3-app-") as root, _gradio_folder(root):
        # imported here, because Gradio makes folders when it is imported
        from diff2to3.app._handlers import Handlers
        from diff2to3.app._page import build

        page = build(Handlers(pipeline, limits, Path(root)))
        try:
            yield _launch(page, limits, host, port)
        finally:
            page.close(verbose=False)


def _launch(page: gr.Blocks, limits: Limits, host: str, port: int | None) -> str:
    from diff2to3.app._page import STYLE, THEME

    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            max_file_size=limits.upload_megabytes * 1_000_000,
            css_paths=STYLE,
            theme=THEME,
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
        )
    except OSError as error:
        raise InputError(
            f"the app cannot listen at {host}, port {port or '7860 and on'}; "
            "expected an address of this machine and a port that is free"
        ) from error
    return address


@contextmanager
def _gradio_folder(root: str) -> Iterator[None]:
    """Have Gradio keep its files in `root`: it takes the folder from the environment, and from nowhere else."""
    name = "GRADIO_TEMP_DIR"
    before = os.environ.get(name)
    os.environ[name] = root
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

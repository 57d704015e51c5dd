"""What happens when somebody uses the page or the API; the layout is in `_page`."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diff2to3._errors import InputError
from diff2to3._pipeline import Pipeline
from diff2to3.app import _views as views
from diff2to3.app._limits import Limits, check_settings, uploaded_picture
from diff2to3.app._sessions import Run, Session, Sessions
from diff2to3.app._work import Made, Progress, Voxels, generate

_log = logging.getLogger("diff2to3.app")
#: The file that can be downloaded as soon as a splat is there.
FIRST_FORMAT = "ply"
_SAME: Any = gr.skip()


def _told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors the user can read: ours as they are, of all others only that there was one."""

    def explained(handlers: Handlers, error: Exception) -> gr.Error:
        if isinstance(error, InputError):
            # without the folders of this machine
            text = re.sub(rf"{re.escape(str(handlers.sessions.root))}/(\S*/)?", "", str(error))
            return gr.Error(text, print_exception=False)
        _log.error("the app failed", exc_info=error)
        return gr.Error("the server failed; its log says why", print_exception=False)

    @functools.wraps(handler)
    def call(self: Handlers, *arguments: Any, **options: Any) -> Any:
        try:
            return handler(self, *arguments, **options)
        except Exception as error:
            raise explained(self, error) from error

    @functools.wraps(handler)
    def iterate(self: Handlers, *arguments: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from handler(self, *arguments, **options)
        except Exception as error:
            raise explained(self, error) from error

    return iterate if inspect.isgeneratorfunction(handler) else call


class Handlers:
    """The handlers of one server.

    Args:
        pipeline: makes the objects; one call at a time uses it.
        limits: of what a user may ask.
        root: folder for everything that is written.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits, root: Path) -> None:
        self.pipeline, self.limits = pipeline, limits
        self.sessions = Sessions(root, limits.sessions)
        self.formats = views.formats()

    @_told
    def cut_out(self, upload: Any, request: gr.Request) -> str | None:
        """The part of the picture that the pipeline sees, as a file; None without a picture."""
        if upload is None:
            return None
        picture, name = uploaded_picture(self.limits, upload)
        path = self._session(request).folder() / f"{name}.png"
        views.preview(self.pipeline.cut_out(picture)).save(path)
        return str(path)

    @_told
    def run(
        self, upload: Any, seed: Any, samples: Any, own: Any, steps: Any, guidance: Any, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Values for (progress, viewer, gallery, video, format, download), again and again while the work goes on."""
        given = (None, None) if own else (steps, guidance)
        settings = check_settings(self.limits, seed, samples, *given)
        picture, name = uploaded_picture(self.limits, upload)
        with self.sessions.working(request.session_hash) as session:
            run = session.new_run(name, settings.samples)
            session.show(run)
            seconds: dict[str, float] = {}

            def stages(event: Progress | None) -> str:
                return views.progress(event, run.samples, seconds)

            yield _outputs(
                progress=stages(None),
                viewer=views.placeholder("Looking at the picture ..."),
                gallery=gr.update(value=[], visible=False),
                video=None,
                format=FIRST_FORMAT,
                download=gr.update(label="Download", value=None, interactive=False),
            )
            for event in generate(self.pipeline, picture, settings):
                match event:
                    case Progress():
                        yield _outputs(progress=stages(event))
                    case Voxels(_, coords, grid_size):
                        yield _outputs(viewer=views.voxel_viewer(coords, grid_size, run.folder))
                    case Made(sample, asset):
                        seconds = asset.timings
                        run.assets.append(asset)
                        run.shown = sample
                        yield _outputs(viewer=self._view(run), gallery=self._gallery(run))
            yield _outputs(
                progress=stages(Progress(run.shown, views.TURNTABLE, 0, 1)), download=_link(run, FIRST_FORMAT)
            )
            video = str(run.file(run.shown, "mp4"))
            yield _outputs(progress=stages(Progress(run.shown, views.DONE, 1, 1)), video=video)

    @_told
    def choose(self, request: gr.Request, event: gr.SelectData) -> Iterator[tuple[Any, ...]]:
        """Values for (viewer, video, format, download) of the sample that was clicked."""
        run = self._run(request)
        run.shown = min(int(event.index), len(run.assets) - 1)
        yield self._view(run), None, FIRST_FORMAT, _link(run, FIRST_FORMAT)
        yield _SAME, str(run.file(run.shown, "mp4")), _SAME, _SAME

    @_told
    def write(self, suffix: str, request: gr.Request) -> Iterator[Any]:
        """The download button for a format, once the file is written."""
        self._check_format(suffix)
        run = self._run(request)
        yield gr.update(label=f"Writing .{suffix} ...", value=None, interactive=False)
        yield _link(run, suffix)

    @_told
    def generate(
        self,
        image: Any,
        seed: Any = 0,
        samples: Any = 1,
        steps: Any = None,
        guidance: Any = None,
        formats: Any = (FIRST_FORMAT,),
        request: gr.Request = None,  # type: ignore[assignment]
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[str]:
        """Make 3D Gaussians of a picture: the files of every sample in every format asked for, sample by sample."""
        settings = check_settings(self.limits, seed, samples, steps, guidance)
        for suffix in formats:
            self._check_format(suffix)
        picture, name = uploaded_picture(self.limits, image)
        with self.sessions.working(request.session_hash) as session:
            run = session.new_run(name, settings.samples)
            for event in generate(self.pipeline, picture, settings):
                match event:
                    case Progress(sample, stage, done, total):
                        progress((done, total), desc=f"sample {sample + 1} of {run.samples}: {stage}")
                    case Made(_, asset):
                        run.assets.append(asset)
            return [str(run.file(sample, suffix)) for sample in range(run.samples) for suffix in formats]

    def forget(self, request: gr.Request) -> None:
        """The user is gone, or the connection."""
        self.sessions.leave(request.session_hash)

    def _session(self, request: gr.Request) -> Session:
        return self.sessions.of(request.session_hash)

    def _run(self, request: gr.Request) -> Run:
        run = self._session(request).run
        if run is None or not run.assets:
            raise InputError("there is no object yet, or it is no longer kept; press Generate")
        return run

    def _check_format(self, suffix: Any) -> None:
        known = [name for _, name in self.formats]
        if suffix not in known:
            raise InputError(f"no format {str(suffix)[:40]!r}; expected one of {', '.join(known)}")

    def _view(self, run: Run) -> str:
        return views.viewer(run.file(run.shown, "html"), f"{run.name}, to turn and zoom")

    def _gallery(self, run: Run) -> Any:
        if run.samples == 1:
            return _SAME
        pictures = [(views.thumbnail(asset), f"Sample {number + 1}") for number, asset in enumerate(run.assets)]
        return gr.update(value=pictures, visible=True, selected_index=None)


def _outputs(
    progress: Any = _SAME,
    viewer: Any = _SAME,
    gallery: Any = _SAME,
    video: Any = _SAME,
    format: Any = _SAME,
    download: Any = _SAME,
) -> tuple[Any, ...]:
    """Values of the right half of the page; what is not given stays as it is."""
    return progress, viewer, gallery, video, format, download


def _link(run: Run, suffix: str) -> Any:
    path = run.file(run.shown, suffix)
    size = path.stat().st_size / 1e6
    return gr.update(label=f"Download {path.name} ({size:.1f} MB)", value=str(path), interactive=True)

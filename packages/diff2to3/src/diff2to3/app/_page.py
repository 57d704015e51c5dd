"""The layout of the page, and which handler each part calls."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from smdit import SamplerConfig

from diff2to3.app import _views as views
from diff2to3.app._handlers import FIRST_FORMAT, Handlers
from diff2to3.app._limits import MAX_GUIDANCE, Limits

EXAMPLES = Path(__file__).parent / "_examples"
STYLE = Path(__file__).parent / "_style.css"
THEME = gr.themes.Default(primary_hue="indigo")
TITLE = "diff2to3"
_HEAD = """
# One picture in, a 3D splat out
Choose a picture of **one object**, look at what is cut out of it, press **Generate**.
"""
_HEIGHT = 250


class _Inputs(NamedTuple):
    picture: gr.Image
    cut: gr.Image
    generate: gr.Button
    stop: gr.Button
    seed: gr.Number
    dice: gr.Button
    samples: gr.Slider
    own: gr.Checkbox
    steps: gr.Slider
    guidance: gr.Slider


class _Outputs(NamedTuple):
    """In the order in which `Handlers.run` gives their values."""

    progress: gr.HTML
    viewer: gr.HTML
    gallery: gr.Gallery
    video: gr.Video
    format: gr.Dropdown
    download: gr.DownloadButton


def build(handlers: Handlers) -> gr.Blocks:
    """The page of a server, with the API behind it."""
    age = 60 * handlers.limits.minutes
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(min(age, 300), age)) as page:
        gr.Markdown(_HEAD, elem_id="head")
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                inputs = _inputs(handlers.limits, handlers.pipeline.config.sampler)
            with gr.Column(scale=6, min_width=360):
                outputs = _outputs(handlers)
        _connect(handlers, inputs, outputs)
        _offer_api(handlers)
        page.unload(handlers.forget)
    return page.queue(max_size=handlers.limits.queue, default_concurrency_limit=2)


def _inputs(limits: Limits, sampler: SamplerConfig) -> _Inputs:
    with gr.Row():
        picture = gr.Image(
            label="1. Picture",
            type="filepath",
            sources=["upload", "clipboard"],
            height=_HEIGHT,
            elem_id="picture",
            placeholder=f"Drop a picture here, or click\n(at most {limits.upload_megabytes} MB)",
        )
        cut = gr.Image(
            label="2. What is cut out", height=_HEIGHT, interactive=False, buttons=[], format="png", elem_id="cut"
        )
    examples = [[str(path)] for path in sorted(EXAMPLES.glob("*.webp"))]
    gr.Examples(examples, picture, label="No picture at hand? Take one of these", elem_id="examples")
    generate = gr.Button("3. Generate", variant="primary", size="lg", elem_id="generate")
    stop = gr.Button("Stop", variant="stop", size="lg", visible=False, elem_id="stop")
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        with gr.Row():
            seed = gr.Number(0, label="Seed", info="The same seed makes the same object again.", elem_id="seed")
            dice = gr.Button("Another seed", size="sm", scale=0, min_width=120, elem_id="dice")
        samples = gr.Slider(1, limits.samples, 1, step=1, label="Samples", info="Variants, to choose from.")
        own = gr.Checkbox(True, label="The pipeline's own steps and guidance", elem_id="own")
        steps = gr.Slider(
            1,
            limits.steps,
            sampler.steps,
            step=1,
            label="Steps",
            info="Fewer are faster.",
            visible=False,
            elem_id="steps",
        )
        guidance = gr.Slider(
            0,
            MAX_GUIDANCE,
            sampler.guidance,
            step=0.1,
            label="Guidance",
            info="More keeps closer to the picture.",
            visible=False,
            elem_id="guidance",
        )
    return _Inputs(picture, cut, generate, stop, seed, dice, samples, own, steps, guidance)


def _outputs(handlers: Handlers) -> _Outputs:
    progress = gr.HTML(views.progress(None, 1, {}), elem_id="progress")
    viewer = gr.HTML(views.placeholder("Your object appears here"), elem_id="viewer")
    gallery = gr.Gallery(
        label="Samples: click one to see it",
        visible=False,
        columns=handlers.limits.samples,
        rows=1,
        height=210,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="gallery",
    )
    with gr.Row():
        video = gr.Video(
            label="Turntable", height=_HEIGHT, autoplay=True, loop=True, interactive=False, buttons=[], elem_id="video"
        )
        with gr.Column(min_width=220):
            form = gr.Dropdown(handlers.formats, value=FIRST_FORMAT, label="4. Take it with you", elem_id="format")
            download = gr.DownloadButton("Download", interactive=False, variant="primary", elem_id="download")
    return _Outputs(progress, viewer, gallery, video, form, download)


def _connect(handlers: Handlers, inputs: _Inputs, outputs: _Outputs) -> None:
    raw: dict[str, Any] = {"preprocess": False, "api_visibility": "private"}  # the handlers check what comes
    buttons = [inputs.generate, inputs.stop]
    inputs.picture.change(handlers.cut_out, inputs.picture, inputs.cut, show_progress_on=inputs.cut, **raw)
    inputs.dice.click(lambda: random.SystemRandom().randrange(100_000), None, inputs.seed, api_visibility="private")
    inputs.own.change(
        lambda own: [gr.update(visible=not own)] * 2,
        inputs.own,
        [inputs.steps, inputs.guidance],
        queue=False,
        api_visibility="private",
    )
    inputs.generate.click(lambda: _swap(running=True), None, buttons, queue=False, api_visibility="private")
    run = inputs.generate.click(
        handlers.run,
        [inputs.picture, inputs.seed, inputs.samples, inputs.own, inputs.steps, inputs.guidance],
        list(outputs),
        show_progress="full",  # the place in the queue
        show_progress_on=outputs.progress,
        concurrency_limit=1,
        concurrency_id="pipeline",
        **raw,
    )
    run.then(lambda: _swap(running=False), None, buttons, queue=False, api_visibility="private")
    stopped = views.progress(None, 1, {}), views.placeholder("Stopped"), *_swap(running=False)
    inputs.stop.click(
        lambda: stopped, None, [outputs.progress, outputs.viewer, *buttons], cancels=run, api_visibility="private"
    )
    shown = [outputs.viewer, outputs.video, outputs.format, outputs.download]
    outputs.gallery.select(handlers.choose, None, shown, show_progress_on=outputs.video, **raw)
    outputs.format.input(handlers.write, outputs.format, outputs.download, show_progress="hidden", **raw)


def _swap(running: bool) -> tuple[Any, Any]:
    return gr.update(visible=not running), gr.update(visible=running)


def _offer_api(handlers: Handlers) -> None:
    """The endpoint /generate. Gradio makes endpoints of components; the page does not show these."""
    suffixes = [suffix for _, suffix in handlers.formats]
    fields = [
        gr.Image(type="filepath", label="image", visible=False),
        gr.Number(0, label="seed", visible=False),
        gr.Number(1, label="samples", visible=False),
        gr.Number(None, label="steps", visible=False),
        gr.Number(None, label="guidance", visible=False),
        gr.CheckboxGroup(suffixes, value=[FIRST_FORMAT], label="formats", visible=False),
    ]
    gr.Button(visible=False).click(
        handlers.generate,
        fields,
        gr.Files(label="files", visible=False),
        preprocess=False,
        api_name="generate",
        concurrency_limit=1,
        concurrency_id="pipeline",
    )

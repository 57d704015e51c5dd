"""The stages as a stream of events: in order, with the results of the pipeline, and stopped when nobody listens."""

import pytest
import torch
from diff2to3 import Pipeline
from diff2to3.app._limits import Settings
from diff2to3.app._work import STAGES, Made, Progress, Voxels, generate
from PIL import Image, ImageDraw

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline(micro_pipeline):
    return Pipeline.from_pretrained(micro_pipeline, device="cpu")


@pytest.fixture(scope="module")
def picture():
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((10, 5, 50, 60), fill=(200, 60, 20, 255))
    return image


def test_samples_are_those_of_the_pipeline(pipeline, picture):
    events = list(generate(pipeline, picture, Settings(seed=5, samples=2, steps=3, guidance=1.5)))
    made = [event for event in events if isinstance(event, Made)]
    assert [event.sample for event in made] == [0, 1]
    for event in made:
        wanted = pipeline(picture, seed=5, sample=event.sample, steps=3, guidance=1.5)
        assert torch.equal(event.asset.gaussians.means, wanted.gaussians.means)
        assert torch.equal(event.asset.gaussians.sh, wanted.gaussians.sh)
        assert torch.equal(event.asset.voxels, wanted.voxels)
        assert event.asset.settings == wanted.settings
        assert event.asset.timings.keys() == wanted.timings.keys()
    voxels = [event for event in events if isinstance(event, Voxels)]
    assert all(torch.equal(v.coords, m.asset.voxels) for v, m in zip(voxels, made, strict=True))


def test_events_come_in_the_order_of_the_work(pipeline, picture):
    events = list(generate(pipeline, picture, Settings(seed=0, samples=2, steps=2, guidance=None)))
    begun = [(event.sample, event.stage) for event in events if isinstance(event, Progress) and event.done == 0]
    rest = STAGES[2:]
    assert list(dict.fromkeys(begun)) == [(0, stage) for stage in STAGES] + [(1, stage) for stage in rest]
    done = {(e.sample, e.stage): (e.done, e.total) for e in events if isinstance(e, Progress)}
    assert done[1, "latents"] == done[1, "structure"] == (2, 2)
    kinds = [type(event) for event in events if not isinstance(event, Progress)]
    assert kinds == [Voxels, Made] * 2


def test_work_ends_when_nobody_listens(pipeline, picture, monkeypatch):
    monkeypatch.setattr(pipeline, "decode", lambda latents: pytest.fail("the work went on"))
    events = generate(pipeline, picture, Settings(seed=0, samples=4, steps=50, guidance=None))
    while not isinstance(next(events), Voxels):
        pass
    events.close()  # waits for the thread, which would take 50 steps and then fail


def test_errors_reach_the_listener(pipeline, picture, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(pipeline, "fill_voxels", fail)
    events = generate(pipeline, picture, Settings(seed=0, samples=1, steps=2, guidance=None))
    while not isinstance(next(events), Voxels):
        pass
    next(events)  # the stage begins
    with pytest.raises(RuntimeError, match="broken"):
        next(events)

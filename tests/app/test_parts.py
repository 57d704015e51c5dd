"""Limits, sessions, views and handlers, without a server."""

import html
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from diff2to3 import Pipeline
from diff2to3._errors import ImageInputError, InputError
from diff2to3.app import _views as views
from diff2to3.app._limits import Limits, Settings, check_settings, uploaded_picture
from diff2to3.app._sessions import Sessions
from diff2to3.app._work import Progress
from gs_render import load
from PIL import Image, ImageDraw

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = Limits(upload_megabytes=1, pixels=10_000, samples=3, steps=9)


@pytest.fixture(scope="module")
def pipeline(micro_pipeline):
    return Pipeline.from_pretrained(micro_pipeline, device="cpu")


@pytest.fixture
def upload(tmp_path):
    """What Gradio makes of an uploaded picture."""
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((10, 5, 50, 60), fill=(200, 60, 20, 255))
    image.save(tmp_path / "ball.png")
    return {"path": str(tmp_path / "ball.png"), "orig_name": "ball.png"}


@pytest.fixture
def handlers(pipeline, tmp_path):
    pytest.importorskip("gradio", reason="NOT TESTED: gradio is not installed")
    from diff2to3.app._handlers import Handlers

    root = tmp_path / "root"
    root.mkdir()
    return Handlers(pipeline, LIMITS, root)


def user(name):
    return SimpleNamespace(session_hash=name)


# ---- limits


def test_settings_inside_the_limits():
    assert check_settings(LIMITS, 7, 2.0, None, None) == Settings(seed=7, samples=2, steps=None, guidance=None)
    assert check_settings(LIMITS, 0, 1, 9, 2) == Settings(seed=0, samples=1, steps=9, guidance=2.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": -1}, "seed is -1; expected a number from 0"),
        ({"seed": "1"}, "seed is '1'"),
        ({"seed": None}, "seed is None"),
        ({"samples": 4}, "samples is 4; expected a number from 1 to 3"),
        ({"samples": True}, "samples is True"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number from 1 to 9"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": 1e9}, "guidance is 1000000000.0; expected a number from 0.0 to 20.0"),
        ({"guidance": [1]}, r"guidance is \[1\]"),
    ],
)
def test_settings_outside_the_limits(changed, message):
    with pytest.raises(InputError, match=message):
        check_settings(LIMITS, **{"seed": 0, "samples": 1, "steps": 5, "guidance": 1.0, **changed})


def test_upload(upload):
    picture, name = uploaded_picture(LIMITS, upload)
    assert (picture.mode, picture.size, name) == ("RGBA", (64, 64), "ball")


def test_uploads_that_cannot_be_used(tmp_path):
    Image.new("RGB", (101, 100)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:-60])
    (tmp_path / "heavy.png").write_bytes(bytes(1_000_001))
    wanted = {
        "wide.png": "wide.png has 101 x 100 pixels; expected at most 0.01 million",
        "text.png": "text.png is not a picture that can be read; expected PNG, JPEG, WebP or similar",
        "empty.png": r"empty.png is empty \(0 bytes\); expected a picture",
        "heavy.png": "heavy.png is too large; expected at most 1 MB",
        "missing.png": "there is no picture yet; upload one, or choose an example",
    }
    for name, message in wanted.items():
        with pytest.raises(ImageInputError, match=f"^{message}$"):
            uploaded_picture(LIMITS, {"path": str(tmp_path / name)})
    with pytest.raises(ImageInputError, match=r"^cut.png is damaged"):
        uploaded_picture(LIMITS.model_copy(update={"pixels": 20_000}), {"path": str(tmp_path / "cut.png")})
    for nothing in (None, {}, {"path": None}, {"url": "data:image/png;base64,AAAA"}):
        with pytest.raises(ImageInputError, match="there is no picture yet"):
            uploaded_picture(LIMITS, nothing)


# ---- sessions


def test_sessions_are_apart_and_vanish(tmp_path):
    sessions = Sessions(tmp_path, limit=2)
    folders = {name: sessions.of(name).folder() for name in "ab"}
    assert sessions.of("a") is sessions.of("a") is not sessions.of("b")
    assert sessions.of(None) is not sessions.of(None)  # clients without a key, who push out the older ones
    assert not folders["a"].exists()
    assert not folders["b"].exists()
    folder = sessions.of("c").folder()
    assert folder.parent.parent == tmp_path
    assert len(folder.parent.name) >= 16
    sessions.leave("nobody")
    sessions.leave("c")
    sessions.sweep()
    assert folder.exists()
    sessions.grace = 0
    sessions.sweep()
    assert not folder.exists()
    assert sessions.of("c").run is None


def test_files_of_users_who_are_gone_are_removed_by_themselves(tmp_path):
    sessions = Sessions(tmp_path, limit=2, grace=0)
    folder = sessions.of("a").folder()
    sessions.leave("a")
    while sessions.sweeper is not None:
        sessions.sweeper.join(0.1)
    assert not folder.exists()


def test_a_user_whose_connection_was_lost_keeps_the_files(tmp_path):
    """A busy server or a bad network loses the sign of life of a client that is there and goes on."""
    sessions = Sessions(tmp_path, limit=2)
    folder = sessions.of("a").folder()
    sessions.leave("a")
    sessions.of("a")  # it came back
    sessions.grace = 0
    sessions.sweep()
    assert folder.exists()
    with sessions.working("a"):
        sessions.leave("a")
        sessions.sweep()
        assert folder.exists()
        sessions.grace = 1000
    sessions.sweep()
    assert folder.exists()  # there is time to come for what was made
    sessions.grace = 0
    sessions.sweep()
    assert not folder.exists()


def test_other_users_do_not_push_out_one_who_waits(tmp_path):
    sessions = Sessions(tmp_path, limit=2)
    with sessions.working("a") as session:
        folder = session.folder()
        others = [sessions.of(name).folder() for name in "bcd"]
        assert folder.exists()
        assert [other.exists() for other in others] == [False, False, True]
    sessions.of("e")
    assert not folder.exists()


def test_files_of_a_run(pipeline, upload, tmp_path):
    session = Sessions(tmp_path / "root", limit=2).of("a")
    run = session.new_run("ball", samples=2)
    session.show(run)
    run.assets += [pipeline(upload["path"], sample=sample) for sample in range(2)]
    path = run.file(1, "ply")
    written = path.stat().st_mtime_ns
    assert path.name == "ball-1.ply"
    assert len(load(path)) == len(run.assets[1].gaussians)
    assert run.file(1, "ply").stat().st_mtime_ns == written  # kept, not written again
    session.show(session.new_run("box", samples=1))
    assert not path.exists()


# ---- views


def test_viewer_holds_the_whole_page(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<title>\"a\" & 'b'</title><script>`${1 < 2}`</script>")
    frame = views.viewer(page, 'a "chair"')
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page.read_text()
    assert 'title="a &quot;chair&quot;"' in frame
    assert 'sandbox="allow-scripts"' in frame  # its scripts run, but reach nothing of the page around it


def test_voxels_are_balls_in_their_places():
    coords = torch.tensor([[0, 0, 0], [15, 8, 3]], dtype=torch.int32)
    balls = views.voxel_gaussians(coords, 16)
    assert torch.allclose(balls.means, (coords + 0.5) / 16 - 0.5)
    assert (balls.scales <= 0.5 / 16).all()


def test_progress_says_where_the_work_is():
    text = views.progress(Progress(1, "latents", 3, 12), 2, {"structure": 1.25})
    items = re.findall(r'<li class="(\w+)"><b>(\w+)</b><i><u style="width: (\d+)%"></u></i><small>(.*?)</small>', text)
    assert items == [
        ("done", "Picture", "100", ""),
        ("done", "Features", "100", ""),
        ("done", "Structure", "100", "1.2 s"),
        ("now", "Latents", "25", "3 / 12"),
        ("next", "Splat", "0", ""),
        ("next", "Turntable", "0", ""),
    ]
    assert "Sample 2 of 2" in text
    assert "Sample" not in views.progress(Progress(0, "image", 0, 1), 1, {})
    assert views.progress(None, 1, {}).count("next") == views.progress(Progress(0, "done", 1, 1), 1, {}).count("done")


# ---- handlers


def test_every_format_can_be_downloaded(handlers, upload):
    names = [name for _, name in handlers.formats]
    assert set(names) >= {"ply", "splat", "spz", "sog", "glb", "html", "obj", "png", "mp4", "gif", "webp"}
    names.remove("obj")  # looking for a surface takes long
    files = handlers.generate(upload, formats=names, steps=1, request=user("a"))
    assert [path.rsplit(".", 1)[1] for path in files] == names
    for path in files:
        if path.endswith((".ply", ".splat", ".spz", ".sog", ".glb")):
            assert len(load(path)) > 0
        elif path.endswith((".png", ".gif", ".webp")):
            Image.open(path).verify()


def test_the_page_shows_each_stage_and_then_the_splat(handlers, upload):
    import gradio as gr

    shown = list(handlers.run(upload, 0, 2, False, 2, 1.0, user("a")))
    assert all(len(values) == 6 for values in shown)
    progress, viewers, galleries, videos, _, downloads = (
        [value for value in column if value is not None and value != gr.skip()] for column in zip(*shown, strict=True)
    )
    titles = [re.search(r'title="(.*?)"', text)[1] for text in viewers if "iframe" in text]
    assert titles == ["occupied voxels, to turn and zoom", "ball, to turn and zoom"] * 2
    assert "2 / 2" in "".join(progress)
    assert progress[-1].count('class="done"') == 6
    assert len(galleries[-1]["value"]) == 2
    assert videos[-1].endswith("ball-1.mp4")
    assert downloads[-1]["value"].endswith("ball-1.ply")
    chosen = list(handlers.choose(user("a"), SimpleNamespace(index=0)))
    assert chosen[0][3]["value"].endswith("ball-0.ply")
    assert chosen[1][1].endswith("ball-0.mp4")
    *_, button = handlers.write("spz", user("a"))
    assert button["value"].endswith("ball-0.spz")


def test_users_do_not_see_each_other(handlers, upload):
    import gradio as gr

    list(handlers.run(upload, 0, 1, False, 1, 1.0, user("a")))
    with pytest.raises(gr.Error, match="there is no object yet"):
        list(handlers.write("ply", user("b")))
    handlers.forget(user("a"))
    handlers.sessions.grace = 0
    handlers.sessions.sweep()
    assert not list(handlers.sessions.root.rglob("*.ply"))
    with pytest.raises(gr.Error, match="there is no object yet"):
        list(handlers.write("ply", user("a")))


def test_users_mistakes_are_told_without_folders(handlers, upload, monkeypatch):
    import gradio as gr

    with pytest.raises(gr.Error, match="expected one of ply"):
        handlers.generate(upload, formats=["../../etc"], request=user("a"))

    def refuse(image):
        raise InputError(f"{handlers.sessions.root}/abc/d/ball.png and {handlers.sessions.root}/x are no good")

    monkeypatch.setattr(handlers.pipeline, "cut_out", refuse)
    with pytest.raises(gr.Error) as caught:
        handlers.cut_out(upload, user("a"))
    assert caught.value.message == "ball.png and x are no good"


def test_faults_are_logged_and_not_told(handlers, upload, monkeypatch, caplog):
    import gradio as gr

    def fail(image):
        raise RuntimeError("secret")

    monkeypatch.setattr(handlers.pipeline, "cut_out", fail)
    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error, match="its log says why") as caught:
        handlers.cut_out(upload, user("a"))
    assert "secret" not in caught.value.message
    assert "secret" in caplog.text
    assert handlers.cut_out(None, user("a")) is None

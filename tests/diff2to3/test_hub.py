"""Pipelines from and to the Hub, over HTTP with a Hub of our own: no network, the real client."""

import json
import os
import subprocess
import sys

import hub_server
import pytest
from diff2to3 import Pipeline
from diff2to3._errors import PipelineFormatError
from diff2to3._locate import locate
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, ImageDraw

NAME = "somebody/chairs"


@pytest.fixture
def hub(micro_pipeline, monkeypatch, tmp_path):
    """The Hub with one repository of two commits, and an empty cache of this client."""
    hub = hub_server.Hub()
    files = {path.name: path.read_bytes() for path in micro_pipeline.iterdir()}
    hub.first = hub.commit(NAME, {**files, "README.md": b"old", "big/other.safetensors": b"not ours"})
    hub.second = hub.commit(NAME, {**files, "README.md": b"new"})
    with hub_server.serving(hub) as hub.address:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.cache = tmp_path / "cache"
        yield hub


def commits_of(hub):
    return {path.name for path in hub.cache.glob("*/snapshots/*")}


def test_loading_by_id(hub):
    pipeline = Pipeline.from_pretrained(NAME, device="cpu")
    assert (pipeline.config.name, pipeline.revision) == ("micro", hub.second)
    assert pipeline.weight_hashes()
    assert commits_of(hub) == {hub.second}


def test_a_revision_is_pinned(hub):
    pinned = Pipeline.from_pretrained(NAME, revision=hub.first, device="cpu")
    assert pinned.revision == hub.first
    assert (locate(NAME, hub.first) / "README.md").read_text() == "old"
    assert not (locate(NAME, hub.first) / "big").exists(), "a pipeline has no folders"
    assert commits_of(hub) == {hub.first}
    with pytest.raises(PipelineFormatError, match=r"'somebody/chairs at revision v9' .*RevisionNotFoundError"):
        locate(NAME, "v9")
    with pytest.raises(PipelineFormatError, match="revision 'v1' was given, but the embedded pipeline has none"):
        Pipeline.from_pretrained(revision="v1")
    with pytest.raises(PipelineFormatError, match="revision 'v1' was given, but tiny has none"):
        Pipeline.from_pretrained("tiny", revision="v1")


def test_without_a_network(hub, monkeypatch):
    expected = "the Hub's cache lacks it while downloads are off; run once with a network: hf download somebody/chairs"
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)  # what the environment variable sets
        with pytest.raises(PipelineFormatError, match=expected):
            locate(NAME, local_files_only=not offline)
    with pytest.raises(PipelineFormatError, match=f"{expected} --revision v1"):
        locate(NAME, "v1", local_files_only=True)
    folder = locate(NAME)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Pipeline.from_pretrained(NAME, device="cpu").revision == hub.second
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert Pipeline.from_pretrained(NAME, device="cpu", local_files_only=True).revision == hub.second
    assert hub.asked == []
    assert locate(NAME) == folder


def test_a_damaged_file_of_the_cache_is_named_and_fetched_again(hub):
    path = locate(NAME) / "backbone.safetensors"
    blob = path.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(PipelineFormatError) as caught:
        Pipeline.from_pretrained(NAME, device="cpu")
    assert f"delete {blob} and get it again" in str(caught.value)
    blob.unlink()
    Pipeline.from_pretrained(NAME, device="cpu")


def test_what_the_hub_refuses_is_worded(hub):
    with pytest.raises(PipelineFormatError) as caught:
        locate("nobody/nothing")
    assert "'nobody/nothing' is no directory here, and the Hub does not give it (RepositoryNotFound" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    hub.commit("somebody/else", {"config.json": b"{}"})
    with pytest.raises(PipelineFormatError, match=r"is not a pipeline: it has no pipeline\.json"):
        Pipeline.from_pretrained("somebody/else")


def test_pushed_and_loaded_again(hub, micro_pipeline):
    pipeline = Pipeline.from_pretrained(micro_pipeline, device="cpu")
    with pytest.raises(HfHubHTTPError, match="401"):
        pipeline.push_to_hub("me/mine", token="hf_fail")
    commit = pipeline.push_to_hub("me/mine", private=True, message="first", token="hf_pass")
    assert "private" in json.dumps(hub.created["me/mine"])  # a flag or a value, as the client's version has it
    again = Pipeline.from_pretrained("me/mine", device="cpu")
    assert again.revision == commit
    assert again.weight_hashes().keys() == pipeline.weight_hashes().keys()
    assert again.config == pipeline.config
    card = hub.files("me/mine", "main")[1]["README.md"].decode()
    assert "library_name: diff2to3" in card
    assert 'Pipeline.from_pretrained("me/mine")' in card


def test_pushing_again_replaces_the_pipeline_and_nothing_else(hub, micro_pipeline):
    old = {"latent_encoder.safetensors": b"of the old decoder", "README.md": b"my words", "notes.txt": b"mine"}
    before = hub.commit("me/mine", old)
    hub.created["me/mine"] = {}
    pipeline = Pipeline.from_pretrained(micro_pipeline, device="cpu")
    commit = pipeline.push_to_hub("me/mine", revision="next", token="hf_pass")
    files = hub.files("me/mine", "next")[1]
    assert (files["README.md"], files["notes.txt"]) == (b"my words", b"mine")
    assert "latent_encoder.safetensors" not in files
    assert hub.branches["me/mine"] == {"main": before, "next": commit}
    assert Pipeline.from_pretrained("me/mine", revision="next", device="cpu").revision == commit


def test_command_line(hub, tmp_path):
    """Downloads with progress, pins what it used in the manifest, and makes the same again after the branch went on."""
    image = Image.new("RGBA", (96, 80))
    ImageDraw.Draw(image).ellipse((20, 10, 70, 60), fill=(200, 30, 40, 255))
    image.save(tmp_path / "ball.png")
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_CACHE": str(hub.cache),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }

    def run(*arguments, **changes):
        command = [sys.executable, "-m", "diff2to3", "generate", *map(str, arguments), "--format", "ply"]
        return subprocess.run(command, capture_output=True, text=True, env=environment | changes, timeout=280)

    made = run(tmp_path / "ball.png", "--pipeline", NAME, "--revision", "main", "-o", tmp_path / "a", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["revision"] == hub.second
    assert "Fetching 6 files: 100%" in made.stderr
    hub.commit(NAME, {"pipeline.json": b"{}"})
    (tmp_path / "ball.png").rename(tmp_path / "a" / "ball.png")  # found beside the manifest
    again = run("--from-manifest", tmp_path / "a" / "ball.json", "-o", tmp_path / "b", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a" / "ball.ply").read_bytes() == (tmp_path / "b" / "ball.ply").read_bytes()
    fresh = run(tmp_path / "a" / "ball.png", "--pipeline", NAME, "--revision", "v9", "-o", tmp_path / "c")
    assert (fresh.returncode, fresh.stdout, fresh.stderr.count("\n")) == (2, "", 1), fresh.stderr
    assert "at revision v9" in fresh.stderr

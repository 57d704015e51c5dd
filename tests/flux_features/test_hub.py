"""Downloads: announced, agreed to where the owner asks, and none where the cache has the files. Without a network."""

import logging
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from flux_features import DinoFeatures, DinoFeaturesConfig, FluxFeatures, FluxFeaturesConfig, load_extractor
from flux_features import _config as config_module
from flux_features.__main__ import main
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

SMALL_KL = FluxFeaturesConfig(architecture="kl", block_channels=(32, 32, 64, 64), shift=0.1159, scale=0.3611)
TAEF2 = FluxFeaturesConfig.preset("taef2")
DEV = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def hub(monkeypatch, tmp_path, kl):
    """A Hub with one repository's files, an empty cache, and a note of everything that was downloaded."""
    kl.autoencoder.save_pretrained(tmp_path / "vae")
    state = SimpleNamespace(downloaded=[], cached=set(), gated=False, licence="mit", error=None, folder=tmp_path)

    def download(repository, file, revision=None):
        if state.error is not None:
            raise state.error
        state.downloaded.append((repository, file, revision))
        state.cached.add((repository, file))
        return str(tmp_path / file)

    def look_up(repository, file, revision=None):
        return str(tmp_path / file) if (repository, file) in state.cached else None

    def describe(self, repository, revision=None):
        return SimpleNamespace(gated=state.gated, card_data={"license": state.licence})

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look_up)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", describe)
    return state


def test_files_are_announced(hub, caplog):
    with caplog.at_level(logging.WARNING, "flux_features"):
        model = FluxFeatures.from_pretrained("owner/flux", SMALL_KL, revision="r1")
    assert hub.downloaded == [
        ("owner/flux", "vae/diffusion_pytorch_model.safetensors", "r1"),
        ("owner/flux", "vae/config.json", "r1"),
    ]
    assert "downloading owner/flux from the Hugging Face Hub; licence of the weights: mit" in caplog.text
    assert model.config.scale == pytest.approx(0.18215)  # diffusers' default, as its config.json states


def test_gated_weights_need_consent(hub):
    with pytest.raises(PermissionError) as caught:
        FluxFeatures.from_pretrained(DEV, SMALL_KL)
    assert hub.downloaded == []
    message = str(caught.value)
    assert "FLUX.1 [dev] Non-Commercial License" in message
    assert f"https://huggingface.co/{DEV}" in message
    assert "pass accept_licence=True" in message
    FluxFeatures.from_pretrained(DEV, SMALL_KL, accept_licence=True)
    assert len(hub.downloaded) == 2


def test_of_unknown_repositories_the_hub_says_whether_they_are_gated(hub):
    hub.gated, hub.licence = "manual", "own-terms"
    with pytest.raises(PermissionError, match="asks for consent to the licence \\(own-terms\\)"):
        FluxFeatures.from_pretrained("owner/flux", SMALL_KL)
    assert hub.downloaded == []


def test_what_the_cache_has_needs_neither_hub_nor_consent(hub):
    hub.cached = {(DEV, "vae/diffusion_pytorch_model.safetensors"), (DEV, "vae/config.json")}
    FluxFeatures.from_pretrained(DEV, SMALL_KL)
    assert hub.downloaded == []
    hub.cached.pop()
    with pytest.raises(PermissionError, match="not downloaded"):
        FluxFeatures.from_pretrained(DEV, SMALL_KL)


def test_errors_of_the_hub(hub, monkeypatch):
    hub.error = GatedRepoError.__new__(GatedRepoError)  # its constructor wants a response of the server
    with pytest.raises(PermissionError, match=r"accept it at https://huggingface\.co/owner/flux"):
        FluxFeatures.from_pretrained("owner/flux", SMALL_KL)
    hub.error = LocalEntryNotFoundError("offline")
    with pytest.raises(ConnectionError, match=r"taef2\.safetensors is not in the local cache"):
        FluxFeatures.from_pretrained("madebyollin/taef2", TAEF2)

    def offline(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(ConnectionError, match=r"owner/flux: no such directory here, and .* \(no route to host\)"):
        FluxFeatures.from_pretrained("owner/flux", SMALL_KL)


@pytest.fixture
def dino_hub(hub):
    """The same with a tiny DINOv2 in its repositories."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        transformers.Dinov2WithRegistersModel(config).save_pretrained(hub.folder)
    return hub


def test_dino_downloads_when_asked_only(dino_hub, caplog):
    default = DinoFeaturesConfig().source
    with pytest.raises(FileNotFoundError, match=f"{default} is not on this machine: run 'hf download {default}'"):
        DinoFeatures(DinoFeaturesConfig())
    assert dino_hub.downloaded == []
    with caplog.at_level(logging.WARNING, "flux_features"):
        extractor = DinoFeatures.from_pretrained(default, revision="r1")
    assert "downloading facebook/dinov2-with-registers-large from the Hugging Face Hub; licence" in caplog.text
    assert dino_hub.downloaded == [(default, "config.json", "r1"), (default, "model.safetensors", "r1")]
    assert (extractor.channels, extractor.image_size, extractor.config.source) == (32, 518, default)
    DinoFeatures(DinoFeaturesConfig())  # the cache has it now
    dino_hub.gated = "auto"
    with pytest.raises(PermissionError, match=r"owner/dino: not downloaded, .* pass accept_licence=True"):
        DinoFeatures.from_pretrained("owner/dino")
    assert len(dino_hub.downloaded) == 2


def test_load_extractor_by_id(dino_hub, monkeypatch):
    """What well-known ids are is known; of others it is said."""
    asked = []

    def agree(repository, terms):
        asked.append((repository, terms.licence))
        return len(asked) > 1

    monkeypatch.setitem(config_module._PRESETS, "paper", SMALL_KL)
    with pytest.raises(PermissionError, match="Non-Commercial"):
        load_extractor(DEV, accept_licence=agree)
    assert dino_hub.downloaded == []
    assert isinstance(load_extractor(DEV, accept_licence=agree), FluxFeatures)
    assert asked == [(DEV, "FLUX.1 [dev] Non-Commercial License")] * 2
    assert isinstance(load_extractor(DinoFeaturesConfig().source), DinoFeatures)
    timm = load_extractor("timm/vit_large_patch14_reg4_dinov2.lvd142m", library="timm")
    assert timm.config.library == "timm"
    with pytest.raises(
        ValueError, match=r"owner/x: no such file or directory; of Hub ids known are .* by preset: paper, "
    ):
        load_extractor("owner/x")
    assert isinstance(load_extractor("owner/x", "dino"), DinoFeatures)
    assert isinstance(load_extractor("owner/y", "paper"), FluxFeatures)
    with pytest.raises(ValueError, match="no FluxFeaturesConfig preset 'huge'"):
        load_extractor("owner/x", "huge")


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), ("", False), ("no", False), (None, False)])
def test_command_asks_on_a_terminal(hub, monkeypatch, capsys, answer, agreed):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))

    def reply():
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    assert main(["download", DEV]) == (0 if agreed else 2)
    assert bool(hub.downloaded) == agreed
    printed = capsys.readouterr()
    assert "FLUX.1 [dev] Non-Commercial License" in printed.err
    assert agreed == ("not downloaded" not in printed.err)


def test_command_without_a_terminal(hub, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    assert main(["download", DEV]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert hub.downloaded == []
    assert main(["download", DEV, "--accept-licence"]) == 0
    assert len(hub.downloaded) == 2
    assert main(["download", "owner/flux"]) == 2
    assert "for others say what they have by preset" in capsys.readouterr().err
    assert main(["download", "owner/flux", "--preset", "paper"]) == 0
    assert main(["download", "owner/flux", "--preset", "huge"]) == 2
    assert main(["download", "owner/dino", "--preset", "dino"]) == 0
    assert hub.downloaded[-1] == ("owner/dino", "model.safetensors", None)

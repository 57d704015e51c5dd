"""Downloads: announced, agreed to where the owner asks, and none where the cache has the files. Without a network."""

import logging
from types import SimpleNamespace

import huggingface_hub
import pytest
from flux_features import DinoFeatures, DinoFeaturesConfig, FluxFeatures, FluxFeaturesConfig
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

    def download(repository, file, revision=None, local_files_only=False):
        if state.error is not None:
            raise state.error
        if not local_files_only:
            state.downloaded.append((repository, file, revision))
        assert not local_files_only or (repository, file) in state.cached
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


def test_dino_is_announced_too(hub, caplog):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="no DINOv2 weights there"), caplog.at_level("WARNING", "flux_features"):
        DinoFeatures(DinoFeaturesConfig())
    source = DinoFeaturesConfig().source
    assert f"downloading {source} from the Hugging Face Hub" in caplog.text
    assert hub.downloaded == [(source, "config.json", None), (source, "model.safetensors", None)]
    assert DinoFeatures.is_available(DinoFeaturesConfig()).startswith(f"{source} is not on this machine: run 'hf")
    hub.cached |= {(source, file) for file in ("config.json", "model.safetensors")}
    assert DinoFeatures.is_available(DinoFeaturesConfig()) is None
    assert len(hub.downloaded) == 2
    hub.gated = "auto"
    with pytest.raises(PermissionError, match="then run 'hf download owner/dino'"):
        DinoFeatures(DinoFeaturesConfig(source="owner/dino"))


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), ("", False), ("no", False), (None, False)])
def test_command_asks_on_a_terminal(hub, monkeypatch, capsys, answer, agreed):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))

    def reply(prompt):
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    assert main(["download", DEV]) == (0 if agreed else 2)
    assert bool(hub.downloaded) == agreed
    printed = capsys.readouterr()
    assert "FLUX.1 [dev] Non-Commercial License" in printed.out
    assert agreed or "nothing was downloaded" in printed.err


def test_command_without_a_terminal(hub, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    assert main(["download", DEV]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert hub.downloaded == []
    assert main(["download", DEV, "--accept-licence"]) == 0
    assert len(hub.downloaded) == 2
    assert main(["download", "owner/flux"]) == 2
    assert "owner/flux: pass --preset" in capsys.readouterr().err
    assert main(["download", "owner/flux", "--preset", "paper"]) == 0
    assert main(["download", "owner/flux", "--preset", "huge"]) == 2

"""Files of published autoencoder weights: where they are, what their tensors are called, and strict loading.

Layouts read here, told apart by the names of the tensors:

- diffusers (``AutoencoderKL``, ``AutoencoderTiny``): the names that the modules here have;
- black-forest-labs (``ae.safetensors``): github.com/black-forest-labs/flux, ``modules/autoencoder.py``, and flux2,
  ``autoencoder.py``;
- taesd (``taef2_encoder.safetensors`` and ``taef2_decoder.safetensors``): github.com/madebyollin/taesd, ``taesd.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flux_features._config import FluxFeaturesConfig
from flux_features._hub import hub_files

_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# A diffusers name of AutoencoderKL -> its black-forest-labs name; applied in this order.
_BFL_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\bdown_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"\bdown_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    # Their decoder counts resolutions from the finest, diffusers from the coarsest.
    (r"\bup_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"\bup_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"\bmid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"\bmid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"\bmid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"\bmid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"\bconv_shortcut\b", "nin_shortcut"),
    (r"\bconv_norm_out\b", "norm_out"),
    (r"^quant_conv\b", "encoder.quant_conv"),
    (r"^post_quant_conv\b", "decoder.post_quant_conv"),
)
_BATCH_NORM = ("bn.running_mean", "bn.running_var")  # of FLUX.2, under both names
_BATCH_NORM_EPSILON = 1e-4  # FLUX.2's, also where no config.json states it


def bfl_name(name: str) -> str:
    """What black-forest-labs call the tensor that diffusers' ``AutoencoderKL`` calls ``name``."""
    for pattern, replacement in _BFL_RULES:
        name = re.sub(pattern, replacement, name)
    return name


def taesd_name(name: str) -> str:
    """``encoder.layers.3.x`` -> ``encoder.3.x``; the decoder's are one up: taesd.py counts its clamp as a layer."""
    part, _, index, rest = name.split(".", 3)
    return f"{part}.{int(index) + (part == 'decoder')}.{rest}"


def hub_names(config: FluxFeaturesConfig) -> list[str]:
    """Files of a Hub repository that has weights of this layout."""
    if config.architecture != "tiny":
        return [f"vae/{_DIFFUSERS_FILE}", "vae/config.json"]
    return ["taef2.safetensors"] if config.normalised_blocks else [_DIFFUSERS_FILE, "config.json"]


def find_files(
    source: str | Path, config: FluxFeaturesConfig, revision: str | None, accept_licence: bool
) -> tuple[list[Path], Path | None]:
    """Weight files and the ``config.json`` beside them, if there is one.

    Args:
        source: a file, a directory or a Hub id.
        config: layout of the weights; of a tiny one encoder and decoder may be files of their own.
        revision: Hub revision.
        accept_licence: consent to the licence of a gated repository.
    """
    path, is_tiny = Path(source), config.architecture == "tiny"
    if path.is_file():
        return _with_sibling(path) if is_tiny else [path], None
    if path.is_dir():
        return _in_directory(path, is_tiny)
    if path.suffix == ".safetensors" or not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{source}: no such file or directory, and not a Hub id such as 'owner/name'")
    weights, *config_file = hub_files(str(source), hub_names(config), revision, accept_licence)
    return [weights], config_file[0] if config_file else None


def published_numbers(
    architecture: str, tensors: dict[str, Tensor], config_file: Path | None, where: str
) -> dict[str, Any]:
    """Fields of ``FluxFeaturesConfig`` that come with the weights; nothing where nothing is stated.

    Of FLUX.1 and the tiny ones ``scale`` and ``shift``, as a diffusers ``config.json`` states them. Of FLUX.2
    ``channel_mean`` and ``channel_std``, from its batch norm over 2x2 patches, whose tensors are taken out of
    ``tensors``.
    """
    stated = _read_config(config_file)
    if architecture != "kl2":
        names = {"scale": "scaling_factor", "shift": "shift_factor"}
        return {ours: float(stated[theirs]) for ours, theirs in names.items() if stated.get(theirs) is not None}
    if absent := [name for name in _BATCH_NORM if name not in tensors]:
        raise ValueError(f"{where}: not FLUX.2's autoencoder: it has no tensor {absent[0]}")
    mean, variance = (tensors.pop(name).double() for name in _BATCH_NORM)
    tensors.pop("bn.num_batches_tracked", None)
    deviation = (variance + float(stated.get("batch_norm_eps", _BATCH_NORM_EPSILON))).sqrt()
    return {"channel_mean": tuple(mean.tolist()), "channel_std": tuple(deviation.tolist())}


def _read_config(config_file: Path | None) -> dict[str, Any]:
    if config_file is None:
        return {}
    try:
        stated = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file}: not a JSON file ({error})") from error
    if not isinstance(stated, dict):
        raise ValueError(f"{config_file}: expected a JSON object, got {type(stated).__name__}")
    return stated


def load_strictly(model: nn.Module, found: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a ``TinyAutoencoder`` or an ``AutoencoderKL``, whatever the layout.

    Args:
        model: the autoencoder.
        found: tensors by their names in the files.
        where: the files, for errors.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; they are named as in the file.
    """
    rename = _layout(found)
    own = model.state_dict()
    expected = {name: rename(name) for name in own}
    missing = sorted(set(expected.values()) - found.keys())
    unexpected = sorted(found.keys() - set(expected.values()))
    if missing or unexpected:
        parts = [
            f"{len(names)} tensors {what}, first {names[0]}"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(f"{where}: not the weights of this autoencoder: {'; '.join(parts)}")
    converted: dict[str, Tensor] = {}
    for name, theirs in expected.items():
        value, shape = found[theirs], own[name].shape
        if value.shape != shape and value.shape == (*shape, 1, 1):  # attention by 1x1 convolutions
            value = value.reshape(shape)
        if value.shape != shape:
            raise ValueError(
                f"{where}: {theirs} has the shape {tuple(value.shape)}, expected {tuple(shape)}; "
                "these are the weights of another autoencoder"
            )
        converted[name] = value
    model.load_state_dict(converted)


def _layout(names: Mapping[str, Any]) -> Callable[[str], str]:
    if any(re.search(r"\.(down|up|mid)\.", name) for name in names):
        return bfl_name
    if any(re.match(r"(encoder|decoder)\.\d", name) for name in names):
        return taesd_name
    return str


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files; those of a taesd pair with ``encoder.`` and ``decoder.`` before their names.

    Raises:
        ValueError: a file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
        half = re.search(r"_(encoder|decoder)$", file.stem) if len(files) > 1 else None
        found |= {f"{half[1]}.{name}": value for name, value in tensors.items()} if half else tensors
    return found


def _in_directory(folder: Path, is_tiny: bool) -> tuple[list[Path], Path | None]:
    for place in (folder / "vae", folder):
        if (place / _DIFFUSERS_FILE).is_file():
            config = place / "config.json"
            return [place / _DIFFUSERS_FILE], config if config.is_file() else None
    single = folder / "ae.safetensors"
    if not is_tiny and single.is_file():
        return [single], None
    encoders = sorted(folder.glob("*_encoder.safetensors")) if is_tiny else []
    if len(encoders) == 1:
        return _with_sibling(encoders[0]), None
    if encoders:
        raise ValueError(
            f"{folder}: has several encoders ({', '.join(e.name for e in encoders)}); name one of the files"
        )
    wanted = "a pair *_encoder.safetensors and *_decoder.safetensors" if is_tiny else "ae.safetensors"
    raise FileNotFoundError(f"{folder}: has neither {_DIFFUSERS_FILE} (here or in vae/) nor {wanted}")


def _with_sibling(file: Path) -> list[Path]:
    """The encoder's and the decoder's file of a taesd pair, given one of them; any other file alone."""
    if not file.stem.endswith(("_encoder", "_decoder")):
        return [file]
    pair = [file.with_name(f"{file.stem[:-8]}_{half}{file.suffix}") for half in ("encoder", "decoder")]
    for part in pair:
        if not part.is_file():
            raise FileNotFoundError(
                f"{part}: no such file; {file.name} is one half of an autoencoder, the other is needed"
            )
    return pair

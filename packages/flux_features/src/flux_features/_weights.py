"""Files of published autoencoder weights: where they are, what their tensors are called, and strict loading.

Layouts read here, told apart by the names of the tensors:

- diffusers (``AutoencoderKL``, ``AutoencoderTiny``): the names that the modules here have;
- black-forest-labs (``ae.safetensors``): github.com/black-forest-labs/flux, ``modules/autoencoder.py``, and flux2,
  ``autoencoder.py``;
- taesd (``taef2_encoder.safetensors`` and ``taef2_decoder.safetensors``): github.com/madebyollin/taesd, ``taesd.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _flux_features_weights import PUBLISHED
from _gs_render_reading import read_json as bounded_json
from _gs_render_reading import why_missing, why_unreadable
from pydantic import ValidationError
from torch import Tensor, nn

from flux_features._config import FluxFeaturesConfig

_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
OWN_FILE = "model.safetensors"  # beside a config.json with the fields of FluxFeaturesConfig

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


def published_config(source: str | Path) -> FluxFeaturesConfig | None:
    """The layout of well-known weights by their Hub id; None for other places."""
    presets = {entry.source: entry.preset for entry in PUBLISHED if entry.component == "flux"}
    return FluxFeaturesConfig.preset(presets[str(source)]) if str(source) in presets else None


def hub_names(config: FluxFeaturesConfig) -> list[str]:
    """Files of a Hub repository that has weights of this layout, the tensors first."""
    if config.architecture != "tiny":
        return [f"vae/{_DIFFUSERS_FILE}", "vae/config.json"]
    return ["taef2.safetensors"] if config.normalised_blocks else [_DIFFUSERS_FILE, "config.json"]


def find_files(source: str | Path) -> tuple[list[Path], Path | None]:
    """Weight files at a local place, and the ``config.json`` beside them, if there is one.

    Args:
        source: a file or a directory; of a tiny one encoder and decoder may be files of their own.
    """
    path = Path(source)
    if path.is_file():
        return _with_sibling(path), None
    for place in (path / "vae", path):
        for name in (_DIFFUSERS_FILE, OWN_FILE):
            if (place / name).is_file():
                config = place / "config.json"
                return [place / name], config if config.is_file() else None
    if (path / "ae.safetensors").is_file():
        return [path / "ae.safetensors"], None
    encoders = sorted(path.glob("*_encoder.safetensors"))
    if len(encoders) == 1:
        return _with_sibling(encoders[0]), None
    if encoders:
        raise ValueError(f"{path}: has several encoders ({', '.join(e.name for e in encoders)}); name one of the files")
    for name in ("vae/" + _DIFFUSERS_FILE, _DIFFUSERS_FILE, OWN_FILE, "ae.safetensors"):
        if reason := why_missing(path / name):
            raise ValueError(reason)
    raise FileNotFoundError(
        f"{path}: has no weights: neither {_DIFFUSERS_FILE} (here or in vae/) nor {OWN_FILE} nor ae.safetensors nor a "
        "pair *_encoder.safetensors and *_decoder.safetensors"
    )


def own_config(config_file: Path | None) -> FluxFeaturesConfig | None:
    """The config of a model folder that diff2to3 wrote; None where ``config.json`` is of another kind.

    Raises:
        ValueError: the file cannot be read.
    """
    if config_file is None:
        return None
    try:
        return FluxFeaturesConfig.model_validate(read_json(config_file))
    except ValidationError:
        return None


def config_of(tensors: Mapping[str, Tensor], where: str) -> FluxFeaturesConfig:
    """The preset whose layout the tensors have.

    Raises:
        ValueError: their names are those of no autoencoder.
    """
    if _BATCH_NORM[0] in tensors:
        return FluxFeaturesConfig.preset("flux2")
    if any(re.match(r"encoder\.(down|mid)(_block|\.)", name) for name in tensors):
        return FluxFeaturesConfig.preset("paper")
    for name, value in tensors.items():
        if re.fullmatch(r"decoder\.(layers\.0|1)\.weight", name):
            return FluxFeaturesConfig.preset("taef2" if value.shape[1:2] == (32,) else "taef1")
    raise ValueError(f"{where}: not the weights of an autoencoder: its first tensor is {min(tensors, default='none')}")


def published_numbers(
    architecture: str, tensors: dict[str, Tensor], config_file: Path | None, where: str
) -> dict[str, Any]:
    """Fields of ``FluxFeaturesConfig`` that come with the weights; nothing where nothing is stated.

    Of FLUX.1 and the tiny ones ``scale`` and ``shift``, as a diffusers ``config.json`` states them. Of FLUX.2
    ``channel_mean`` and ``channel_std``, from its batch norm over 2x2 patches, whose tensors are taken out of
    ``tensors``.
    """
    stated = read_json(config_file) if config_file is not None else {}
    if architecture != "kl2":
        names = {"scale": "scaling_factor", "shift": "shift_factor"}
        return {ours: float(stated[theirs]) for ours, theirs in names.items() if stated.get(theirs) is not None}
    if absent := [name for name in _BATCH_NORM if name not in tensors]:
        raise ValueError(f"{where}: not FLUX.2's autoencoder: it has no tensor {absent[0]}")
    mean, variance = (tensors.pop(name).double() for name in _BATCH_NORM)
    tensors.pop("bn.num_batches_tracked", None)
    deviation = (variance + float(stated.get("batch_norm_eps", _BATCH_NORM_EPSILON))).sqrt()
    return {"channel_mean": tuple(mean.tolist()), "channel_std": tuple(deviation.tolist())}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        stated = bounded_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(stated, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(stated).__name__}")
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
            raise ValueError(why_unreadable(file, error)) from error
        half = re.search(r"_(encoder|decoder)$", file.stem) if len(files) > 1 else None
        found |= {f"{half[1]}.{name}": value for name, value in tensors.items()} if half else tensors
    return found


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

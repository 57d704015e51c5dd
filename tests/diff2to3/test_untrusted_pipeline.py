"""A pipeline directory from elsewhere: it may be wrong, huge or hostile, and is refused with its reason."""

import json
import os
import pickle
import resource
import shutil
import time

import pytest
import torch
from _gs_render_reading import MAX_JSON_BYTES, MAX_JSON_DEPTH, read_json
from diff2to3 import Pipeline
from diff2to3._errors import InputError
from diff2to3._manifest import read_manifest
from diff2to3._store import read_config
from safetensors.torch import load_file
from smdit import StructureDiTConfig

PICKLE = "is a pickle, which can run any program when it is read"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def folder(micro_pipeline, tmp_path):
    return shutil.copytree(micro_pipeline, tmp_path / "pipeline")


def change(folder, role, **fields):
    """Overwrite settings of a component; a dotted name reaches into a nested one."""
    path = folder / "pipeline.json"
    contents = json.loads(path.read_text())
    for name, value in fields.items():
        target = contents["roles"][role]["config"]
        *parents, last = name.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    path.write_text(json.dumps(contents))


def refused(folder, match):
    """Loading fails soon, with one line, and takes no memory to speak of."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(InputError, match=match) as caught:
        Pipeline.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("role", "fields", "match"),
    [
        ("backbone", {"num_single_blocks": 10**9}, "num_single_blocks"),
        ("backbone", {"grid_size": 2**20}, "grid_size"),
        ("backbone", {"width": 2**40, "num_heads": 2**36}, "width"),
        ("backbone", {"mlp_ratio": 1e12}, "mlp_ratio"),
        ("backbone", {"mlp_ratio": float("inf")}, "mlp_ratio"),
        ("backbone", {"io_channels": [16] * 9}, "io_channels"),
        ("structure", {"sampler__steps": 10**9}, "steps"),
        ("structure", {"decoder__grid_size": 2**20}, "grid_size"),
        ("structure", {"decoder__num_res_blocks": 10**7}, "num_res_blocks"),
        ("latent_decoder", {"gaussians__num_gaussians": 10**9}, "num_gaussians"),
        ("latent_decoder", {"gaussians__means_multiplier": float("nan")}, "means_multiplier"),
        ("feature_extractor", {"image_size": 2**20}, "image_size"),
        ("feature_extractor", {"encoder_blocks": [10**6] * 4}, "encoder_blocks"),
    ],
)
def test_sizes_out_of_range(folder, role, fields, match):
    change(folder, role, **fields)
    refused(folder, match)


@pytest.mark.parametrize(
    ("role", "fields"),
    [
        ("backbone", {"width": 1 << 16, "num_heads": 1 << 12}),  # one layer of it has 7e10 parameters
        ("backbone", {"num_single_blocks": 1024}),
        ("backbone", {"mlp_ratio": 64.0, "num_double_blocks": 1000}),
        ("structure", {"flow__num_double_blocks": 1024}),
        ("structure", {"decoder__decoder_channels": [1 << 16, 1 << 16]}),
        ("latent_decoder", {"width": 1 << 16}),
        ("latent_decoder", {"num_blocks": 1024}),
        ("feature_extractor", {"encoder_blocks": [1024] * 4}),
    ],
)
def test_no_model_is_larger_than_its_weights(folder, role, fields):
    """Each size is in its range, and their product is more than there are weights, up to 1e13 parameters."""
    change(folder, role, **fields)
    refused(folder, "the config asks for a model of more than|not enough memory")


def test_the_limit_ends_with_the_block_and_is_of_one_thread(folder):
    from concurrent.futures import ThreadPoolExecutor

    from diff2to3._parameter_limit import TooManyParametersError, no_larger_than

    weights = folder / "structure.safetensors"
    large = weights.stat().st_size
    with pytest.raises(TooManyParametersError, match="more than"), no_larger_than(weights):
        torch.nn.Linear(large, 1)
    with no_larger_than(weights), ThreadPoolExecutor(1) as other:
        torch.nn.Linear(8, 8)
        other.submit(torch.nn.Linear, large, 1).result()
    torch.nn.Linear(large, 1)


@pytest.mark.parametrize("read", [read_config, lambda folder: read_manifest(folder / "pipeline.json")])
@pytest.mark.parametrize(
    "text",
    [
        b" " * (MAX_JSON_BYTES + 1),
        b"[" * 100_000,
        b'{"a":' * (MAX_JSON_DEPTH + 1) + b"1" + b"}" * (MAX_JSON_DEPTH + 1),
        b"9" * 5000,
        b"\xff\xfe{}",
        b"{",
        b"",
        b"[]",
        b"null",
        b'{"name": "x", "roles": {}, "unknown": 1}',
    ],
    ids=lambda text: text[:12].decode("latin1"),
)
def test_descriptions_are_bounded(folder, read, text):
    (folder / "pipeline.json").write_bytes(text)
    with pytest.raises(InputError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_limits_are_those_of_bytes_and_of_depth(tmp_path):
    """Of JSON that is right but for its size, and at the limit."""
    path = tmp_path / "a.json"
    for text, reason in (
        ("[]" + " " * (MAX_JSON_BYTES - 1), "more than 4,194,304 bytes"),
        ("[" * (MAX_JSON_DEPTH + 2) + "]" * (MAX_JSON_DEPTH + 2), "deeper than 32"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_json(path)
    path.write_text("[]" + " " * (MAX_JSON_BYTES - 2))
    assert read_json(path) == []


def test_a_description_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")  # reading it would wait for ever
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zeros.json", "."):
        with pytest.raises((ValueError, OSError), match=r"no file|directory"):
            read_json(tmp_path / name)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH)
    assert read_json(deep)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".pkl"])
def test_a_pickle_beside_the_place_of_weights_is_named(folder, suffix):
    weights = folder / "backbone.safetensors"
    torch.save(load_file(weights), weights.with_suffix(suffix))
    weights.unlink()
    refused(folder, rf"backbone\{suffix} {PICKLE}")


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_a_pickle_under_the_name_of_safetensors_is_not_run(folder, tmp_path, protocol):
    weights, trace = folder / "structure.safetensors", tmp_path / "ran"
    if protocol is None:
        torch.save({"a": Bomb(trace)}, weights)
    else:
        weights.write_bytes(pickle.dumps(Bomb(trace), protocol))
    refused(folder, PICKLE)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # the bomb works


def test_links_are_followed_when_reading_and_replaced_when_writing(folder, tmp_path):
    """The Hub's cache is made of links. A link in an output folder must not lead a write elsewhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in list(folder.iterdir()):
        (outside / path.name).write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(outside / path.name)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    pipeline = Pipeline.from_pretrained(folder, device="cpu")
    pipeline.save_pretrained(folder, dtype="float32")
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_a_component_cannot_be_named_as_a_path(folder):
    path = folder / "pipeline.json"
    for name in ("../evil", "/etc/passwd", "os:system", "smdit\0", "a:b:c", ""):
        contents = json.loads(path.read_text())
        contents["roles"]["backbone"]["name"] = name
        path.write_text(json.dumps(contents))
        refused(folder, "backbone")
    contents["roles"]["../x"] = contents["roles"].pop("structure")
    path.write_text(json.dumps(contents))
    refused(folder, "unknown roles")


def test_a_position_table_is_bounded():
    """It is no parameter, so the weights do not bound it."""
    sizes = {"width": 1024, "num_heads": 16, "num_blocks": 1}
    with pytest.raises(ValueError, match="position table of more than 1 GB"):
        StructureDiTConfig(grid_size=512, **sizes)
    assert StructureDiTConfig(grid_size=512, patch_size=8, **sizes)

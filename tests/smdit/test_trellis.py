"""Checkpoints in TRELLIS's layout: a .json with name and arguments beside a .safetensors."""

import json

import pytest
import torch
from safetensors.torch import save_file
from smdit import CrossDiT, StructureDiT, load_trellis
from smdit._trellis import (
    TRELLIS_CROSS_BLOCK,
    TRELLIS_RES_BLOCK,
    TRELLIS_TRUNK,
    _numbered,
    cross_dit_config,
    structure_dit_config,
)

SPARSE = {
    "resolution": 16, "in_channels": 8, "out_channels": 8, "model_channels": 64, "cond_channels": 12, "num_blocks": 1,
    "num_heads": 4, "mlp_ratio": 4, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [16],
    "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True,
}  # fmt: skip
DENSE = {
    "resolution": 4, "in_channels": 8, "out_channels": 8, "model_channels": 64, "cond_channels": 12, "num_blocks": 1,
    "num_heads": 4, "mlp_ratio": 4, "patch_size": 1, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True,
}  # fmt: skip


def in_trellis_names(model, modules):
    """Our state dict under TRELLIS's names, in half precision as the public files are."""
    back = {ours: theirs for theirs, ours in modules.items()}
    state = {}
    for key, tensor in model.state_dict().items():
        module, _, parameter = key.rpartition(".")
        state[f"{back[module]}.{parameter}"] = tensor.half()
    return state


def sparse_checkpoint(awake):
    model = awake(CrossDiT(cross_dit_config(SPARSE)))
    modules = {**TRELLIS_TRUNK, "input_layer": "encoder.input", **_numbered("blocks", "blocks", 1, TRELLIS_CROSS_BLOCK)}
    modules |= _numbered("input_blocks", "encoder.blocks", 2, TRELLIS_RES_BLOCK)
    modules |= _numbered("out_blocks", "decoder.blocks", 2, TRELLIS_RES_BLOCK)
    return model, "SLatFlowModel", SPARSE, in_trellis_names(model, modules)


def dense_checkpoint(awake):
    model = awake(StructureDiT(structure_dit_config(DENSE)))
    modules = {**TRELLIS_TRUNK, "input_layer": "input", **_numbered("blocks", "blocks", 1, TRELLIS_CROSS_BLOCK)}
    state = in_trellis_names(model, modules) | {"pos_emb": model.positions.half()}
    return model, "SparseStructureFlowModel", DENSE, state


def write(folder, name, args, state):
    (folder / "flow.json").write_text(json.dumps({"name": name, "args": args}))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "flow.safetensors")
    return folder / "flow"


@pytest.mark.parametrize("make", [sparse_checkpoint, dense_checkpoint])
@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_checkpoint_files_load(make, suffix, tmp_path, awake):
    model, name, args, state = make(awake)
    loaded = load_trellis(f"{write(tmp_path, name, args, state)}{suffix}")
    assert type(loaded) is type(model)
    assert not loaded.training
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[key].half().float())


@pytest.mark.parametrize("make", [sparse_checkpoint, dense_checkpoint])
def test_nothing_may_be_missing_or_left_over(make, tmp_path, awake):
    _, name, args, state = make(awake)
    missing = {key: tensor for key, tensor in state.items() if key != "out_layer.bias"}
    with pytest.raises(ValueError, match=r"output\.bias"):
        load_trellis(write(tmp_path, name, args, missing))
    with pytest.raises(ValueError, match=r"no counterpart for 'extra\.weight'"):
        load_trellis(write(tmp_path, name, args, {**state, "extra.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match="without a counterpart here: window"):
        load_trellis(write(tmp_path, name, {**args, "window": 8}, state))
    with pytest.raises(ValueError, match="pe_mode='rope'"):
        load_trellis(write(tmp_path, name, {**args, "pe_mode": "rope"}, state))
    with pytest.raises(ValueError, match="'SLatEncoder', expected one of SLatFlowModel"):
        load_trellis(write(tmp_path, "SLatEncoder", args, state))
    with pytest.raises(ValueError, match="lack 'resolution'"):
        load_trellis(write(tmp_path, name, {k: v for k, v in args.items() if k != "resolution"}, state))
    with pytest.raises(ValueError, match="are of the wrong type"):
        load_trellis(write(tmp_path, name, {**args, "model_channels": "64", "num_heads": None}, state))
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_trellis(tmp_path / "other")


def test_variants_of_the_training_code_are_the_same_models(tmp_path, awake):
    model, name, args, state = sparse_checkpoint(awake)
    assert load_trellis(write(tmp_path, f"Elastic{name}", args, state)).config == model.config


def test_wrong_position_table_is_refused(tmp_path, awake):
    _, name, args, state = dense_checkpoint(awake)
    with pytest.raises(ValueError, match="pos_emb is not the sin/cos table"):
        load_trellis(write(tmp_path, name, args, {**state, "pos_emb": state["pos_emb"].flip(0)}))

"""Checkpoints in TRELLIS's layout: a .json with name and arguments beside a .safetensors."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from smdit import CrossDiT, StructureDiT, cross_dit_from_trellis, load_trellis, structure_dit_from_trellis
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


# The args of TRELLIS-image-large's two flows.
PUBLIC = {
    "model_channels": 1024, "cond_channels": 1024, "num_blocks": 24, "num_heads": 16, "mlp_ratio": 4, "in_channels": 8,
    "out_channels": 8, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True,
}  # fmt: skip
SLAT_FLOW_L = {**PUBLIC, "resolution": 64, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [128]}
STRUCTURE_FLOW_L = {**PUBLIC, "resolution": 16, "patch_size": 1}


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def residual_block(name, channels, out_channels, width):
    conv1, conv2 = ((out_channels, 3, 3, 3, c) for c in (channels, out_channels))
    layout = {f"{name}.norm1.{part}": (channels,) for part in ("weight", "bias")}
    layout |= {f"{name}.conv1.conv.weight": conv1, f"{name}.conv2.conv.weight": conv2}
    layout |= {f"{name}.conv{i}.conv.bias": (out_channels,) for i in (1, 2)}
    layout |= linear(f"{name}.emb_layers.1", 2 * out_channels, width)
    return layout if channels == out_channels else layout | linear(f"{name}.skip_connection", out_channels, channels)


def trellis_layout(args):
    """Key -> shape of a SLatFlowModel of one level or a SparseStructureFlowModel, written down from TRELLIS alone."""
    width, hidden = args["model_channels"], args["mlp_ratio"] * args["model_channels"]
    sparse = "io_block_channels" in args
    channels = args["io_block_channels"][0] if sparse else width
    cell = 1 if sparse else args["patch_size"] ** 3
    layout = linear("input_layer", channels, cell * args["in_channels"])
    layout |= linear("out_layer", cell * args["out_channels"], channels)
    layout |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    linears = {
        "adaLN_modulation.1": (6 * width, width),
        "self_attn.to_qkv": (3 * width, width),
        "self_attn.to_out": (width, width),
        "cross_attn.to_q": (width, width),
        "cross_attn.to_kv": (2 * width, args["cond_channels"]),
        "cross_attn.to_out": (width, width),
        "mlp.mlp.0": (hidden, width),
        "mlp.mlp.2": (width, hidden),
    }
    for name in (f"blocks.{i}" for i in range(args["num_blocks"])):
        for part, size in linears.items():
            layout |= linear(f"{name}.{part}", *size)
        layout |= {f"{name}.norm2.{part}": (width,) for part in ("weight", "bias")}
        gamma = (args["num_heads"], width // args["num_heads"])
        for attention, option in (("self_attn", "qk_rms_norm"), ("cross_attn", "qk_rms_norm_cross")):
            if args.get(option, False):
                layout |= {f"{name}.{attention}.{which}_rms_norm.gamma": gamma for which in "qk"}
    if not sparse:
        return layout | {"pos_emb": ((args["resolution"] // args["patch_size"]) ** 3, width)}
    layout |= residual_block("input_blocks.0", channels, channels, width)
    layout |= residual_block("input_blocks.1", channels, width, width)
    layout |= residual_block("out_blocks.0", 2 * width, channels, width)
    return layout | residual_block("out_blocks.1", 2 * channels, channels, width)


@pytest.mark.parametrize(
    ("build", "args", "millions"),
    [(cross_dit_from_trellis, SLAT_FLOW_L, 600.4), (structure_dit_from_trellis, STRUCTURE_FLOW_L, 555.5)],
    ids=["slat_flow_img_dit_L_64l8p2_fp16", "ss_flow_img_dit_L_16l8_fp16"],
)
def test_public_checkpoints_fit_tensor_by_tensor(build, args, millions):
    layout = trellis_layout(args)
    positions = layout.pop("pos_emb", None)  # compared by value, so it cannot be checked without data
    with torch.device("meta"):
        model = build(args, {key: torch.empty(shape, dtype=torch.float16) for key, shape in layout.items()})
    assert sum(math.prod(shape) for shape in layout.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert positions is None or model.positions.shape == positions
    misfit = {**layout, "blocks.23.mlp.mlp.0.weight": (4096, 1023)}
    with torch.device("meta"), pytest.raises(RuntimeError, match=r"blocks\.23\.mlp\.0\.weight"):
        build(args, {key: torch.empty(shape) for key, shape in misfit.items()})


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", ["d_ss_flow_patch1_qknorm", "d_ss_flow_patch2", "e_slat_flow_io64_qknorm", "e_slat_flow_io28_noqknorm"]
)
def test_written_down_layout_is_the_references(case, golden_cases):
    (found,) = golden_cases(case)
    layout = {key: tuple(tensor.shape) for key, tensor in found.part("weight").items()}
    assert trellis_layout(found.args) == layout

"""Equality with tensors of the reference implementation, within the tolerance of the golden notes."""

import pytest
import torch
from einops import rearrange
from sparse_vae import (
    AbsolutePositionEmbedding,
    MultiHeadRMSNorm,
    SparseConv3d,
    SparseTensor,
    Topology,
    TransformerBlock,
    downsample,
    from_trellis_config,
    from_trellis_state_dict,
    patchify,
    pixel_shuffle_3d,
    to_coords,
    unpatchify,
    upsample,
)
from sparse_vae._structure import ResBlock3d
from sparse_vae._trellis import _SPARSE_KEYS, _STRUCTURE_KEYS

pytestmark = pytest.mark.golden


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def place(case, grid_size):
    """Input features on their topology, and a function that brings results back to the order of the input rows."""
    topology, order = Topology.from_coords(case["input.coords"], grid_size)

    def restore(rows):
        result = torch.empty_like(rows)
        result[order] = rows
        return result

    return SparseTensor(case["input.feats"][order], topology), restore


def load(case, grid_size=64):
    model = from_trellis_config(case.trellis, grid_size)
    model.load_state_dict(from_trellis_state_dict(case.trellis, case.group("weight.")))
    return model.eval()


def test_slat_encoder(golden_cases):
    for case in golden_cases("a_"):
        x, restore = place(case, case.kwargs["resolution"])
        mean, logvar = (restore(value.features) for value in load(case)(x))
        case.close(mean, "output.mean")
        case.close(logvar, "output.logvar")
        case.close(mean + torch.exp(0.5 * logvar) * case["input.noise"], "output.z")


def test_gaussian_decoder(golden_cases):
    for case in golden_cases("b_"):
        x, restore = place(case, case.kwargs["resolution"])
        decoder = load(case)
        case.close(restore(decoder.transformer(x)), "output.raw")
        input_batch = case["input.coords"][:, 0]
        count = decoder.config.gaussians.num_gaussians
        results = decoder(x)
        fields = {
            "get_xyz": [g.means for g in results],
            "get_scaling": [g.scales for g in results],
            "get_rotation": [g.quaternions for g in results],
            "get_opacity": [g.opacities[:, None] for g in results],
            "_features_dc": [g.sh for g in results],
        }
        for name, values in fields.items():
            rows = restore(torch.cat([rearrange(v, "(n g) ... -> n g ...", g=count) for v in values]))
            for number in range(len(results)):
                case.close(rows[input_batch == number].flatten(0, 1), f"output.{number}.{name}")


def test_structure_encoder(golden_cases):
    for case in golden_cases("c_ss_encoder"):
        mean, logvar = load(case, grid_size=case["input.x"].shape[-1])(case["input.x"])
        case.close(mean, "output.mean")
        case.close(logvar, "output.logvar")
        case.close(mean + torch.exp(0.5 * logvar) * case["input.noise"], "output.z")


def test_structure_decoder(golden_cases):
    for case in golden_cases("c_ss_decoder"):
        decoder = load(case, grid_size=case["output.logits"].shape[-1])
        logits = decoder(case["input.x"])
        case.close(logits, "output.logits")
        occupied = decoder.occupied(case["input.x"])
        for number, coords in enumerate(occupied):
            reference = torch.zeros_like(logits[number, 0], dtype=torch.bool)
            rows = case["output.coords"][case["output.coords"][:, 0] == number].long()
            reference[rows[:, 1], rows[:, 2], rows[:, 3]] = True
            sure = logits[number, 0].abs() > 1e-4
            found = torch.zeros_like(reference)
            found[tuple(coords.long().T)] = True
            assert torch.equal(found[sure], reference[sure])
            assert torch.equal(to_coords(found), coords)


def test_absolute_positions(golden_cases):
    for case in golden_cases("f_ape"):
        case.close(AbsolutePositionEmbedding(case.kwargs["channels"])(case["input.coords"]), "output.emb")


def test_submanifold_convolution(golden_cases):
    for case in golden_cases("g_subm"):
        x, restore = place(case, 64)
        convolution = SparseConv3d(case.kwargs["in_channels"], case.kwargs["out_channels"])
        convolution.load_state_dict(case.group("weight.conv."))
        case.close(restore(convolution(x).features), "output.feats")


def test_down_and_up(golden_cases):
    for case in golden_cases("g_downsample"):
        x, restore = place(case, 64)
        coarse = downsample(x, mode="trellis")
        assert torch.equal(coarse.topology.coords, case["output.down.coords"])
        case.close(coarse.features, "output.down.feats")
        assert torch.equal(restore(x.topology.coarser().parent), case["output.down.idx"])
        fine = upsample(coarse.replace(case["input.up_feats"]), x.topology)
        assert fine.topology is x.topology
        case.close(restore(fine.features), "output.up.feats")


def test_subdivide(golden_cases):
    for case in golden_cases("g_subdivide"):
        x, _ = place(case, 64)
        fine = x.topology.subdivide()
        expected, order = Topology.from_coords(case["output.coords"], 128)
        assert torch.equal(fine.coords, expected.coords)
        case_rows = case["output.feats"][order]
        assert fine.coarser().topology.coords.equal(x.topology.coords)
        torch.testing.assert_close(x.features[fine.coarser().parent], case_rows)


def test_windows(golden_cases):
    for case in golden_cases("g_window"):
        topology, order = Topology.from_coords(case["input.coords"], 64)
        for size, shift in case.kwargs["windows"]:
            layout = topology.windows(size, shift)
            segment = torch.repeat_interleave(torch.arange(layout.num_segments), torch.tensor(layout.lengths))
            window = torch.empty(len(topology), dtype=torch.int64)
            window[layout.order] = segment
            assert torch.equal(window, case[f"output.w{size}s{shift}.window_id"][order])
            assert list(layout.lengths) == case[f"output.w{size}s{shift}.seq_lens"].tolist()


def test_patchify_and_pixel_shuffle(golden_cases):
    for case in golden_cases("g_patchify"):
        case.close(pixel_shuffle_3d(case["input.x"], 2), "output.pixel_shuffle")
        case.close(patchify(case["input.y"], 2), "output.patchify")
        case.close(unpatchify(patchify(case["input.y"], 2), 2), "output.unpatchify")


def test_every_sparse_operation_is_compared(golden_dir):
    known = {"g_subm_conv3", "g_downsample_upsample2", "g_subdivide", "g_window_partition", "g_patchify_pixelshuffle"}
    found = {path.stem for path in golden_dir.glob("g_*.json")}
    assert {name for name in found if not any(name.startswith(k) for k in known)} == set()


def test_multi_head_rms_norm(golden_cases):
    for case in golden_cases("i_multihead_rmsnorm"):
        norm = MultiHeadRMSNorm(case.kwargs["dim"], case.kwargs["heads"])
        norm.load_state_dict(case.group("weight."))
        case.close(norm(case["input.x"]), "output.y")


def rename(state, patterns, prefix):
    """Names of a single block through the key map of whole models."""
    import re

    renamed = {}
    for key, value in state.items():
        (name,) = [m.expand(new) for old, new in patterns if (m := re.fullmatch(old, prefix + key))]
        renamed[name] = value
    return renamed


def test_sparse_transformer_block(golden_cases):
    for case in golden_cases("i_sparse_transformer_block"):
        kwargs = case.kwargs
        block = TransformerBlock(kwargs["channels"], kwargs["num_heads"], qk_norm=kwargs["qk_rms_norm"])
        state = rename(case.group("weight."), _SPARSE_KEYS, "blocks.0.")
        block.load_state_dict({k.removeprefix("transformer.blocks.0."): v for k, v in state.items()})
        x, restore = place(case, 64)
        layout = x.topology.windows(kwargs["window_size"], kwargs["shift_window"])
        case.close(restore(block(x.features, layout)), "output.feats")


def test_dense_res_block(golden_cases):
    for case in golden_cases("i_dense_resblock"):
        kwargs = case.kwargs
        block = ResBlock3d(kwargs["channels"], kwargs["out_channels"], kwargs["norm_type"])
        weights = case.group("weight.")
        skip = {f"skip.{k}": weights.pop(f"skip_connection.{k}") for k in ("weight", "bias")}
        state = rename(weights, _STRUCTURE_KEYS, "blocks.0.")
        block.load_state_dict({k.removeprefix("levels.0."): v for k, v in state.items()} | skip)
        case.close(block(case["input.x"]), "output.y")

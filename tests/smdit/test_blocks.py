"""Blocks against diffusers' FLUX blocks with the same weights and positions, and the packing that they work on."""

import pytest
import torch
from marope import AxialRoPE, MARoPE
from smdit import (
    DoubleStreamBlock,
    JointTokens,
    SingleStreamBlock,
    from_bfl_block,
    from_diffusers_double_block,
    from_diffusers_single_block,
)
from smdit._rows import Rows

HEADS, HEAD_DIM = 3, 32
WIDTH = HEADS * HEAD_DIM
AXES = (8, 12, 12)


def flux():
    return pytest.importorskip("diffusers.models.transformers.transformer_flux")


def randomised(module):
    """Weights of every kind away from their initial values, norms included."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def batch(num_objects=2, num_image=6, num_voxel=9):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(num_objects, num_image, WIDTH, generator=generator)
    voxel = torch.randn(num_objects, num_voxel, WIDTH, generator=generator)
    embedding = torch.randn(num_objects, WIDTH, generator=generator)
    rope = AxialRoPE(HEAD_DIM, AXES)
    image_ids = MARoPE(64, 8).plane(2, num_image // 2)
    voxel_ids = torch.randint(0, 8, (num_voxel, 3), generator=generator).float()
    tokens = JointTokens.build(
        [num_voxel] * num_objects, num_image, None, rope, image_ids, voxel_ids.repeat(num_objects, 1)
    )
    rotary = flux().FluxPosEmbed(theta=10000, axes_dim=list(AXES))(torch.cat([image_ids, voxel_ids]))
    return image, voxel, embedding, rope, tokens, rotary


@torch.no_grad()
def test_double_stream_block_equals_diffusers():
    theirs = randomised(flux().FluxTransformerBlock(WIDTH, HEADS, HEAD_DIM))
    ours = DoubleStreamBlock(WIDTH, HEADS)
    ours.load_state_dict(from_diffusers_double_block(theirs.state_dict()))
    image, voxel, embedding, rope, tokens, rotary = batch()
    expected_image, expected_voxel = theirs(
        hidden_states=voxel, encoder_hidden_states=image, temb=embedding, image_rotary_emb=rotary
    )
    got_image, got_voxel = ours(image.flatten(0, 1), voxel.flatten(0, 1), (embedding, embedding), tokens, rope)
    torch.testing.assert_close(got_image.view_as(image), expected_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_voxel.view_as(voxel), expected_voxel, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_single_stream_block_equals_diffusers():
    theirs = randomised(flux().FluxSingleTransformerBlock(WIDTH, HEADS, HEAD_DIM))
    ours = SingleStreamBlock(WIDTH, HEADS)
    ours.load_state_dict(from_diffusers_single_block(theirs.state_dict()))
    image, voxel, embedding, rope, tokens, rotary = batch()
    expected = torch.cat(
        theirs(hidden_states=voxel, encoder_hidden_states=image, temb=embedding, image_rotary_emb=rotary), dim=1
    )
    got = ours(torch.cat([image, voxel], dim=1).flatten(0, 1), embedding, tokens, rope)
    torch.testing.assert_close(got.view_as(expected), expected, atol=1e-5, rtol=1e-5)


BFL_NAMES = {
    "modulation.linear": "mod.lin",
    "qkv": "attn.qkv",
    "q_norm": "attn.norm.query_norm",
    "k_norm": "attn.norm.key_norm",
    "out": "attn.proj",
    "mlp.0": "mlp.0",
    "mlp.2": "mlp.2",
}


def test_black_forest_labs_layout_of_a_double_block():
    block = randomised(DoubleStreamBlock(WIDTH, HEADS))
    theirs = {}
    for key, value in block.state_dict().items():
        stream, _, rest = key.partition(".")
        module, _, parameter = rest.rpartition(".")
        parameter = "scale" if module.endswith("_norm") else parameter
        theirs[f"{'img' if stream == 'voxel' else 'txt'}_{BFL_NAMES[module]}.{parameter}"] = value
    back = from_bfl_block(theirs)
    assert back.keys() == block.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in block.state_dict().items())


def test_black_forest_labs_layout_of_a_single_block():
    block = randomised(SingleStreamBlock(WIDTH, HEADS))
    ours = block.state_dict()
    theirs = {
        "modulation.lin.weight": ours["modulation.linear.weight"],
        "modulation.lin.bias": ours["modulation.linear.bias"],
        "linear1.weight": ours["expand.weight"],
        "linear1.bias": ours["expand.bias"],
        "linear2.weight": ours["contract.weight"],
        "linear2.bias": ours["contract.bias"],
        "norm.query_norm.scale": ours["q_norm.weight"],
        "norm.key_norm.scale": ours["k_norm.weight"],
    }
    back = from_bfl_block(theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], value) for key, value in ours.items())


def test_unknown_weights_are_refused():
    state = flux().FluxSingleTransformerBlock(WIDTH, HEADS, HEAD_DIM).state_dict()
    with pytest.raises(ValueError, match=r"no counterpart for 'attn\.to_extra\.weight'"):
        from_diffusers_single_block({**state, "attn.to_extra.weight": torch.zeros(1)})


@torch.no_grad()
def test_new_blocks_are_the_identity():
    image, voxel, embedding, rope, tokens, _ = batch()
    double, single = DoubleStreamBlock(WIDTH, HEADS), SingleStreamBlock(WIDTH, HEADS)
    for module in (double.image, double.voxel, single):
        module.modulation.reset_parameters()
    rows = (image.flatten(0, 1), voxel.flatten(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(double(*rows, (embedding,) * 2, tokens, rope), rows, strict=True))
    joint = torch.cat([image, voxel], dim=1).flatten(0, 1)
    assert torch.equal(single(joint, embedding, tokens, rope), joint)


def test_packing_puts_image_tokens_before_voxel_tokens_object_by_object():
    tokens = JointTokens.build([2, 0, 3], 2)
    streams = torch.tensor([10, 11, 20, 21, 30, 31, 12, 13, 32, 33, 34])  # tens: object, units: place in it
    joint = tokens.layout.to_segments(streams)
    assert joint.tolist() == [10, 11, 12, 13, 20, 21, 30, 31, 32, 33, 34]
    assert tokens.joint.lengths == (4, 2, 5)
    assert tokens.joint.index.tolist() == [0] * 4 + [1] * 2 + [2] * 5


def test_rope_needs_all_positions():
    with pytest.raises(ValueError, match="positions of all 5 voxel tokens"):
        JointTokens.build([2, 3], 2, None, AxialRoPE(32, AXES), torch.zeros(2, 3), torch.zeros(4, 3))


@pytest.mark.parametrize("lengths", [(4,), (3, 3), (2, 0, 5)])
def test_spread_gives_every_row_its_objects_value_and_sums_gradients(lengths):
    rows = Rows.from_lengths(lengths)
    values = torch.randn(len(lengths), 3, dtype=torch.float64, requires_grad=True)
    expected = values[rows.index]
    got = rows.spread(values).expand_as(expected)
    assert torch.equal(got, expected)
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((rows.spread(values) * weights).sum(), values)
    (reference,) = torch.autograd.grad((expected * weights).sum(), values)
    torch.testing.assert_close(gradient, reference)

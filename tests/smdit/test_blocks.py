"""Blocks against FLUX's with the same weights and positions, diffusers' and black-forest-labs' layout; and packing."""

import pytest
import torch
import torch.nn.functional as F
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
    return image, voxel, embedding, rope, tokens, torch.cat([image_ids, voxel_ids])


def flux_rotary(ids):
    return flux().FluxPosEmbed(theta=10000, axes_dim=list(AXES))(ids)


@torch.no_grad()
def test_double_stream_block_equals_diffusers():
    theirs = randomised(flux().FluxTransformerBlock(WIDTH, HEADS, HEAD_DIM))
    ours = DoubleStreamBlock(WIDTH, HEADS)
    ours.load_state_dict(from_diffusers_double_block(theirs.state_dict()))
    image, voxel, embedding, rope, tokens, ids = batch()
    expected_image, expected_voxel = theirs(
        hidden_states=voxel, encoder_hidden_states=image, temb=embedding, image_rotary_emb=flux_rotary(ids)
    )
    got_image, got_voxel = ours(image.flatten(0, 1), voxel.flatten(0, 1), (embedding, embedding), tokens, rope)
    torch.testing.assert_close(got_image.view_as(image), expected_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_voxel.view_as(voxel), expected_voxel, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_single_stream_block_equals_diffusers():
    theirs = randomised(flux().FluxSingleTransformerBlock(WIDTH, HEADS, HEAD_DIM))
    ours = SingleStreamBlock(WIDTH, HEADS)
    ours.load_state_dict(from_diffusers_single_block(theirs.state_dict()))
    image, voxel, embedding, rope, tokens, ids = batch()
    expected = torch.cat(
        theirs(hidden_states=voxel, encoder_hidden_states=image, temb=embedding, image_rotary_emb=flux_rotary(ids)),
        dim=1,
    )
    got = ours(torch.cat([image, voxel], dim=1).flatten(0, 1), embedding, tokens, rope)
    torch.testing.assert_close(got.view_as(expected), expected, atol=1e-5, rtol=1e-5)


# Parameters of black-forest-labs' blocks and their shapes over (width, MLP, head dimension), and their forward passes
# as plain functions of such a state dict: an oracle that knows nothing of this package's names.
BFL_STREAM = {
    "mod.lin": ("6w", "w"), "attn.qkv": ("3w", "w"), "attn.proj": ("w", "w"), "mlp.0": ("m", "w"), "mlp.2": ("w", "m"),
    "attn.norm.query_norm": "d", "attn.norm.key_norm": "d",
}  # fmt: skip
BFL_SINGLE = {
    "modulation.lin": ("3w", "w"), "linear1": ("3w+m", "w"), "linear2": ("w", "w+m"),
    "norm.query_norm": "d", "norm.key_norm": "d",
}  # fmt: skip


def bfl_state(modules):
    generator = torch.Generator().manual_seed(0)
    sizes = {"w": WIDTH, "m": 4 * WIDTH, "d": HEAD_DIM, "3w": 3 * WIDTH, "6w": 6 * WIDTH}
    sizes |= {"w+m": 5 * WIDTH, "3w+m": 7 * WIDTH}
    state = {}
    for name, shape in modules.items():
        if isinstance(shape, str):
            state[f"{name}.scale"] = 1 + 0.1 * torch.randn(sizes[shape], generator=generator)
        else:
            rows, columns = (sizes[size] for size in shape)
            state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
            state[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=generator)
    return state


def bfl_linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def bfl_modulation(state, name, vec, count):
    return bfl_linear(state, name, F.silu(vec))[:, None].chunk(count, dim=-1)


def bfl_norm(x, shift, scale):
    return (1 + scale) * F.layer_norm(x, (WIDTH,), eps=1e-6) + shift


def bfl_heads(state, norm, qkv):
    """q, k, v [B, heads, L, D] of [B, L, 3 heads D], q and k normalised."""
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    scales = (state[f"{norm}.query_norm.scale"], state[f"{norm}.key_norm.scale"])
    q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * s for x, s in zip((q, k), scales, strict=True))
    return q, k, v


def bfl_attention(q, k, v, ids):
    """Rotation by 2 x 2 matrices of neighbouring channels, axis by axis, then softmax attention."""
    angles = [ids[:, i, None].double() * 10000.0 ** -(torch.arange(0, d, 2) / d) for i, d in enumerate(AXES)]
    angle = torch.cat(angles, dim=-1)
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2)).float()
    q, k = (torch.einsum("lpij,bhlpj->bhlpi", matrix, x.unflatten(-1, (-1, 2))).flatten(-2) for x in (q, k))
    weights = torch.softmax(q @ k.transpose(-1, -2) / HEAD_DIM**0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def bfl_double_block(state, img, txt, vec, ids):
    parts, modulations = [], []
    for name, x in (("txt", txt), ("img", img)):
        modulations.append(bfl_modulation(state, f"{name}_mod.lin", vec, 6))
        qkv = bfl_linear(state, f"{name}_attn.qkv", bfl_norm(x, *modulations[-1][:2]))
        parts.append(bfl_heads(state, f"{name}_attn.norm", qkv))
    attended = bfl_attention(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)), ids)
    out = []
    attended = attended.split([txt.shape[1], img.shape[1]], dim=1)
    for name, x, rows, (_, _, gate, shift, scale, gate2) in zip(
        ("txt", "img"), (txt, img), attended, modulations, strict=True
    ):
        x = x + gate * bfl_linear(state, f"{name}_attn.proj", rows)
        hidden = F.gelu(bfl_linear(state, f"{name}_mlp.0", bfl_norm(x, shift, scale)), approximate="tanh")
        out.append(x + gate2 * bfl_linear(state, f"{name}_mlp.2", hidden))
    return out[1], out[0]


def bfl_single_block(state, x, vec, ids):
    shift, scale, gate = bfl_modulation(state, "modulation.lin", vec, 3)
    qkv, hidden = bfl_linear(state, "linear1", bfl_norm(x, shift, scale)).split([3 * WIDTH, 4 * WIDTH], dim=-1)
    attended = bfl_attention(*bfl_heads(state, "norm", qkv), ids)
    return x + gate * bfl_linear(state, "linear2", torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1))


@torch.no_grad()
def test_double_stream_block_equals_black_forest_labs():
    state = bfl_state({f"{name}_{part}": shape for name in ("img", "txt") for part, shape in BFL_STREAM.items()})
    image, voxel, embedding, rope, tokens, ids = batch()
    ours = DoubleStreamBlock(WIDTH, HEADS)
    ours.load_state_dict(from_bfl_block(state))
    expected_voxel, expected_image = bfl_double_block(state, voxel, image, embedding, ids)
    got_image, got_voxel = ours(image.flatten(0, 1), voxel.flatten(0, 1), (embedding, embedding), tokens, rope)
    torch.testing.assert_close(got_image.view_as(image), expected_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_voxel.view_as(voxel), expected_voxel, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_single_stream_block_equals_black_forest_labs():
    state = bfl_state(BFL_SINGLE)
    image, voxel, embedding, rope, tokens, ids = batch()
    ours = SingleStreamBlock(WIDTH, HEADS)
    ours.load_state_dict(from_bfl_block(state))
    joint = torch.cat([image, voxel], dim=1)
    got = ours(joint.flatten(0, 1), embedding, tokens, rope).view_as(joint)
    torch.testing.assert_close(got, bfl_single_block(state, joint, embedding, ids), atol=1e-5, rtol=1e-5)


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

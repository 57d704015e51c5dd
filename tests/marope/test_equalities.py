"""MARoPE against other people's rotary embeddings: diffusers' FLUX and the TRELLIS reference tensors."""

import json

import pytest
import torch
from marope import MARoPE

SHARES = [(64, (16, 24, 24)), (128, (16, 56, 56))]


@pytest.mark.parametrize(("head_dim", "axes_dim"), SHARES)
def test_equals_diffusers_flux(head_dim, axes_dim):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    rope = MARoPE(head_dim, 9, axes_dim=axes_dim, plane_axis="-y", orientation=("-z", "+x"))
    ids = torch.cat([rope.plane(4, 6), rope.plane(4, 6, index=1), rope.volume(torch.randint(0, 9, (40, 3)))])
    q, k = (torch.randn(2, len(ids), 3, head_dim) for _ in range(2))
    theirs = flux.FluxPosEmbed(theta=10000, axes_dim=list(axes_dim))(ids)
    for got, x in zip(rope(q, k, ids), (q, k), strict=True):
        torch.testing.assert_close(got, embeddings.apply_rotary_emb(x, theirs, sequence_dim=1), atol=1e-6, rtol=1e-6)


@pytest.mark.golden
def test_reproduces_the_trellis_rotary_embedding(golden_dir):
    load_file = pytest.importorskip("safetensors.torch").load_file
    cases = sorted(golden_dir.glob("f_rope_*.json"))
    assert cases, f"no f_rope_* case in {golden_dir}"
    for path in cases:
        spec, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        head_dim = spec["kwargs"]["hidden_size"]
        q, k = (tensors[f"input.{name}"].unsqueeze(-2) for name in "qk")  # the reference has no head axis
        rotated = MARoPE(head_dim)(q, k, tensors["input.indices"])
        tolerance = spec["tolerance"]
        for name, got in zip("qk", rotated, strict=True):
            torch.testing.assert_close(
                got.squeeze(-2),
                tensors[f"output.{name}"],
                atol=tolerance["atol"],
                rtol=tolerance["rtol"],
                msg=lambda text, case=path.stem, which=name: f"{case} {which}: {text}",
            )

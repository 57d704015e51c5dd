"""The README's examples run, and those for other libraries agree with rotating by hand."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

README = Path(__file__).resolve().parents[2] / "packages" / "marope" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def run(*blocks):
    torch.manual_seed(0)
    scope = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    return scope


def attend(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


def test_there_are_four_examples():
    assert len(BLOCKS) == 4
    assert all(len([line for line in block.splitlines() if line]) <= 10 for block in BLOCKS)


def test_first_example():
    scope = run(BLOCKS[0])
    assert scope["q"].shape == scope["k"].shape == (1, 756, 8, 64)


def test_plain_transformer():
    scope = run(*BLOCKS[:2])
    assert scope["y"].shape == (1, 756, 512)
    x, layers = torch.randn(1, 756, 512), (torch.nn.Linear(512, 1536), torch.nn.Linear(512, 512))
    positions, table = scope["positions"], scope["rope"].table
    there, moved, shuffled = (
        scope["attention"](x, *layers, table(at)) for at in (positions, positions + 3, positions.flip(0))
    )
    torch.testing.assert_close(moved, there, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(shuffled, there, atol=1e-3)


@torch.no_grad()
def test_diffusers():
    pytest.importorskip("diffusers")
    scope = run(BLOCKS[0], BLOCKS[2])
    attention, rope, table = scope["attention"], scope["rope"], scope["rope"].table(scope["positions"])
    x = torch.randn(1, 756, 512)
    q, k, v = (linear(x).unflatten(-1, (8, 64)) for linear in (attention.to_q, attention.to_k, attention.to_v))
    expected = attend(*rope.rotate(attention.norm_q(q), attention.norm_k(k), table), v)
    torch.testing.assert_close(attention(x, image_rotary_emb=scope["rotary"]), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_timm():
    pytest.importorskip("timm")
    scope = run(BLOCKS[0], BLOCKS[3])
    attention, rope, table = scope["attention"], scope["rope"], scope["rope"].table(scope["positions"])
    x = torch.randn(1, 756, 512)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 8, 64)).unbind(2)
    expected = attention.proj(attend(*rope.rotate(q, k, table), v))
    got = attention(x, rope=torch.cat([scope["sin"], scope["cos"]], dim=-1))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

"""Every attention backend against the naive one, which itself is compared with a masked dense softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_vae import AttentionLayout, Topology, attention, attention_backend, attention_backends
from sparse_vae import _attention as module
from sparse_vae._layout import MAX_PADDING


def qkv(rows, key_rows=None, heads=2, dim=8, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    sizes = (rows, key_rows or rows, key_rows or rows)
    tensors = [torch.randn(n, heads, dim, generator=generator, dtype=torch.float64) for n in sizes]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def outputs_and_gradients(tensors, layout, backend):
    out = attention(*tensors, layout, backend)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), tensors)


def test_naive_equals_dense_softmax_with_a_mask():
    lengths = [3, 1, 5]
    q, k, v = qkv(9, dtype=torch.float64)
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    logits = torch.einsum("nhd,mhd->hnm", q, k) / 8**0.5
    logits = logits.masked_fill(segment[:, None] != segment, -torch.inf)
    expected = torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, AttentionLayout.from_lengths(lengths), "naive"), expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.booleans())
def test_sdpa_equals_naive(lengths, permuted):
    total = sum(lengths)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)) if permuted else None
    layout = AttentionLayout.from_lengths(lengths, order=order)
    tensors = qkv(total, dtype=torch.float64)
    if total == 0:
        assert attention(*tensors, layout).shape == tensors[0].shape
        return
    for actual, expected in zip(
        outputs_and_gradients(tensors, layout, "sdpa"), outputs_and_gradients(tensors, layout, "naive"), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=8))
def test_cross_attention(pairs):
    lengths, key_lengths = zip(*pairs, strict=True)
    layout = AttentionLayout.from_lengths(lengths, key_lengths=key_lengths)
    tensors = qkv(sum(lengths), sum(key_lengths), dtype=torch.float64)
    if sum(lengths) == 0:
        return
    for actual, expected in zip(
        outputs_and_gradients(tensors, layout, "sdpa"), outputs_and_gradients(tensors, layout, "naive"), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_equal_segments_need_no_padding():
    layout = AttentionLayout.from_lengths([4, 4, 4])
    assert layout.padding.query_rows is None
    tensors = qkv(12)
    torch.testing.assert_close(attention(*tensors, layout, "sdpa"), attention(*tensors, layout, "naive"))


@pytest.mark.parametrize(("size", "shift"), [(8, 0), (8, 4), (4, 0), (4, 2)])
def test_padding_on_surfaces_stays_within_the_budget(surface, size, shift):
    topology, _ = Topology.from_coords([surface(radius, 32) for radius in (6, 10, 14)], 32)
    layout = topology.windows(size, shift)
    assert layout.padding.num_rows <= (1 + MAX_PADDING) * layout.num_rows
    assert len(layout.padding.buckets) <= 40


def test_a_permuted_layout_permutes_back():
    order = torch.tensor([4, 0, 3, 1, 2])
    layout = AttentionLayout.from_lengths([2, 3], order=order)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layout.to_segments(x), x[order])
    assert torch.equal(layout.from_segments(layout.to_segments(x)), x)
    assert torch.autograd.gradcheck(lambda t: layout.to_segments(t) ** 2, (x,))


def test_large_logits_stay_finite_in_half_precision():
    q, k, v = qkv(64, dtype=torch.float16)
    layout = AttentionLayout.from_lengths([30, 34])
    results = [attention(q * 200, k * 200, v, layout, name) for name in ("naive", "sdpa")]
    assert all(result.isfinite().all() for result in results)


def test_naive_ignores_autocast():
    q, k, v = qkv(10)
    layout = AttentionLayout.from_lengths([4, 6])
    expected = attention(q, k, v, layout, "naive")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, layout, "naive"), expected)


def test_choice_of_backend(monkeypatch):
    calls = []
    original = module._find
    monkeypatch.setattr(module, "_find", lambda name: calls.append(name) or original(name))
    tensors, layout = qkv(5), AttentionLayout.from_lengths([2, 3])
    attention(*tensors, layout)
    with attention_backend("naive"):
        attention(*tensors, layout)
        attention(*tensors, layout, "sdpa")
    assert calls == ["sdpa", "naive", "naive", "sdpa"]


def test_unavailable_and_unknown_backends_are_explained():
    tensors, layout = qkv(5), AttentionLayout.from_lengths([2, 3])
    with pytest.raises(RuntimeError, match="'varlen' is not available: it needs float16 or bfloat16 on CUDA"):
        attention(*tensors, layout, "varlen")
    with pytest.raises(ValueError, match="choose one of triton, varlen, sdpa, xformers, naive"):
        attention(*tensors, layout, "flash")
    with pytest.raises(ValueError, match="choose one of"), attention_backend("flash"):
        pass
    report = attention_backends()
    assert report["sdpa"] is None
    assert report["naive"] is None
    assert "CUDA" in report["varlen"]


def test_bad_layouts_and_shapes_are_explained():
    with pytest.raises(ValueError, match="no key to attend to"):
        AttentionLayout.from_lengths([2, 1], key_lengths=[3, 0])
    with pytest.raises(ValueError, match="2 segments of queries but 1 of keys"):
        AttentionLayout.from_lengths([2, 1], key_lengths=[3])
    with pytest.raises(ValueError, match="must not be negative"):
        AttentionLayout.from_lengths([2, -1])
    with pytest.raises(ValueError, match=r"expected \(3,\)"):
        AttentionLayout.from_lengths([2, 1], order=torch.arange(2))
    with pytest.raises(ValueError, match="4 queries and 4 keys for a layout of 3 and 3"):
        attention(*qkv(4), AttentionLayout.from_lengths([2, 1]))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "sdpa", "xformers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cross", [False, True])
def test_backends_on_the_gpu(backend, dtype, cross):
    reason = attention_backends("cuda", dtype)[backend] if torch.cuda.is_available() else "there is no GPU"
    if reason is not None:
        pytest.skip(reason)
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    key_lengths = [n + 7 for n in lengths] if cross else None
    order = None if cross else torch.randperm(sum(lengths), device="cuda")
    layout = AttentionLayout.from_lengths(lengths, "cuda", key_lengths=key_lengths, order=order)
    tensors = qkv(sum(lengths), layout.num_key_rows, heads=3, dim=64, dtype=dtype, device="cuda")
    precise = [t.detach().float().requires_grad_() for t in tensors]
    expected = outputs_and_gradients(precise, layout, "naive")
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}[dtype]
    for actual, reference in zip(outputs_and_gradients(tensors, layout, backend), expected, strict=True):
        error = (actual.float() - reference).abs().max() / reference.abs().max()
        assert error < tolerance, f"relative error {error:.2e}"

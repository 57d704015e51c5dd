"""The Triton kernel against the naive backend: in Triton's interpreter on the CPU, compiled on the GPU.

The interpreter must be chosen before Triton is imported, so those cases run in a process of their own, which is this
file started as a script.
"""

import pytest
import torch
from sparse_vae import AttentionLayout, attention


def compare(lengths, heads, dim, dtype, tolerance, key_lengths=None, device="cpu", run=None):
    """The kernel against the naive backend in float32 on the same numbers; rows are views into one projection."""
    from sparse_vae import _triton_attention

    layout = AttentionLayout.from_lengths(lengths, device, key_lengths=key_lengths)
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randn(count, 3, heads, dim, generator=generator).to(device, dtype).unbind(1)

    (q, _, _), (_, k, v) = draw(sum(lengths)), draw(sum(key_lengths or lengths))
    if key_lengths is None:
        q, k, v = draw(sum(lengths))
    expected = attention(q.float(), k.float(), v.float(), layout, "naive")
    actual = (run or _triton_attention.attention)(q, k, v, layout)
    assert actual.dtype == dtype
    error = float((actual.float() - expected).norm() / expected.norm().clamp(min=1e-12))
    assert error <= tolerance, f"{lengths} {heads} {dim} {dtype}: off by {error:.1e}"


def cases(dtype, tolerance, device="cpu"):
    compare([5, 0, 130, 64, 1], 2, 16, dtype, tolerance, device=device)
    compare([70, 65], 1, 24, dtype, tolerance, device=device)
    compare([3, 100], 2, 32, dtype, tolerance, key_lengths=[80, 7], device=device)


def interpreted_cases() -> None:
    """All comparisons in Triton's interpreter."""
    from sparse_vae import _triton_attention

    cases(torch.float32, 1e-5)
    cases(torch.float16, 2e-3)

    def wrong(q, k, v, layout):
        return _triton_attention.attention(q, k.roll(1, 0), v, layout)

    with pytest.raises(AssertionError, match="off by"):
        compare([9, 7], 2, 16, torch.float32, 1e-5, run=wrong)
    q = torch.ones(3, 1, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        _triton_attention.attention(q, q, q, AttentionLayout.from_lengths([3]))
    print("all interpreted cases agree")


def test_in_the_interpreter(interpret):
    interpret(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    cases(torch.bfloat16, 1e-2, "cuda")
    cases(torch.float16, 2e-3, "cuda")


def test_tiles_cover_every_query_once():
    layout = AttentionLayout.from_lengths([5, 0, 130, 64], key_lengths=[3, 0, 2, 9])
    rows = []
    for first, end, key, last_key in layout.query_tiles.tolist():
        rows += [(row, key, last_key) for row in range(first, min(first + 64, end))]
    spans = [(0, 3)] * 5 + [(3, 5)] * 130 + [(5, 14)] * 64
    assert rows == [(row, *span) for row, span in enumerate(spans)]


if __name__ == "__main__":
    interpreted_cases()

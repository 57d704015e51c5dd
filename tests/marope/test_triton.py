"""The fused kernel against plain PyTorch: in Triton's interpreter on the CPU, compiled on the GPU.

The interpreter must be chosen before Triton is imported, so those cases run in a process of their own, which is this
file started as a script.
"""

import pytest
import torch
from marope import MARoPE, kernel_backend, kernel_backends, norm_rotary


def inputs(shape, dtype, head_weights, device="cpu", seed=0):
    """Queries and keys as views into one projection, weights and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    *outer, heads, dim = shape
    q, k, _ = draw(*outer, 3, heads, dim).to(device, dtype).unbind(-3)
    weights = [1 + draw(*((heads, dim) if head_weights else (dim,))).to(device) / 4 for _ in range(2)]
    return q, k, *weights, *(draw(*shape).to(device, dtype) for _ in range(2))


def results(run, q, k, q_weight, k_weight, *grads):
    """Both outputs, then the gradients of the four inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k, q_weight, k_weight)]
    out = run(*leaves)
    return [x.detach() for x in out] + list(torch.autograd.grad(out, leaves, grads))


def compare(shape, dtype, *, rotate=True, interleaved=True, head_weights=False, tolerance, run=None, device="cpu"):
    """The kernel against the plain expression in float64 on the same numbers."""
    from marope import _triton

    length, dim = shape[-3], shape[-1]
    rope = MARoPE(dim, 8, interleaved=interleaved)
    positions = torch.randint(0, 8, (length, 3), generator=torch.Generator().manual_seed(1))
    table = rope.table(positions.to(device)) if rotate else None
    given = inputs(shape, dtype, head_weights, device)
    run = run or _triton.norm_rotary
    actual = results(lambda q, k, a, b: run(q, k, table, a, b, 1e-6, interleaved), *given)
    exact = results(
        lambda q, k, a, b: norm_rotary(q, k, table, a, b, interleaved=interleaved, backend="torch"),
        *(x.double() for x in given),
    )
    names = ("q", "k", "gradient of q", "gradient of k", "gradient of q_weight", "gradient of k_weight")
    for name, a, b in zip(names, actual, exact, strict=True):
        error = float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) if b.numel() else 0.0
        assert a.shape == b.shape
        assert error <= tolerance, (
            f"{shape} {dtype} {rotate=} {interleaved=} {head_weights=}: {name} is off by {error:.1e}"
        )


def cases(device="cpu"):
    single, half = {"tolerance": 1e-6}, {"tolerance": 5e-3}
    compare((70, 3, 64), torch.float32, device=device, **single)
    compare((2, 5, 2, 48), torch.float32, interleaved=False, device=device, **single)
    compare((2, 5, 2, 48), torch.float32, head_weights=True, device=device, **single)
    compare((9, 1, 6), torch.float32, rotate=False, device=device, **single)
    compare((130, 2, 32), torch.bfloat16, head_weights=True, interleaved=False, device=device, **half)
    compare((3, 40, 4, 64), torch.float16, device=device, **half)
    compare((0, 2, 8), torch.float32, device=device, **single)


def interpreted_cases() -> None:
    """All comparisons in Triton's interpreter."""
    from marope import _triton

    cases()

    def wrong(q, k, table, a, b, eps, interleaved):
        return _triton.norm_rotary(q, k, table._replace(sin=-table.sin), a, b, eps, interleaved)

    with pytest.raises(AssertionError, match="q is off"):
        compare((7, 2, 16), torch.float32, run=wrong, tolerance=1e-6)
    print("all interpreted cases agree")


def test_in_the_interpreter(interpret):
    interpret(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    cases("cuda")


def test_plain_is_norm_then_rotation():
    q, k, q_weight, k_weight, *_ = inputs((2, 9, 3, 16), torch.float32, head_weights=False)
    rope = MARoPE(16, 4)
    table = rope.table(torch.arange(27).reshape(9, 3) % 4)
    normed = [torch.nn.functional.rms_norm(x, (16,), w, 1e-6) for x, w in ((q, q_weight), (k, k_weight))]
    for got, expected in zip(norm_rotary(q, k, table, q_weight, k_weight), rope.rotate(*normed, table), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_backend_that_cannot_be_used_is_named():
    q, k, q_weight, k_weight, *_ = inputs((5, 2, 8), torch.float32, head_weights=False)
    assert kernel_backends("cpu")["torch"] is None
    assert "CUDA" in kernel_backends("cpu")["triton"]
    with kernel_backend("triton"), pytest.raises(RuntimeError, match="it needs CUDA, got cpu"):
        norm_rotary(q, k, None, q_weight, k_weight)
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        norm_rotary(q, k, None, q_weight, k_weight, backend="cuda")


@pytest.mark.parametrize(("change", "message"), [
    ({"k": torch.zeros(4, 2, 8)}, "one shape"),
    ({"q_weight": torch.ones(2)}, "q_weight has shape"),
    ({"k_weight": torch.ones(3, 8)}, "k_weight has shape"),
])  # fmt: skip
def test_shapes_are_checked(change, message):
    q, k, q_weight, k_weight, *_ = inputs((5, 2, 8), torch.float32, head_weights=False)
    with pytest.raises(ValueError, match=message):
        norm_rotary(**{"q": q, "k": k, "table": None, "q_weight": q_weight, "k_weight": k_weight} | change)


if __name__ == "__main__":
    interpreted_cases()

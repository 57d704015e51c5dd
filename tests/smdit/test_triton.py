"""The fused kernels against plain PyTorch: in Triton's interpreter on the CPU, compiled on the GPU.

The interpreter must be chosen before Triton is imported, so those cases run in a process of their own, which is this
file started as a script.
"""

import pytest
import torch
from marope import kernel_backend
from smdit._modulation import affine_norm, gated, modulated_norm
from smdit._rows import Rows
from sparse_vae import LayerNorm32


def draw(*shape, device, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def compare(name, lengths, channels, dtype, tolerance, device="cpu", run=None):
    """A kernel against the plain expression in float64 on the same numbers, output and gradients."""
    rows = Rows.from_lengths(lengths, device)
    x = draw(sum(lengths), channels, device=device, dtype=dtype, seed=0)
    update = draw(sum(lengths), channels + 3, device=device, dtype=dtype, seed=1)[:, 3:]  # rows with a gap
    factors = draw(len(lengths), 3 * channels, device=device, dtype=torch.float32, seed=2) / 2
    norm = LayerNorm32(channels).to(device)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    calls = {
        "norm": lambda x, u, f, n: modulated_norm(x, *f.chunk(3, dim=1)[:2], rows),
        "norm and silu": lambda x, u, f, n: modulated_norm(x, *f.chunk(3, dim=1)[1:], rows, silu=True),
        "affine norm": lambda x, u, f, n: affine_norm(x, n, rows),
        "affine norm and silu": lambda x, u, f, n: affine_norm(x, n, rows, silu=True),
        "gate": lambda x, u, f, n: gated(x, u, f.chunk(3, dim=1)[2], rows),
    }

    def results(call, x, update, factors, norm):
        leaves = [t.detach().requires_grad_() for t in (x, update, factors)]
        out = call(*leaves, norm)
        grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).cos().to(out.dtype)
        return out.detach(), *torch.autograd.grad(
            out, (*leaves, *norm.parameters()), grad, allow_unused=True, materialize_grads=True
        )

    with kernel_backend("torch"):
        exact = results(calls[name], x.double(), update.double(), factors.double(), norm.double())
    norm = norm.float()
    actual = results(run or calls[name], x, update, factors, norm)
    parts = ("output", "gradient of x", "of the update", "of the factors", "of the weight", "of the bias")
    for part, a, b in zip(parts, actual, exact, strict=True):
        error = float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) if b.numel() else 0.0
        assert a.shape == b.shape
        assert error <= tolerance, f"{name} {lengths} {channels} {dtype}: {part} is off by {error:.1e}"


def cases(device):
    for name in ("norm", "norm and silu", "affine norm", "affine norm and silu", "gate"):
        compare(name, [90], 64, torch.float32, 2e-6, device)
        compare(name, [70, 1, 300], 24, torch.float32, 2e-6, device)
        compare(name, [20, 0, 30], 130, torch.bfloat16, 1e-2, device)
        compare(name, [0], 16, torch.float32, 2e-6, device)


def interpreted_cases() -> None:
    """All comparisons in Triton's interpreter."""
    from smdit import _modulation, _triton

    _modulation.use_triton = lambda *tensors: tensors[0].dtype != torch.float64
    cases("cpu")
    assert "_Gate" in str(gated(*[torch.ones(1, 4, requires_grad=True)] * 3, Rows.from_lengths([1])).grad_fn)
    with pytest.raises(AssertionError, match="output is off"):
        compare(
            "gate", [9, 2], 16, torch.float32, 2e-6,
            run=lambda x, u, f, n: _triton.gate(x, u, f[:, :16], Rows.from_lengths([9, 2])),
        )  # fmt: skip
    print("all interpreted cases agree")


def test_in_the_interpreter(interpret):
    interpret(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    cases("cuda")


def test_pieces_cover_every_row_once():
    rows = Rows.from_lengths([5, 0, 12, 4])
    pieces = rows.pieces(4)
    covered = [
        (int(o), r) for o, a, b in zip(pieces.object, pieces.begin, pieces.end, strict=True) for r in range(a, b)
    ]
    assert covered == list(zip(rows.index.tolist(), range(21), strict=True))
    values = torch.randn(len(pieces.object), 1, 3)
    owners = torch.zeros(4, 1, 3).index_add_(0, pieces.object.long(), values)
    torch.testing.assert_close(pieces.sum(values), owners)
    assert rows.pieces(4) is pieces


if __name__ == "__main__":
    interpreted_cases()

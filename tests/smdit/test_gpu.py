"""CUDA against the CPU, and no waiting for the device where none is needed."""

import pytest
import torch
from marope import MARoPE, kernel_backend
from smdit import EulerSampler, SMDiT, SMDiTConfig, flow_matching_loss
from smdit._flow import per_object_std
from smdit._rows import Rows
from sparse_vae import convolution_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIG = SMDiTConfig(
    grid_size=16, width=96, num_heads=2, head_dim=48, num_double_blocks=1, num_single_blocks=2, io_channels=(16,),
    condition_channels=12,
)  # fmt: skip


@pytest.fixture
def models(awake):
    cpu = awake(SMDiT(CONFIG))
    gpu = SMDiT(CONFIG).cuda().eval()
    gpu.load_state_dict(cpu.state_dict())
    return cpu, gpu


def gradients(model, x, condition):
    t = torch.linspace(0.2, 0.8, x.topology.batch_size, device=x.device)
    model.zero_grad()
    model(x, t, condition).features.float().square().mean().backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lengths", [[80], [60, 60], [70, 1, 40]])
def test_values_and_gradients_agree_with_the_cpu(models, lengths, make_voxels, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    cpu, gpu = models
    x, condition = make_voxels(lengths, 16), torch.randn(len(lengths), 1, 3, 4, 12)
    expected = gradients(cpu, x, condition)
    for name, gradient in gradients(gpu, x.to("cuda"), condition.cuda()).items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-3, f"{name}: {error:.1e}"


def test_training_in_bfloat16_follows_float32(models, make_voxels):
    _, gpu = models
    x, condition = make_voxels([70, 40, 90], 16).to("cuda"), torch.randn(3, 1, 3, 4, 12, device="cuda")
    exact = gradients(gpu, x, condition)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rough = gradients(gpu, x, condition)
    total = torch.cat([gradient.flatten() for gradient in exact.values()])
    error = torch.cat([(rough[name] - exact[name]).flatten() for name in exact])
    assert error.norm() < 0.05 * total.norm()


def test_steps_do_not_wait_for_the_device(models, make_voxels):
    _, gpu = models
    x, condition = make_voxels([70, 40], 16).to("cuda"), torch.randn(2, 1, 3, 4, 12, device="cuda")
    sampler = EulerSampler(steps=2, guidance=3.0)
    first = sampler.sample(gpu, x, condition)  # makes the tables, which does wait
    gpu.prepare(x.topology, (1, 3, 4))
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = sampler.sample(gpu, x, condition)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            generator = torch.Generator("cuda").manual_seed(0)
            flow_matching_loss(gpu, x, condition, generator).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(first.features, second.features)


def test_a_recorded_run_equals_an_eager_one(models, make_voxels):
    _, gpu = models
    x, condition = make_voxels([70, 40], 16).to("cuda"), torch.randn(2, 1, 3, 4, 12, device="cuda")
    runs = {
        capture: EulerSampler(steps=8, guidance=3.0, interval=(0.3, 0.8), capture=capture).sample(gpu, x, condition)
        for capture in (False, True)
    }
    torch.testing.assert_close(runs[True].features, runs[False].features)


def test_fused_kernels_agree_with_plain_pytorch(models, make_voxels):
    _, gpu = models
    x, condition = make_voxels([70, 40], 16).to("cuda"), torch.randn(2, 1, 3, 4, 12, device="cuda")
    fast = gradients(gpu, x, condition)
    with kernel_backend("torch"), convolution_backend("torch"):
        plain = gradients(gpu, x, condition)
    for name, gradient in fast.items():
        error = (gradient - plain[name]).norm() / plain[name].norm().clamp(min=1e-6)
        assert error < 1e-2, f"{name}: {error:.1e}"


def test_segment_sums(make_voxels):
    rows = Rows.from_lengths((5, 0, 300, 2), "cuda")
    values = torch.randn(4, 7, device="cuda", requires_grad=True)
    weights = torch.randn(307, 7, device="cuda")
    (gradient,) = torch.autograd.grad((rows.spread(values) * weights).sum(), values)
    (expected,) = torch.autograd.grad((values[rows.index] * weights).sum(), values)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    x = make_voxels([30, 50], 16)
    torch.testing.assert_close(per_object_std(x.to("cuda")).cpu(), per_object_std(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_agrees_with_the_cpu(dtype):
    rope = MARoPE(64, 16)
    q, k = torch.randn(2, 300, 4, 64).to(dtype)
    positions = torch.cat([rope.plane(10, 10), rope.volume(torch.randint(0, 16, (200, 3)))])
    for got, expected in zip(rope(q.cuda(), k.cuda(), positions.cuda()), rope(q, k, positions), strict=True):
        torch.testing.assert_close(got.cpu(), expected)

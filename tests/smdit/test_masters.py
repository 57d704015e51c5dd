"""Float32 masters of half-precision weights."""

import copy

import torch
from smdit import MasterWeights, SMDiT, SMDiTConfig
from torch import nn


def test_steps_too_small_for_half_precision_add_up():
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    masters = MasterWeights(model, torch.bfloat16)
    optimizer = torch.optim.SGD(masters.parameters, lr=1e-5)
    for _ in range(2000):
        model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
        masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
        masters.give_weights()
    assert model.weight.dtype == torch.bfloat16
    torch.testing.assert_close(masters.parameters[0].detach(), before - 0.02, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.weight.detach(), (before - 0.02).bfloat16(), atol=2**-9, rtol=2**-8)


def test_float32_halves_train_as_the_model_itself():
    """With nothing rounded, the masters' steps are those of an optimizer of the model."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    twin = copy.deepcopy(plain)
    masters = MasterWeights(twin, torch.float32)
    optimizers = [torch.optim.AdamW(p, lr=1e-2) for p in (plain.parameters(), masters.parameters)]
    for _ in range(5):
        x = torch.randn(7, 6)
        plain.zero_grad()
        plain(x).square().mean().backward()
        optimizers[0].step()
        twin(x).square().mean().backward()
        masters.take_gradients()
        assert all(p.grad is None for p in twin.parameters())
        optimizers[1].step()
        optimizers[1].zero_grad()
        masters.give_weights()
    for a, b in zip(plain.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_without_a_gradient_and_frozen_ones_stay():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight.requires_grad_(False)
    masters = MasterWeights(model, torch.bfloat16)
    assert [p.requires_grad for p in masters.parameters] == [True, True, False, True]
    model[0](torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    masters.take_gradients()
    assert [p.grad is None for p in masters.parameters] == [False, False, True, True]
    assert masters.parameters[0].grad.dtype == torch.float32


def test_gradients_of_several_batches_add_up_in_float32():
    model = nn.Linear(2, 1, bias=False)
    masters = MasterWeights(model, torch.bfloat16)
    for value in (1.0, 2.0**-10):  # the sum is not a bfloat16
        model.weight.grad = torch.full((1, 2), value, dtype=torch.bfloat16)
        masters.take_gradients()
    assert masters.parameters[0].grad.tolist() == [[1 + 2.0**-10] * 2]


def test_state_of_the_model_keeps_its_names():
    model = SMDiT(SMDiTConfig.preset("tiny"))
    names = list(model.state_dict())
    MasterWeights(model, torch.bfloat16)
    assert list(model.state_dict()) == names
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

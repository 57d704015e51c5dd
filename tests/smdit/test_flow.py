"""Flow matching, noise, samplers and stage 1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from smdit import (
    EulerSampler,
    HeunSampler,
    MultistepSampler,
    SamplerConfig,
    SMDiTConfig,
    StructureDiTConfig,
    StructureFlow,
    StructureFlowConfig,
    flow_matching_loss,
    guidance_from_scale,
    make_sampler,
    sample_time,
    voxel_noise,
)
from smdit._flow import per_object_std
from sparse_vae import SparseTensor, StructureVAEConfig, Topology

SAMPLERS = [EulerSampler, HeunSampler, MultistepSampler]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_loss_is_zero_for_the_true_velocity(make_voxels):
    z0 = make_voxels([30, 50], 8)

    def oracle(x, t, condition):
        # On the straight path z_t = z0 + t (eps - z0), so the velocity can be read off a known z0.
        return x.replace((x.features - z0.features) / t[x.topology.batch_index, None])

    assert flow_matching_loss(oracle, z0, torch.zeros(2, 1), seeded()) < 1e-8


def test_loss_of_a_silent_model_is_the_power_of_the_target():
    z0 = torch.randn(64, 4, 6, 6, 6, generator=seeded())
    loss = flow_matching_loss(lambda x, t, c: torch.zeros_like(x), z0, torch.zeros(64, 1), seeded(1))
    assert loss.item() == pytest.approx(2.0, abs=0.05)  # var(eps) + var(z0)
    assert loss.dtype == torch.float32


def test_loss_drops_whole_conditions_at_the_stated_rate():
    seen = []

    def model(x, t, condition):
        seen.append(condition)
        return x

    condition = torch.ones(4000, 2, 3)
    flow_matching_loss(model, torch.zeros(4000, 1), condition, seeded(), p_uncond=0.25)
    kept = seen[0].flatten(1).float().mean(dim=1)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_loss_repeats_with_its_generator_and_leaves_the_global_one_alone(make_voxels):
    z0 = make_voxels([30], 8)
    state = torch.get_rng_state()
    losses = [flow_matching_loss(lambda x, t, c: x, z0, torch.zeros(1, 1), seeded(s)).item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_times():
    uniform = sample_time(20000, seeded())
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    normal = sample_time(20000, seeded(), "logit_normal").logit()
    assert normal.mean().item() == pytest.approx(1.0, abs=0.03)
    assert normal.std().item() == pytest.approx(1.0, abs=0.03)
    with pytest.raises(ValueError, match="uniform"):
        sample_time(2, seeded(), "cosine")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(-(2**70), 2**70), sample=st.integers(0, 5), count=st.integers(1, 30))
def test_voxel_noise_of_a_voxel_does_not_depend_on_the_others(seed, sample, count):
    cells = torch.randperm(8**3, generator=seeded(count))[:count]
    coords = torch.stack([cells // 64, cells // 8 % 8, cells % 8], 1).int()
    noise = voxel_noise(coords, 3, 8, seed, sample)
    assert noise.shape == (count, 3)
    assert noise.dtype == torch.float32
    for i in (0, count - 1):
        assert torch.equal(voxel_noise(coords[i : i + 1], 3, 8, seed, sample)[0], noise[i])


def test_voxel_noise_is_normal_and_differs_by_seed_sample_and_grid():
    coords = Topology.full(1, 8).coords[:, 1:]
    first = voxel_noise(coords, 4, 8, 0)
    assert first.mean().abs() < 0.1
    assert first.std().item() == pytest.approx(1, abs=0.05)
    others = [voxel_noise(coords, 4, 8, 1), voxel_noise(coords, 4, 8, 0, 1), voxel_noise(coords, 4, 16, 0)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 0.1


def linear_flow(x, t, condition):
    """dx/dt = x - c t, which has a closed solution."""
    return x - condition * t.reshape(-1, 1)


def linear_solution(noise, c):
    # x(t) = c t + c + k e^t with x(1) = noise; wanted is x(0).
    return c + (noise - 2 * c) / math.e


@pytest.mark.parametrize(("sampler", "order"), [(EulerSampler, 1), (HeunSampler, 2), (MultistepSampler, 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_orders_of_convergence(sampler, order, shift):
    noise = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
    condition = torch.tensor([[0.7], [0.2]], dtype=torch.float64)
    exact = linear_solution(noise, condition)
    errors = [
        (sampler(steps=n, guidance=0.0, shift=shift).sample(linear_flow, noise, condition) - exact).abs().max().item()
        for n in (64, 128)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_straight_paths_need_one_step(sampler):
    noise, data = torch.randn(2, 5, generator=seeded()), torch.randn(2, 5, generator=seeded(1))
    out = sampler(steps=3, guidance=0.0).sample(lambda x, t, c: noise - data, noise, torch.zeros(2, 1))
    torch.testing.assert_close(out, data)


class Recorder:
    """Velocity x * 0 + condition; remembers times and batch sizes."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, condition):
        features = x.features if isinstance(x, SparseTensor) else x
        assert len(t) == len(condition)
        self.calls.append((round(t[0].item(), 4), len(t)))
        if isinstance(x, SparseTensor):
            assert x.topology.batch_size == len(t)
            return x.replace(condition[x.topology.batch_index].expand_as(features))
        return condition.expand_as(features)


@pytest.mark.parametrize("guidance", [-0.5, 1.0, 4.0])
def test_guidance_is_one_plus_w_conditional_minus_w_unconditional(guidance):
    model = Recorder()
    noise = torch.zeros(2, 3)
    out = EulerSampler(steps=4, guidance=guidance).sample(
        model, noise, torch.full((2, 1), 2.0), null=torch.full((2, 1), 0.5)
    )
    torch.testing.assert_close(out, torch.full((2, 3), -((1 + guidance) * 2.0 - guidance * 0.5)))
    assert all(size == 4 for _, size in model.calls), "both branches share one forward"


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guidance_from_the_other_convention(scale):
    conditional, unconditional = torch.full((2, 1), 2.0), torch.full((2, 1), 0.5)
    sampler = EulerSampler(steps=1, guidance=guidance_from_scale(scale))
    out = sampler.sample(Recorder(), torch.zeros(2, 3), conditional, null=unconditional)
    torch.testing.assert_close(-out, (unconditional + scale * (conditional - unconditional)).expand(2, 3))


def test_guidance_acts_inside_its_interval_only_ends_included(make_voxels):
    model = Recorder()
    noise = make_voxels([5, 7], 8)
    EulerSampler(steps=4, guidance=3.0, interval=(0.5, 0.75)).sample(model, noise, torch.ones(2, 1))
    assert model.calls == [(1.0, 2), (0.75, 4), (0.5, 4), (0.25, 2)]


def test_multistep_does_not_extrapolate_across_the_end_of_guidance():
    def model(x, t, condition):
        return condition.expand_as(x)

    noise, condition, null = torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1)
    options = {"steps": 4, "guidance": 3.0, "interval": (0.6, 1.0)}
    out = MultistepSampler(**options).sample(model, noise, condition, null)
    # Both velocities are constant in time, 4 under guidance and 1 without, so Euler is exact.
    torch.testing.assert_close(out, EulerSampler(**options).sample(model, noise, condition, null))
    torch.testing.assert_close(out, torch.full((1, 1), -(4 * 0.5 + 1 * 0.5)))


def test_states_are_float32_whatever_the_model():
    seen = []

    def model(x, t, condition):
        seen.append(x.dtype)
        return condition.bfloat16().expand_as(x)

    out = EulerSampler(steps=100, guidance=0.0).sample(model, torch.zeros(1, 1).bfloat16(), torch.ones(1, 1))
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(out, torch.full((1, 1), -1.0))


def test_no_guidance_costs_no_second_branch():
    model = Recorder()
    EulerSampler(steps=2, guidance=0.0).sample(model, torch.zeros(1, 1), torch.ones(1, 1))
    assert [size for _, size in model.calls] == [1, 1]


@pytest.mark.parametrize(("sampler", "calls"), [(EulerSampler, 6), (HeunSampler, 11), (MultistepSampler, 6)])
def test_model_calls_a_run(sampler, calls):
    model = Recorder()
    sampler(steps=6, guidance=0.0).sample(model, torch.zeros(1, 1), torch.ones(1, 1))
    assert len(model.calls) == calls
    assert all(t > 0 for t, _ in model.calls), "no model is trained at t = 0"


def test_sparse_and_dense_states_sample_alike(make_voxels):
    x = make_voxels([6, 6], 8)
    dense = torch.stack(x.split(x.features))

    def field(features, t, condition):
        return features * t + condition

    def sparse_model(state, t, condition):
        index = state.topology.batch_index
        return state.replace(field(state.features, t[index, None], condition[index]))

    def dense_model(state, t, condition):
        return field(state, t[:, None, None], condition[:, None])

    condition = torch.randn(2, 8, generator=seeded())
    sampler = EulerSampler(steps=5, guidance=2.0, interval=(0.3, 1.0), rescale=0.7)
    sparse = sampler.sample(sparse_model, x, condition)
    torch.testing.assert_close(
        torch.stack(sparse.split(sparse.features)), sampler.sample(dense_model, dense, condition)
    )


def test_full_rescale_keeps_the_spread_of_the_conditional_prediction(make_voxels):
    x = make_voxels([40, 25], 8)

    def model(state, t, condition):
        return state.replace(state.features * condition[state.topology.batch_index])

    condition, null = torch.tensor([[0.2], [0.4]]), torch.full((2, 1), 0.9)
    guided = next(EulerSampler(steps=4, guidance=4.0, rescale=1.0).trajectory(model, x, condition, null))
    plain = next(EulerSampler(steps=4, guidance=0.0).trajectory(model, x, condition))
    torch.testing.assert_close(per_object_std(guided.x0), per_object_std(plain.x0))
    wild = next(EulerSampler(steps=4, guidance=4.0).trajectory(model, x, condition, null))
    assert not torch.allclose(per_object_std(wild.x0), per_object_std(plain.x0), rtol=0.1)


def test_callback_counts_steps():
    seen = []
    EulerSampler(steps=3).sample(Recorder(), torch.zeros(1, 1), torch.ones(1, 1), callback=lambda *c: seen.append(c))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_sampling_builds_no_graph():
    weight = torch.ones(1, requires_grad=True)
    out = EulerSampler(steps=2).sample(lambda x, t, c: x * weight, torch.ones(1, 1), torch.ones(1, 1))
    assert not out.requires_grad
    assert torch.is_grad_enabled()


def test_schedule():
    assert EulerSampler(steps=4).times() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = EulerSampler(steps=4, shift=3.0).times()
    assert shifted[0] == 1
    assert shifted[-1] == 0
    assert shifted[2] == pytest.approx(1.5 / 2)


def test_make_sampler_follows_its_config():
    config = SamplerConfig(method="heun", steps=7, guidance=1.0, interval=(0.5, 1.0), shift=3.0, rescale=0.2)
    expected = HeunSampler(steps=7, guidance=1.0, interval=(0.5, 1.0), shift=3.0, rescale=0.2)
    assert make_sampler(config) == expected
    assert make_sampler(SamplerConfig()) == EulerSampler()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"shift": 0.0}, "shift positive"),
        ({"rescale": 1.5}, "rescale"),
        ({"interval": (0.9, 0.1)}, "low <= high"),
    ],
)
def test_samplers_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        EulerSampler(**options)


def test_sample_needs_one_condition_an_object():
    with pytest.raises(ValueError, match="3 rows for 2 objects"):
        EulerSampler().sample(Recorder(), torch.zeros(2, 1), torch.ones(3, 1))


def stage_1(flow):
    decoder = StructureVAEConfig(
        grid_size=8, encoder_channels=(4, 8), decoder_channels=(8, 4), num_res_blocks=1, num_middle_blocks=1,
        latent_mean=(0.1,) * 8, latent_std=(2.0,) * 8,
    )  # fmt: skip
    return StructureFlowConfig(flow=flow, decoder=decoder, sampler=SamplerConfig(steps=3))


FLOWS = [
    SMDiTConfig(
        grid_size=4, width=24, num_heads=1, head_dim=24, num_double_blocks=1, num_single_blocks=1,
        condition_channels=12, rotary={"plane_extent": "grid"},
    ),
    StructureDiTConfig(grid_size=4, width=24, num_heads=1, num_blocks=1, condition_channels=12),
]  # fmt: skip


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.kind)
def test_stage_1_samples_voxels_that_depend_on_seed_and_image_only(flow, awake):
    stage = awake(StructureFlow(stage_1(flow)))
    condition = torch.randn(3, 1, 3, 4, 12, generator=seeded())
    latents = []
    stage.decoder.register_forward_pre_hook(lambda module, args: latents.append(args[0]))
    coords = stage.sample(condition, seeds=[1, 2, 1])
    assert all(c.dtype == torch.int32 and c.shape[1] == 3 and c.min() >= 0 and c.max() < 8 for c in coords)
    for image, seed in ((1, 2), (1, 3), (2, 2)):
        stage.sample(condition[image : image + 1], seeds=[seed])
    batch, alone, other_seed, other_image = latents
    torch.testing.assert_close(alone[0], batch[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(other_seed[0], batch[1], atol=0.1)
    assert not torch.allclose(other_image[0], batch[1], atol=1e-3)
    with pytest.raises(ValueError, match="one seed an object"):
        stage.sample(condition, seeds=[1])


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.kind)
def test_stage_1_takes_several_images_of_an_object(flow, awake):
    stage = awake(StructureFlow(stage_1(flow)))
    latents = []
    stage.decoder.register_forward_pre_hook(lambda module, args: latents.append(args[0]))
    pair = torch.randn(1, 2, 3, 4, 12, generator=seeded())
    for condition in (pair, pair[:, :1]):
        stage.sample(condition, seeds=[1])
    assert not torch.allclose(latents[0], latents[1], atol=1e-3)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.kind)
def test_stage_1_trains(flow):
    stage = StructureFlow(stage_1(flow))
    z0 = torch.randn(2, 8, 4, 4, 4, generator=seeded())
    state = stage.to_state(z0)
    assert torch.equal(stage.from_state(state), z0)
    loss = flow_matching_loss(stage.flow, state, torch.randn(2, 1, 3, 4, 12), seeded(1))
    loss.backward()
    assert loss.item() > 0
    assert stage.flow.output.weight.grad.any()


def test_stage_1_passes_its_options_on(awake):
    stage = awake(StructureFlow(stage_1(FLOWS[0])))
    seen = []
    stage.sample(torch.randn(1, 1, 3, 4, 12), seeds=[0], steps=2, guidance=0.0, callback=lambda *c: seen.append(c))
    assert seen == [(1, 2), (2, 2)]


def test_dense_latents_and_voxels_share_one_order():
    stage = StructureFlow(stage_1(FLOWS[0]))
    z = torch.zeros(1, 8, 4, 4, 4)
    z[0, :, 1, 2, 3] = 1
    state = stage.to_state(z)
    (row,) = state.features[:, 0].nonzero().flatten().tolist()
    assert state.topology.coords[row].tolist() == [0, 1, 2, 3]

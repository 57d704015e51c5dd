"""SMDiT and its baselines as functions of voxels, time and condition images."""

import pytest
import torch
from pydantic import ValidationError
from smdit import (
    CrossDiT,
    CrossDiTConfig,
    SMDiT,
    SMDiTConfig,
    StructureDiT,
    StructureDiTConfig,
    StructureFlowConfig,
)
from sparse_vae import SparseTensor, SparseVAE, SparseVAEConfig, Topology

SMALL = {
    "grid_size": 16, "width": 48, "num_heads": 2, "head_dim": 24, "num_double_blocks": 1, "num_single_blocks": 1,
    "condition_channels": 12, "io_channels": (16,),
}  # fmt: skip
VARIANTS = {
    "conv": {},
    "mean": {"io_pooling": "mean"},
    "two levels": {"io_channels": (8, 16)},
    "tokens are voxels": {"io_channels": ()},
    "shared modulation": {"shared_modulation": True},
    "absolute": {"position": "absolute"},
    "no qk norm": {"qk_norm": False},
    "single blocks only": {"num_double_blocks": 0},
}
CROSS = {
    "grid_size": 16, "width": 48, "num_heads": 2, "num_blocks": 1, "condition_channels": 12, "io_channels": (16,),
}  # fmt: skip


def smdit(**options):
    return SMDiT(SMDiTConfig(**{**SMALL, **options}))


def models():
    yield from ((name, lambda options=options: smdit(**options)) for name, options in VARIANTS.items())
    yield "cross", lambda: CrossDiT(CrossDiTConfig(**CROSS))
    yield "cross rotary", lambda: CrossDiT(CrossDiTConfig(**CROSS, position="rotary", condition_position="absolute"))


ALL = pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in models()])


def condition_of(num_objects, images=1, seed=0):
    return torch.randn(num_objects, images, 3, 4, 12, generator=torch.Generator().manual_seed(seed))


@ALL
@torch.no_grad()
def test_new_model_returns_zero_on_the_same_voxels(build, make_voxels):
    x = make_voxels([40, 60], 16)
    velocity = build()(x, torch.tensor([0.2, 0.9]), condition_of(2))
    assert velocity.topology is x.topology
    assert velocity.features.shape == x.features.shape
    assert not velocity.features.any()


@ALL
@torch.no_grad()
def test_objects_of_a_batch_do_not_see_each_other(build, make_voxels, awake):
    model = awake(build())
    x, t, condition = make_voxels([70, 1, 40], 16), torch.tensor([0.1, 0.5, 0.9]), condition_of(3)
    together = model(x, t, condition)
    assert together.features.std() > 1e-3
    for i, (alone, rows) in enumerate(zip(x.unbatch(), together.unbatch(), strict=True)):
        out = model(alone, t[i : i + 1], condition[i : i + 1])
        torch.testing.assert_close(out.features, rows.features, atol=1e-5, rtol=1e-4)


@ALL
@torch.no_grad()
def test_every_input_matters(build, make_voxels, awake):
    model = awake(build())
    x, t, condition = make_voxels([50], 16), torch.tensor([0.5]), condition_of(1)
    base = model(x, t, condition).features
    assert not torch.allclose(model(x, t + 0.3, condition).features, base, atol=1e-4)
    assert not torch.allclose(model(x, t, torch.zeros_like(condition)).features, base, atol=1e-4)
    changed = x.features.clone()
    changed[0] += 1
    assert not torch.allclose(model(x.replace(changed), t, condition).features[1:], base[1:], atol=1e-6)


@ALL
def test_every_parameter_learns(build, make_voxels, awake):
    model = awake(build())
    model(make_voxels([50, 30], 16), torch.rand(2), condition_of(2)).features.square().sum().backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not silent
    # A key's bias shifts all scores of a query alike where nothing normalises it, so its gradient may vanish.
    zero = [name for name, p in model.named_parameters() if not p.grad.any() and not name.endswith("kv.bias")]
    assert not zero


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"position": "absolute"}], ids=["marope", "absolute"])
def test_patches_have_places(options, make_voxels, awake):
    model = awake(smdit(**options))
    x, t, condition = make_voxels([50], 16), torch.tensor([0.5]), condition_of(1)
    shuffled = condition.flatten(2, 3)[:, :, torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    out = model(x, t, shuffled.view_as(condition)).features
    assert not torch.allclose(out, model(x, t, condition).features, atol=1e-5)


@torch.no_grad()
def test_several_images_stand_on_different_planes(make_voxels, awake):
    model = awake(smdit())
    x, t, condition = make_voxels([50], 16), torch.tensor([0.5]), condition_of(1, images=2)
    base = model(x, t, condition).features
    assert not torch.allclose(model(x, t, condition.flip(1)).features, base, atol=1e-5)


@torch.no_grad()
def test_nothing_is_made_twice_across_sampling_steps(make_voxels, awake):
    model = awake(smdit())
    x, condition = make_voxels([50, 20], 16), condition_of(2)
    first = model(x, torch.rand(2), condition)
    coarse = x.topology.coarser().topology
    known = [dict(x.topology._memo), dict(coarse._memo)]
    model(first, torch.rand(2), condition)
    for topology, before in zip((x.topology, coarse), known, strict=True):
        assert topology._memo.keys() == before.keys()
        assert all(topology._memo[key] is value for key, value in before.items())


@torch.no_grad()
@pytest.mark.parametrize("rotary", [{"theta": 100.0}, {"theta": (1e4, 1e4, 1e3)}, {"scaling": ("ntk", 2.0)}], ids=str)
def test_models_of_other_options_do_not_share_tables(rotary, make_voxels, awake):
    x, t, condition = make_voxels([50], 16), torch.tensor([0.5]), condition_of(1)
    first, second = awake(smdit()), awake(smdit(rotary=rotary))
    plain = first(x, t, condition).features
    shared = second(x, t, condition).features
    assert not torch.allclose(shared, plain, atol=1e-5)
    assert SMDiTConfig.model_validate_json(second.config.model_dump_json()) == second.config
    fresh = SparseTensor.from_coords(x.topology.coords, x.features, 16)
    assert torch.equal(second(fresh, t, condition).features, shared)


@torch.no_grad()
def test_half_precision_stays_close(make_voxels, awake):
    model = awake(smdit())
    x, t, condition = make_voxels([50, 70], 16), torch.rand(2), condition_of(2)
    exact = model(x, t, condition).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(x, t, condition).features
    cast = model.bfloat16()(x, t, condition).features
    assert autocast.dtype == torch.float32
    assert cast.dtype == torch.bfloat16
    for other in (autocast, cast.float()):
        assert (other - exact).norm() < 0.02 * exact.norm()


@torch.no_grad()
def test_autocast_leaves_time_and_modulation_alone(make_voxels, awake):
    model = awake(smdit())
    t = torch.tensor([0.5, 0.5005])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = model.time(t)
        modulation = model.output_modulation(embedding)
    assert embedding.dtype == modulation.dtype == torch.float32
    assert torch.equal(embedding, model.time(t))
    assert torch.equal(modulation, model.output_modulation(embedding))


def test_weights_round_trip(tmp_path, make_voxels, awake):
    from safetensors.torch import load_file, save_file

    model = awake(smdit(shared_modulation=True))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = SMDiT(SMDiTConfig.model_validate(model.config.model_dump(mode="json"))).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x, t, condition = make_voxels([30], 16), torch.tensor([0.4]), condition_of(1)
    assert torch.equal(again(x, t, condition).features, model(x, t, condition).features)


@pytest.mark.parametrize(
    "build", [smdit, lambda: CrossDiT(CrossDiTConfig(**CROSS, position="rotary"))], ids=["smdit", "cross"]
)
@torch.no_grad()
def test_models_can_be_averaged(build, make_voxels, awake):
    """What training keeps is an exponential average, by PyTorch's own tool; it is a model like any other."""
    model, decay = awake(build()), 0.75
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    average.update_parameters(model)  # the first is a copy
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.add_(0.1)
    average.update_parameters(model)
    for key, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor, decay * expected[key] + (1 - decay) * model.state_dict()[key])
    x, t, condition = make_voxels([30], 16), torch.tensor([0.4]), condition_of(1)
    again = build().eval()
    again.load_state_dict(average.module.state_dict())
    assert torch.equal(average(x, t, condition).features, again(x, t, condition).features)


@torch.no_grad()
def test_structure_dit_takes_image_tokens_in_both_forms(awake):
    config = StructureDiTConfig(grid_size=4, width=48, num_heads=2, num_blocks=1, condition_channels=12, patch_size=2)
    model = awake(StructureDiT(config))
    x, t, condition = torch.randn(2, 8, 4, 4, 4), torch.rand(2), condition_of(2)
    assert torch.equal(model(x, t, condition), model(x, t, condition.flatten(1, 3)))


def parameters(build, config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters()) / 1e6


def test_paper_presets_count_821_million():
    total = parameters(SMDiT, SMDiTConfig.preset("paper")) + parameters(SparseVAE, SparseVAEConfig.preset("paper"))
    assert total == pytest.approx(821, rel=0.01)


def test_baseline_presets_count_as_trellis():
    assert parameters(CrossDiT, CrossDiTConfig.preset("paper")) == pytest.approx(600.4, abs=0.05)
    assert parameters(StructureDiT, StructureDiTConfig.preset("paper")) == pytest.approx(555.5, abs=0.05)


def test_tiny_presets_fit_the_embedded_pipeline():
    assert parameters(SMDiT, SMDiTConfig.preset("tiny")) < 6
    assert parameters(SMDiT, StructureFlowConfig.preset("tiny").flow) < 5


@pytest.mark.parametrize("config", [SMDiTConfig, CrossDiTConfig, StructureDiTConfig, StructureFlowConfig])
@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_presets_survive_json(config, name):
    preset = config.preset(name)
    assert config.model_validate_json(preset.model_dump_json()) == preset


def test_presets_fit_the_autoencoders():
    for name in ("tiny", "small", "paper"):
        assert SMDiTConfig.preset(name).grid_size == SparseVAEConfig.preset(name).grid_size
        assert StructureFlowConfig.preset(name).decoder.grid_size == SMDiTConfig.preset(name).grid_size


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SMDiTConfig(**{**SMALL, "width": 50}), "num_heads \\* head_dim"),
        (lambda: SMDiTConfig(**{**SMALL, "grid_size": 17}), "cannot be halved"),
        (lambda: SMDiTConfig(**SMALL, depth=3), "Extra inputs"),
        (lambda: SMDiTConfig.preset("huge"), "choose one of tiny, small, paper"),
        (lambda: CrossDiTConfig(**{**CROSS, "num_heads": 5}), "num_heads=5"),
        (lambda: StructureDiTConfig(grid_size=5, patch_size=2, width=8, num_heads=2, num_blocks=1), "patch_size=2"),
        (lambda: StructureFlowConfig.model_validate(
            {**StructureFlowConfig.preset("tiny").model_dump(), "decoder": {"grid_size": 64}}), "the decoder reads"),
        (lambda: StructureFlowConfig(
            flow=StructureDiTConfig.preset("tiny").model_copy(update={"out_channels": 4}),
            decoder=StructureFlowConfig.preset("tiny").decoder), "takes 8 channels and returns 4: no velocity"),
    ],
)  # fmt: skip
def test_configs_say_what_is_wrong(build, message):
    with pytest.raises((ValueError, ValidationError), match=message):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x.replace(x.features[:, :5])}, "5 channels on a grid of 16, expected 8"),
        ({"x": lambda x: SparseTensor(x.features, Topology(x.topology.coords, 32, 2))}, "grid of 32"),
        ({"t": lambda t: t[:1]}, "one time an object"),
        ({"condition": lambda c: c[:1]}, r"expected \[2, images"),
        ({"condition": lambda c: c[..., :3]}, r"columns, 12\]"),
        ({"condition": lambda c: c.flatten(1, 3)}, "needs"),
    ],
)
def test_forward_says_what_is_wrong(change, message, make_voxels):
    inputs = {"x": make_voxels([20, 20], 16), "t": torch.rand(2), "condition": condition_of(2)}
    inputs.update({name: edit(inputs[name]) for name, edit in change.items()})
    with pytest.raises(ValueError, match=message):
        smdit()(**inputs)


def test_blocks_compile_as_one_graph_each_with_gradients(make_voxels, awake):
    x, t, condition = make_voxels([40, 30], 16), torch.rand(2), condition_of(2)
    plain, compiled = awake(smdit()), smdit().eval()
    compiled.load_state_dict(plain.state_dict())
    for block in (*compiled.double_blocks, *compiled.single_blocks):
        block.compile(backend="eager", fullgraph=True)
    gradients = []
    for model in (plain, compiled):
        model(x, t, condition).features.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)

"""The 2to3-VAE and the structure VAE: contracts that hold for random weights."""

import pytest
import torch
from pydantic import ValidationError
from sparse_vae import (
    GaussianConfig,
    GaussianDecoder,
    SparseTensor,
    SparseVAE,
    SparseVAEConfig,
    StructureVAE,
    StructureVAEConfig,
    Topology,
    dice_loss,
    gaussian_regularisation,
    kl_divergence,
    to_coords,
    to_occupancy,
)

GAUSSIANS = GaussianConfig(num_gaussians=4, scale_bias=0.02)
SMALL = SparseVAEConfig(
    grid_size=16,
    in_channels=5,
    latent_channels=3,
    width=24,
    num_blocks=2,
    num_heads=3,
    window_size=4,
    gaussians=GAUSSIANS,
)
FIELDS = ("means", "scales", "quaternions", "opacities", "sh")


@pytest.fixture
def model():
    """A small VAE whose zero-initialised layers have been filled."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SparseVAE(SMALL).eval()
        for half in (model.encoder, model.decoder):
            torch.nn.init.normal_(half.transformer.output_layer.weight, std=0.2)
    return model


def features_of(objects, channels=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(len(o), channels, generator=generator).to(dtype) for o in objects]
    return SparseTensor.from_coords(objects, rows, 16)


def concatenated(gaussians):
    return [torch.cat([getattr(g, name) for g in gaussians]) for name in FIELDS]


def test_shapes_and_ranges(model, objects):
    x = features_of(objects)
    mean, logvar = model.encoder(x)
    assert mean.features.shape == logvar.features.shape == (len(x.topology), 3)
    results = model.decode(mean)
    assert [len(g) for g in results] == [4 * len(o) for o in objects]
    for gaussians in results:
        gaussians.validate()
        assert gaussians.means.abs().max() <= 0.5 + 0.75 / 16
        assert gaussians.scales.min() >= GAUSSIANS.min_scale
        torch.testing.assert_close(gaussians.quaternions.norm(dim=1), torch.ones(len(gaussians)))


def test_a_fresh_decoder_fills_its_voxels_evenly(objects):
    decoder = GaussianDecoder(SMALL)
    z = features_of(objects, channels=3)
    (gaussians, *_) = decoder(z)
    centre = (z.topology.coords[: len(objects[0]), 1:].float() + 0.5) / 16 - 0.5
    offset = (gaussians.means.view(-1, 4, 3) - centre[:, None]) * 16
    assert offset.abs().max() <= 0.5 + 1e-5
    assert offset[0, :, 0].sort().values.tolist() == pytest.approx([-0.5, -0.25, 0.0, 0.25], abs=1e-5)
    assert gaussians.opacities.unique().tolist() == pytest.approx([0.1])
    assert gaussians.scales.unique().tolist() == pytest.approx([(0.02**2 + 0.0009**2) ** 0.5])
    assert gaussians.quaternions.unique(dim=0).tolist() == [[1, 0, 0, 0]]


def test_an_object_does_not_depend_on_its_batch_mates(model, objects):
    together = model.decode(model.encode(features_of(objects)))
    for number, piece in enumerate(features_of(objects).unbatch()):
        (alone,) = model.decode(model.encode(piece))
        for name in FIELDS:
            torch.testing.assert_close(getattr(alone, name), getattr(together[number], name), atol=1e-5, rtol=1e-5)


def test_permuting_objects_and_voxels_permutes_the_result(model, objects):
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(len(o), 5, generator=generator) for o in objects]
    expected = model.decode(model.encode(SparseTensor.from_coords(objects, rows, 16)))
    shuffles = [torch.randperm(len(o), generator=generator) for o in objects]
    coords = [o[s] for o, s in zip(objects, shuffles, strict=True)][::-1]
    shuffled = [r[s] for r, s in zip(rows, shuffles, strict=True)][::-1]
    actual = model.decode(model.encode(SparseTensor.from_coords(coords, shuffled, 16)))[::-1]
    # The topology sorts, so equal voxels come out in equal order whatever the order they came in.
    for a, b in zip(concatenated(actual), concatenated(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_attention_backends_agree(model, objects):
    from sparse_vae import attention_backend

    x = features_of(objects)
    results = []
    for name in ("naive", "sdpa"):
        with attention_backend(name):
            results.append(model.encode(x).features)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def training_gradients(model, x):
    model.train()
    gaussians, mean, logvar = model(x, torch.Generator().manual_seed(0))
    loss = gaussian_regularisation(gaussians) + kl_divergence(mean.features, logvar.features)
    loss = loss + sum(g.means.square().mean() + g.sh.square().mean() for g in gaussians)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def test_checkpointing_changes_nothing(model, objects):
    x = features_of(objects)
    twin = SparseVAE(SMALL.model_copy(update={"gradient_checkpointing": True}))
    twin.load_state_dict(model.state_dict())
    (loss, gradients), (twin_loss, twin_gradients) = training_gradients(model, x), training_gradients(twin, x)
    torch.testing.assert_close(loss, twin_loss)
    for a, b in zip(gradients, twin_gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_autocast_stays_finite_and_close(model, objects, scale):
    x = features_of(objects)
    x = x.replace(x.features * scale)
    expected, _ = training_gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = training_gradients(model, x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0.02)
    assert all(g.isfinite().all() for g in gradients)


def test_half_precision_weights(model, objects):
    x = features_of(objects)
    expected = concatenated(model.decode(model.encode(x)))
    half = SparseVAE(SMALL).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    actual = concatenated(half.decode(half.encode(x.to(dtype=torch.bfloat16))))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)


def test_sampling_uses_the_generator_only(model, objects):
    x = features_of(objects)
    state = torch.get_rng_state()
    first, second = (model.encode(x, torch.Generator().manual_seed(7)).features for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model.encode(x).features)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_topology_made_for_inference_serves_training(model, objects):
    with torch.inference_mode():
        inferred = features_of(objects)
        model.encode(inferred)
    x = SparseTensor(inferred.features.clone(), inferred.topology)
    _, gradients = training_gradients(model, x)
    assert all(g.isfinite().all() for g in gradients)


def test_full_attention(objects):
    full = SparseVAE(SMALL.model_copy(update={"window_size": None, "qk_norm": True}))
    assert full.encode(features_of(objects)).features.isfinite().all()


def test_objects_without_voxels(model):
    empty = torch.empty(0, 3, dtype=torch.int64)
    x = SparseTensor.from_coords([empty, torch.tensor([[1, 2, 3]])], [torch.empty(0, 5), torch.ones(1, 5)], 16)
    assert [len(g) for g in model.decode(model.encode(x))] == [0, 4]
    nothing = SparseTensor.from_coords([empty], [torch.empty(0, 5)], 16)
    assert [len(g) for g in model.decode(model.encode(nothing))] == [0]


def test_wrong_inputs_are_explained(model):
    with pytest.raises(ValueError, match="4 channels, expected 5"):
        model.encode(SparseTensor(torch.zeros(8, 4), Topology.full(1, 2)))
    with pytest.raises(ValueError, match="grid of 2 voxels, expected 16"):
        model.encode(SparseTensor(torch.zeros(8, 5), Topology.full(1, 2)))


@pytest.mark.parametrize("config_class", [SparseVAEConfig, StructureVAEConfig])
@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_presets_survive_json(config_class, name):
    config = config_class.preset(name)
    assert config_class.model_validate_json(config.model_dump_json()) == config
    assert config_class.model_validate(config.model_dump(mode="json")) == config


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_presets():
    with torch.device("meta"):
        paper = SparseVAE(SparseVAEConfig.preset("paper"))
        tiny = SparseVAE(SparseVAEConfig.preset("tiny"))
        structure = StructureVAE(StructureVAEConfig.preset("tiny"))
    assert num_parameters(paper) == 170_411_984  # TRELLIS's B size, "2 x about 85 M"
    assert num_parameters(tiny.decoder) < 2e6
    assert num_parameters(structure.decoder) <= 1e6
    assert num_parameters(structure.encoder) <= 1.2e6
    assert structure.config.latent_size == 8


def test_configs_refuse_nonsense():
    with pytest.raises(ValidationError, match="width 100 is not a multiple of num_heads 3"):
        SparseVAEConfig(width=100, num_heads=3)
    with pytest.raises(ValidationError, match="offset_range is 1"):
        GaussianConfig(offset_range=1.0)
    with pytest.raises(ValidationError, match="has 2 values, expected one for each of 8"):
        SparseVAEConfig(latent_mean=(0.0, 1.0), latent_std=(1.0, 1.0))
    with pytest.raises(ValidationError, match="go together"):
        SparseVAEConfig(latent_mean=(0.0,) * 8)
    with pytest.raises(ValidationError, match="must be positive"):
        SparseVAEConfig(latent_mean=(0.0,) * 8, latent_std=(0.0,) * 8)
    with pytest.raises(ValidationError, match="extra"):
        SparseVAEConfig(widht=3)
    with pytest.raises(ValidationError, match="2 encoder levels but 3 decoder levels"):
        StructureVAEConfig(encoder_channels=(8, 16))
    with pytest.raises(ValidationError, match="cannot be halved 2 times"):
        StructureVAEConfig(grid_size=30)
    with pytest.raises(ValueError, match="no preset"):
        SparseVAEConfig.preset("huge")


STRUCTURE = StructureVAEConfig(
    grid_size=8,
    latent_channels=2,
    encoder_channels=(4, 8),
    decoder_channels=(8, 4),
    num_res_blocks=1,
    num_middle_blocks=1,
)


def test_structure_vae(objects):
    model = StructureVAE(STRUCTURE)
    coords = [o[(o < 8).all(dim=1)] for o in objects]
    occupancy = to_occupancy(coords, 8)
    mean, logvar = model.encode(occupancy)
    assert mean.shape == logvar.shape == (3, 2, 4, 4, 4)
    logits = model.decode(mean)
    assert logits.shape == (3, 1, 8, 8, 8)
    occupied = model.decoder.occupied(mean)
    assert [len(c) for c in occupied] == [(grid > 0).sum().item() for grid in logits]
    with pytest.raises(ValueError, match=r"expected \[B, 1, 8, 8, 8\]"):
        model.encode(occupancy[..., :4])
    checkpointed = StructureVAE(STRUCTURE.model_copy(update={"gradient_checkpointing": True}))
    checkpointed.load_state_dict(model.state_dict())
    gradients = []
    for each in (model, checkpointed):
        logits, mean, logvar = each(occupancy, torch.Generator().manual_seed(0))
        loss = dice_loss(logits, occupancy) + 1e-3 * kl_divergence(mean, logvar)
        gradients.append(torch.autograd.grad(loss, list(each.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode(mean).dtype == torch.float32


def test_structure_latents_are_denormalised_by_the_config():
    z = torch.ones(1, 2, 4, 4, 4)
    assert torch.equal(StructureVAE(STRUCTURE).decoder.denormalise(z), z)
    config = STRUCTURE.model_copy(update={"latent_mean": (1.0, 2.0), "latent_std": (3.0, 0.5)})
    assert StructureVAE(config).decoder.denormalise(z)[0, :, 0, 0, 0].tolist() == [4.0, 2.5]


def test_occupancy_and_coords_are_inverse(objects):
    for coords, grid in zip(objects, to_occupancy(objects, 16), strict=True):
        ours = to_coords(grid[0] > 0)
        assert {tuple(row) for row in ours.tolist()} == {tuple(row) for row in coords.tolist()}
        Topology.from_coords([ours], 16)


def test_losses_have_their_known_values():
    assert kl_divergence(torch.zeros(3), torch.zeros(3)).item() == 0
    normal = torch.distributions.Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0]))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(normal.loc, normal.scale.log() * 2), expected)
    target = (torch.arange(8) < 3).float()
    assert dice_loss((target - 0.5) * 1e3, target).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss((0.5 - target) * 1e3, target).item() == pytest.approx(1 - 1 / (5 + 3 + 1))
    with pytest.raises(ValueError, match="one shape"):
        dice_loss(torch.zeros(2), torch.zeros(3))


def test_regularisation_averages_over_all_gaussians(model, objects):
    gaussians = model.decode(model.encode(features_of(objects)))
    scales, opacities = (torch.cat([getattr(g, n) for g in gaussians]) for n in ("scales", "opacities"))
    expected = 2 * scales.prod(dim=1).mean() + 3 * ((1 - opacities) ** 2).mean()
    torch.testing.assert_close(gaussian_regularisation(gaussians, volume=2, opacity=3), expected)


@pytest.mark.gpu
def test_training_step_on_the_gpu(model, objects):
    """bf16 autocast on the GPU against float32 on the CPU, without a host synchronisation once the topology stands."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    x = features_of(objects)
    config = SMALL.model_copy(update={"num_heads": 3, "width": 48})
    reference, twin = SparseVAE(config), SparseVAE(config).to("cuda")
    for half in (reference.encoder, reference.decoder):
        torch.nn.init.normal_(half.transformer.output_layer.weight, std=0.2)
    twin.load_state_dict(reference.state_dict())
    on_gpu = x.to("cuda")

    def step(model, x):
        mean, logvar = model.encoder(x)
        gaussians = model.decoder(mean)
        loss = gaussian_regularisation(gaussians) + kl_divergence(mean.features, logvar.features)
        loss = loss + sum(g.means.square().mean() + g.sh.square().mean() for g in gaussians)
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    expected, expected_gradients = step(reference, x)
    with torch.autocast("cuda", torch.bfloat16):
        step(twin, on_gpu)  # builds what the topology derives
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, gradients = step(twin, on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected, atol=0.02, rtol=0.02)
    for actual, reference_gradient in zip(gradients, expected_gradients, strict=True):
        error = (actual.cpu() - reference_gradient).norm() / reference_gradient.norm().clamp_min(1e-6)
        assert error < 0.1, f"relative error {error:.2e}"


@pytest.mark.gpu
def test_topology_on_the_gpu_equals_that_on_the_cpu(objects):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    here, order = Topology.from_coords(objects, 16)
    there, order_there = Topology.from_coords([o.to("cuda") for o in objects], 16)
    pairs = [(order, order_there), (here.coords, there.coords), (here.neighbours(), there.neighbours())]
    pairs += [(here.children(), there.children()), (here.windows(4, 2).order, there.windows(4, 2).order)]
    pairs += list(zip(here.coarser()[1:], there.coarser()[1:], strict=True))
    for a, b in pairs:
        assert torch.equal(a, b.cpu())
    assert here.windows(4, 2).lengths == there.windows(4, 2).lengths
    assert here.lengths == there.lengths

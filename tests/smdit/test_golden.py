"""The TRELLIS reference, case by case, through the strict key maps."""

import pytest
import torch
from smdit import EulerSampler, cross_dit_from_trellis, structure_dit_from_trellis
from smdit._cross_blocks import CrossBlock, CrossTokens
from smdit._embedding import TimeEmbedding, sincos_embedding, timestep_embedding
from smdit._flux_weights import rename
from smdit._sparse_io import SparseResBlock
from smdit._trellis import TRELLIS_CROSS_BLOCK, TRELLIS_RES_BLOCK
from sparse_vae import SparseTensor, Topology

pytestmark = pytest.mark.golden


def sparse_input(case, grid_size, name="feats"):
    """The stored voxels, sorted into a topology, and how to bring rows back into the stored order."""
    inputs = case.part("input")
    topology, order = Topology.from_coords(inputs["coords"], grid_size)

    def restore(rows):
        out = torch.empty_like(rows)
        out[order] = rows
        return out

    return SparseTensor(inputs[name][order], topology), order, restore


def tap(model, paths):
    """Outputs of submodules, by path."""
    outputs = {}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: outputs.update({path: out})
        )
    return outputs


@torch.no_grad()
def test_structure_flow(golden_cases):
    for case in golden_cases("d_"):
        model = structure_dit_from_trellis(case.args, case.part("weight"))
        seen = tap(model, ["time", "blocks.0"])
        inputs = case.part("input")
        velocity = model(inputs["x"], inputs["t"] / 1000, inputs["cond"])
        case.check(seen["time"], "inter.t_embedder")
        case.check(seen["blocks.0"].unflatten(0, (len(inputs["x"]), -1)), "inter.blocks.0")
        case.check(velocity, "v")


@torch.no_grad()
def test_slat_flow(golden_cases):
    for case in golden_cases("e_"):
        model = cross_dit_from_trellis(case.args, case.part("weight"))
        taps = {"t_embedder": "time", "input_layer": "encoder.input", "input_blocks.1": "encoder.blocks.1"}
        taps |= {f"blocks.{i}": f"blocks.{i}" for i in range(model.config.num_blocks)}
        taps = {theirs: ours for theirs, ours in taps.items() if f"output.inter.{theirs}" in case.tensors}
        seen = tap(model, taps.values())
        x, _, restore = sparse_input(case, case.args["resolution"])
        velocity = model(x, case.tensors["input.t"] / 1000, case.tensors["input.cond"])
        on_stored_rows = not model.config.io_channels
        for theirs, ours in taps.items():
            got = getattr(seen[ours], "features", seen[ours])
            case.check(restore(got) if on_stored_rows and theirs != "t_embedder" else got, f"inter.{theirs}")
        case.check(restore(velocity.features), "v")


def test_absolute_positions(golden_cases):
    for case in golden_cases("f_ape"):
        case.check(sincos_embedding(case.tensors["input.coords"], case.args["channels"]), "emb")


@torch.no_grad()
def test_timestep(golden_cases):
    for case in golden_cases("f_timestep"):
        t = case.tensors["input.t"]
        model = TimeEmbedding(case.args["hidden_size"], case.args["frequency_embedding_size"])
        model.load_state_dict(rename(case.part("weight"), {"mlp.0": "expand", "mlp.2": "contract"}))
        case.check(timestep_embedding(t, case.args["frequency_embedding_size"]), "freq")
        case.check(timestep_embedding(t, 7), "freq_dim7")
        case.check(model(t / 1000), "emb")


class ToyModel:
    """The analytic velocity of the stored sampler runs; remembers the times that it was called at."""

    def __init__(self, coefficients):
        self.a, self.b, self.c = coefficients
        self.times = []

    def __call__(self, x, t, condition):
        self.times.append(1000 * t)
        return self.a * x + self.b * condition + self.c * t.reshape(-1, *[1] * (x.ndim - 1))


def trellis_sampler(run):
    return EulerSampler(
        steps=run["steps"],
        shift=run["rescale_t"],
        guidance=run.get("cfg_strength", 0.0),
        interval=tuple(run.get("cfg_interval", (0.0, 1.0))),
    )


def reference_calls(times, run, batch_size):
    """Times of the reference's model calls, which come one by one where ours hold both halves of a guided pair."""
    guided_runs = "cfg_strength" in run
    low, high = run.get("cfg_interval", (0.0, 1.0))
    calls = []
    for t in times:
        unique = t.unique()
        assert len(unique) == 1
        assert len(t) in (batch_size, 2 * batch_size)
        twice = guided_runs and low <= round(unique.item() / 1000, 6) <= high
        assert (len(t) == 2 * batch_size) == (twice and run["cfg_strength"] != 0)
        calls += [unique] * (2 if twice else 1)
    return torch.cat(calls)


def reference_x0(noise, steps, sigma_min):
    """The reference's estimate of the data, for paths that keep a share `sigma_min` of noise at t = 0."""
    befores = [noise, *(step.x for step in steps[:-1])]
    velocities = [(x - step.x0) / step.t for x, step in zip(befores, steps, strict=True)]
    return torch.stack(
        [
            (1 - sigma_min) * x - (sigma_min + (1 - sigma_min) * step.t) * v
            for x, v, step in zip(befores, velocities, steps, strict=True)
        ]
    )


def test_samplers(golden_cases):
    for case in golden_cases("h_sampler"):
        inputs = case.part("input")
        noise = inputs["noise"]
        batch_size = len(noise)
        condition = inputs["cond"].expand(batch_size, *inputs["cond"].shape[1:])
        null = inputs["neg_cond"].expand_as(condition) if "neg_cond" in inputs else None
        for run in case.spec["runs"]:
            model = ToyModel(case.spec["toy"])
            steps = list(trellis_sampler(run).trajectory(model, noise, condition, null))
            case.check(torch.stack([step.x for step in steps]), f"{run['name']}.pred_x_t")
            case.check(steps[-1].x, f"{run['name']}.samples")
            case.check(reference_calls(model.times, run, batch_size), f"{run['name']}.model_t")
            case.check(reference_x0(noise, steps, run["sigma_min"]), f"{run['name']}.pred_x_0")


@torch.no_grad()
def test_sampling_with_the_structure_flow(golden_cases):
    for case in golden_cases("h_e2e_dense"):
        model = structure_dit_from_trellis(case.args, case.part("weight"))
        inputs = case.part("input")
        run = trellis_sampler(case.spec["run"]).trajectory(model, inputs["noise"], inputs["cond"], inputs["neg_cond"])
        steps = list(run)
        case.check(torch.stack([step.x for step in steps]), "pred_x_t")
        case.check(torch.stack([step.x0 for step in steps]), "pred_x_0")
        case.check(steps[-1].x, "samples")


@torch.no_grad()
def test_sampling_with_the_slat_flow(golden_cases):
    for case in golden_cases("h_e2e_sparse"):
        model = cross_dit_from_trellis(case.args, case.part("weight"))
        inputs = case.part("input")
        noise, _, restore = sparse_input(case, case.args["resolution"], "noise")
        condition = inputs["cond"].expand(noise.topology.batch_size, -1, -1)
        steps = list(trellis_sampler(case.spec["run"]).trajectory(model, noise, condition))
        case.check(torch.stack([restore(step.x.features) for step in steps]), "pred_x_t")
        case.check(torch.stack([restore(step.x0.features) for step in steps]), "pred_x_0")
        case.check(restore(steps[-1].x.features), "samples")
        case.check(restore(steps[-1].x.features) * inputs["norm_std"] + inputs["norm_mean"], "slat")


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["i_dense_mod_cross_block", "i_sparse_mod_cross_block"])
def test_cross_block(golden_cases, prefix):
    for case in golden_cases(prefix):
        inputs = case.part("input")
        block = CrossBlock(case.args["channels"], case.args["ctx_channels"], case.args["num_heads"])
        block.load_state_dict(rename(case.part("weight"), TRELLIS_CROSS_BLOCK))
        condition = inputs["cond"].flatten(0, 1)
        if "coords" in inputs:
            x, _, restore = sparse_input(case, 64)
            packing = CrossTokens.build(x.topology.lengths, inputs["cond"].shape[1])
            case.check(restore(block(x.features, inputs["mod"], condition, packing)), "feats")
        else:
            packing = CrossTokens.build([inputs["x"].shape[1]] * len(inputs["x"]), inputs["cond"].shape[1])
            rows = block(inputs["x"].flatten(0, 1), inputs["mod"], condition, packing)
            case.check(rows.unflatten(0, inputs["x"].shape[:2]), "y")


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "resample"), [("i_sparse_resblock_down", "down"), ("i_sparse_resblock_same", None)])
def test_residual_block(golden_cases, prefix, resample):
    for case in golden_cases(prefix):
        x, _, restore = sparse_input(case, 64)
        channels = (case.args["channels"], case.args.get("out_channels", case.args["channels"]))
        block = SparseResBlock(*channels, case.args["emb_channels"], resample=resample, pooling="trellis")
        block.load_state_dict(rename(case.part("weight"), TRELLIS_RES_BLOCK))
        out = block(x, case.tensors["input.emb"])
        if resample == "down":
            assert torch.equal(out.topology.coords, case.tensors["output.coords"])
            case.check(out.features, "feats")
        else:
            case.check(restore(out.features), "feats")

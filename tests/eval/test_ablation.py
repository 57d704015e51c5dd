"""The ablation from end to end at the smallest size: resumes, merges, and refuses what does not belong together."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diff2to3._errors import InputError
from diff2to3.eval import _ablation
from diff2to3.eval._ablation import run_ablation
from diff2to3.eval._ablation_config import load_ablation
from diff2to3.eval._ablation_table import _pairs
from diff2to3.eval._known_voxels import KnownVoxels

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "ablation"
TRAINING = {"batch_size": 2, "steps": 4, "checkpoint_every": 2, "warmup_steps": 1, "precision": "fp32"}
CROSS = {"preset": "tiny", "width": 16, "num_heads": 1, "num_blocks": 1, "io_channels": []}
JOINT = {
    "preset": "tiny", "width": 16, "num_heads": 1, "head_dim": 16, "num_double_blocks": 0, "num_single_blocks": 1,
    "io_channels": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def values(eval_data, eval_assets, tmp_path_factory):
    """Settings of two rows whose extractors are autoencoders of 4 and 8 channels, untrained."""
    from diff2to3.train._checkpoint import save_model
    from flux_features import FluxFeatures, FluxFeaturesConfig

    folder, extractors = tmp_path_factory.mktemp("extractors"), {}
    for name, channels in (("semantic", 8), ("diffusion", 4)):
        config = FluxFeaturesConfig(
            image_size=32, latent_channels=channels, channel_mean=(0.0,) * channels, channel_std=(1.0,) * channels
        )
        with torch.random.fork_rng():
            torch.manual_seed(channels)
            save_model(folder / name, config, FluxFeatures(config).state_dict())
        extractors[name] = {"source": str(folder / name)}
    vae = {"preset": "tiny", "width": 16, "num_blocks": 1, "num_heads": 1}
    vae["gaussians"] = {"num_gaussians": 2, "scale_bias": 0.03, "min_scale": 0.004}
    return {
        "data": str(eval_data.root),
        "source": str(eval_assets),
        "device": "cpu",
        "grid_size": 16,
        "seeds": [0],
        "extractors": extractors,
        "lift": {"num_views": 4, "num_variants": 1},
        "vae": {"model": vae, **TRAINING},
        "flow": dict(TRAINING),
        "rows": {
            "Exp 1": {"features": "semantic", "backbone": "cross-dit", "model": CROSS, "marks": ["", "", ""]},
            "Exp 4": {"features": "diffusion", "backbone": "smdit", "model": JOINT, "marks": ["x", "x", "x"]},
        },
        "scoring": {"limit": 2, "size": 32, "steps": 1, "shown": 1, "renderer": "cpu"},
    }


@pytest.fixture
def config_of(values, tmp_path):
    def load(out, **changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**values, "out": str(out), **changes}))
        return load_ablation(path)

    return load


@pytest.fixture(scope="module")
def finished(values, tmp_path_factory):
    """A run of seed 0, and its table."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "config.yaml").write_text(yaml.safe_dump({**values, "out": str(folder / "run")}))
    return folder / "run", run_ablation(load_ablation(folder / "config.yaml"))


def results(out):
    return {f.stem: json.loads(f.read_text()) for f in (out / "results").glob("*.json")}


def test_table_and_page(finished):
    out, text = finished
    assert set(results(out)) == {"Exp 1-0", "Exp 4-0", "vae semantic-0", "vae diffusion-0"}
    assert "| Exp 4 (paper) |  |  |  | 98.45 | 19.78 | 0.0394 | 122.9 | 3.78 |  |" in text
    [row] = [line for line in text.splitlines() if line.startswith("| Exp 4 (1 seeds) | x | x | x |")]
    assert row.count("|") > 6
    assert "VAE of semantic features" in text
    assert "semantic are FluxFeatures' 8 channels" in text
    assert "diffusion are FluxFeatures' 4 channels" in text
    page = (out / "index.html").read_text()
    assert "<th>Exp 1</th><th>Exp 4</th>" in page
    assert page.count("data:image/jpeg") == 4  # input, truth and both rows of one object


def test_finished_work_is_not_done_again(finished, config_of, monkeypatch):
    out, text = finished
    monkeypatch.setattr(_ablation, "train", lambda *args, **options: pytest.fail("trained again"))
    monkeypatch.setattr(_ablation, "evaluate_generation", lambda *args, **options: pytest.fail("scored again"))
    assert run_ablation(config_of(out)) == text


def test_interrupted_run_goes_on_and_ends_on_the_same_figures(finished, config_of, tmp_path, monkeypatch):
    steps, real = [], _ablation.train

    def counted(stage, config, resume, on_step):
        return real(stage, config, resume, lambda step: (steps.append(step), on_step(step)))

    monkeypatch.setattr(_ablation, "train", counted)
    clock = iter([0.0, *[1.0] * 20])  # the deadline is 60 s after the first reading
    monkeypatch.setattr(_ablation.time, "monotonic", lambda: next(clock) if len(steps) < 2 else 1e9)
    out = tmp_path / "run"
    text = run_ablation(config_of(out), minutes=1)
    assert steps == [1, 2]
    assert "Exp 1 (0 seeds)" in text
    monkeypatch.undo()
    monkeypatch.setattr(_ablation, "train", counted)
    run_ablation(config_of(out))
    assert steps[2:4] == [3, 4]  # from the checkpoint, not from the start
    for name, result in results(finished[0]).items():
        assert results(out)[name]["summary"] == result["summary"], name


def test_results_of_another_seed_join(finished, config_of, tmp_path):
    out = finished[0]
    other = tmp_path / "other"
    run_ablation(config_of(other, seeds=[1]))
    text = run_ablation(config_of(out), merge=[other], table_only=True)
    assert "Exp 1 (2 seeds)" in text
    values = [r["Exp 1-0" if folder == out else "Exp 1-1"] for folder in (out, other) for r in [results(folder)]]
    first, second = (v["summary"]["psnr"]["mean"] for v in values)
    assert first != second
    assert f"| Exp 1 (2 seeds) | {(first + second) / 2:.4g} ± " in text
    assert "| Exp 4 less Exp 1 | " in text
    (other / "results" / "Exp 1-1.json").write_text("{")
    with pytest.raises(InputError, match=r"Exp 1-1.json: not the result of an ablation"):
        run_ablation(config_of(out), merge=[other], table_only=True)
    with pytest.raises(InputError, match="no results there"):
        run_ablation(config_of(out), merge=[tmp_path], table_only=True)


def test_differences_are_object_by_object():
    def seeds(*figures):
        return {seed: {"objects": [{"psnr": value} for value in values]} for seed, values in enumerate(figures)}

    noise = [10.0, 30.0, 20.0]  # between objects, far more than between the rows
    better = seeds([v + 1 for v in noise], [v + 3 for v in noise])
    results = {"a": seeds(noise, noise), "b": better, "c": {7: better[0]}, "d": seeds([9, 31, 24])}
    table = _pairs(results, {"b": "a", "c": "a", "d": "a", "e": "a"}).splitlines()
    assert table[2].startswith("| b less a | +2 [+2, +2] | ")
    mean, low, high = (float(x) for x in re.findall(r"[+-]\d[\d.]*", table[3]))
    assert (mean, low, high) == (1.33, -1.0, 4.0)
    assert len(table) == 4


def test_other_settings_are_refused(finished, config_of, values, tmp_path):
    out = finished[0]
    with pytest.raises(InputError, match=r"begun with other settings \(flow\)"):
        run_ablation(config_of(out, flow={**TRAINING, "steps": 5}))
    with pytest.raises(InputError, match=r"begun with other settings \(scoring.steps\)"):
        run_ablation(config_of(out, scoring={**values["scoring"], "steps": 2}))
    rows = {**values["rows"], "Exp 1": {**values["rows"]["Exp 1"], "features": "diffusion"}}
    with pytest.raises(InputError, match=r"begun with other settings \(rows.Exp 1\)"):
        run_ablation(config_of(out, rows=rows))
    with pytest.raises(InputError, match="cannot be merged"):
        run_ablation(config_of(tmp_path / "new", lift={"num_views": 3}), merge=[out], table_only=True)
    with pytest.raises(InputError, match="the ablation gives seed itself"):
        run_ablation(config_of(tmp_path / "seed", vae={**values["vae"], "seed": 3}))
    rows = {**values["rows"], "Exp 4": {**values["rows"]["Exp 4"], "backbone": "smdti"}}
    with pytest.raises(InputError, match="no backbone named 'smdti'"):
        run_ablation(config_of(tmp_path / "unknown", rows=rows))
    with pytest.raises(InputError, match=r"features 'x'; extractors has diffusion, semantic"):
        config_of(out, rows={"a": {"features": "x", "backbone": "smdit"}})


def test_told_voxels_are_given_back():
    structure, coords = KnownVoxels(4, 16), [torch.tensor([[1, 2, 3]])]
    structure.tell(coords)
    [found] = structure.sample(torch.zeros(1, 1, 2, 2, 4), seeds=[0])
    assert found.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_published_tables_are_whole(name):
    """Each row differs from the one before in what the paper says and in nothing else."""
    config = load_ablation(CONFIGS / f"{name}.yaml")
    first, second, third, fourth = config.rows.values()
    assert len(config.seeds) >= 2
    assert (first.features, first.backbone, first.model) == ("semantic", "cross-dit", second.model)
    assert second.features == third.features == fourth.features == "diffusion"
    assert second.backbone == "cross-dit"
    assert second.model["condition_position"] == "absolute"
    assert third.backbone == fourth.backbone == "smdit"
    assert third.model | {"position": "marope"} == fourth.model
    assert third.model["position"] == "absolute"


@pytest.mark.parametrize("name", ["backbone", "channels"])
def test_published_studies_share_the_table_s_run_folder(name):
    table, study = load_ablation(CONFIGS / "tiny.yaml"), load_ablation(CONFIGS / f"{name}.yaml")
    assert study.digest == table.digest
    assert study.tables != table.tables
    if "Exp 4" in study.rows:
        assert study.rows["Exp 4"].model == table.rows["Exp 4"].model


def test_processes_share_a_run_folder(finished, config_of, tmp_path, monkeypatch):
    """Rows on their own, a lock that another process holds, and a configuration with other rows beside."""
    from filelock import FileLock

    out = tmp_path / "run"
    assert "Exp 1 (0 seeds)" in run_ablation(config_of(out), rows=["Exp 4"])
    assert set(results(out)) == {"Exp 4-0", "vae diffusion-0"}
    with FileLock(out / "locks" / "vae semantic-0.lock"):
        run_ablation(config_of(out), rows=["Exp 1"], minutes=0.02)
        assert set(results(out)) == {"Exp 4-0", "vae diffusion-0"}
    assert run_ablation(config_of(out)) == finished[1]
    other = {"Joint": {"features": "diffusion", "backbone": "smdit", "model": JOINT}}
    text = run_ablation(config_of(out, rows=other, tables="studies"))
    assert "| Joint (1 seeds) |" in text
    assert "Exp 1 (" not in text
    assert (out / "studies" / "table.md").read_text() == f"# Ablation\n\n{text}\n"
    assert "Exp 1 (1 seeds)" in (out / "table.md").read_text()
    run_ablation(config_of(tmp_path / "merged"), merge=[out], table_only=True)
    with pytest.raises(InputError, match="'Exp 9': unknown; the configuration has Exp 1, Exp 4"):
        run_ablation(config_of(out), rows=["Exp 9"])

"""The examples in the README and on the documentation page run as printed."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "packages/sparse_vae/README.md", ROOT / "docs/sparse_vae.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    scope: dict = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, page.name, "exec"), scope)


def test_sizes_of_presets_are_those_of_the_table():
    from sparse_vae import SparseVAE, SparseVAEConfig, StructureVAE, StructureVAEConfig

    table = PAGES[1].read_text()
    for name in ("tiny", "small", "paper"):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
        with torch.device("meta"):
            models = SparseVAE(SparseVAEConfig.preset(name)), StructureVAE(StructureVAEConfig.preset(name))
        for model in models:
            halves = [sum(p.numel() for p in half.parameters()) / 1e6 for half in (model.encoder, model.decoder)]
            shown = [f"{h:.2f} M" if name == "tiny" else f"{h:.1f} M" for h in halves]
            assert " + ".join(shown) in line, shown

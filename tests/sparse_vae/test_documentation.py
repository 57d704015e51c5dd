"""The tables on the documentation page are true."""

from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs/sparse_vae.md"


def test_sizes_of_presets_are_those_of_the_table():
    from sparse_vae import SparseVAE, SparseVAEConfig, StructureVAE, StructureVAEConfig

    table = PAGE.read_text()
    for name in ("tiny", "small", "paper"):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
        with torch.device("meta"):
            models = SparseVAE(SparseVAEConfig.preset(name)), StructureVAE(StructureVAEConfig.preset(name))
        for model in models:
            halves = [sum(p.numel() for p in half.parameters()) / 1e6 for half in (model.encoder, model.decoder)]
            shown = [f"{h:.2f} M" if name == "tiny" else f"{h:.1f} M" for h in halves]
            assert " + ".join(shown) in line, shown

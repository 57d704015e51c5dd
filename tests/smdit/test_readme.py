"""The tables of README and guide are true."""

import re
from pathlib import Path

import torch
from smdit import CrossDiT, CrossDiTConfig, SMDiT, SMDiTConfig, StructureDiT, StructureDiTConfig, _flux_weights

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "packages" / "smdit" / "README.md").read_text()
GUIDE = (ROOT / "docs" / "smdit.md").read_text()
MODELS = {
    "SMDiTConfig": (SMDiT, SMDiTConfig),
    "CrossDiTConfig": (CrossDiT, CrossDiTConfig),
    "StructureDiTConfig": (StructureDiT, StructureDiTConfig),
}


def test_table_of_parameters():
    rows = re.findall(r'`(\w+)\.preset\("(\w+)"\)`.*\| ([\d.]+) M \|', README)
    assert len(rows) == 5
    for config, preset, stated in rows:
        build, configs = MODELS[config]
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in build(configs.preset(preset)).parameters())
        assert f"{count / 1e6:.1f}" == stated


def test_documented_key_maps_are_the_ones_in_use():
    documented = {}
    for ours, diffusers, bfl in re.findall(r"^\| `(\S+)` \| (`.+`) \| `(\S+)` \|$", GUIDE, flags=re.MULTILINE):
        documented[ours] = (tuple(re.findall(r"`(\S+)`", diffusers)), bfl)
    maps = _flux_weights
    used = {**maps.FLUX_DOUBLE_FUSED, **maps.FLUX_SINGLE_FUSED}
    for table in (maps.FLUX_DOUBLE_BLOCK, maps.FLUX_SINGLE_BLOCK):
        used |= {ours: (theirs,) for theirs, ours in table.items()}
    bfl = {}
    for table in (maps.FLUX_BFL_DOUBLE_BLOCK, maps.FLUX_BFL_SINGLE_BLOCK):
        bfl |= {ours: theirs for theirs, ours in table.items()}
    assert documented == {ours: (theirs, bfl[ours]) for ours, theirs in used.items()}

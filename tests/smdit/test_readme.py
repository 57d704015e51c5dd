"""The README's example runs, and its table of parameters is true."""

import re
from pathlib import Path

import torch
from smdit import CrossDiT, CrossDiTConfig, SMDiT, SMDiTConfig, StructureDiT, StructureDiTConfig

README = (Path(__file__).resolve().parents[2] / "packages" / "smdit" / "README.md").read_text()
MODELS = {
    "SMDiTConfig": (SMDiT, SMDiTConfig),
    "CrossDiTConfig": (CrossDiT, CrossDiTConfig),
    "StructureDiTConfig": (StructureDiT, StructureDiTConfig),
}


def test_example():
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["loss"].ndim == 0
    assert scope["latents"].features.shape == (500, 8)


def test_table_of_parameters():
    rows = re.findall(r'`(\w+)\.preset\("(\w+)"\)`.*\| ([\d.]+) M \|', README)
    assert len(rows) == 5
    for config, preset, stated in rows:
        build, configs = MODELS[config]
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in build(configs.preset(preset)).parameters())
        assert f"{count / 1e6:.1f}" == stated

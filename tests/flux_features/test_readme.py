"""The code of the README runs, in order."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "packages" / "flux_features" / "README.md"


def test_readme_code_runs():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(README), "exec"), names)
    assert names["features"].shape == (2, 16, 32, 32)
    assert names["tokens"].shape == (2, 16, 16, 64)
    assert names["pictures"].shape == names["images"].shape
    assert names["volume"].shape == (500, 16)

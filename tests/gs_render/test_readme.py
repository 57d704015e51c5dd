"""The code of the README runs, in order."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "packages" / "gs_render" / "README.md"


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert {"ball.ply", "ball.spz", "ball.png", "ball.html", "ball.gif", "ball.glb"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert names["output"].color.shape == (8, 256, 256, 3)

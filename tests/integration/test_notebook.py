"""examples/quickstart.ipynb runs from top to bottom, and shows a splat that can be turned."""

import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    shutil.copy(EXAMPLES / "mushroom.png", tmp_path)
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs do not belong into the repository"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if output.output_type == "execute_result"]
    assert any("<iframe" in data.get("text/html", "") and "webgl2" in data["text/html"] for data in shown)
    assert sum("image/png" in data for data in shown) == 2
    assert {"mushroom.ply", "mushroom.spz", "mushroom.views.png"} <= {path.name for path in tmp_path.iterdir()}

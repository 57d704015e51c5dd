"""Options and fixtures of the whole test suite."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    parser.addoption("--golden", default=str(default), help="folder with tensors of the reference implementation")


@pytest.fixture(scope="session")
def golden_dir(request):
    """Folder of the stored tensors that tests marked `golden` compare with."""
    folder = Path(request.config.getoption("--golden"))
    if not folder.is_dir():
        pytest.skip(f"NO GOLDEN DATA: {folder} does not exist; give its place with --golden DIR")
    return folder

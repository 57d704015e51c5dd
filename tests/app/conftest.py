"""A server with the embedded pipeline, and a browser to look at it."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def server():
    """Address of a running app with small limits, and the pipeline that it uses."""
    pytest.importorskip("gradio", reason="NOT TESTED: gradio is not installed, pip install 'diff2to3[app]'")
    from diff2to3 import Pipeline
    from diff2to3.app._limits import Limits
    from diff2to3.app._server import serving

    pipeline = Pipeline.from_pretrained(device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")  # how soon it sees that a user is gone
        with serving(pipeline, Limits(upload_megabytes=1, pixels=1_000_000, samples=2, queue=2)) as address:
            yield address, pipeline


@pytest.fixture(scope="session")
def server_folder(server):
    """Where the server keeps what users upload and make."""
    return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window and without a network but this machine; downloads go to `tmp_path`."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("NO BROWSER: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="NO BROWSER: selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--use-gl=angle",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        "--window-size=1400,1000",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()

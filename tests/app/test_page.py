"""The page in a real browser: from a picture to a downloaded splat, and what happens to wrong pictures."""

import io
import json
import threading
from pathlib import Path

import numpy as np
from diff2to3.app._work import THREADS
from gs_render import load
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT = 120


def wait(browser, found):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, TIMEOUT, 0.1, [StaleElementReferenceException]).until(found)


def find(browser, selector):
    """The first visible element, waited for."""
    return wait(
        browser, lambda b: next(filter(lambda e: e.is_displayed(), b.find_elements("css selector", selector)), None)
    )


def choose(browser, path):
    field = wait(browser, lambda b: b.find_elements("css selector", "#picture input[type=file]"))
    field[0].send_keys(str(path))


def generate(browser, steps):
    find(browser, "#settings button").click()
    find(browser, "#own input").click()
    field = find(browser, "#steps input[type=number]")
    browser.execute_script(f"arguments[0].value = {steps}; arguments[0].dispatchEvent(new Event('input'))", field)
    find(browser, "#generate").click()


def picture(element):
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"), np.float32) / 255


def drawn(element):
    """Share of an element's pixels that are clearly not white, without its frame."""
    inner = picture(element)[10:-60, 10:-10]  # the note at the bottom is no object
    return float((inner.min(-1) < 0.8).mean())


def requests(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_from_a_picture_to_a_splat(server, server_folder, browser, tmp_path):
    browser.get(server[0])
    choose(browser, EXAMPLES / "mushroom.png")
    cut = picture(find(browser, "#cut img"))
    assert cut.std() > 0.1
    generate(browser, steps=2)
    frame = find(browser, "#viewer iframe")
    assert frame.get_attribute("title") == "occupied voxels, to turn and zoom"
    wait(browser, lambda b: drawn(find(b, "#viewer iframe")) > 0.01)
    frame = find(browser, "#viewer iframe[title^=mushroom]")
    wait(browser, lambda b: drawn(frame) > 0.01)
    splat = picture(frame)
    assert (splat[..., 0] - splat[..., 2]).max() > 0.3  # the red of a mushroom
    find(browser, "#video video")
    assert len(browser.find_elements("css selector", "#progress li.done")) == 6

    find(browser, "#download:not([disabled])").click()
    wait(browser, lambda b: list(tmp_path.glob("mushroom.ply")))
    own = server[1](EXAMPLES / "mushroom.png", steps=2, guidance=server[1].config.sampler.guidance)
    assert len(load(tmp_path / "mushroom.ply")) == len(own.gaussians)
    assert {url.split("/")[2] for url in requests(browser) if url.startswith("http")} == {server[0].split("/")[2]}

    assert list(server_folder.rglob("mushroom.mp4"))
    browser.get("about:blank")
    wait(browser, lambda b: not list(server_folder.rglob("mushroom.mp4")))  # gone with the user


def test_stop_ends_the_work(server, browser):
    def working():
        return [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]

    browser.get(server[0])
    find(browser, "#examples button").click()
    find(browser, "#cut img")
    generate(browser, steps=100)
    wait(browser, lambda b: "/ 100" in b.find_element("id", "progress").text)
    assert working()
    find(browser, "#stop").click()
    wait(browser, lambda b: not working())
    find(browser, "#generate")
    assert not browser.find_elements("css selector", "#viewer iframe")


def test_wrong_pictures_get_a_message(server, browser, tmp_path):
    (tmp_path / "letter.png").write_text("not a picture")
    Image.new("RGB", (1200, 900), "white").save(tmp_path / "huge.png")
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")
    browser.get(server[0])
    for name, message in (
        ("letter.png", "letter.png is not a picture that can be read"),
        ("huge.png", "huge.png has 1200 x 900 pixels; expected at most 1 million"),
        ("heavy.png", "maximum allowed size"),
    ):
        choose(browser, tmp_path / name)
        wait(browser, lambda b, text=message: text in b.find_element("tag name", "body").text)
        browser.refresh()
    find(browser, "#generate").click()
    wait(browser, lambda b: "there is no picture yet" in b.find_element("tag name", "body").text)

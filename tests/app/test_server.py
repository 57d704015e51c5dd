"""The running server: as an API, for two at once, with hostile calls; and the command that starts it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from gs_render import load, save

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DOCUMENTATION = ROOT / "docs" / "app.md"


@pytest.fixture
def client(server):
    return connect(server[0])


def connect(address):
    from gradio_client import Client

    return Client(address, verbose=False)


def same_splat(path, asset, folder):
    expected = save(asset.gaussians, folder / "expected.ply")
    return torch.equal(load(path).means, load(expected).means)


def test_documented_call(server, tmp_path, monkeypatch, capsys):
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    assert code.count("http://127.0.0.1:7860") == 1
    code = code.replace("http://127.0.0.1:7860", server[0]).replace("steps=None,  ", "steps=1,")
    shutil.copy(EXAMPLES / "chair.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, str(DOCUMENTATION), "exec"), scope)
    splat, page = map(Path, scope["files"])
    assert [splat.name, page.name] == ["chair.ply", "chair.html"]
    assert same_splat(splat, server[1](EXAMPLES / "chair.png", seed=0, steps=1), tmp_path)
    assert "chair.ply" in capsys.readouterr().out


def test_two_at_once_get_their_own(server, tmp_path):
    from gradio_client import handle_file

    def make(name):
        picture = handle_file(str(EXAMPLES / f"{name}.png"))
        [path] = connect(server[0]).predict(image=picture, steps=1, seed=2, api_name="/generate")
        return path

    names = ("cake", "robot")
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(make, names))
    for name, path in zip(names, paths, strict=True):
        assert Path(path).name == f"{name}.ply"
        assert same_splat(path, server[1](EXAMPLES / f"{name}.png", seed=2, steps=1), tmp_path)


def test_who_finds_the_queue_full_is_turned_away(server):
    from gradio_client import handle_file
    from gradio_client.utils import QueueError

    client, picture = connect(server[0]), handle_file(str(EXAMPLES / "cake.png"))
    jobs = [client.submit(image=picture, steps=1, api_name="/generate") for _ in range(5)]  # one works, two may wait
    errors = [job.exception() for job in jobs]
    assert errors.count(None) >= 2
    full = [error for error in errors if error is not None]
    assert full
    assert all(isinstance(error, QueueError) for error in full)


def test_what_cannot_be_done_is_said(client, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "letter.png").write_text("not a picture")
    chair = str(EXAMPLES / "chair.png")
    for file, options, message in (
        (tmp_path / "letter.png", {}, "letter.png is not a picture that can be read"),
        (chair, {"samples": 3}, "samples is 3; expected a number from 1 to 2"),
        (chair, {"formats": ["exe"]}, "no format 'exe'; expected one of ply"),
    ):
        with pytest.raises(AppError) as caught:
            client.predict(image=handle_file(str(file)), **options, api_name="/generate")
        assert caught.value.message.startswith(message)
        assert "/" not in caught.value.message


def test_too_large_a_file_is_refused(client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "heavy.png").write_bytes(bytes(1_100_000))
    with pytest.raises(Exception, match="maximum file size of 1000000 bytes"):
        client.predict(image=handle_file(str(tmp_path / "heavy.png")), api_name="/generate")


def test_files_of_the_server_stay_there(server, server_folder):
    import httpx

    address = server[0].rstrip("/") + "/gradio_api"
    inside = [str(DOCUMENTATION), str(server_folder), "/etc/passwd", f"{server_folder}/../{server_folder.name}"]
    for path in inside:
        assert httpx.get(f"{address}/file={path}").status_code in (403, 404)
    picture = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    event = httpx.post(f"{address}/call/generate", json={"data": [picture, 0, 1, 1, None, ["ply"]]}).json()["event_id"]
    answer = httpx.get(f"{address}/call/generate/{event}", timeout=60).text
    assert answer.startswith("event: error")
    assert "root:" not in answer
    for page in (server[0], address + "/info"):
        text = httpx.get(page).text
        assert str(ROOT) not in text
        assert str(Path.home()) not in re.sub(re.escape(str(server_folder)), "", text)


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="NOT TESTED: no table of sockets, not Linux")
def test_only_this_machine_can_reach_it(server):
    port = int(re.search(r":(\d+)", server[0])[1])
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path("/proc/net", table).read_text().splitlines()[1:]]
    listening = "0A"
    addresses = {row[1].split(":")[0] for row in rows if row[3] == listening and row[1].endswith(f":{port:04X}")}
    assert addresses == {"0100007F"}  # 127.0.0.1, in the order of bytes of this machine


def test_command_starts_and_leaves_nothing(micro_pipeline, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diff2to3", "app", "--no-browser", "--device", "cpu", "--pipeline", micro_pipeline]
    environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    environment["TMPDIR"] = str(tmp_path)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": tmp_path}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs inherit none
    with subprocess.Popen([*command, "--port", str(port)], **options) as process:
        try:
            assert process.stdout.readline() == f"http://127.0.0.1:{port}/\n"
            assert list(tmp_path.glob("diff2to3-app-*"))
            assert b"diff2to3" in urlopen(f"http://127.0.0.1:{port}/").read()
        finally:
            process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in messages
    assert not list(tmp_path.iterdir())


def test_command_line_refuses_at_once():
    result = subprocess.run(
        [sys.executable, "-m", "diff2to3", "app", "--pipeline", "nothing"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("diff2to3: error: no pipeline 'nothing'")


def test_port_that_is_taken_is_said(server, micro_pipeline):
    from click.testing import CliRunner
    from diff2to3._errors import InputError
    from diff2to3.app._cli import app

    port = server[0].rstrip("/").rsplit(":", 1)[1]
    options = ["--port", port, "--pipeline", str(micro_pipeline), "--device", "cpu", "--no-browser"]
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(f"the app cannot listen at 127.0.0.1, port {port}; expected an address")
    assert urlopen(server[0]).status == 200  # the other one goes on

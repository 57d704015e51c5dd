"""The app under two users for half an hour: does a call fail, does its memory grow?

    python tests/faults/soak.py                  # 30 minutes
    python tests/faults/soak.py --minutes 2

One user is a program that stays connected, the other comes anew for every object, like a page that is opened and
closed. Prints the lowest memory of the server in each thirtieth of the time; exit code 1 where a call failed, a file
was not whole, or memory has grown by more than 5 % once it is warm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import gs_render
from gradio_client import Client, handle_file
from measure import growth, resident

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.png"))
LIMIT = 0.05
MEASUREMENTS = 30


class User(threading.Thread):
    """Makes one object after the other until told to stop."""

    def __init__(self, address: str, folder: Path, stays: bool, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.address, self.folder, self.stays, self.stop = address, folder, stays, stop
        self.done, self.errors, self.slowest = 0, Counter[str](), 0.0

    def run(self) -> None:
        client = self._connect() if self.stays else None
        while not self.stop.is_set():
            start = time.monotonic()
            try:
                if client is not None:
                    self._make(client)
                else:
                    with closing(self._connect()) as visitor:  # else its heartbeat says for ever that it is there
                        self._make(visitor)
                self.done += 1
            except Exception as error:  # whatever it is: it is what the soak looks for
                self.errors[f"{type(error).__name__}: {error}"] += 1
            self.slowest = max(self.slowest, time.monotonic() - start)

    def _connect(self) -> Client:
        return Client(self.address, verbose=False, download_files=str(self.folder))

    def _make(self, client: Client) -> None:
        picture = EXAMPLES[self.done % len(EXAMPLES)]
        options = {"steps": 1, "seed": self.done % 5, "formats": ["ply", "html"]}
        files = client.predict(image=handle_file(str(picture)), **options, api_name="/generate")
        splat, page = map(Path, files)
        assert len(gs_render.load(splat)) > 0, f"{splat} is empty"
        assert page.read_text().rstrip().endswith("</html>"), f"{page} is cut"
        for path in (splat, page):
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pipeline", help="default: the embedded one")
    options = parser.parse_args()
    command = [sys.executable, "-m", "diff2to3", "app", "--no-browser", "--device", "cpu"]
    command += ["--pipeline", options.pipeline] if options.pipeline else []
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            users = [User(address, Path(folder) / str(stays), stays, stop) for stays in (True, False)]
            for user in users:
                user.start()
            curve, start = [], time.monotonic()
            for number in range(1, MEASUREMENTS + 1):
                curve.append(lowest(server.pid, start + number * options.minutes * 60 / MEASUREMENTS))
                made, failed = sum(user.done for user in users), sum(user.errors.total() for user in users)
                print(
                    f"{(time.monotonic() - start) / 60:5.1f} min  {curve[-1]:8.1f} MB  {threads(server.pid):3d} threads"
                    f"  {made:4d} objects  {failed} errors",
                    flush=True,
                )
            stop.set()
            for user in users:
                user.join(120)
        finally:
            server.terminate()
        log.seek(0)
        messages = log.read()
    for user in users:
        kind = "connected" if user.stays else "new each time"
        print(f"{kind}: {user.done} objects, slowest {user.slowest:.1f} s, errors {dict(user.errors)}")
    grown, errors = growth(curve, skip=MEASUREMENTS // 10), sum(user.errors.total() for user in users)
    print(
        f"memory {100 * grown:+.2f} % (at most {100 * LIMIT:.0f} % wanted), server's log: {messages.strip() or 'empty'}"
    )
    return int(errors > 0 or grown > LIMIT or "Traceback" in messages)


def lowest(pid: int, end: float) -> float:
    """Lowest resident memory of a process until a time, MB: what an object needs for a while comes and goes."""
    found = resident(pid)
    while time.monotonic() < end:
        time.sleep(min(0.5, max(0, end - time.monotonic())))
        found = min(found, resident(pid))
    return found


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


if __name__ == "__main__":
    raise SystemExit(main())

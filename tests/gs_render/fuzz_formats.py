"""Feed damaged files to `gs_render.load`: it must return Gaussians or raise ValueError, soon and in little memory.

    python tests/gs_render/fuzz_formats.py --count 10000

Files are mutations of valid ones of every format that is read. Containers are also mutated inside and packed again, so
that damage reaches the parsers behind gzip, zip and JSON.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from gs_render import Gaussians, load, save

SUFFIXES = (".ply", ".compressed.ply", ".splat", ".spz", ".sog", ".glb")
SECONDS_PER_FILE = 10
_EXTREMES = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00000)


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Valid files: small ones of two degrees, and an empty one."""
    generator = torch.Generator().manual_seed(0)
    scenes = [Gaussians.empty()]
    for count, degree in ((300, 0), (40, 3)):
        scenes.append(
            Gaussians(
                torch.rand(count, 3, generator=generator) - 0.5,
                torch.rand(count, 3, generator=generator) * 0.1 + 1e-3,
                torch.randn(count, 4, generator=generator),
                torch.rand(count, generator=generator),
                torch.randn(count, (degree + 1) ** 2, 3, generator=generator) * 0.3,
            )
        )
    found: dict[str, list[bytes]] = {suffix: [] for suffix in SUFFIXES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for suffix in SUFFIXES:
            for scene in scenes:
                found[suffix].append(save(scene, folder / f"seed{suffix}").read_bytes())
    return found


def mutate(data: bytes, dice: random.Random) -> bytes:
    """One to eight random changes of the bytes."""
    buffer = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 3, 8))):
        # Headers are short and matter most.
        reach = len(buffer) if dice.random() < 0.5 else min(len(buffer), 400)
        at = dice.randrange(reach + 1)
        kind = dice.randrange(7)
        if kind == 0 and at < len(buffer):
            buffer[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            buffer[at : at + 4] = struct.pack("<I", dice.choice(_EXTREMES))
        elif kind == 2:
            del buffer[at : at + dice.choice((1, 4, 64, len(buffer)))]
        elif kind == 3:
            buffer[at:at] = dice.randbytes(dice.choice((1, 4, 100)))
        elif kind == 4:
            other = dice.randrange(len(buffer) + 1)
            buffer[at : at + 16] = buffer[other : other + 16]
        elif kind == 5:
            buffer[at : at + 1] = dice.choice((b"9", b"-", b"[", b"{", b"null", b"1e999", b'"', b"\n", b" "))
        else:
            buffer += buffer[:at]
    return bytes(buffer)


def mutate_json(text: bytes, dice: random.Random) -> bytes:
    """Replace one value somewhere in a JSON document by one of another type or size."""
    document = json.loads(text)
    spots: list[tuple[dict | list, str | int]] = []

    def walk(node: object) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            spots.append((node, key))  # type: ignore[arg-type]
            walk(value)

    walk(document)
    for _ in range(dice.choice((1, 1, 2))):
        parent, key = dice.choice(spots)
        values = (None, -1, 0, 2**31, 2**62, 1e308, "x", [], {}, [[]], True, 3.5, "meta.json", [1e999])
        parent[key] = dice.choice(values)  # type: ignore[index]
    return json.dumps(document).encode()


def mutate_inside(suffix: str, data: bytes, dice: random.Random) -> bytes:
    """Damage behind the outer layer of the format, if it has one."""
    if suffix == ".spz":
        return gzip.compress(mutate(gzip.decompress(data), dice), 1)
    if suffix == ".sog":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = dice.choice(["meta.json", dice.choice(list(members))])
        change = mutate_json if name == "meta.json" and dice.random() < 0.8 else mutate
        members[name] = change(members[name], dice)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return buffer.getvalue()
    if suffix == ".glb":
        length = struct.unpack("<I", data[12:16])[0]
        text = mutate_json(data[20 : 20 + length], dice)
        return data[:12] + struct.pack("<I", len(text)) + data[16:20] + text + data[20 + length :]
    return mutate(data, dice)


def run(count: int, seed: int = 0, report: Callable[[str], None] = print) -> tuple[Counter[str], list[str]]:
    """(outcomes by kind, descriptions of failures) of `count` files."""
    dice = random.Random(seed)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    slowest = 0.0

    def too_long(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS_PER_FILE} s")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        valid = seeds(folder)
        for index in range(count):
            suffix = SUFFIXES[index % len(SUFFIXES)]
            data = dice.choice(valid[suffix])
            damaged = mutate(data, dice) if dice.random() < 0.4 else mutate_inside(suffix, data, dice)
            path = folder / f"case{suffix}"
            path.write_bytes(damaged)
            start = time.perf_counter()
            signal.alarm(SECONDS_PER_FILE)
            try:
                load(path)
                outcomes["loaded"] += 1
            except ValueError:
                outcomes["refused"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcomes["FAILED"] += 1
                failures.append(f"file {index} ({suffix}), seed {seed}: {type(error).__name__}: {error}")
                report(failures[-1])
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(
        f"{count} files: {dict(outcomes)}; slowest {slowest:.2f} s; peak memory {peak:.0f} MiB (with PyTorch itself)"
    )
    if peak > 1024:
        failures.append(f"peak memory {peak:.0f} MiB exceeds 1 GiB")
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _, failures = run(options.count, options.seed)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

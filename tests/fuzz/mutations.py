"""Random damage to files: bytes, values of JSON documents, and what lies behind the outer layer of a container."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import tarfile
import zipfile

_EXTREMES = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00000)
_WORDS = (b"9", b"-", b"[", b"{", b"null", b"1e999", b'"', b"\n", b" ", b"&a ", b"*a", b"\x80", b"\0")
_NUMBERS = (b"-1", b"0", b"65536", b"4294967295", b"1e400", b"999999999999", b"NaN", b"null", b"[]", b"0.5")
_NAMES = (b"../outside.png", b"/etc/passwd", b"%2e%2e/outside.png", b"link.png", b"", b"\0", b"file:///etc/passwd")
_VALUES = (
    *(None, -1, 0, 1, 2**16, 2**31, 2**62, 10**30, 1e308, -0.5, 3.5, True, [1e999], float("nan")),
    *("", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], {"": None}, "meta.json"),
)


def mutate(data: bytes, dice: random.Random) -> bytes:
    """One to eight random changes of the bytes."""
    buffer = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 3, 8))):
        # Headers are short and matter most.
        reach = len(buffer) if dice.random() < 0.5 else min(len(buffer), 400)
        at = dice.randrange(reach + 1)
        kind = dice.randrange(9)
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
            buffer[at : at + 1] = dice.choice(_WORDS)
        elif kind == 6 and len(buffer) < 1 << 20:
            buffer += buffer[:at]
        else:
            pattern, chosen = (rb"\d+", _NUMBERS) if kind == 7 else (rb"[\w/]+\.(?:png|mtl|bin|tar)", _NAMES)
            found = list(re.finditer(pattern, buffer[:20_000]))
            if found:
                start, end = dice.choice(found).span()
                buffer[start:end] = dice.choice(chosen)
    return bytes(buffer)


def mutate_json(text: bytes, dice: random.Random) -> bytes:
    """One or two values somewhere in a JSON document become of another type or size, go, or move elsewhere."""
    document = json.loads(text)
    spots: list[tuple[dict | list, str | int]] = []

    def walk(node: object) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            spots.append((node, key))  # type: ignore[arg-type]
            walk(value)

    walk(document)
    for _ in range(dice.choice((1, 1, 2)) if spots else 0):
        parent, key = dice.choice(spots)
        kind = dice.random()
        if kind < 0.15 and isinstance(parent, dict):
            parent.pop(key, None)
        elif kind < 0.25 and isinstance(parent, dict):
            parent[dice.choice(("", "x", "__proto__", "config", "name"))] = parent.pop(key, None)
        elif isinstance(parent, dict) or key < len(parent):  # type: ignore[operator]
            parent[key] = dice.choice(_VALUES)  # type: ignore[index]
    return json.dumps(document).encode()


def mutate_safetensors(data: bytes, dice: random.Random) -> bytes:
    """Damage in the header, whose length is told truly again most times."""
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length]
    head = mutate_json(head, dice) if dice.random() < 0.7 else mutate(head, dice)
    told = len(head) if dice.random() < 0.8 else dice.choice(_EXTREMES) << dice.choice((0, 20, 31))
    return told.to_bytes(8, "little") + head + data[8 + length :]


def mutate_inside(name: str, data: bytes, dice: random.Random) -> bytes:
    """Damage behind the outer layer of a file's format, if it has one."""
    suffix = name[name.rfind(".") :]
    if suffix == ".spz" and data[:2] == b"\x1f\x8b":
        return gzip.compress(mutate(gzip.decompress(data), dice), 1)
    if suffix == ".sog":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        member = dice.choice(["meta.json", dice.choice(list(members))])
        change = mutate_json if member == "meta.json" and dice.random() < 0.8 else mutate
        members[member] = change(members[member], dice)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return buffer.getvalue()
    if suffix == ".tar":
        return _mutate_tar(data, dice)
    if suffix == ".glb":
        length = struct.unpack("<I", data[12:16])[0]
        text = mutate_json(data[20 : 20 + length], dice)
        return data[:12] + struct.pack("<I", len(text)) + data[16:20] + text + data[20 + length :]
    if suffix in (".json", ".gltf"):
        return mutate_json(data, dice)
    if suffix == ".safetensors":
        return mutate_safetensors(data, dice)
    return mutate(data, dice)


def _mutate_tar(data: bytes, dice: random.Random) -> bytes:
    """One member's content or name changes, or it becomes a link; the archive keeps its size where it can."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        members = old.getmembers()
        chosen = dice.randrange(len(members))
        for number, member in enumerate(members):
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            if number == chosen:
                kind = dice.randrange(3)
                if kind == 0:
                    content = mutate_inside(member.name, content, dice)
                    member.size = len(content)
                elif kind == 1:
                    member.name = dice.choice(("../x.json", "/etc/passwd", "", "a" * 300, ".", member.name[:3]))
                else:
                    member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            new.addfile(member, io.BytesIO(content) if member.size else None)
    return buffer.getvalue()

"""The PLY container: elements of scalar columns, binary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

_MAX_HEADER = 1 << 16
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_NAMES = {kind: name for name, kind in _TYPES.items() if not name[-1].isdigit()}


def read_elements(path: Path) -> dict[str, np.ndarray]:
    """Structured arrays by element name. An element with list properties (faces) and all after it are left out."""
    data = path.read_bytes()
    head, start = _split_header(data, path)
    order, elements = _parse_header(head, path)
    tables: dict[str, np.ndarray] = {}
    for name, count, columns in elements:
        if columns is None:
            break
        dtype = np.dtype([(column, order + kind) for column, kind in columns])
        end = start + count * dtype.itemsize
        if end > len(data):
            raise ValueError(
                f"{path}: truncated: element '{name}' of {count} rows x {dtype.itemsize} bytes ends at byte {end}, "
                f"the file has {len(data)}"
            )
        tables[name] = np.frombuffer(data, dtype, count, start) if dtype.itemsize else np.zeros(0, dtype)
        start = end
    return tables


def write_elements(path: Path, elements: Mapping[str, np.ndarray], comments: tuple[str, ...] = ()) -> None:
    """Write structured arrays as little-endian PLY elements, in order."""
    lines = ["ply", "format binary_little_endian 1.0", *(f"comment {line}" for line in comments)]
    for name, table in elements.items():
        lines.append(f"element {name} {len(table)}")
        lines += [f"property {_NAMES[table.dtype[column].str[1:]]} {column}" for column in table.dtype.names or ()]
    with path.open("wb") as file:
        file.write(("\n".join(lines) + "\nend_header\n").encode("ascii"))
        for table in elements.values():
            file.write(table.astype(table.dtype.newbyteorder("<"), copy=False).tobytes())


def _split_header(data: bytes, path: Path) -> tuple[str, int]:
    """(header text, offset of the body)."""
    if not data.startswith(b"ply"):
        raise ValueError(f"{path}: not a PLY file: it starts with {data[:8]!r}, expected b'ply'")
    marker = data.find(b"end_header", 0, _MAX_HEADER)
    end = data.find(b"\n", marker, marker + 16) if marker >= 0 else -1
    if end < 0:
        raise ValueError(f"{path}: damaged PLY: no 'end_header' line in the first {_MAX_HEADER} bytes")
    return data[:marker].decode("ascii", errors="replace"), end + 1


def _parse_header(head: str, path: Path) -> tuple[str, list[tuple[str, int, list[tuple[str, str]] | None]]]:
    """Byte order and [(element, rows, [(column, dtype)] or None if it holds lists)]."""
    orders = {"binary_little_endian": "<", "binary_big_endian": ">"}
    order = None
    elements: list[tuple[str, int, list[tuple[str, str]] | None]] = []
    for line in head.splitlines()[1:]:
        words = line.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "format" and len(words) >= 2:
            order = orders.get(words[1])
            if order is None:
                raise ValueError(f"{path}: PLY format {words[1]!r} is not supported; expected a binary one")
        elif words[0] == "element" and len(words) == 3 and words[2].isdecimal() and len(words[2]) < 16:
            elements.append((words[1], int(words[2]), []))
        elif words[0] == "property" and elements and len(words) == 3 and words[1] in _TYPES:
            name, _, columns = elements[-1]
            if columns is not None:
                if any(words[2] == column for column, _ in columns):
                    raise ValueError(f"{path}: damaged PLY: column {words[2]!r} of element {name!r} appears twice")
                columns.append((words[2], _TYPES[words[1]]))
        elif words[0] == "property" and elements and len(words) == 5 and words[1] == "list":
            elements[-1] = (*elements[-1][:2], None)
        else:
            raise ValueError(f"{path}: damaged PLY header line {line[:80]!r}")
    if order is None:
        raise ValueError(f"{path}: damaged PLY: the header has no 'format' line")
    return order, elements

"""The .spz of Niantic: about 20 bytes a Gaussian before compression. Reads versions 2, 3 (gzip) and 4 (zstd), writes 3.

Sections of the payload, N rows each: position 3 x 24-bit fixed point, opacity, colour, log-scale, rotation (version 2:
bytes of x y z; later: which component is largest and 3 x (sign, 9 bits), order x y z w), harmonics, rgb inside.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from gs_render._formats._arrays import from_smallest_three, smallest_three
from gs_render._gaussians import Gaussians

_MAGIC = 0x5053474E
_COLOR_SCALE = 0.15
_REST = (0, 3, 8, 15)
_MAX_FRACTION_BITS = 20  # other programs write 12, a precision of 1/4096; we take what the extent leaves
# A payload may be this large, or this many times the file, whichever is more. Real files shrink 1.1 to 4 times,
# those with harmonics of zeros 11 times.
_FREE_PAYLOAD = 32 << 20
_MAX_RATIO = 32


def read(path: Path) -> Gaussians:
    """Gaussians in the frame of the file."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        version, count, degree, fraction, payload = _open_gzip(data, path)
    elif data[:4] == struct.pack("<I", _MAGIC):
        version, count, degree, fraction, payload = _open_zstd(data, path)
    else:
        raise ValueError(f"{path}: not an SPZ file: it starts with {data[:4]!r}, expected gzip or b'NGSP'")
    sections = {}
    start = 0
    for name, width in _layout(version, degree):
        sections[name] = np.frombuffer(payload, np.uint8, count * width, start).reshape(count, width)
        start += count * width
    bytes_ = sections["position"].reshape(count, 3, 3).astype(np.int32)
    fixed = bytes_[..., 0] | bytes_[..., 1] << 8 | bytes_[..., 2] << 16
    fixed -= (fixed & 0x800000) << 1
    color = (sections["color"] / np.float32(255) - np.float32(0.5)) / np.float32(_COLOR_SCALE)
    rest = (sections["rest"].astype(np.float32) - 128) / 128
    fields = (
        fixed / np.float32(1 << fraction),
        np.exp(sections["scale"] / np.float32(16) - 10),
        _unpack_rotation(sections["rotation"], version),
        sections["opacity"][:, 0] / np.float32(255),
        np.concatenate([color[:, None, :], rest.reshape(count, _REST[degree], 3)], axis=1),
    )
    return Gaussians(*(torch.from_numpy(np.array(field, dtype=np.float32, order="C")) for field in fields))


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians that are in the frame of the file already."""
    count, means = len(gaussians), gaussians.means.numpy().astype(np.float64)
    extent = float(np.abs(means).max()) if count else 0.0
    if extent >= 1 << 22:
        raise ValueError(f".spz keeps positions up to 2^22 world units, got {extent:.4g}")
    fraction = min(_MAX_FRACTION_BITS, 22 - int(np.ceil(np.log2(max(extent, 1.0) + 1e-9))))
    fixed = np.rint(means * (1 << fraction)).astype(np.int64) & 0xFFFFFF
    sh = gaussians.sh.numpy()
    sections = (
        np.stack([fixed & 255, fixed >> 8 & 255, fixed >> 16], axis=-1),
        gaussians.opacities.numpy() * 255,
        (sh[:, 0] * _COLOR_SCALE + 0.5) * 255,
        (np.log(np.maximum(gaussians.scales.numpy(), 1e-20)) + 10) * 16,
        _pack_rotation(gaussians.quaternions.numpy()),
        sh[:, 1:] * 128 + 128,
    )
    header = struct.pack("<IIIBBBB", _MAGIC, 3, count, gaussians.sh_degree, fraction, 0, 0)
    body = b"".join(np.rint(section).clip(0, 255).astype(np.uint8).tobytes() for section in sections)
    packer = zlib.compressobj(6, wbits=31)
    path.write_bytes(packer.compress(header + body) + packer.flush())


def _layout(version: int, degree: int) -> list[tuple[str, int]]:
    """Sections with their bytes a Gaussian, in order."""
    rotation = 3 if version == 2 else 4
    return [
        ("position", 9),
        ("opacity", 1),
        ("color", 3),
        ("scale", 3),
        ("rotation", rotation),
        ("rest", 3 * _REST[degree]),
    ]


def _check_header(version: int, count: int, degree: int, fraction: int, size: int, path: Path) -> int:
    """Bytes of the payload; ValueError if the header cannot be true for a file of `size` bytes."""
    if degree > 3 or not 1 <= fraction <= 24:
        raise ValueError(f"{path}: damaged SPZ header: degree {degree}, {fraction} fraction bits")
    wanted = count * sum(width for _, width in _layout(version, degree))
    limit = max(_FREE_PAYLOAD, _MAX_RATIO * size)
    if wanted > limit:
        raise ValueError(
            f"{path}: {count} Gaussians would unpack {size} bytes into {wanted}, more than the {limit} accepted"
        )
    return wanted


def _open_gzip(data: bytes, path: Path) -> tuple[int, int, int, int, bytes]:
    """(version, count, degree, fraction bits, payload) of versions 2 and 3; unpacks no more than the header claims."""
    stream = zlib.decompressobj(wbits=31)
    try:
        head = stream.decompress(data, 16)
        if len(head) < 16:
            raise ValueError(f"{path}: truncated SPZ: {len(head)} of 16 header bytes")
        magic, version, count, degree, fraction, _, _ = struct.unpack("<IIIBBBB", head)
        if magic != _MAGIC or version not in (2, 3):
            raise ValueError(f"{path}: not an SPZ file of version 2 or 3: magic {magic:#x}, version {version}")
        wanted = _check_header(version, count, degree, fraction, len(data), path)
        payload = stream.decompress(stream.unconsumed_tail, wanted) if wanted else b""
    except zlib.error as error:
        raise ValueError(f"{path}: damaged SPZ: {error}") from error
    if len(payload) != wanted:
        raise ValueError(f"{path}: truncated SPZ: {len(payload)} of {wanted} bytes for {count} Gaussians")
    return version, count, degree, fraction, payload


def _open_zstd(data: bytes, path: Path) -> tuple[int, int, int, int, bytes]:
    """The same for version 4: a plain header, a table of sizes and one zstd frame for each non-empty section."""
    if len(data) < 32:
        raise ValueError(f"{path}: truncated SPZ: {len(data)} of 32 header bytes")
    _, version, count, degree, fraction, _, streams, table = struct.unpack("<IIIBBBBI", data[:20])
    if version != 4:
        raise ValueError(f"{path}: SPZ version {version} is not supported; 2, 3 and 4 are")
    _check_header(version, count, degree, fraction, len(data), path)
    sizes = [count * width for _, width in _layout(version, degree) if count * width]
    position = table + 16 * streams
    if streams != len(sizes) or table < 32 or position > len(data):
        raise ValueError(f"{path}: damaged SPZ: {streams} streams listed at byte {table}; expected {len(sizes)}")
    parts = []
    for index, wanted in enumerate(sizes):
        packed, unpacked = struct.unpack_from("<QQ", data, table + 16 * index)
        if unpacked != wanted or packed > len(data) - position:
            raise ValueError(f"{path}: damaged SPZ: stream {index} of {packed} -> {unpacked} bytes, expected {wanted}")
        parts.append(_unzstd(data[position : position + packed], wanted, path))
        position += packed
    return version, count, degree, fraction, b"".join(parts)


def _unzstd(data: bytes, wanted: int, path: Path) -> bytes:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: SPZ version 4 needs zstandard: pip install 'gs-render[spz4]'") from error
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as reader:
            payload = reader.read(wanted)
    except zstandard.ZstdError as error:
        raise ValueError(f"{path}: damaged SPZ: {error}") from error
    if len(payload) != wanted:
        raise ValueError(f"{path}: truncated SPZ: {len(payload)} of {wanted} bytes in a stream")
    return payload


def _unpack_rotation(section: np.ndarray, version: int) -> np.ndarray:
    """[N, 4] wxyz."""
    if version == 2:
        xyz = section / np.float32(127.5) - 1
        w = np.sqrt(np.maximum(1 - (xyz**2).sum(axis=1, keepdims=True), 0))
        return np.concatenate([w, xyz], axis=1)
    words = np.ascontiguousarray(section).view("<u4")[:, 0]
    fields = np.stack([(words >> shift) & 1023 for shift in (20, 10, 0)], axis=1)
    size = (fields & 511) * np.float32(np.sqrt(0.5) / 511)
    others = np.where(fields & 512, -size, size)
    return np.roll(from_smallest_three((words >> 30).astype(np.int64), others), 1, axis=1)


def _pack_rotation(quaternions: np.ndarray) -> np.ndarray:
    """[N, 4] bytes of the later versions."""
    largest, others = smallest_three(np.roll(quaternions, -1, axis=1))
    size = np.rint(np.abs(others) * np.float32(511 / np.sqrt(0.5))).clip(0, 511).astype(np.uint32)
    fields = size | (others < 0).astype(np.uint32) << 9
    words = largest.astype(np.uint32) << 30 | fields[:, 0] << 20 | fields[:, 1] << 10 | fields[:, 2]
    return words.astype("<u4").view(np.uint8).reshape(-1, 4)

"""A frame: named arrays and a small header as bytes that find every damage and never make a reader allocate blindly.

    magic     4   b"KVCF"
    checksum  16  SHA-256 of all that follows, cut to 128 bits
    version   1
    length    4   of the header, little-endian
    header    -   msgpack [head, [[name, dtype, shape, form, stored length], ...]]
    planes    -   the arrays' bytes one after another; form "raw" is read in place, "zstd" is one zstd frame

The checksum covers the version, so that damage is told from a newer format. It is SHA-256 because processors have
instructions for it: 1.1 GB/s where Python's BLAKE2b does 0.4, and hashing is a good part of decoding. Needs no torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import zstandard

from kvchat.errors import CorruptFrame, UnknownCodec

Planes = dict[str, npt.NDArray[Any]]

MAGIC = b"KVCF"
VERSION = 1
DTYPES = ("|u1", "<u2", "<u4", "<f2", "<f4")
_PREFIX = struct.Struct("<4s16sBI")
_CHECKED_FROM = 20
_MAX_HEADER = 64 * 1024
_MAX_PLANES = 64
_MAX_DIMS = 4
_MOST_ELEMENTS = 1 << 60
# Compressed is kept only when stored / plain is below this.
_BAR = 0.97


@dataclass(frozen=True, slots=True)
class _Plane:
    name: str
    dtype: str
    shape: tuple[int, ...]
    form: str
    stored: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * int(self.dtype[2:])


def pack(head: Mapping[str, Any], planes: Planes, bars: Mapping[str, float] | None = None) -> bytes:
    """Bytes of `head` (msgpack values) and `planes` (dtypes of DTYPES, at most 4 dimensions).

    `bars[name]` says how far zstd must shrink a plane (stored / plain) to be worth its time; 0 = do not try.
    """
    compressor = zstandard.ZstdCompressor(level=1)
    bodies: list[Any] = []
    described: list[tuple[str, str, tuple[int, ...], str, int]] = []
    for name, plane in planes.items():
        assert plane.dtype.str in DTYPES and plane.ndim <= _MAX_DIMS, (name, plane.dtype, plane.shape)
        body: Any = np.ascontiguousarray(plane).reshape(-1).view(np.uint8)
        form, bar = "raw", (bars or {}).get(name, _BAR)
        if bar > 0 and plane.nbytes:
            packed = compressor.compress(body)
            if len(packed) < bar * plane.nbytes:
                form, body = "zstd", packed
        bodies.append(body)
        described.append((name, plane.dtype.str, plane.shape, form, len(body)))
    header = msgpack.packb([dict(head), described])
    assert len(header) <= _MAX_HEADER and len(planes) <= _MAX_PLANES
    fixed = struct.pack("<BI", VERSION, len(header))
    return b"".join([MAGIC, _digest(fixed, header, *bodies), fixed, header, *bodies])


class Sound(bytes):
    """A frame that lies in memory since it was checked: `check` does not hash it again."""


def check(blob: bytes) -> None:
    """Raise CorruptFrame unless `blob` is a whole, undamaged frame, and UnknownCodec if its format is newer."""
    if isinstance(blob, Sound):
        return
    if len(blob) < _PREFIX.size:
        raise CorruptFrame(f"the frame is cut short: {len(blob)} bytes")
    magic, digest, version, header_length = _PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise CorruptFrame(f"not a frame: it begins with {magic!r} in place of {MAGIC!r}")
    if _digest(memoryview(blob)[_CHECKED_FROM:]) != digest:
        raise CorruptFrame(f"the frame is damaged: the checksum of its {len(blob)} bytes is wrong")
    if version != VERSION:
        raise UnknownCodec(f"the frame has format version {version}, this program reads {VERSION}: update kvchat")
    if header_length > min(_MAX_HEADER, len(blob) - _PREFIX.size):
        raise CorruptFrame(f"the frame's header claims {header_length} bytes of {len(blob)}")


def read_head(blob: bytes) -> dict[str, Any]:
    """The head of a frame, its planes unread. Raises what `check` raises."""
    check(blob)
    header_length = _PREFIX.unpack_from(blob)[3]
    return _read_header(memoryview(blob)[_PREFIX.size : _PREFIX.size + header_length])[0]


def with_head(blob: bytes, changes: Mapping[str, Any]) -> bytes:
    """The frame with other values in its head, its planes unread. Raises what `check` raises."""
    check(blob)
    start = _PREFIX.size + _PREFIX.unpack_from(blob)[3]
    head, described = _read_header(memoryview(blob)[_PREFIX.size : start])
    planes = [(one.name, one.dtype, one.shape, one.form, one.stored) for one in described]
    header, bodies = msgpack.packb([{**head, **changes}, planes]), memoryview(blob)[start:]
    fixed = struct.pack("<BI", VERSION, len(header))
    return b"".join([MAGIC, _digest(fixed, header, bodies), fixed, header, bodies])


def plane_bytes(blob: bytes) -> int:
    """What the planes of a frame take by its header, themselves unread. Raises what `check` raises."""
    check(blob)
    header_length = _PREFIX.unpack_from(blob)[3]
    return sum(plane.nbytes for plane in _read_header(memoryview(blob)[_PREFIX.size : _PREFIX.size + header_length])[1])


def plane_shapes(blob: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each plane of a frame by its header, themselves unread. Raises what `check` raises."""
    check(blob)
    header_length = _PREFIX.unpack_from(blob)[3]
    described = _read_header(memoryview(blob)[_PREFIX.size : _PREFIX.size + header_length])[1]
    return {plane.name: (plane.dtype, plane.shape) for plane in described}


def unpack(blob: bytes, *, limit: int) -> tuple[dict[str, Any], Planes]:
    """Head and planes of a frame whose planes take at most `limit` bytes; raw planes are read-only views of `blob`.

    Raises what `check` raises, and CorruptFrame if what the header claims does not fit the bytes or the limit.
    """
    check(blob)
    header_length = _PREFIX.unpack_from(blob)[3]
    start = _PREFIX.size + header_length
    head, described = _read_header(memoryview(blob)[_PREFIX.size : start])
    if sum(plane.nbytes for plane in described) > limit:
        raise CorruptFrame(f"the frame claims {sum(p.nbytes for p in described)} bytes, at most {limit} are expected")
    if start + sum(plane.stored for plane in described) != len(blob):
        raise CorruptFrame(f"the frame's planes do not add up to its {len(blob)} bytes")
    planes: Planes = {}
    for plane in described:
        planes[plane.name] = _read_plane(plane, memoryview(blob)[start : start + plane.stored])
        start += plane.stored
    return head, planes


def expect(planes: Planes, name: str, shape: tuple[int, ...], *dtypes: str) -> npt.NDArray[Any]:
    """The plane `name`, or CorruptFrame if it is missing, has another shape, none of the dtypes, or is not finite."""
    plane = planes.get(name)
    if plane is None:
        raise CorruptFrame(f"the frame has no plane {name!r}, only {', '.join(planes) or 'none'}")
    if plane.shape != shape or plane.dtype.str not in dtypes:
        raise CorruptFrame(f"plane {name!r} is {plane.dtype.str} {plane.shape}, expected {'/'.join(dtypes)} {shape}")
    if plane.dtype.kind == "f" and not np.isfinite(plane).all():
        raise CorruptFrame(f"plane {name!r} holds numbers that are not finite")
    return plane


def _digest(*parts: Any) -> bytes:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.digest()[:16]


def _read_header(data: memoryview) -> tuple[dict[str, Any], list[_Plane]]:
    try:
        header = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=_MAX_HEADER,
            max_bin_len=0,
            max_array_len=1024,
            max_map_len=64,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as exc:
        raise CorruptFrame(f"the frame's header cannot be read: {type(exc).__name__}") from exc
    match header:
        case [dict(head), list(described)] if len(described) <= _MAX_PLANES:
            return head, [_read_description(entry) for entry in described]
    raise CorruptFrame("the frame's header has another structure than [head, planes]")


def _read_description(entry: Any) -> _Plane:
    match entry:
        case [str(name), str(dtype), list(shape), "raw" | "zstd" as form, int(stored)] if (
            dtype in DTYPES
            and len(shape) <= _MAX_DIMS
            and all(type(size) is int and size >= 0 for size in shape)
            # Beside a length of 0 too: numpy multiplies the others.
            and prod(max(size, 1) for size in shape) < _MOST_ELEMENTS
            and stored >= 0
        ):
            plane = _Plane(name, dtype, tuple(shape), form, stored)
            if form == "raw" and stored != plane.nbytes:
                raise CorruptFrame(f"plane {name!r} claims {plane.nbytes} bytes and stores {stored}")
            return plane
    raise CorruptFrame(f"the frame describes a plane that cannot be: {str(entry)[:80]}")


def _read_plane(plane: _Plane, stored: memoryview) -> npt.NDArray[Any]:
    data: Any = stored
    if plane.form == "zstd":
        try:
            # The decompressor allocates what the zstd frame claims, whatever limit it is given: look first.
            claimed = zstandard.frame_content_size(stored)
            if claimed != plane.nbytes:
                raise CorruptFrame(f"plane {plane.name!r} claims {plane.nbytes} bytes, its zstd frame {claimed}")
            data = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as exc:
            raise CorruptFrame(f"plane {plane.name!r} cannot be decompressed: {exc}") from exc
    return np.frombuffer(data, np.dtype(plane.dtype)).reshape(plane.shape)

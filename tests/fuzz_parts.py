"""What fuzzing needs: sound bytes of every kind to begin with, changes to them, and what reads them.

After each change checksums are made right again, so that they do not hide the parser behind them. Run as a program,
with a seed and a number of inputs, it reads so many with little memory to spare: `python -m tests.fuzz_parts 0 500`.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import zstandard

from kvchat import portable
from kvchat.cache.segment import Ranking
from kvchat.codecs.archive import Basis
from kvchat.codecs.encode import decode_frame, encode_segment
from kvchat.codecs.fit import Part, fit_basis
from kvchat.codecs.frame import unpack
from kvchat.codecs.header import ARCHIVE, SegmentHeader
from kvchat.errors import KVChatError
from kvchat.store.store import Store
from tests.store_parts import converse, read_all, segment

PREFIX = struct.Struct("<4s16sBI")
SUM_FROM = 20
LAYERS, HEADS, TOKENS, HEAD_DIM = 3, 2, 40, 16
CPU = torch.device("cpu")
CODECS = ("raw", "k8v8", "k4v3", "eb5", ARCHIVE)
# What a reader may take beyond a header's 256 MiB: its input, copies of a plane, and torch's threads.
SPARE_BYTES = 768 << 20


@dataclass(frozen=True)
class Seed:
    """Sound bytes, and what reads them."""

    kind: str
    blob: bytes
    read: Callable[[bytes], object]


def seeds() -> list[Seed]:
    """Frames, headers and a basis of each codec, and a portable file."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, LAYERS, HEADS, TOKENS, HEAD_DIM, generator=generator).bfloat16()
    draw = np.random.default_rng(0)
    ranking = Ranking(5, draw.integers(0, 3, (LAYERS, HEADS, TOKENS)).astype(np.uint8), (0.9, 0.5, 0.1))
    present = torch.ones(LAYERS, HEADS, TOKENS, dtype=torch.bool)
    basis = fit_basis(iter([Part(keys, values, ranking, present)]))
    found = [Seed("basis", basis, lambda blob: Basis.from_bytes(blob, LAYERS, HEADS, HEAD_DIM))]
    for codec in CODECS:
        given = basis if codec == ARCHIVE else b""
        header, frames = encode_segment(codec, list(keys), list(values), ranking, given)
        found += _seeds_of(header, [blob for _, _, blob in frames], given)
    return [*found, Seed("portable", _portable(), read_portable)]


def _seeds_of(header: SegmentHeader, frames: list[bytes], basis: bytes) -> list[Seed]:
    def read_header(blob: bytes) -> None:
        found = SegmentHeader.from_bytes(blob, basis)
        shape = (found.ranking.chunk_of.shape, found.head_dim, found.dtype, found.num_groups, found.ranking.num_chunks)
        # As `sealing.read_header` does; a header that stays within the model's geometry is used.
        if shape == ((LAYERS, HEADS, TOKENS), HEAD_DIM, header.dtype, header.num_groups, header.ranking.num_chunks):
            decode_frame(found, 0, 0, frames[0], CPU)

    def read_rows(blob: bytes) -> None:
        decode_frame(header, 0, 0, blob, CPU)
        unpack(blob, limit=1 << 20)

    return [Seed("header", header.to_bytes(), read_header), Seed("rows", frames[0], read_rows)]


def _portable() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "s.db")
        _, chain = converse(store, "trip", "Where did we stay?", "In a hotel.", "And then?", "By the river.")
        store.put_segment(*segment(chain, 0, 2))
        file = Path(folder) / "trip.kvchat"
        with file.open("wb") as stream:
            portable.write(store, "trip", stream)
        store.close()
        return file.read_bytes()


def read_portable(data: bytes) -> None:
    """Use up a file, as taking it in does. Raises KVChatError."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    file = folder / f"kvchat-fuzz-{os.getpid()}.kvchat"
    try:
        file.write_bytes(data)
        portable.read_manifest(file)
        for part in read_all(file):
            for _ in () if isinstance(part, list) else part[1]:
                pass
    finally:
        file.unlink(missing_ok=True)


# -- checksums ---------------------------------------------------------------------------------------------------------


def reseal(blob: bytes) -> bytes:
    """A frame with the checksum of what it holds now."""
    rest = blob[SUM_FROM:]
    return b"KVCF" + hashlib.sha256(rest).digest()[:16] + rest


def reseal_portable(data: bytes) -> bytes:
    """A portable file with all checksums of what it holds now."""
    out, position = bytearray(data[:10]), 10
    while position + 4 <= len(data):
        length = struct.unpack_from("<I", data, position)[0]
        block = data[position + 4 : position + 4 + length]
        if len(block) == length > SUM_FROM:
            digest = hashlib.sha256(out).hexdigest().encode()
            at = block.find(b"\xa6digest\xd9\x40")
            if at > 0:
                block = block[: at + 9] + digest + block[at + 73 :]
            block = reseal(block)
        out += data[position : position + 4] + block
        position += 4 + length
    return bytes(out)


def resealed(seed: Seed, blob: bytes) -> bytes:
    """Whatever is changed in it, with right checksums."""
    return reseal_portable(blob) if seed.kind == "portable" else reseal(blob)


def read(seed: Seed, blob: bytes) -> bool:
    """Let the reader of `seed` read it; whether it could. Anything but a KVChatError comes out."""
    with suppress(KVChatError):
        seed.read(blob)
        return True
    return False


# -- changes -----------------------------------------------------------------------------------------------------------

HOSTILE: tuple[Any, ...] = (
    *(0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, float("nan")),
    *(True, None, "", "raw", "zstd", "archive", "<f4", "key", "x" * 300, [], [[]], {}, [2**40], [2**31, 2**31]),
)


def change(blob: bytes, draw: random.Random) -> bytes:
    """One change to a frame: bytes, its length, or a value of its header, whatever the checksum then says."""
    how = draw.choice([_flip, _flip, _cut, _splice, _swap_value, _swap_value, _swap_value, _inflate])
    return how(blob, draw)


def change_portable(data: bytes, draw: random.Random) -> bytes:
    """A change to one block of a portable file, which is told its new length; or to the file as such."""
    blocks, position = [], 10
    while position + 4 <= len(data):
        length = struct.unpack_from("<I", data, position)[0]
        blocks.append(data[position + 4 : position + 4 + length])
        position += 4 + length
    if not blocks or draw.random() < 0.2:
        return draw.choice([_flip, _cut])(data, draw)
    chosen = draw.randrange(len(blocks))
    what = draw.choice(["change", "change", "change", "drop", "repeat", "swap"])
    if what == "change":
        blocks[chosen] = change(blocks[chosen], draw)
    elif what == "drop":
        del blocks[chosen]
    elif what == "repeat":
        blocks.insert(chosen, blocks[draw.randrange(len(blocks))])
    else:
        other = draw.randrange(len(blocks))
        blocks[chosen], blocks[other] = blocks[other], blocks[chosen]
    return data[:10] + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def changed(seed: Seed, draw: random.Random) -> bytes:
    """The seed's bytes after one to three changes, with right checksums."""
    blob = seed.blob
    for _ in range(draw.choice([1, 1, 2, 3])):
        blob = change_portable(blob, draw) if seed.kind == "portable" else change(blob, draw)
    return resealed(seed, blob)


def _flip(blob: bytes, draw: random.Random) -> bytes:
    data = bytearray(blob)
    # More often where the structure is than in planes.
    for _ in range(draw.choice([1, 2, 8])):
        if data:
            data[min(len(data) - 1, int(len(data) * draw.random() ** 3))] = draw.randrange(256)
    return bytes(data)


def _cut(blob: bytes, draw: random.Random) -> bytes:
    return blob[: draw.randrange(len(blob) + 1)] + draw.randbytes(draw.choice([0, 0, 1, 100]))


def _splice(blob: bytes, draw: random.Random) -> bytes:
    first, last = sorted(draw.randrange(len(blob) + 1) for _ in range(2))
    at = draw.randrange(len(blob) + 1)
    return blob[:at] + blob[first:last] + blob[at:]


def _parts(blob: bytes) -> tuple[Any, bytes] | None:
    """Header and planes of a frame, if they can be read."""
    with suppress(ValueError, TypeError, struct.error, msgpack.UnpackException):
        length = PREFIX.unpack_from(blob)[3]
        return msgpack.unpackb(blob[PREFIX.size : PREFIX.size + length], strict_map_key=False), blob[25 + length :]
    return None


def joined(header: Any, planes: bytes) -> bytes:
    """A frame, still without a checksum."""
    packed = msgpack.packb(header)
    return PREFIX.pack(b"KVCF", bytes(16), 1, len(packed)) + packed + planes


def _swap_value(blob: bytes, draw: random.Random) -> bytes:
    """Another value somewhere in the header: a size, a name, a type, whatever it is."""
    parts = _parts(blob)
    if parts is None:
        return _flip(blob, draw)
    holder, header = parts[0], parts[0]
    while isinstance(holder, list | dict) and holder:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = draw.choice(keys)
        if not isinstance(holder[key], list | dict) or not holder[key] or draw.random() < 0.1:
            old = holder[key]
            near = [old + 1, old - 1, old * 2, -old] if type(old) is int and abs(old) < 2**61 else []
            holder[key] = draw.choice([*near, draw.choice(HOSTILE)])
            break
        holder = holder[key]
    return joined(header, parts[1])


def _inflate(blob: bytes, draw: random.Random) -> bytes:
    """A plane that claims to be large, and, being zeros, hardly takes any bytes when compressed."""
    parts = _parts(blob)
    if parts is None or not isinstance(parts[0], list) or len(parts[0]) < 2 or not isinstance(parts[0][1], list):
        return _flip(blob, draw)
    (head, described, *_), size = parts[0], draw.choice([1 << 10, 1 << 20, 1 << 26])
    body = zstandard.ZstdCompressor(level=1).compress(bytes(size))
    body = _claiming(body, draw)
    name = draw.choice(["chunk_of", "key0", "key", "value", "x"])
    shape = draw.choice([[size], [size // 16, 16], [LAYERS, HEADS, size // 6], [1, 1, size]])
    kept = draw.choice([described, []])
    return joined([head, [*kept, [name, "|u1", shape, "zstd", len(body)]]], (parts[1] if kept else b"") + body)


def _claiming(body: bytes, draw: random.Random) -> bytes:
    """A zstd frame that claims another size than it has, or none, or is followed by something."""
    return draw.choice([body, body[:-3], body + b"\0", bytes([body[0], body[1] & 0x1F, *body[2:]]), body[:5]])


def main(seed: str, count: str) -> None:
    """Read so many changed inputs with SPARE_BYTES of address space to spare; how many could be read."""
    found, draw = seeds(), random.Random(seed)
    for one in found:
        assert read(one, resealed(one, one.blob)), one.kind
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_BYTES, resource.RLIM_INFINITY))
    sound = 0
    for _ in range(int(count)):
        one = draw.choice(found)
        sound += read(one, changed(one, draw))
    print(f"{count} inputs, {sound} could be read")


if __name__ == "__main__":
    main(*sys.argv[1:])

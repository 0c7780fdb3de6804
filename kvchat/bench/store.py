"""What saved KV takes, costs and how fast it is written and read, for every codec, on the history's exact KV."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvchat.bench.closeness import Closeness
from kvchat.bench.history import Subject, drain, ratio, spread, timed
from kvchat.cache.segment import Ranking
from kvchat.codecs import CODECS, SegmentHeader, decode_frame, encode_segment, packed_bytes, param_bytes
from kvchat.codecs.fit import Part, fit_basis
from kvchat.codecs.header import ARCHIVE
from kvchat.compress.compressor import codecs_for
from kvchat.config import Config
from kvchat.recode import dense
from kvchat.residence.sealing import cuts_of
from kvchat.store.records import SegmentRecord
from kvchat.store.store import Store

Frame = tuple[int, int, bytes]
SAMPLE_TOKENS = 1536
"""At least so much of the history is coded, if it is so long."""


@dataclass(frozen=True)
class Source:
    """The exact KV of one stored segment, L layers of (H, T, D), and the ranking that it was stored with."""

    record: SegmentRecord
    ranking: Ranking
    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    @property
    def elements(self) -> int:
        """Numbers of keys and values."""
        return 2 * sum(layer.numel() for layer in self.keys)

    def part(self) -> Part:
        """As what a basis is made of."""
        present = torch.ones(self.ranking.chunk_of.shape, dtype=torch.bool)
        return Part(torch.stack(list(self.keys)), torch.stack(list(self.values)), self.ranking, present)


@dataclass(frozen=True)
class Written:
    """A segment as it is stored."""

    record: SegmentRecord
    header: SegmentHeader
    frames: list[Frame]

    @property
    def bodies(self) -> list[bytes]:
        """The header and all frames; the basis, which segments share, is not among them."""
        return [self.record.header, *(blob for _, _, blob in self.frames)]

    @property
    def packed(self) -> int:
        """Bytes as encoded, before zstd; the ranking says where pairs lie, not what they are, and is not counted."""
        chunks = range(self.header.ranking.num_chunks)
        return param_bytes(self.header) + sum(packed_bytes(self.header, chunk) for chunk in chunks)


def store(subject: Subject) -> dict[str, Any]:
    """Bytes and speeds, MB/s of bf16 for codecs and of stored bytes for the store.

    The store commits as it does for KV, without waiting for the disk (a power cut may lose the newest segment), so its
    writing is set against a plain file both with and without fsync. Reading is from the page cache for both.
    """
    saved = subject.conversation.stats()
    plain, on_disk = subject.engine.model.bf16_bytes_per_token, saved["bytes_on_disk"] / saved["num_tokens"]
    sources, listed = list_sources(subject), ",".join(subject.config.codec.names)
    closeness = Closeness(subject, [one.part()[:2] for one in sources], sources[-1].record.end)
    return {
        "history_tokens": saved["num_tokens"],
        "codec": listed,
        "disk_bytes_per_token": round(on_disk, 1),
        "bf16_bytes_per_token": plain,
        "compression_factor": round(plain / on_disk, 3),
        "coded_tokens": sources[-1].record.end,
        "codecs": {
            name: one_codec(name, sources, subject, closeness) for name in dict.fromkeys([*CODECS, ARCHIVE, listed])
        },
    }


def list_sources(subject: Subject) -> list[Source]:
    """The history's first segments, up to SAMPLE_TOKENS, with the KV that transformers computed for them.

    Behind them some of the history is left, if it has two segments: there the codecs are compared.
    """
    path, residence, layers = subject.conversation.path, subject.conversation.residence, subject.plain.layers
    sources: list[Source] = []
    for record, _ in residence.store.cover([message.id for message in path], residence.fingerprint):
        if record.start >= SAMPLE_TOKENS:
            break
        ranking = SegmentHeader.of(record).ranking
        part = slice(record.start, record.end)
        keys, values = [layer.keys[0][:, part] for layer in layers], [layer.values[0][:, part] for layer in layers]
        sources.append(Source(record, ranking, keys, values))
    return sources[:-1] if len(sources) > 1 and sources[-1].record.end == len(subject.ids) else sources


def one_codec(name: str, sources: Sequence[Source], subject: Subject, closeness: Closeness) -> dict[str, Any]:
    """Bits an element, KL against the full cache, and the speeds of coding, writing and reading."""
    device, folder = subject.engine.model.device, subject.config.store_path.parent
    runs = Runs()
    for _ in range(subject.rounds):
        written: list[Written] = []
        runs.add("encode", partial(encode_all, name, sources, subject.config, written), device)
        runs.add("decode", partial(decode_all, written, device), device)
        rows_and_file(runs, written, subject.conversation.store, folder / "plain.bin")
    bits, elements = 8, sum(source.elements for source in sources)
    shared = sum(len(basis) for basis in {one.record.basis for one in written})
    stored = shared + sum(len(body) for one in written for body in one.bodies)
    packed, plain = sum(one.packed for one in written), torch.bfloat16.itemsize * elements
    return {
        "bits_per_element_on_disk": round(bits * stored / elements, 3),
        # A codec that is nothing without zstd has no size before it.
        "bits_per_element_packed": None if name == ARCHIVE else round(bits * packed / elements, 3),
        "compression_factor": round(plain / stored, 3),
        "kl": closeness.kl([dense(one.header, one.frames, device) for one in written]),
        **runs.speeds(plain, "encode", "decode"),
        **runs.speeds(stored, "store_write", "file_write_fsync", "file_write", "store_read", "file_read"),
        "write_over_file_fsync": runs.speedup("store_write", "file_write_fsync"),
        "write_over_file": runs.speedup("store_write", "file_write"),
        "read_over_file": runs.speedup("store_read", "file_read"),
    }


class Runs:
    """Seconds of several runs, by what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, work: Callable[[], object], device: torch.device | None = None) -> None:
        """Do it once."""
        self.seconds.setdefault(name, []).append(timed(work, device))

    def speeds(self, nbytes: int, *names: str) -> dict[str, Any]:
        """MB/s of so many bytes."""
        return {f"{name}_mb_per_s": spread([nbytes / one / 1e6 for one in self.seconds[name]]) for name in names}

    def speedup(self, name: str, baseline: str) -> float | None:
        """How many times as fast as the baseline."""
        return ratio(spread(self.seconds[baseline]), spread(self.seconds[name]))


@torch.inference_mode()
def encode_all(name: str, sources: Sequence[Source], config: Config, written: list[Written]) -> None:
    """Add every segment in a codec to `written`; for the archive this makes the basis too."""
    compress, basis = config.compress, b""
    if name == ARCHIVE:
        basis = fit_basis(iter([source.part() for source in sources]))
    names = codecs_for(cuts_of(compress), compress.rank_chunks, name.split(","))
    written += [encoded(name, names, source, basis) for source in sources]


def encoded(name: str, names: Sequence[str], source: Source, basis: bytes) -> Written:
    """One segment in a codec, under an id of its own and a fingerprint that no conversation asks for."""
    header, frames = encode_segment(names, source.keys, source.values, source.ranking, basis)
    listed = list(frames)
    record = replace(
        source.record,
        id=f"bench:{name}:{source.record.id}",
        fingerprint="bench",
        codec=name,
        header=header.to_bytes(),
        num_chunks=header.ranking.num_chunks,
        num_groups=header.num_groups,
        stored_chunks=header.ranking.num_chunks,
        basis=basis,
    )
    return Written(record, header, listed)


def decode_all(written: Sequence[Written], device: torch.device) -> None:
    """Decode every frame, in one thread."""
    for one in written:
        for chunk, group, blob in one.frames:
            decode_frame(one.header, chunk, group, blob, device)


def rows_and_file(runs: Runs, written: Sequence[Written], database: Store, file: Path) -> None:
    """Write and read the same bytes as rows of the store and as a plain file."""
    bodies = [body for one in written for body in one.bodies]
    runs.add("store_write", partial(write_rows, database, written))
    runs.add("store_read", partial(read_rows, database, written))
    for one in written:
        database.drop_segment(one.record.id)
    runs.add("file_write", lambda: write_file(file, bodies, sync=False))
    file.unlink()
    runs.add("file_write_fsync", lambda: write_file(file, bodies, sync=True))
    runs.add("file_read", lambda: read_file(file, [len(body) for body in bodies]))
    file.unlink()


def write_rows(database: Store, written: Sequence[Written]) -> None:
    """One transaction a segment."""
    for one in written:
        database.put_segment(one.record, one.frames)


def read_rows(database: Store, written: Sequence[Written]) -> None:
    """Every segment's header and all its frames."""
    for one in written:
        assert database.segment(one.record.id)
        drain(database.frames(one.record.id, range(one.record.num_chunks)))


def write_file(file: Path, bodies: Sequence[bytes], sync: bool) -> None:
    """One write a body; with `sync` it waits for the disk."""
    with file.open("wb", buffering=0) as out:
        for body in bodies:
            out.write(body)
        if sync:
            os.fsync(out.fileno())


def read_file(file: Path, lengths: Sequence[int]) -> None:
    """One read a body."""
    with file.open("rb", buffering=0) as source:
        for length in lengths:
            assert len(source.read(length)) == length

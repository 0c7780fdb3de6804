"""Stored segments written anew in another codec, as when a conversation is put away: k8v8 to k4v4 to archive.

One segment at a time is in memory, and each is replaced in one transaction: stopped half-way, some are old and some are
new, and all can be read. Values that were quantised are quantised again, so every step costs a little more than the new
codec alone.

Letters: L layers, H KV heads, T tokens of a segment, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor

from kvchat.codecs import SegmentHeader, decode_frame, encode_segment
from kvchat.codecs.fit import Part, fit_basis
from kvchat.codecs.frame import plane_bytes
from kvchat.codecs.header import ARCHIVE, find_codec
from kvchat.errors import CorruptFrame
from kvchat.store.records import SegmentRecord, segment_id
from kvchat.store.store import Store

CPU = torch.device("cpu")


def recode(
    store: Store, records: Sequence[SegmentRecord], codec: str | Sequence[str], device: torch.device = CPU
) -> list[SegmentRecord]:
    """Replace sealed segments of one conversation by the same in another codec; those that took a place.

    Of a segment of which only the first chunks are stored, these are written. Left as they are: open segments, those
    that are in that codec already, those with frames of another conversation, and those that were removed meanwhile.
    Nobody may have the conversation open.

    Args:
        store: where they lie.
        records: of one conversation. For codec `archive` they share a basis: that of one of them which is archived
            already, else a new one, made of all.
        codec: a name of CODECS or `archive`, or one for each rank chunk, of which the last serves the rest.
        device: where rows are decoded and encoded.

    Raises:
        CodecError: a segment is damaged or of a newer version, or its numbers cannot be written in that codec. Those
            before it are replaced already.
        UnknownCodec: there is no such codec.
    """
    names = (codec,) if isinstance(codec, str) else tuple(codec)
    if names != (ARCHIVE,):
        for name in names:
            find_codec(name)
    own = [record for record in records if record.kind == "sealed" and not record.frames_of]
    sealed = [record for record in own if record.codec != ",".join(names)]
    basis = _basis(store, records, sealed, device) if sealed and names == (ARCHIVE,) else b""
    written = (_replaced(store, record, names, basis, device) for record in sealed)
    return [new for new in written if new]


def _replaced(
    store: Store, record: SegmentRecord, names: tuple[str, ...], basis: bytes, device: torch.device
) -> SegmentRecord | None:
    """The segment in the new codec, or None if it was removed meanwhile. On return nothing of it is in memory."""
    part = read_part(store, record, device)
    header, frames = encode_segment(names, list(part.keys), list(part.values), part.ranking, basis)
    del part  # the codecs hold what they still need
    stored = [frame for frame in frames if frame[0] < record.stored_chunks]
    new = _renamed(record, ",".join(names), header, basis)
    return new if store.replace_segment(record.id, new, stored) else None


def read_part(store: Store, record: SegmentRecord, device: torch.device = CPU) -> Part:
    """A segment's pairs as far as they are stored; the others are the mean of their head, which moves no scale.

    Raises CodecError.
    """
    header = SegmentHeader.of(record)
    _check_size(header, store.frames(record.id, range(record.stored_chunks)))
    present = torch.from_numpy(header.ranking.chunk_of < record.stored_chunks)
    keys, values = dense(header, store.frames(record.id, range(record.stored_chunks)), device)
    if record.stored_chunks < header.ranking.num_chunks:
        there = present.to(device).unsqueeze(3)
        for rows in (keys, values):
            _fill(rows, there)
    return Part(keys, values, header.ranking, present)


def dense(
    header: SegmentHeader, frames: Iterable[tuple[int, int, bytes]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys and values (L, H, T, D) of a segment's frames, zeros where there is none. Raises CodecError."""
    chunk_of = torch.from_numpy(header.ranking.chunk_of.copy()).to(device)
    keys, values = (torch.zeros(*chunk_of.shape, header.head_dim, dtype=header.dtype, device=device) for _ in range(2))
    for chunk, group, blob in frames:
        first, last = header.layers(group)
        here, decoded = chunk_of[first:last] == chunk, decode_frame(header, chunk, group, blob, device)
        keys[first:last][here] = torch.cat([layer.keys for layer in decoded])
        values[first:last][here] = torch.cat([layer.values for layer in decoded])
    return keys, values


def _check_size(header: SegmentHeader, frames: Iterable[tuple[int, int, bytes]]) -> None:
    """Raise CorruptFrame unless the frames' planes are as large as the header says that rows are.

    No model is there to say how many numbers a head has; a basis says so for itself.
    """
    claimed = needed = 0
    for chunk, group, blob in frames:
        first, last = header.layers(group)
        claimed += plane_bytes(blob)
        needed += int(header.ranking.counts(chunk)[first:last].sum()) * header.head_dim // 2  # at 2 bits a number
    if claimed < needed and header.basis is None:
        raise CorruptFrame(f"the segment's frames hold {claimed} bytes, its header asks for {needed} at least")


def _fill(rows: Tensor, there: Tensor) -> None:
    """Put each head's mean where (L, H, T, D) has nothing."""
    for layer, here in zip(rows, there, strict=True):
        mean = layer.double().mul(here).sum(1, keepdim=True) / here.sum(1, keepdim=True).clamp(min=1)
        layer.copy_(torch.where(here, layer, mean.to(layer.dtype)))


def _basis(
    store: Store, records: Sequence[SegmentRecord], wanted: Sequence[SegmentRecord], device: torch.device
) -> bytes:
    """What the archived segments of a conversation share."""

    def parts() -> Iterator[Part]:
        # What came from a file serves nobody else, and must not decide how exactly KV is written that does.
        for record in [record for record in wanted if not record.from_file] or wanted:
            yield read_part(store, record, device)

    return next((one.basis for one in records if one.basis and not one.from_file), b"") or fit_basis(parts())


def _renamed(record: SegmentRecord, codec: str, header: SegmentHeader, basis: bytes) -> SegmentRecord:
    """The record of the same segment in another codec; its id stands for the basis too."""
    method = f"{codec}:{blake2b(basis, digest_size=16).hexdigest()}" if basis else codec
    identity = segment_id(
        record.fingerprint, record.kind, record.scorer, method, record.messages[0], record.messages[-1]
    )
    return replace(
        record, id=identity, codec=codec, header=header.to_bytes(), num_groups=header.num_groups, nbytes=0, basis=basis
    )

"""The blocks of a portable file, read one after another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvchat.errors import CodecError, CorruptFrame, InputError
from kvchat.portable import form
from kvchat.portable.form import End


class Blocks:
    """The blocks of a file, hashed and counted as they are read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        self._hasher = hashlib.sha256()
        self._count = 0
        start = stream.read(form.START.size)
        if len(start) < form.START.size or not start.startswith(form.MAGIC):
            raise CorruptFrame("this is no portable file of kvchat, or only the beginning of one")
        version = form.START.unpack(start)[1]
        if version != form.VERSION:
            raise InputError(f"it has format version {version}, this program reads {form.VERSION}: update kvchat")
        self._hasher.update(start)

    def next(self, limit: int = form.MAX_BLOCK) -> bytes:
        """The next block, which who asks for it checks. Raises CorruptFrame."""
        prefix = self._read(form.LENGTH.size)
        length = form.LENGTH.unpack(prefix)[0]
        if length > limit:
            raise CorruptFrame(f"block {self._count + 1} claims {length} bytes, at most {limit} are allowed")
        body = self._read(length)
        self._before = self._hasher.hexdigest()
        self._hasher.update(prefix)
        self._hasher.update(body)
        self._count += 1
        return body

    def _read(self, length: int) -> bytes:
        # What is not there is not asked for: reading allocates what it is asked for.
        data = self._stream.read(length) if length <= self._size - self._stream.tell() else b""
        if len(data) != length:
            raise CorruptFrame(f"it is cut short in block {self._count + 1}, at byte {self._size}")
        return data

    def digest(self) -> bytes:
        """SHA-256 of all that was read."""
        return self._hasher.digest()

    def check_end(self) -> None:
        """Read the end. Raises CodecError unless it is the end of just this."""
        end = End.from_bytes(self.next())
        if (end.blocks, end.digest) != (self._count - 1, self._before):
            raise CorruptFrame("its end does not agree with what stands before it")
        if self._stream.read(1):
            raise CorruptFrame("something follows its end")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What is wrong with a file, as one line that names it."""
    try:
        yield
    except (CodecError, InputError) as error:
        raise InputError(f"{path}: {error}; nothing was taken in") from None

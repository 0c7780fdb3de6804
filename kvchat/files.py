"""Files that a user asks for: whole or not there, and readable to nobody else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvchat.errors import InputError


@contextmanager
def written(path: Path, force: bool = False) -> Iterator[BinaryIO]:
    """A stream into the file at `path`, which appears with mode 0600 once all of it is written, or not at all.

    Raises:
        InputError: the file is there already and `force` is not set, or its folder cannot be written.
        OSError: it cannot be written.
    """
    if path.exists() and not force:
        raise InputError(f"{path} is there already; add --force to overwrite it")
    if path.exists() and not path.is_file():  # a pipe or a device cannot be replaced
        with path.open("wb") as stream:
            yield stream
        return
    target = path.resolve()
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}-")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with open(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(handle)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)

"""One session in one file: text, token ids, timings and KV, to be taken in on another machine.

    start     8 + 2  b"KVCHAT\\x1a\\n", version, little-endian
    blocks    -      each a length (4, little-endian) and a frame of `codecs.frame`, which has a checksum of its own

    manifest         what the session is and how much of everything follows
    messages         batches of the current path, from its beginning
    segments         of each: a description, its header, a basis if it differs from the one before, its frames in order
    end              number of blocks before it, and SHA-256 of all bytes before it

Files come from other people. Nothing is believed before it is checked, nothing larger than its limit (`form.py`) is
read, and never more than one block is in memory, or one segment where the store has a limit. No code is in the file,
and none is run. Its KV cannot be checked without computing it: it serves conversations that say the same as the file up
to a segment's end, and no others. Needs no torch.
"""

from __future__ import annotations

from kvchat.portable.form import Manifest
from kvchat.portable.intake import take_in
from kvchat.portable.read import is_portable, read_manifest
from kvchat.portable.write import write

__all__ = ["Manifest", "is_portable", "read_manifest", "take_in", "write"]

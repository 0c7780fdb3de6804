"""Every exception that kvchat raises on purpose.

A message is one line: what happened, the value, and what to do about it.

    KVChatError
    |-- ConfigError              a setting that does not exist or has a wrong value
    |-- InputError               an empty message, an unknown role, a file that cannot be imported
    |-- ModelError               a model that cannot be found, read or supported
    |   `-- FingerprintMismatch  the session's KV was made by another model, dtype or template
    |-- StoreError               the database is damaged, newer than this program, or busy
    |   |-- SessionNotFound
    |   |-- SessionExists
    |   |-- SessionBusy          another process has the session open
    |   |-- SessionChanged       another process wrote to the session all the same
    |   `-- StoreDamaged         SQLite finds the file itself damaged
    |-- CodecError               bytes that do not decode
    |   |-- UnknownCodec
    |   `-- CorruptFrame         checksum, size or structure is wrong
    `-- CapacityError            the model's window has no room for what was asked
        `-- OutOfMemory          the device's memory has none
"""

from __future__ import annotations


class KVChatError(Exception):
    """Base of all errors below; the command line prints it as one line and exits with 1."""


class ConfigError(KVChatError):
    """A setting that does not exist or has a wrong value."""


class InputError(KVChatError):
    """What the user gave cannot be used: an empty message, an unknown role, a broken file."""


class ModelError(KVChatError):
    """A model that cannot be found, read or supported."""


class FingerprintMismatch(ModelError):
    """The session's KV was made by another model, dtype or template."""


class StoreError(KVChatError):
    """The database is damaged, newer than this program, or busy."""


class SessionNotFound(StoreError):
    """No session of that name."""


class SessionExists(StoreError):
    """A session of that name is there already."""


class SessionBusy(StoreError):
    """Another process has the session open."""


class SessionChanged(StoreError):
    """Another process wrote to the session since it was read, past its lock."""


class StoreDamaged(StoreError):
    """SQLite finds the file itself damaged, all of it or some pages."""


class CodecError(KVChatError):
    """Bytes that do not decode."""


class UnknownCodec(CodecError):
    """A codec name that this version does not know."""


class CorruptFrame(CodecError):
    """A frame whose checksum, size or structure is wrong."""


class CapacityError(KVChatError):
    """The model's window has no room for what was asked."""


class OutOfMemory(CapacityError):
    """The device's memory has no room, even after what can be made again was let go; the session goes on."""

"""Where the key of an encrypted store comes from: a passphrase, or a random key in the system's keyring.

The keyring names a key by the salt that its file begins with, so that a store may be moved and renamed. A passphrase
becomes a key as in SQLCipher, once, and not again at every opening (https://www.zetetic.net/sqlcipher/design/).
"""

from __future__ import annotations

import getpass
import hashlib
import os
import secrets
import sys
import unicodedata
from pathlib import Path
from typing import Any

from kvchat.cipher import Key, salt, sqlcipher
from kvchat.errors import StoreError
from kvchat.terminal import neutralise

VARIABLE = "KVCHAT_PASSPHRASE"
SERVICE = "kvchat"
"""Under which the keyring lists keys; the user name is the salt in hex."""
KEPT = "the key in the keyring"
ROUNDS = 256_000
"""Of PBKDF2-HMAC-SHA512."""
UNUSABLE = (ImportError, AttributeError, RuntimeError, OSError, TypeError)
"""What a keyring that is set up wrongly raises, besides its own errors."""


def find_key(path: Path, passphrase: str | None = None) -> Key | None:
    """The key of the store at `path`, which may be wrong; None if it is not encrypted. Call it where one can be asked.

    The first of: `passphrase`, the variable KVCHAT_PASSPHRASE, the keyring, and a prompt if stdin is a terminal. With
    one of the first two a store that is not there yet is made encrypted.

    Raises:
        StoreError: there is no key, a package is missing, or `passphrase` was given for a store that is not encrypted.
    """
    found, new = salt(path), not path.exists() or (path.is_file() and not path.stat().st_size)
    if found is None and not new:
        if passphrase is not None:
            raise StoreError(f"{path} is not encrypted and takes no passphrase; `kvchat encrypt` encrypts it")
        return None
    if passphrase is not None or os.environ.get(VARIABLE):
        return given(passphrase, found)
    if found is None:
        return None
    sqlcipher()  # before anyone is asked for what cannot be used
    if key := _kept(found):
        return key
    if not sys.stdin.isatty():
        raise StoreError(
            f"{path} is encrypted, or damaged, and the keyring has no key for it: set {VARIABLE}, or run kvchat in a "
            "terminal, which asks for the passphrase"
        )
    return _from_passphrase(_ask(f"Passphrase of {path}: "), "the passphrase that was typed", found)


def given(passphrase: str | None = None, found: bytes | None = None) -> Key:
    """The key by `passphrase`, or else by the variable KVCHAT_PASSPHRASE, for a file's salt. Raises StoreError."""
    sqlcipher()
    if passphrase is None:
        return _from_passphrase(os.environ[VARIABLE], f"the passphrase in {VARIABLE}", found)
    return _from_passphrase(passphrase, "the passphrase that was given", found)


def new_passphrase() -> Key:
    """The key by the variable KVCHAT_PASSPHRASE, or else by a passphrase that is asked for twice. Raises StoreError."""
    sqlcipher()
    if os.environ.get(VARIABLE):
        return given()
    if not sys.stdin.isatty():
        raise StoreError(f"there is no terminal to type a passphrase at: set {VARIABLE}")
    typed = _ask("New passphrase: ")
    if typed != _ask("The same again: "):
        raise StoreError("the two passphrases differ: nothing was changed")
    return _from_passphrase(typed, "the passphrase that was typed", None)


def new_key() -> Key:
    """A random key, which the keyring has already. Raises StoreError: the keyring cannot be used."""
    sqlcipher()
    errors, keyring = _keyring()
    if keyring is None:
        raise StoreError("the keyring needs a package: install it with `pip install 'kvchat[crypt]'`")
    user, key = secrets.token_hex(16), secrets.token_hex(32)
    try:
        keyring.set_password(SERVICE, user, key)
        if keyring.get_password(SERVICE, user) != key:  # a backend may keep nothing, and the store would be lost
            raise StoreError("the keyring does not keep what it is given; use --passphrase: nothing was changed")
    except errors as error:
        raise StoreError(f"the keyring cannot be used ({_why(error)}); use --passphrase: nothing was changed") from None
    return _raw(key, user)


def keep_elsewhere(key: Key) -> str | None:
    """How a user copies a key out of the keyring; None if it follows from a passphrase."""
    return f"keyring get {SERVICE} {key.salt}" if key.source == KEPT else None


def child_environment() -> dict[str, str]:
    """This process's environment less the passphrase, for programs that open no store."""
    return {name: value for name, value in os.environ.items() if name != VARIABLE}


def _kept(found: bytes) -> Key | None:
    """The key that the keyring has for a salt; a machine without one may have a passphrase. Raises StoreError."""
    errors, keyring = _keyring()
    if keyring is None:
        return None
    try:
        key = keyring.get_password(SERVICE, found.hex())
    except errors as error:
        from keyring.errors import NoKeyringError

        if isinstance(error, NoKeyringError):
            return None
        # Nobody knows whether there is a key: to ask for a passphrase would be to ask for what may never have been.
        raise StoreError(
            f"the keyring cannot be read ({_why(error)}): unlock it, or set {VARIABLE} if the store has a passphrase"
        ) from None
    return _raw(key, found.hex()) if key else None


def _keyring() -> tuple[tuple[type[Exception], ...], Any]:
    """What the keyring raises, and the keyring; None if its package is not installed."""
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return (), None
    return (KeyringError, *UNUSABLE), keyring


def _why(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0] or type(error).__name__


def _raw(key: str, salted: str) -> Key:
    """From 32 bytes and 16 bytes in hex. SQLCipher derives nothing from such a key, and opens at once."""
    return Key(f"x'{key}{salted}'", KEPT)


def _from_passphrase(text: str, source: str, found: bytes | None) -> Key:
    """For the salt of a file, or for a new file with a random one."""
    if not text or not text.isprintable():
        raise StoreError(f"{source} is empty, or has characters that cannot be typed: nothing was changed")
    salted = found or secrets.token_bytes(16)
    return Key(f"x'{_derived(text, salted).hex()}{salted.hex()}'", source)


def _derived(text: str, salted: bytes) -> bytes:
    """The 32 bytes that SQLCipher 4 derives from a passphrase."""
    # Systems type accents in different ways.
    return hashlib.pbkdf2_hmac("sha512", unicodedata.normalize("NFC", text).encode(), salted, ROUNDS, 32)


def _ask(prompt: str) -> str:
    try:
        return getpass.getpass(neutralise(prompt))
    except EOFError:
        raise StoreError("no passphrase was typed: nothing was changed") from None

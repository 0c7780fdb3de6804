"""The commands that encrypt the store, and take its encryption away. They need no model."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kvchat.errors import InputError
from kvchat.flags import StoreFlags, command
from kvchat.plain import say

app = typer.Typer()


@app.command()
@command
def encrypt(
    flags: StoreFlags,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Ask for a passphrase, or take KVCHAT_PASSPHRASE; no keyring.")
    ] = False,
) -> None:
    """Encrypt the store with a new key in the system's keyring, or with a passphrase. Without the key all is lost.

    The old file and its log are overwritten. What they gave back to the file system before is not; an SSD, a file
    system with snapshots and your own copies may still keep their bytes.
    """
    from kvchat import keys
    from kvchat.cipher import salt
    from kvchat.recrypt import recrypt

    path = flags.settings().store_path
    if salt(path) is not None:
        raise InputError(f"{path} is encrypted already, or damaged; `kvchat doctor` tells")
    if not passphrase and os.environ.get(keys.VARIABLE):
        raise InputError(f"{keys.VARIABLE} is set, and would be tried before the keyring; unset it or add --passphrase")
    key = keys.new_passphrase() if passphrase else keys.new_key()
    undone = recrypt(path, None, key)
    print(f"{path} is encrypted with {key.source}")
    if copied := keys.keep_elsewhere(key):
        print(f"back the key up: `{copied}` shows it, the same with `set` keeps it on another machine")
    if undone:
        say(f"encrypted; the old bytes could not be overwritten: {undone}")


@app.command()
@command
def decrypt(flags: StoreFlags) -> None:
    """Take the store's encryption away. A key in the keyring stays there, for copies of the store."""
    from kvchat.cipher import salt
    from kvchat.recrypt import recrypt

    path = flags.settings().store_path
    if salt(path) is None:
        raise InputError(f"{path} is not encrypted")
    undone = recrypt(path, flags.key, None)
    print(f"{path} is not encrypted any more")
    if undone:
        say(f"decrypted; a power cut now may bring the encrypted file back: {undone}")

"""The commands that encrypt the store, and take its encryption away. They need no model."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kvchat.cli.flags import Json, StoreFlags, command, examples
from kvchat.cli.plain import say, write
from kvchat.cli.store import print_json
from kvchat.errors import InputError

app = typer.Typer()


@app.command(short_help="Encrypt the store.", epilog=examples("kvchat encrypt", "kvchat encrypt --passphrase"))
@command
def encrypt(
    flags: StoreFlags,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Ask for a passphrase, or take KVCHAT_PASSPHRASE; no keyring.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Encrypt the store with a new key in the system's keyring, or with a passphrase. Without the key all is lost.

    The old file and its log are overwritten. What they gave back to the file system before is not; an SSD, a file
    system with snapshots and your own copies may still keep their bytes.
    """
    from kvchat import keys
    from kvchat.cipher import salt
    from kvchat.store.recrypt import recrypt

    path = flags.settings().store_path
    if salt(path) is not None:
        raise InputError(f"{path} is encrypted already, or damaged; `kvchat doctor` tells")
    if not passphrase and os.environ.get(keys.VARIABLE):
        raise InputError(f"{keys.VARIABLE} is set, and would be tried before the keyring; unset it or add --passphrase")
    key = keys.new_passphrase() if passphrase else keys.new_key()
    undone, copied = recrypt(path, None, key), keys.keep_elsewhere(key)
    if as_json:
        print_json({"store": str(path), "encrypted": True, "key": key.source, "back_up": copied})
    else:
        write(f"{path} is encrypted with {key.source}\n")
        if copied:
            write(f"back the key up: `{copied}` shows it, the same with `set` keeps it on another machine\n")
    if undone:
        say(f"encrypted; the old bytes could not be overwritten: {undone}")


@app.command(epilog=examples("kvchat decrypt"))
@command
def decrypt(flags: StoreFlags, as_json: Json = False) -> None:
    """Take the store's encryption away. A key in the keyring stays there, for copies of the store."""
    from kvchat.cipher import salt
    from kvchat.store.recrypt import recrypt

    path = flags.settings().store_path
    if salt(path) is None:
        raise InputError(f"{path} is not encrypted")
    undone = recrypt(path, flags.key, None)
    if as_json:
        print_json({"store": str(path), "encrypted": False})
    else:
        write(f"{path} is not encrypted any more\n")
    if undone:
        say(f"decrypted; a power cut now may bring the encrypted file back: {undone}")

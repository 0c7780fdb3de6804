"""What this machine has: checks of everything that a session needs, and the models that are here."""

from __future__ import annotations

import json
import platform
import re
import sqlite3
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvchat.cipher import database_errors
from kvchat.cli.plain import format_room, size
from kvchat.config import Config, default_folder
from kvchat.errors import KVChatError
from kvchat.keys import find_key
from kvchat.store.shed import Allowance, free_bytes

PACKAGES = ("kvchat", "torch", "transformers", "sqlite-utils", "textual", "zstandard")
FULL_DISK, LOW_DISK = 200_000_000, 2_000_000_000
"""Free bytes below which saving fails soon, and below which a long conversation may not fit."""

REACHED = 0.95
"""Part of what the limits allow from which on they count as reached: the next segments make others give way."""

Row = dict[str, Any]


def checks(config: Config) -> list[Row]:
    """One row per check: its name, state (ok, warn or fail) and what was found."""
    rows = [_row("python", "ok", platform.python_version())]
    rows += [_package(name) for name in PACKAGES]
    return [*rows, _sqlite(), *_device(config), _model(config), *_store(config), _disk(config)]


def models() -> list[Row]:
    """The built-in model, converted GGUF files and the Hugging Face cache: name, source, state and folder."""
    from kvchat.supported import quiet_libraries

    cache = default_folder("cache") / "models"
    with quiet_libraries():
        return [_builtin(cache), *_converted(cache), *_hub()]


def _row(check: str, state: str, detail: str) -> Row:
    return {"check": check, "state": state, "detail": detail}


def _package(name: str) -> Row:
    try:
        return _row(name, "ok", version(name))
    except PackageNotFoundError:
        return _row(name, "warn", "not installed as a package")


def _sqlite() -> Row:
    try:
        with sqlite3.connect(":memory:") as database:
            database.execute("create virtual table words using fts5(word)")
    except sqlite3.Error as error:
        return _row("sqlite", "fail", f"{sqlite3.sqlite_version} has no full-text search (FTS5): {error}")
    return _row("sqlite", "ok", f"{sqlite3.sqlite_version} with full-text search")


def _device(config: Config) -> list[Row]:
    """Device, dtype and attention backend, as a session would use them."""
    import torch

    from kvchat.attention import backend_for, has_kernels
    from kvchat.model import choose_device, choose_dtype

    try:
        device = choose_device(config.model.device)
        dtype = choose_dtype(config.model.dtype, device)
    except KVChatError as error:
        return [_row("device", "fail", str(error))]
    backend = backend_for(config.model.attention, device, dtype)
    slow = backend == "reference"
    return [
        _row("device", "ok", str(device)),
        _row("dtype", "ok", str(dtype).removeprefix("torch.")),
        _row("attention", "warn" if slow else "ok", f"{backend}, which is slow" if slow else backend),
        _decoding(device.type, dtype == torch.float32, has_kernels(device, dtype)),
    ]


def _decoding(device: str, wide: bool, kernels: bool) -> Row:
    """How tokens are computed one by one, and why not faster."""
    if device != "cuda":
        return _row("decoding", "ok", "a pass a token, over decoded KV")
    if kernels:
        return _row("decoding", "ok", f"as a CUDA graph, over KV as it was encoded (triton {version('triton')})")
    reason = "its kernels are for bfloat16 and float16" if wide else "triton is not installed"
    return _row("decoding", "warn", f"a pass a token, several times slower than it could be: {reason}")


def _model(config: Config) -> Row:
    from kvchat.builtin import BUILTIN

    name = config.model.name or BUILTIN
    known = {row["name"]: row for row in models()}
    if Path(name).expanduser().exists():
        return _row("model", "ok", f"{name}: a local file or folder")
    if name not in known:
        return _row("model", "warn", f"{name}: not here yet, it is downloaded on first use")
    return _row("model", "ok" if known[name]["state"] == "ready" else "warn", f"{name}: {known[name]['state']}")


def _store(config: Config) -> list[Row]:
    """The file, and what its limits leave to it."""
    from kvchat.store.store import Store

    path, limits = config.store_path, config.store
    if not path.exists():
        return [_row("store", "ok", f"{path}: not there yet, the first session creates it")]
    try:
        key = find_key(path)
        store = Store(path, allowance=Allowance(limits.disk_budget, limits.min_free), key=key)
        try:
            sessions, room = len(store.sessions()), store.room()
        finally:
            store.close()
    except (KVChatError, OSError) as error:
        return [_row("store", "fail", str(error))]
    except database_errors() as error:
        return [_row("store", "fail", str(error))]
    reached = room.in_use > REACHED * room.allowed
    given = f"; {room.limit} is reached: KV of cold sessions gives way" if reached else ""
    figures = format_room(room.in_use, room.disk_budget, room.free, room.min_free) + given
    return [
        _row("store", "ok", f"{path}: {sessions} sessions, {size(path.stat().st_size)}"),
        _row("encryption", "ok", f"SQLCipher, opened with {key.source}" if key else "none; `kvchat encrypt` does it"),
        _row("room", "warn" if reached else "ok", figures),
    ]


def _disk(config: Config) -> Row:
    free = free_bytes(config.store_path)
    state = "fail" if free < FULL_DISK else "warn" if free < LOW_DISK else "ok"
    return _row("disk", state, f"{size(free)} free for the store")


def _builtin(cache: Path) -> Row:
    from kvchat.builtin import BUILTIN, builtin_path

    folder = builtin_path(cache)
    ready = folder.is_dir()
    return _entry(BUILTIN, "built-in", "ready" if ready else "downloaded on first use", folder if ready else None)


def _converted(cache: Path) -> Iterator[Row]:
    """GGUF files that were converted before, by the name of the file if it is still known."""
    from kvchat.builtin import BUILTIN_SHA, FORMAT

    try:
        hashes = json.loads((cache / "hashes.json").read_text("utf-8"))
    except (OSError, ValueError):
        hashes = {}
    files = {entry[2][:16]: path for path, entry in hashes.items()}
    for folder in sorted(cache.glob(f"*-{FORMAT}")):
        sha = folder.name.removesuffix(f"-{FORMAT}")
        if re.fullmatch("[0-9a-f]{16}", sha) and not BUILTIN_SHA.startswith(sha):
            yield _entry(files.get(sha, str(folder)), "gguf", "ready", folder)


def _hub() -> Iterator[Row]:
    """Models in Hugging Face's cache; the state says what is missing or why one cannot run."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, ValueError):
        return
    for repository in sorted(repositories, key=lambda item: item.repo_id):
        if repository.repo_type == "model" and repository.revisions:
            used = max(repository.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
            name, folder = repository.repo_id, used.snapshot_path
            yield _entry(name, "hugging face", _state(name, folder), folder)


def _state(name: str, folder: Path) -> str:
    from kvchat.download import weight_files
    from kvchat.supported import read_config

    try:
        read_config(name, folder)
        weight_files(folder)
    except KVChatError as error:
        return str(error)
    return "ready"


def _entry(name: str, source: str, state: str, folder: Path | None) -> Row:
    return {"name": name, "source": source, "state": state, "folder": str(folder or "")}

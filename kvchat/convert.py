"""GGUF files into folders of safetensors, once for each file, in `CACHE/SHA-FORMAT/`.

A folder of that name is always whole: it is filled under another name and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from kvchat.builtin import FORMAT
from kvchat.errors import ModelError
from kvchat.events import Listener, Progress
from kvchat.supported import one_line_errors, quiet_libraries, read_config

HEADER_BYTES = 1 << 26
"""More than the metadata and tensor names of a GGUF file take."""

DAY = 86_400


def gguf_folder(path: Path, cache: Path, listener: Listener) -> Path:
    """The converted folder of a GGUF file, known by the file's bytes."""
    with one_line_errors(f"cannot read {path}"), path.open("rb") as file:
        begin = file.read(4)
    if begin != b"GGUF":
        hint = "give a .gguf file, a folder or a Hugging Face id"
        raise ModelError(f"{path.name} is not a GGUF file (it begins with {begin!r}); {hint}")
    target = cache / f"{file_sha256(path, cache)[:16]}-{FORMAT}"
    if not target.is_dir():
        convert(path, path.name, target, listener)
    return target


def convert(path: Path, name: str, target: Path, listener: Listener) -> None:
    """Write a GGUF file's model to the folder `target` as bfloat16 safetensors, with its tokenizer."""
    size = path.stat().st_size
    where = {"gguf_file": path.name}
    listener(Progress("convert", 0, size))
    with _converting(name):
        _refuse_scaled_rope(path, name)
        config = read_config(name, path.parent, **where)
    listener(Progress("convert", size // 4, size))
    with _converting(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, config=config, **where)
    listener(Progress("convert", size // 2, size))
    with _converting(name):
        network = _dequantised(path, config)
    listener(Progress("convert", size * 3 // 4, size))
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, 2 * sum(parameter.numel() for parameter in network.parameters()))
    with _converting(name), whole_folder(target) as partial:
        network.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    listener(Progress("convert", size, size))


@contextlib.contextmanager
def _converting(name: str) -> Iterator[None]:
    with quiet_libraries(), one_line_errors(f"cannot convert {name}"):
        yield


def _dequantised(path: Path, config: Any) -> Any:
    """The network in bfloat16."""
    # Versions with a GgufConfig keep the packed layers unless told; those without always dequantise.
    packing = getattr(transformers, "GgufConfig", None)
    extra = {"quantization_config": packing(dequantize=True)} if packing else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.bfloat16, **extra
    )


def _refuse_scaled_rope(path: Path, name: str) -> None:
    """transformers drops these parts of a GGUF file, and the model would run with other positions than it learned."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    kind = re.search(rb"\.rope\.scaling\.type\x08\0\0\0(.)\0{7}", header, re.DOTALL)
    scaled = kind and header[kind.end() : kind.end() + kind[1][0]] != b"none"
    if scaled or re.search(rb"rope_(freqs|factors_long|factors_short)\.weight", header):
        raise ModelError(f"{name} cannot be converted: GGUF loading loses its RoPE scaling; give its Hugging Face id")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends, and is removed if it fails."""
    for stale in target.parent.glob(".partial-*"):
        if time.time() - stale.stat().st_mtime > DAY:
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        # Another process may have finished first: its folder is the same.
        if not target.is_dir():
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Raise `ModelError` if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"the model needs {needed >> 20} MiB in {folder} and {free >> 20} MiB are free; make room there"
        )


def file_sha256(path: Path, cache: Path) -> str:
    """The sha256 of a file, remembered in `cache` by path, size and time of change."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name  # the hub's cache names large files by their sha256
    memory = cache / "hashes.json"
    try:
        known = json.loads(memory.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    state = real.stat()
    entry = known.get(str(real))
    if entry and entry[:2] == [state.st_size, state.st_mtime_ns]:
        return str(entry[2])
    with real.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    known[str(real)] = [state.st_size, state.st_mtime_ns, sha]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache, prefix=".hashes-", delete=False, encoding="utf-8") as new:
        json.dump(known, new)
    os.replace(new.name, memory)
    return sha

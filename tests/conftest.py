"""Fixtures shared by all tests; the builders behind them are in `tests.tiny`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose kernels then run on a CPU

from kvchat.model import Model, load
from kvchat.sections import ModelConfig
from tests.scarcity import Scarcity
from tests.tiny import make_model

# Two processes with more threads than there are cores wait for each other's at every barrier, for minutes.
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def loops_in_the_interpreter() -> Iterator[None]:
    """Let the interpreter of Triton 3.6 loop to a bound that is an argument, with numpy 2.4 or newer too."""
    if not find_spec("triton"):
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)
        patch_once(patched, interpreter)
        yield


def patch_once(patched: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Let a kernel make Triton's language interpreted once for each module it calls, not in every call: half its time.

    What such a call sets stays as it is until the kernel ends, and has no other effect.
    """
    patch, run, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def patch_lang(function: Any) -> Any:
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            return patch(function)
        return None

    def run_anew(*args: Any, **named: Any) -> None:
        done.clear()
        run(*args, **named)

    patched.setattr(interpreter, "_patch_lang", patch_lang)
    patched.setattr(interpreter.GridExecutor, "__call__", run_anew)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """Keep the collector from the million objects of torch and of all tests: a third of a second each time.

    Sessions collect where memory runs out. Anew for each module, because a screen lets the collector see everything.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries would report all that as leaked


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """A random float32 Llama of 3 layers, 4 query and 2 KV heads, and a tokenizer of bytes."""
    return make_model()


@pytest.fixture(scope="session")
def builtin_model() -> Model:
    """The built-in model from the real cache folder, downloaded once. Mark tests that use it with `weights`."""
    return load(ModelConfig())


@pytest.fixture
def scarce() -> Iterator[Scarcity]:
    """Memory that runs out when a test says so."""
    with Scarcity() as scarcity:
        yield scarcity

"""Fixtures shared by all tests; the builders behind them are in `tests.tiny`."""

from __future__ import annotations

import os

import pytest
import torch

from kvchat.config import ModelConfig
from kvchat.model import Model, load
from tests.tiny import make_model

# Two processes with more threads than there are cores wait for each other's at every barrier, for minutes.
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """A random float32 Llama of 3 layers, 4 query and 2 KV heads, and a tokenizer of bytes."""
    return make_model()


@pytest.fixture(scope="session")
def builtin_model() -> Model:
    """The built-in model from the real cache folder, downloaded once. Mark tests that use it with `weights`."""
    return load(ModelConfig())

"""From texts to vectors that say what they are about: by the loaded model itself, or by a small one made for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.fingerprint import digest
from kvchat.sections import EpisodesConfig

DEPTH = 1 / 12
"""How deep in the network states are taken: later ones say more of the next word than of the text. Measured on LoCoMo
with 30 layers: best after two or three, a little worse up to nine, far worse from twelve on."""
MOST = 1024
"""Numbers of a vector. Of a wider network they are a projection on drawn directions, which keeps angles."""


class Embedder(Protocol):
    """What makes vectors."""

    @property
    def name(self) -> str:
        """Vectors of the same name compare."""

    @property
    def whiten(self) -> bool:
        """Whether cosines say more once a conversation's vectors vary alike in all directions (see `Spread`)."""

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(n, d) of length 1, one for each text; 0 for a text without tokens."""


def find_embedder(config: EpisodesConfig, engine: Engine) -> Embedder:
    """What the settings name; nothing is loaded or downloaded before it is used."""
    if config.embedder == "minilm":
        from kvchat.episodes.sentences import Sentences

        return Sentences()
    return HiddenStates(engine)


def own_name(fingerprint: Mapping[str, str]) -> str:
    """What vectors of `HiddenStates` are named by, in any dtype; the number is of the way in which they are made."""
    return f"own2-{digest([fingerprint.get('weights'), fingerprint.get('config')])}"


class Later:
    """An embedder that is made when a text is there to embed.

    Args:
        name: its name, which is known before.
        make: what makes it.
    """

    whiten = True

    def __init__(self, name: str, make: Callable[[], Embedder]) -> None:
        self.name = name
        self._make = make

    @cached_property
    def _made(self) -> Embedder:
        made = self._make()
        if made.name != self.name:
            raise InputError("this session was made by another model; leave --model out, or give that one")
        return made

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """As `Embedder` has it. Raises InputError: it has another name."""
        return self._made.embed(texts)


class HiddenStates:
    """The loaded model's own states of a few layers in, averaged over the tokens of a text that stands alone.

    The first token counts only if there is no other: its states are like no other's, whatever it is.
    """

    whiten = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._layer = max(1, round(engine.model.num_hidden_layers * DEPTH))

    @property
    def name(self) -> str:
        """As `Embedder` has it."""
        return own_name(self._engine.model.fingerprint)

    @property
    def _width(self) -> int:
        return int(self._engine.model.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """As `Embedder` has it; one text at a time, so that no vector depends on what is asked with it."""
        return np.stack([self._embed(text) for text in texts]) if texts else np.zeros((0, 1), np.float32)

    def _embed(self, text: str) -> npt.NDArray[np.float32]:
        model = self._engine.model
        ids = model.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = ids[: model.context_window]
        seen = _Seen(self._layer)
        if not ids:
            return np.zeros(min(self._width, MOST), np.float32)
        with suppress(_Enough):
            self._engine.observe(self._engine.new_cache(), ids, seen)
        assert seen.states is not None
        mean = seen.states[min(1, len(ids) - 1) :].float().mean(0).cpu().numpy()
        return unit(mean if self._drawn is None else mean @ self._drawn)

    @cached_property
    def _drawn(self) -> npt.NDArray[np.float32] | None:
        """The directions (n, MOST) that states are projected on; None where they are as they are."""
        if self._width <= MOST:
            return None
        return np.random.default_rng(42).standard_normal((self._width, MOST), np.float32)


def unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows (n, d) at length 1; those without a direction stay 0."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    found: npt.NDArray[np.float32] = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-6)
    return found


class _Enough(Exception):
    """Ends a forward pass at the layer that was asked for."""


class _Seen:
    """A tap that keeps what enters the attention of one layer, and ends the pass there."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self.states: Tensor | None = None

    def enter(self, layer: int, states: Tensor) -> None:
        """Keep the states (q, n)."""
        if layer == self._layer:
            self.states = states
            raise _Enough

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Not looked at."""

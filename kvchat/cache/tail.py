"""The open tail of one layer: KV of the newest tokens, dense and exact, growing in place.

It is the part that transformers writes to, so the hooks of its cache API are here.

Letters: H KV heads, T tokens of the tail, D head_dim, q new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

TAIL_STEP = 256
"""Tokens by which the tail's room grows at least."""
KEPT_ROOM = 4 * TAIL_STEP
"""The most room that a reserved tail keeps when its tokens are taken away."""


class Tail(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values (H, room, D), of which the first `tail_length` rows count."""

    is_sliding = False

    def __init__(self, num_key_value_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.tail_length = 0
        self.tail_start = 0
        self.aside = 0
        """Tokens of the tail whose rows are elsewhere: in every head as many, not the newest."""
        self.keys = self.values = torch.empty(num_key_value_heads, 0, head_dim, dtype=dtype, device=device)
        self.row: Tensor | None = None
        """Where the device says that the one new token's row belongs, (1,) int64; None: at the end of the tail."""
        self._reserved = False
        self.is_initialized = True

    # -- what transformers calls -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy here."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (1, H, q, D) to the tail; returns the whole tail, (1, H, T, D) views."""
        if self.row is not None:  # whoever gave the row counts the token, and knows which rows of the room are real
            self.keys.index_copy_(1, self.row, key_states[0])
            self.values.index_copy_(1, self.row, value_states[0])
            return self.keys[None], self.values[None]
        self.append_tail(key_states[0], value_states[0])
        keys, values = self.tail()
        return keys[None], values[None]

    def get_seq_length(self) -> int:
        """The logical length, which positions are counted by, never the number of rows."""
        return self.tail_start + self.aside + self.tail_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for a mask that is never built: the attention function knows what each query sees."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` before transformers 5.2x."""
        return -1

    # -- the tail ----------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Tokens that fit before the buffers move."""
        return self.keys.shape[1]

    def tail(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the open tail, (H, T, D) views."""
        return self.keys[:, : self.tail_length], self.values[:, : self.tail_length]

    def rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tail's rows with these numbers (H, R), (H, R, D) copies."""
        index = numbers[..., None].expand(-1, -1, self.keys.shape[-1])
        return self.keys.gather(1, index), self.values.gather(1, index)

    @torch.inference_mode()
    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Have these (H, T, D) for the tail; where they fit a reserved room that is not far too large, it stays."""
        tokens = keys.shape[1]
        if self._reserved and tokens <= self.room <= max(KEPT_ROOM, 2 * tokens):
            self.keys[:, :tokens], self.values[:, :tokens] = keys, values
        else:
            self.keys, self.values = keys, values
        self.tail_length = tokens

    def append_tail(self, keys: Tensor, values: Tensor) -> None:
        """Append (H, q, D)."""
        end = self.tail_length + keys.shape[1]
        if end > self.room:
            self._grow(end)
        self.keys[:, self.tail_length : end] = keys
        self.values[:, self.tail_length : end] = values
        self.tail_length = end

    @torch.inference_mode()
    def rewrite(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Put (H, q, D) rows where they were, from `row` on."""
        self.keys[:, row : row + keys.shape[1]] = keys
        self.values[:, row : row + keys.shape[1]] = values

    @torch.inference_mode()
    def rewrite_keys(self, keys: Tensor) -> None:
        """Have these (H, T, D) keys for all of the tail."""
        self.keys[:, : self.tail_length] = keys

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens. From now on the buffers move only to grow, or when they are far too large.

        A CUDA graph writes to the addresses that it was captured with.
        """
        self._reserved = True
        if self.tail_length + tokens > self.room:
            self._grow(self.tail_length + tokens)

    def _grow(self, tokens: int) -> None:
        room = max(tokens + TAIL_STEP, self.room * 3 // 2)
        old = self.tail()
        heads, _, dim = self.keys.shape
        keys = torch.empty(heads, room, dim, dtype=self.dtype, device=self.device)
        values = torch.empty_like(keys)  # memory may run out here: nothing has changed yet
        keys[:, : self.tail_length], values[:, : self.tail_length] = old
        self.keys, self.values = keys, values

    @torch.inference_mode()
    def after(self, tokens: int) -> tuple[Tensor, Tensor]:
        """A copy of the tail without its first `tokens`."""
        assert not self.aside
        keys, values = (part[:, tokens:].clone() for part in self.tail())
        return keys, values

    # Rows written during a forward pass are inference tensors, which nothing outside inference mode may write to.
    @torch.inference_mode()
    def replace_tail(self, rows: tuple[Tensor, Tensor]) -> None:
        """Hold only `rows`, the end of the tail, for what is before is sealed or belongs to no one; memory is freed."""
        (keys, values), tokens = rows, rows[0].shape[1]
        if self._reserved and tokens < self.room <= KEPT_ROOM:
            self.keys[:, :tokens], self.values[:, :tokens] = keys, values
        else:
            self.keys, self.values = keys, values
        self.tail_start += self.tail_length - tokens
        self.tail_length = tokens

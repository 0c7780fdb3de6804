"""Parts of a network that scorers ask for: what enters attention, its output matrix, and RoPE.

By the names that transformers' decoders share, so that no scorer has code for a model. Where one has other names, only
scorers that ask for the part cannot be used.

Letters: n width of the network's states, Q query heads, H heads of any kind, D head_dim, q tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from kvchat.errors import InputError
from kvchat.model import Model

Enter = Callable[[int, Tensor], None]
"""Told of a layer and the states (q, n) that enter its attention, after the norm."""


class Anatomy:
    """The parts of one model's network. Raises InputError where it has none of these names."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @cached_property
    def attentions(self) -> list[Any]:
        """The attention module of every layer, looked for once."""
        found = [
            part for part in self._model.network.modules() if hasattr(part, "layer_idx") and hasattr(part, "o_proj")
        ]
        if len(found) != self._model.num_hidden_layers:
            raise InputError(self._other())
        return found

    @contextmanager
    def watched(self, enter: Enter) -> Iterator[None]:
        """Inside, `enter` is told of every forward pass."""

        def told(layer: int, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            enter(layer, (given[0] if given else named["hidden_states"])[0])

        with ExitStack() as undo:
            for layer, module in enumerate(self.attentions):
                hook = module.register_forward_pre_hook(partial(told, layer), with_kwargs=True)
                undo.callback(hook.remove)
            yield

    def output_weight(self, layer: int) -> Tensor:
        """W_o of each query head, (Q, D, n): what a head adds to the states is its sum of values times it."""
        weight: Tensor = self.attentions[layer].o_proj.weight
        return weight.T.view(self._model.num_attention_heads, self._model.head_dim, -1)

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """RoPE without its scale of (H, q, D) by (q,) positions, in float32; a negative one turns back."""
        module, rope = self.attentions[0], getattr(self._model.network.base_model, "rotary_emb", None)
        turn = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if rope is None or turn is None:
            raise InputError(self._other())
        states, positions = states.float()[None], positions.to(states.device)
        some, place = torch.unique(
            positions, return_inverse=True
        )  # rows of a segment have one: few angles are computed
        cos, sin = rope(states, some[None])
        scale = float(getattr(rope, "attention_scaling", 1.0))
        # It turns queries and keys: here there are none of the second.
        turned: Tensor = turn(states, states[:, :0], (cos / scale)[:, place], (sin / scale)[:, place])[0][0]
        return turned

    @cached_property
    def turns(self) -> bool:
        """Whether keys can be turned to other positions: the network has RoPE, whose angles add up."""
        keys = torch.randn(1, 4, self._model.head_dim, generator=torch.Generator().manual_seed(0))
        one, two = torch.tensor([3, 5, 0, 100]), torch.tensor([1, 7, 9, -40])
        try:
            rotate = partial(self.rotate, keys.to(self._model.device))
            both, twice = rotate(one + two), self.rotate(rotate(one), two)
        except InputError:
            return False
        return bool(torch.allclose(both, twice, atol=1e-3)) and not bool(torch.equal(both, rotate(one)))

    def turned(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys (N, D) turned by (N,) positions, once, in float32; in their own dtype."""
        return self.rotate(keys[None], by)[0].to(keys.dtype)

    def _other(self) -> str:
        return f"this scorer cannot look into {self._model.name}; set compress.scorer to kvzip, keydiff or knorm"

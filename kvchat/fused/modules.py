"""Small modules of a network with one kernel for what they do in many: forwards to set on an instance.

Each takes over what was proved of its module, and leaves any other call to the module's own forward.

Letters: n width of the network's states, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn

from kvchat.cache.ragged import SegmentedCache
from kvchat.fused.kernels import Weight, add_rms_norm, rms_norm, rotate, silu_mul

Forward = Callable[..., Any]

NAMED = frozenset({"attention_mask", "position_ids", "use_cache", "position_embeddings", "segmented_cache"}) | {
    *("cache", "past_key_values")
}
"""Arguments of a layer that a proof covers, one of the last two among them."""


@contextmanager
def fused(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Inside, these modules run these forwards, as attributes of the instances; no class is touched."""
    assert not any("forward" in vars(module) for module in forwards), "replaced already"
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm of (..., n): one kernel for eight."""

    own: Forward
    weight: Tensor
    eps: float
    form: int

    @property
    def parts(self) -> Weight:
        """What the kernels take."""
        return self.weight, self.eps, self.form

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        """The one argument, under whatever name."""
        (states,) = (*given, *named.values())
        if states.dtype != self.weight.dtype:
            result: Tensor = self.own(states)
            return result
        return rms_norm(states, *self.parts)


@dataclass(frozen=True, eq=False)
class Mlp:
    """down(SiLU(gate) * up) of (..., n): one kernel for the activation and the product."""

    module: Any

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections to gate and up: two, or one that gives both halves."""
        module = self.module
        return [module.gate_up_proj] if hasattr(module, "gate_up_proj") else [module.gate_proj, module.up_proj]

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        """The one argument, under whatever name."""
        (states,) = (*given, *named.values())
        parts = [part(states) for part in self.inputs]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
        result: Tensor = self.module.down_proj(silu_mul(gate, up))
        return result


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of one new token in a decode step: one kernel from the projections to the query and the tail's row.

    norms    of each head's query and key, or None
    overlap  as for `rotate`
    """

    own: Forward
    module: Any
    norms: tuple[Norm, Norm] | None
    overlap: bool

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections to queries, keys and values: three, or one that gives them in this order."""
        module = self.module
        return [module.qkv_proj] if hasattr(module, "qkv_proj") else [module.q_proj, module.k_proj, module.v_proj]

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers of a token's queries, keys and values."""
        queries, rows = int(self.module.o_proj.in_features), sum(part.out_features for part in self.inputs)
        return queries, (rows - queries) // 2, (rows - queries) // 2

    def __call__(self, *given: Any, **named: Any) -> tuple[Tensor, None]:
        """(1, 1, n) to (1, 1, n)."""
        cache, states = named.get("segmented_cache"), named.get("hidden_states")
        if given or states is None or not in_step(cache) or named.keys() - NAMED != {"hidden_states"}:
            result: tuple[Tensor, None] = self.own(*given, **named)
            return result
        parts = [part(states) for part in self.inputs]
        projected = parts if len(parts) == 3 else parts[0].split(self.widths, -1)
        return self.module.o_proj(self.attend(projected, cache, named["position_embeddings"])), None

    def attend(self, projected: Sequence[Tensor], cache: SegmentedCache, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What `o_proj` takes, (1, 1, Q * D), of a token's queries, keys and values."""
        query, key, value = projected
        index, step = int(self.module.layer_idx), cache.step
        layer, norms = cache.layers[index], (self.norms[0].parts, self.norms[1].parts) if self.norms else None
        assert step is not None
        query = rotate(query, key, value, norms, rope, layer.row, (layer.keys, layer.values), self.overlap)
        return step.attend(index, query, layer.keys, layer.values, self.module.scaling).view(1, 1, -1)


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer, (1, 1, n) to (1, 1, n): one kernel for the first residual sum and the norm of it."""

    own: Forward
    module: Any
    norm: Norm

    def __call__(self, *given: Tensor, **named: Any) -> Tensor:
        """`given`: the states."""
        if len(given) != 1 or not named.keys() <= NAMED or given[0].dtype != self.norm.weight.dtype:
            result: Tensor = self.own(*given, **named)
            return result
        attended, _ = self.module.self_attn(hidden_states=self.module.input_layernorm(given[0]), **named)
        states, normed = add_rms_norm(given[0], attended, *self.norm.parts)
        total: Tensor = states + self.module.mlp(normed)
        return total


def in_step(cache: SegmentedCache | None) -> TypeGuard[SegmentedCache]:
    """Whether a decode step is running over the cache."""
    return cache is not None and cache.step is not None

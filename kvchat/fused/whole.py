"""A decoder layer of a decode step in seven kernels.

Letters: n width of the network's states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvchat.fused.kernels import silu_mul
from kvchat.fused.modules import NAMED, Attention, Forward, Layer, Mlp, Norm, in_step
from kvchat.fused.project import project


@dataclass(frozen=True, eq=False)
class WholeLayer:
    """A decoder layer of one new token in a decode step, (1, 1, n) to (1, 1, n), in seven kernels.

    Norms, sums and the activation are done by the kernels that read the weights, which sum in an order of their own.

    norm     the first
    overlap  as for `project`
    """

    layer: Layer
    attention: Attention
    mlp: Mlp
    norm: Norm
    overlap: bool

    def __call__(self, *given: Tensor, **named: Any) -> Tensor:
        """`given`: the states."""
        cache = named.get("segmented_cache")
        own = len(given) == 1 and named.keys() <= NAMED and given[0].dtype == self.norm.weight.dtype
        if not own or not in_step(cache) or given[0].numel() != len(self.norm.weight):
            return self.layer(*given, **named)
        parts = self.projected(given[0]).split_with_sizes(self.attention.widths)
        attended = self.attention.attend(parts, cache, named["position_embeddings"])
        states = self.attended(attended, given[0])
        return self.total(self.gated(states), states)

    def fits(self) -> bool:
        """Whether the kernel takes the matrices."""
        attention, mlp, dtype = self.attention, self.mlp, self.norm.weight.dtype
        linears = [*attention.inputs, attention.module.o_proj, *mlp.inputs, mlp.module.down_proj]
        return all(part.weight.dtype == dtype and part.weight.is_contiguous() for part in linears)

    def projected(self, states: Tensor) -> Tensor:
        """Queries, keys and values, one after the other, of the norm of the states."""
        weights, biases = _matrices(self.attention.inputs, self.attention.widths)
        return project(states, weights, biases, norm=self.norm.parts, overlap=self.overlap)

    def attended(self, out: Tensor, states: Tensor) -> Tensor:
        """The states with what attention adds to them."""
        return self._added(self.attention.module.o_proj, out, states)

    def gated(self, states: Tensor) -> Tensor:
        """What `down_proj` takes, of the states before the second norm."""
        width = self.mlp.module.down_proj.in_features
        weights, biases = _matrices(self.mlp.inputs, (width, width))
        return project(states, weights, biases, norm=self.layer.norm.parts, gated=True, overlap=self.overlap)

    def total(self, hidden: Tensor, states: Tensor) -> Tensor:
        """The states with what the MLP adds to them."""
        return self._added(self.mlp.module.down_proj, hidden, states)

    def _added(self, linear: nn.Linear, given: Tensor, states: Tensor) -> Tensor:
        return project(given, [linear.weight], [linear.bias], added=states, overlap=self.overlap).view_as(states)


def _matrices(parts: Sequence[nn.Linear], sizes: Sequence[int]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Weights and biases apart, whether or not one module holds them all."""
    if len(parts) > 1:
        return [part.weight for part in parts], [part.bias for part in parts]
    (part,) = parts
    none: list[Tensor | None] = [None] * len(sizes)
    return part.weight.split_with_sizes(sizes), none if part.bias is None else part.bias.split_with_sizes(sizes)


@dataclass(frozen=True, eq=False)
class Head:
    """A matrix, as that to the logits, times the states of one token; those of more go its own way."""

    own: Forward
    linear: nn.Linear
    overlap: bool

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        """The one argument, under whatever name."""
        (states,) = (*given, *named.values())
        weight = self.linear.weight
        if states.numel() != weight.shape[1] or states.dtype != weight.dtype:
            result: Tensor = self.own(states)
            return result
        return project(states, [weight], [self.linear.bias], overlap=self.overlap).view(*states.shape[:-1], -1)


def head(linear: object, numbers: Callable[..., Tensor], overlap: bool) -> dict[nn.Module, Forward]:
    """The forward for a network's last matrix, if ours comes near to its own; `numbers` as for `whole_layers`."""
    if not isinstance(linear, nn.Linear) or "forward" in vars(linear) or not linear.weight.is_contiguous():
        return {}
    states = numbers(1, 1, linear.in_features)
    if states.dtype != linear.weight.dtype:
        return {}
    one = Head(linear.forward, linear, overlap)
    return {linear: one} if _near(one(states), linear(states)) else {}


def whole_layers(
    found: Mapping[nn.Module, Forward], numbers: Callable[..., Tensor], overlap: bool
) -> dict[nn.Module, Forward]:
    """The layers of which all parts are proved, and whose projections ours come near to.

    found    what is proved of a network
    numbers  a shape to random numbers of the network's dtype and device
    """
    whole: dict[nn.Module, Forward] = {}
    for layer in found.values():
        if not isinstance(layer, Layer):
            continue
        parts = (found.get(getattr(layer.module, name)) for name in ("self_attn", "mlp", "input_layernorm"))
        attention, mlp, norm = parts
        if isinstance(attention, Attention) and isinstance(mlp, Mlp) and isinstance(norm, Norm):
            one = WholeLayer(layer, attention, mlp, norm, overlap)
            if one.fits() and _projects_alike(one, numbers):
                whole[layer.module] = one
    return whole


def _projects_alike(whole: WholeLayer, numbers: Callable[..., Tensor]) -> bool:
    """Whether each of the four projections gives what the modules give, but for the order of its sums."""
    module, states = whole.layer.module, numbers(1, 1, len(whole.norm.weight))
    out = numbers(1, 1, module.self_attn.o_proj.in_features)
    hidden = numbers(1, 1, module.mlp.down_proj.in_features)
    normed, gate_up = whole.norm(states), [part(whole.layer.norm(states)) for part in whole.mlp.inputs]
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, -1)
    pairs = (
        (whole.projected(states), torch.cat([part(normed) for part in whole.attention.inputs], -1)),
        (whole.attended(out, states), states + module.self_attn.o_proj(out)),
        (whole.gated(states), silu_mul(gate, up)),
        (whole.total(hidden, states), states + module.mlp.down_proj(hidden)),
    )
    return all(_near(ours.flatten(), theirs.flatten()) for ours, theirs in pairs)


def _near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two vectors differ by no more than roundings of their dtype do."""
    return bool((ours - theirs).float().norm() <= 2 * torch.finfo(theirs.dtype).eps * theirs.float().norm())

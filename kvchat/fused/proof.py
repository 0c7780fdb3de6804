"""Which modules of a network a kernel may stand for: those on which it gives what their own forward gives.

Nothing is concluded from a class or its name. Parts that a module calls give fixed answers while it is tried, so that a
proof sees what it does with them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvchat.attention import overlaps
from kvchat.cache.ragged import SegmentedCache
from kvchat.fused.kernels import ONE_PLUS, WEIGHT, rms_norm, silu_mul
from kvchat.fused.modules import NAMED, Attention, Forward, Layer, Mlp, Norm, fused
from kvchat.fused.whole import head, whole_layers
from kvchat.memory import is_out_of_memory
from kvchat.supported import cache_keyword

WORDS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""Numbers of a dtype as integers."""

MAGNITUDES = (1e-4, 1e-2, 1.0, 30.0, 1000.0)
POSITIONS = (7, 100_003)
"""Some networks scale late queries."""

FAR = 2
"""Representable numbers between two results, at most: where a state is rounded the other way, its product with a weight
is off by up to two."""
SHARE = 1 / 256
"""Of all numbers may differ. A sum in another order is off in the 24th bit, which shows where it decides a rounding."""

CALLED_OTHERWISE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
"""What a module raises that wants other arguments than a proof has."""


@torch.inference_mode()
def prove(network: Any) -> dict[nn.Module, Forward]:
    """The forwards that `fused` may set on modules of `network`, a decoder on the device that it will run on."""
    trial = _Trial(network)
    # Somebody else's forward on an instance stays.
    modules = [module for module in network.modules() if "forward" not in vars(module)]
    for find in (_norm, _mlp, _attention, _layer):
        for module in modules:
            if (found := find(module, trial)) is not None:
                trial.found[module] = found
    how = trial.numbers, trial.overlap
    return trial.found | whole_layers(trial.found, *how) | head(network.get_output_embeddings(), *how)


class _Trial:
    """What proofs share. The same random numbers every time, and none of the global generator's."""

    def __init__(self, network: Any) -> None:
        self.found: dict[nn.Module, Forward] = {}
        self.cache = SegmentedCache(network.config.num_hidden_layers, 1, 1, network.dtype, network.device)
        self._keyword = cache_keyword(network)
        self._source = torch.Generator().manual_seed(0)
        self._position = torch.full((1, 1), 3, device=network.device)
        rope = _tried(network.base_model.rotary_emb, self.numbers(1, 1, 1), position_ids=self._position)
        self.overlap = overlaps(network.device)
        self.rope: Sequence[int] | None = rope[0].shape if isinstance(rope, tuple) else None
        """Shape of cos and sin, (1, 1, R)."""

    def numbers(self, *shape: int) -> Tensor:
        """Standard normal, of the network's dtype and device."""
        return torch.randn(shape, generator=self._source).to(self.cache.layers[0].keys)

    def norm(self, module: object) -> Norm | None:
        """The proved norm of a module."""
        found = self.found.get(module) if isinstance(module, nn.Module) else None
        return found if isinstance(found, Norm) else None

    def named(self, position: int) -> dict[str, Any]:
        """Arguments of a layer in a decode step at `position`, with a RoPE of random numbers."""
        assert self.rope is not None
        named = {
            "attention_mask": None,
            "position_ids": torch.full_like(self._position, position),
            self._keyword: self.cache,
            "use_cache": True,
            "position_embeddings": (self.numbers(*self.rope), self.numbers(*self.rope)),
            "segmented_cache": self.cache,
        }
        assert named.keys() <= NAMED
        return named


class _Stub:
    """Stands for a part of a module: gives one answer and notes what it was given."""

    def __init__(self, answer: object) -> None:
        self._answer = answer
        self.given: tuple[object, ...] = ()
        self.named: dict[str, object] = {}

    def __call__(self, *given: object, **named: object) -> Any:
        self.given, self.named = given, named
        return self._answer

    def like(self, other: _Stub) -> bool:
        """Whether both were given the very same objects."""
        return (
            len(self.given) == len(other.given)
            and self.named.keys() == other.named.keys()
            and all(one is two for one, two in zip(self.given, other.given, strict=True))
            and all(one is other.named[name] for name, one in self.named.items())
        )


class _Probe:
    """Stands for the step, whose attention gives one answer."""

    def __init__(self, answer: Tensor) -> None:
        self._answer = answer
        self.asked: tuple[object, ...] = ()
        self.query: Tensor | None = None

    def attend(self, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        self.asked, self.query = (index, scale, keys.data_ptr(), values.data_ptr()), query.clone()
        return self._answer


def close(ours: object, theirs: object) -> bool:
    """Equal tensors, or such as differ in a few last bits (see FAR and SHARE)."""
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return False
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape or ours.dtype not in WORDS:
        return False
    steps = (_ordinal(ours) - _ordinal(theirs)).abs()
    return int(steps.max()) <= FAR and int(steps.count_nonzero()) <= max(1, int(SHARE * steps.numel()))


def _ordinal(numbers: Tensor) -> Tensor:
    """Integers in the order of the numbers; neighbours differ by one."""
    words = numbers.contiguous().view(WORDS[numbers.dtype])
    magnitude = (words & torch.iinfo(words.dtype).max).long()
    return torch.where(words < 0, -magnitude, magnitude)


def _tried(forward: Forward, *given: object, **named: object) -> Any:
    """What a module's own forward gives; None if it cannot be called so."""
    try:
        return forward(*given, **named)
    except CALLED_OTHERWISE as error:
        if is_out_of_memory(error):
            raise
        return None


def _free(module: object, *names: str, kind: type[nn.Module] = nn.Module) -> bool:
    """Whether a module has these parts, and no part has somebody else's forward."""
    parts = [getattr(module, name, None) for name in names]
    return all(isinstance(part, kind) and "forward" not in vars(part) for part in parts)


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _norm(module: Any, trial: _Trial) -> Norm | None:
    """A leaf with one weight (n,), an eps and one argument."""
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(parameters) != ["weight"] or list(module.children()) or not isinstance(eps, float):
        return None
    weight = parameters["weight"]
    if weight.dim() != 1 or weight.dtype not in WORDS or not _takes_one(module):
        return None
    states = trial.numbers(1, len(MAGNITUDES) + 1, len(weight)).to(weight) * _column(*MAGNITUDES, 1.0).to(weight)
    states[0, -1, len(weight) // 2] = 5000.0  # outweighs all others
    theirs = _tried(module.forward, states)
    for form in (WEIGHT.value, ONE_PLUS.value):
        if close(rms_norm(states, weight, eps, form), theirs):
            return Norm(module.forward, weight, eps, form)
    return None


def _column(*factors: float) -> Tensor:
    return torch.tensor(factors)[:, None]


def _mlp(module: Any, trial: _Trial) -> Mlp | None:
    """Gate and up, apart or in one, and down."""
    apart = _free(module, "gate_proj", "up_proj", kind=nn.Linear)
    if not _free(module, "down_proj", kind=nn.Linear) or not (apart or _free(module, "gate_up_proj", kind=nn.Linear)):
        return None
    mlp, width = Mlp(module), module.down_proj.in_features
    if sum(part.out_features for part in mlp.inputs) != 2 * width or not _takes_one(module):
        return None
    factors = _column(0.01, 1.0, 5.0, 15.0).to(trial.cache.layers[0].keys)
    gate, up = (trial.numbers(1, len(factors), width) * factors for _ in range(2))
    answers = [gate, up] if apart else [torch.cat([gate, up], -1)]
    stubs: dict[nn.Module, _Stub] = dict(zip(mlp.inputs, map(_Stub, answers), strict=True))
    states, result, asked = trial.numbers(1, 1, module.down_proj.out_features), trial.numbers(1), _Stub(None)
    asked(states)
    down = _Stub(result)
    with fused({**stubs, module.down_proj: down}):
        theirs = _tried(module.forward, states)
    if theirs is not result or not all(stub.like(asked) for stub in stubs.values()):
        return None
    return mlp if len(down.given) == 1 and close(silu_mul(gate, up), down.given[0]) else None


def _attention(module: Any, trial: _Trial) -> Attention | None:
    """Projections to queries, keys and values, apart or in one, norms of each head or none, RoPE, `o_proj`."""
    apart = _free(module, "q_proj", "k_proj", "v_proj", kind=nn.Linear)
    if not _free(module, "o_proj", kind=nn.Linear) or not (apart or _free(module, "qkv_proj", kind=nn.Linear)):
        return None
    dim, index = getattr(module, "head_dim", None), getattr(module, "layer_idx", None)
    if not isinstance(dim, int) or trial.rope is None or trial.rope[-1] > dim or trial.rope[-1] % 2:
        return None
    if index not in range(len(trial.cache.layers)) or not isinstance(getattr(module, "scaling", None), float):
        return None
    parts = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    norms = [norm for norm in map(trial.norm, parts) if norm is not None and len(norm.weight) == dim]
    if len(norms) not in (0, 2) or len(norms) != sum(part is not None for part in parts):
        return None
    of_heads = (norms[0], norms[1]) if norms else None
    attention = Attention(module.forward, module, of_heads, trial.overlap)
    given, widths = [part.out_features for part in attention.inputs], attention.widths
    if given not in (list(widths), [sum(widths)]) or any(width <= 0 or width % dim for width in widths):
        return None
    return attention if all(_attends_alike(attention, trial, position) for position in POSITIONS) else None


def _attends_alike(attention: Attention, trial: _Trial, position: int) -> bool:
    """Whether both forwards ask the step for the same, write the same row and give the same result."""
    module, (queries, keys, _) = attention.module, attention.widths
    layer, dim = trial.cache.layers[int(module.layer_idx)], int(module.head_dim)
    layer.keys, layer.values = (trial.numbers(keys // dim, 2, dim) for _ in range(2))
    named = {"hidden_states": trial.numbers(1, 1, attention.inputs[0].in_features), **trial.named(position)}
    answer, row = trial.numbers(queries // dim, 1, dim), torch.ones(1, dtype=torch.int64, device=layer.keys.device)

    def run(forward: Callable[..., Any]) -> tuple[_Probe, Tensor, Tensor, Any]:
        probe = _Probe(answer)
        for part in (layer.keys, layer.values):
            part.zero_()
        with trial.cache.stepping(probe, row):
            out = forward(**named)
        return probe, layer.keys.clone(), layer.values.clone(), out

    # RoPE subtracts, which would show a last bit of the norms as many: these are proved, so both sides use them.
    norms = zip((module.q_norm, module.k_norm), attention.norms, strict=True) if attention.norms else ()
    with fused(dict(norms)):
        theirs = run(partial(_tried, attention.own))
        if not isinstance(theirs[3], tuple) or len(theirs[3]) != 2:
            return False
        ours = run(attention)
    return (
        theirs[0].asked == ours[0].asked
        and close(ours[0].query, theirs[0].query)
        and close(ours[1], theirs[1])
        and torch.equal(ours[2], theirs[2])
        and torch.equal(ours[3][0], theirs[3][0])
    )


def _layer(module: Any, trial: _Trial) -> Layer | None:
    """Norm, attention, sum, norm, MLP, sum."""
    norm = trial.norm(getattr(module, "post_attention_layernorm", None))
    if norm is None or trial.rope is None or not _free(module, "input_layernorm", "self_attn", "mlp"):
        return None
    layer, named = Layer(module.forward, module, norm), trial.named(POSITIONS[0])
    states, normed, attended, last = (trial.numbers(1, 1, len(norm.weight)) for _ in range(4))
    # Others may give more than states.
    known = isinstance(trial.found.get(module.self_attn), Attention)
    if not known or not isinstance(_tried(module.mlp, states), Tensor):
        return None

    def run(forward: Callable[..., Any]) -> tuple[Any, list[_Stub]]:
        stubs = [_Stub(normed), _Stub((attended, None)), _Stub(last)]
        with fused(dict(zip((module.input_layernorm, module.self_attn, module.mlp), stubs, strict=True))):
            return forward(states, **named), stubs

    out, theirs = run(partial(_tried, layer.own))
    if not isinstance(out, Tensor):
        return None
    result, ours = run(layer)
    alike = torch.equal(out, result) and theirs[0].like(ours[0]) and theirs[1].like(ours[1])
    return layer if alike and len(theirs[2].given) == 1 and close(ours[2].given[0], theirs[2].given[0]) else None

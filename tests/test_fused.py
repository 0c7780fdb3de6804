"""One kernel stands only for a module that it equals, and only inside the context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="the kernels are written in Triton")

from triton.runtime import interpreter  # noqa: E402

from kvchat.attention import reference  # noqa: E402
from kvchat.engine import Engine  # noqa: E402
from kvchat.fused import Forward, fused, prove  # noqa: E402
from kvchat.fused.kernels import ONE_PLUS, WEIGHT, rms_norm, silu_mul  # noqa: E402
from kvchat.fused.modules import Attention, Layer, Mlp, Norm  # noqa: E402
from kvchat.fused.project import project  # noqa: E402
from kvchat.fused.proof import close  # noqa: E402
from kvchat.fused.whole import Head, WholeLayer  # noqa: E402
from kvchat.model import Model  # noqa: E402
from kvchat.step import DecodeStep  # noqa: E402
from tests.tiny import FAMILIES, make_model  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
LAYERS = 2
VOCABULARY = 272
"""A multiple of the rows that a program takes: the interpreter is slow by the program."""


@pytest.fixture(scope="module", autouse=True)
def rounding_in_the_interpreter() -> Iterator[None]:
    """Let the interpreter round to bfloat16 as a device does, where it cuts off."""
    convert = interpreter._convert_float

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if str(source) != "fp32" or str(target) != "bf16":
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(np.array(data, np.float32, ndmin=1)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_convert_float", rounding)
        yield


def varied(family: str, dtype: torch.dtype = torch.float16, **shape: Any) -> Model:
    """A tiny model whose norms have weights unlike 1 and 0."""
    small = {"layers": LAYERS, "head_dim": 32, "vocab_size": VOCABULARY}
    model = make_model(family, dtype, device=DEVICE, **{**small, **shape})
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=source))
    return model


def kinds(found: dict[nn.Module, Forward]) -> Counter[type]:
    return Counter(type(forward) for forward in found.values())


class Step(DecodeStep):
    """A step whose attention is the plain one: in the interpreter its kernels take seconds."""

    def attend(self, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        length = int(self._length)
        return reference.attend(query, None, keys[:, :length], values[:, :length], scale)


def steps(model: Model) -> Tensor:
    """Logits and tails of two steps behind a prompt."""
    engine = Engine(model, 64, "encoded")
    cache = engine.new_cache()
    engine.forward(cache, [(7 * i) % 250 for i in range(9)])
    step, rows = Step(model, capture=False), []
    step.begin(cache)
    for token in (4, 250):
        rows.append(step.run(cache, torch.tensor([token], device=DEVICE)).clone())
    tails = [part for layer in cache.layers for part in layer.tail()]
    return torch.cat([part.flatten().float() for part in (*rows, *tails)])


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """As close as rounding allows; where sums are in the same order, equal."""
    assert (ours - theirs).norm() < 0.005 * theirs.norm()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral"])  # which has Llama's modules
def test_steps_of_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = varied(family, torch.bfloat16 if CUDA else DTYPES[FAMILIES.index(family) % 2], head_dim=64)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.network.modules())
    found = prove(model.network)
    assert kinds(found) == {Norm: norms, Mlp: LAYERS, Attention: LAYERS, WholeLayer: LAYERS, Head: 1}
    monkeypatch.setattr("kvchat.step.prove", lambda network: found)
    ours = steps(model)
    monkeypatch.setattr("kvchat.step.prove", lambda network: {})
    assert_close(ours, steps(model))


@pytest.mark.parametrize("family", ["gemma", "qwen3"])
def test_both_forms_of_the_weight(family: str) -> None:
    """Gemma's activation is not SiLU, so its MLP stays."""
    found = prove(varied(family, torch.bfloat16).network)
    assert any(isinstance(forward, Mlp) for forward in found.values()) == (family != "gemma")
    forms = {forward.form for forward in found.values() if isinstance(forward, Norm)}
    assert forms == {ONE_PLUS.value if family == "gemma" else WEIGHT.value}


def test_an_exception_inside_leaves_nothing_behind() -> None:
    model = varied("qwen3", layers=1)
    found = prove(model.network)
    with pytest.raises(KeyError), fused(found):
        assert all("forward" in vars(module) for module in found)
        raise KeyError
    assert not any("forward" in vars(module) for module in model.network.modules())
    assert prove(model.network).keys() == found.keys()


def test_the_global_generator_is_left_alone() -> None:
    model, state = varied("llama", layers=1), torch.get_rng_state()
    prove(model.network)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_passes_over_many_tokens_go_their_own_way(family: str) -> None:
    model = varied(family, head_dim=64)
    engine = Engine(model, 64, "encoded")
    theirs = engine.forward(engine.new_cache(), range(20), 20)
    with fused(prove(model.network)):
        ours = engine.forward(engine.new_cache(), range(20), 20)
    assert_close(ours.float(), theirs.float())


class ByNorm(LlamaRMSNorm):
    def forward(self, states: Tensor) -> Tensor:
        return self.weight * states / states.norm(dim=-1, keepdim=True)


class EpsOutside(LlamaRMSNorm):
    def forward(self, states: Tensor) -> Tensor:
        root = states.float().pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return self.weight * (states / root).to(states.dtype)


class Gated(LlamaRMSNorm):
    def forward(self, states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(states)


class Multiplied(LlamaMLP):
    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(states * 2)) * self.up_proj(states))


class Tempered(LlamaAttention):
    """Late queries are scaled."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **named: Any) -> Any:
        return super().forward(hidden_states * (1 + position_ids[..., None] // 8192), **named)


@pytest.fixture(scope="module")
def proved() -> tuple[nn.Module, dict[nn.Module, Forward]]:
    network = varied("llama", layers=1).network
    return network, prove(network)


@pytest.mark.parametrize("kind", [ByNorm, EpsOutside, Gated, Multiplied, Tempered], ids=lambda kind: kind.__name__)
def test_what_only_looks_alike_is_left_alone(
    kind: type[nn.Module], proved: tuple[nn.Module, dict[nn.Module, Forward]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (network, found), base = proved, kind.__bases__[0]
    chosen = [module for module in network.modules() if type(module) is base]
    for module in chosen:
        monkeypatch.setattr(module, "__class__", kind)
    assert chosen and found.keys() >= set(chosen)
    assert not prove(network).keys() & set(chosen)


def test_parts_that_are_missing_or_scaled() -> None:
    assert kinds(prove(varied("smollm3", layers=4).network))[Attention] == 3, "the fourth has no RoPE"
    granite = varied("granite").network
    granite.model.layers[0].residual_multiplier = 0.5
    assert granite.model.layers[0] not in prove(granite) and granite.model.layers[1] in prove(granite)
    assert kinds(prove(varied("cohere").network)) == {Mlp: LAYERS, Head: 1}, "pairs of neighbours are rotated"


def test_a_forward_of_somebody_else_stays() -> None:
    network = varied("llama").network
    layer = network.model.layers[0]
    layer.mlp.up_proj.forward = theirs = layer.mlp.up_proj.forward
    layer.input_layernorm.forward = layer.input_layernorm.forward
    found = prove(network)
    assert not found.keys() & {layer, layer.mlp, layer.input_layernorm} and network.model.layers[1] in found
    assert layer.mlp.up_proj.forward is theirs


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float16), (96, torch.bfloat16), (320, torch.bfloat16)])
def test_projections(width: int, dtype: torch.dtype, biased: bool) -> None:
    source = torch.Generator().manual_seed(2)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(DEVICE, dtype)

    def assert_near(ours: Tensor, theirs: Tensor) -> None:
        assert (ours - theirs).float().norm() < 2 * torch.finfo(dtype).eps * theirs.float().norm()

    states, added = numbers(width), numbers(64)
    linears = [nn.Linear(width, size, bias=biased).to(DEVICE, dtype) for size in (64, 8, 6)]
    weights, biases = [one.weight for one in linears], [one.bias for one in linears]
    assert_near(project(states, weights, biases), torch.cat([one(states) for one in linears]))
    assert_near(project(states, weights[:1], biases[:1], added=added), linears[0](states) + added)
    up = nn.Linear(width, 64, bias=biased).to(DEVICE, dtype)
    gated = project(states, [weights[0], up.weight], [biases[0], up.bias], gated=True)
    assert_near(gated, nn.functional.silu(linears[0](states)) * up(states))
    norm = LlamaRMSNorm(width).to(DEVICE, dtype)
    norm.weight.data.copy_(numbers(width))
    parts = norm.weight, 1e-6, WEIGHT.value
    normed = project(states, weights, biases, norm=parts)
    assert_near(normed, torch.cat([one(norm(states)) for one in linears]))


def test_a_layer_whose_matrices_lie_otherwise_keeps_its_linear_modules() -> None:
    network = varied("llama").network
    first, second = network.model.layers
    second.mlp.down_proj.weight.data = second.mlp.down_proj.weight.data.T.contiguous().T
    found = prove(network)
    assert isinstance(found[first], WholeLayer) and isinstance(found[second], Layer)


def test_a_projection_that_adds_something_keeps_its_module() -> None:
    class Shifted(nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states) + 1

    network = varied("llama").network
    first, second = network.model.layers
    second.self_attn.v_proj.__class__ = Shifted
    found = prove(network)
    assert isinstance(found[first], WholeLayer) and isinstance(found[second], Layer)


def test_memory_that_runs_out_is_no_proof_against_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: LlamaMLP, states: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LlamaMLP, "forward", short)
    with pytest.raises(torch.OutOfMemoryError):
        prove(varied("llama").network)


def test_another_dtype_than_was_proved() -> None:
    norm = LlamaRMSNorm(64).to(DEVICE, torch.bfloat16)
    states = torch.randn(3, 64, device=DEVICE)
    assert torch.equal(Norm(norm.forward, norm.weight, 1e-6, WEIGHT.value)(states), norm(states))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 64, 200, 1030])
def test_kernels_at_odd_widths(dtype: torch.dtype, width: int) -> None:
    gate = torch.linspace(-120, 120, 3 * width, device=DEVICE).view(3, width).to(dtype)
    up = torch.randn(3, width, device=DEVICE).to(dtype)
    assert close(silu_mul(gate, up), nn.functional.silu(gate) * up)
    norm = LlamaRMSNorm(width).to(DEVICE, dtype)
    norm.weight = nn.Parameter(up[0], requires_grad=False)
    assert close(rms_norm(gate, norm.weight, 1e-6, WEIGHT.value), norm(gate))


def test_close_counts_representable_numbers() -> None:
    one = torch.ones(1000, dtype=torch.bfloat16)
    near, far = one.clone(), one.clone()
    near[:3], far[0] = 1 + 2**-6, 1 + 2**-5
    assert close(one, near) and not close(one, far) and not close(one, one.float()) and not close(one, one[:9])
    near[:5] = 1 + 2**-7
    assert not close(one, near)
    tiny = torch.tensor([1e-40], dtype=torch.bfloat16)
    assert close(tiny, -tiny) and close(torch.zeros(9), -torch.zeros(9))

"""Attention alone, over random ragged rows: decoding beside torch's variable-length kernel, prefill beside flash-attn.

Letters: H KV heads, G query heads per KV head, D head_dim, N sealed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvchat.attention import flash, reference, varlen
from kvchat.bench.gpu.ceilings import seconds
from kvchat.cache.coded import GROUP, CodedKV, Form
from kvchat.codecs.coded import decoded

H, G, D = 8, 4, 128
SCALE = D**-0.5
MEANS = (4096, 16384, 32768)
"""Sealed rows a head; heads have 0.2 to 1.8 times as many."""
TAIL = 256
FORMS = {"bf16": Form(16, 16), "k8v8": Form(8, 8), "k4v4": Form(4, 4), "k8v4": Form(8, 4)}
RAGGED = (0, 1, 700, 31, 2300, 0, 129, 64)
"""Lengths at which results are compared: heads without rows and of one row among them."""
_CACHE_BYTES = 240_000_000
"""Inputs take turns until they are several times the device's cache: a layer's rows are read once a token."""
_RUN = 512


@dataclass(frozen=True)
class Inputs:
    """One layer's sealed rows, and a token's query over them and a tail."""

    rows: CodedKV
    query: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor


def decode_attention(read_bytes_per_s: float, means: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Microseconds of one new token by length and form, bandwidth and its share of the ceiling, and baselines."""
    figures: dict[str, Any] = {
        "error": {name: error(inputs(form, RAGGED, device, 0)) for name, form in FORMS.items()},
    }
    for mean in means:
        lengths = spread_lengths(mean)
        row: dict[str, Any] = {}
        for name, form in FORMS.items():
            given = rotating(form, lengths, device)
            nbytes = sum(plane.nbytes for plane in given[0].rows.planes)
            spent = seconds([kernel(one)[0] for one in given])
            row[name] = {
                "us": spent * 1e6,
                "bytes_per_s": nbytes / spent,
                "of_read_bandwidth": nbytes / spent / read_bytes_per_s,
                "time_over_bf16": spent * 1e6 / row["bf16"]["us"] if row else 1.0,
                "bytes_over_bf16": nbytes / (sum(lengths) * 4 * D),
            }
            if name == "bf16":
                row["torch_varlen_us"] = seconds([torch_varlen(one) for one in given]) * 1e6
                row["speedup_over_torch_varlen"] = row["torch_varlen_us"] / row[name]["us"]
        figures[str(mean)] = row
    return figures


def spread_lengths(mean: int) -> list[int]:
    """Rows of each head: 0.2 to 1.8 times the mean, in no order."""
    shares = np.linspace(0.2, 1.8, H)
    np.random.default_rng(7).shuffle(shares)
    lengths: list[int] = (shares * mean).astype(int).tolist()
    return lengths


def rotating(form: Form, lengths: Sequence[int], device: torch.device) -> list[Inputs]:
    """As many different inputs as outgrow the device's cache."""
    first = inputs(form, lengths, device, 0)
    count = _CACHE_BYTES // sum(plane.nbytes for plane in first.rows.planes) + 2
    return [first, *(inputs(form, lengths, device, seed) for seed in range(1, min(12, count)))]


def inputs(form: Form, lengths: Sequence[int], device: torch.device, seed: int) -> Inputs:
    """Random rows, decoded about normal, in runs of 512, a random query, and a tail of 256 tokens in a larger room."""
    source = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=source).bfloat16()

    runs, row, unit = [], 0, 0
    for head, length in enumerate(lengths):
        for start in range(0, length, _RUN):
            count = min(_RUN, length - start)
            runs.append((head, row, count, unit, start, 0))
            row += count
            unit += {16: 0, 8: 1, 4: -(-count // GROUP)}[form.key_bits]
    rows = _coded(form, np.array(runs, np.int64), row, unit, source, device)
    tail, length_there = (normal(H, 2 * TAIL, D), normal(H, 2 * TAIL, D)), torch.full((1,), TAIL, device=device).int()
    return Inputs(rows, normal(H * G, D), *tail, length_there)


def _coded(
    form: Form, runs: np.ndarray[Any, np.dtype[np.int64]], rows: int, units: int, source: torch.Generator, device: Any
) -> CodedKV:
    def side(bits: int) -> Tensor:
        if bits == 16:
            return torch.randn(rows, D, device=device, generator=source).bfloat16()
        return torch.randint(0, 256, (rows, D * bits // 8), dtype=torch.uint8, device=device, generator=source)

    def steps(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=source) * 0.5 + 0.75

    none = torch.zeros(0, device=device, dtype=torch.float16)
    top = float((1 << form.key_bits) - 1)
    key_scale = steps(units, D) * (3.4 / top)
    value_scale = none if form.value_bits == 16 else steps(rows) * (3.4 / 255 if form.value_bits == 8 else 1.0)
    kind = torch.float32 if form.key_bits == 8 else torch.float16
    return CodedKV(
        form=form,
        dtype=torch.bfloat16,
        num_heads=H,
        keys=side(form.key_bits),
        values=side(form.value_bits),
        key_scale=key_scale.to(kind),
        key_min=(-key_scale * top / 2).to(kind),
        value_scale=value_scale.half(),
        value_min=(value_scale * -127.5).half() if form.value_bits == 8 else none,
        positions=torch.zeros(rows, dtype=torch.int32, device=device),
        runs=runs,
    )


def kernel(given: Inputs) -> tuple[Callable[[], None], Tensor]:
    """A call of the decode kernel as a captured step makes it, and where its output is."""
    from kvchat.attention.ragged_decode import DecodePlan, Shape  # needs Triton

    out = torch.empty_like(given.query)
    plan = DecodePlan.tuned(Shape(H, G, D), [given.rows.form], given.query.device)
    plan.update([(given.rows, plan.work(given.rows))])
    return lambda: plan.run(given.query, given.keys, given.values, given.length, out, SCALE), out


def error(given: Inputs) -> float:
    """Relative error of the kernel against attention in float32 over the dequantised rows and the tail."""
    run, out = kernel(given)
    run()
    keys, values = (part[:, : int(given.length)].float() for part in (given.keys, given.values))
    truth = reference.attend(given.query.float().unsqueeze(1), decoded(given.rows), keys, values, SCALE).squeeze(1)
    return float((out.float() - truth).norm() / truth.norm())


def torch_varlen(given: Inputs) -> Callable[[], Tensor]:
    """Torch's variable-length attention over the sealed rows alone: a sequence a KV head, its queries as heads."""
    rows, device = given.rows.rows(), given.query.device
    steps, bounds = (torch.arange(H + 1, dtype=torch.int32, device=device), rows.cu_seqlens.to(device))
    keys, values, longest = rows.keys[:, None], rows.values[:, None], int(rows.cu_seqlens.diff().max())
    query = given.query.view(H, G, D)
    return lambda: flash.by_torch(query, keys, values, steps, bounds, 1, longest, SCALE, False)[0]


def prefill_attention(device: torch.device, new: int = 2048, mean: int = 16384) -> dict[str, Any]:
    """Milliseconds of a prefill of `new` tokens over bfloat16 rows and a tail, by torch's flash and by version 4.

    The error is that of each against the reference, over rows that are few enough for it.
    """
    given = inputs(FORMS["bf16"], spread_lengths(mean), device, 0)
    rows, few = given.rows.rows(), inputs(FORMS["bf16"], RAGGED, device, 1).rows.rows()
    tokens = new + TAIL
    source = torch.Generator(device).manual_seed(2)
    query = torch.randn(H * G, new, D, device=device, generator=source).bfloat16()
    keys, values = (torch.randn(H, tokens, D, device=device, generator=source).bfloat16() for _ in range(2))
    truth = reference.attend(query[:, :300], few, keys[:, :500], values[:, :500], SCALE).float()
    installed, figures = flash.flash_attn_4(torch.cuda.get_device_capability(device)[0]), dict[str, Any]()
    ways = {"torch": flash.by_torch, **({"flash_attn_4": flash.by_flash_attn_4} if installed else {})}
    for name, way in ways.items():
        spent = seconds([partial(varlen.attend, query, rows, keys, values, SCALE, way)], graph=False, rounds=5)
        got = varlen.attend(query[:, :300], few, keys[:, :500], values[:, :500], SCALE, way).float()
        figures[name] = {"ms": spent * 1e3, "error": float((got - truth).norm() / truth.norm())}
    work = 4 * H * G * D * new * (mean + TAIL + new / 2)
    return {
        "new_tokens": new,
        "mean_rows": mean,
        **figures,
        "torch_flops_per_s": work / figures["torch"]["ms"] * 1e3,
        "flash_attn_4_over_torch": figures["torch"]["ms"] / figures["flash_attn_4"]["ms"] if installed else None,
    }

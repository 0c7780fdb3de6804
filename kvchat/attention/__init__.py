"""How KV is read. `register` holds the only calls into transformers' attention registry; no model class is patched.

No mask function is registered: for an attention function without one, transformers builds no mask, and the backends
know what each query may see (every sealed row, and the tail causally).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvchat.attention import reference, sdpa
from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.segment import LayerKV

Backend = Callable[[Tensor, LayerKV | None, Tensor, Tensor, float], Tensor]
"""`reference.attend` and functions equal to it."""

BackendName = Literal["auto", "reference", "sdpa", "varlen"]


def register(name: BackendName = "auto") -> str:
    """Make a backend known to transformers; returns the `attn_implementation` to load a network with. Idempotent."""
    key = "kvchat" if name == "auto" else f"kvchat_{name}"
    AttentionInterface.register(key, _interface(name))
    return key


def backend_for(name: BackendName, device: torch.device, dtype: torch.dtype) -> BackendName:
    """The backend that `name` stands for on a device and dtype."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "sdpa"
    return "varlen" if _has_flash(device, dtype) else "reference"


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this package's Triton kernels run on a device and dtype."""
    return _has_flash(device, dtype) and find_spec("triton") is not None


def reads_encoded(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one new token can attend to sealed rows as they were encoded, in fixed buffers."""
    return has_kernels(device, dtype) and 64 <= head_dim <= 256 and head_dim % 4 == 0


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin there while the one before it is still running, and wait for it inside."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def log_normaliser(query: Tensor, past: Tensor, own: Tensor, scale: float) -> Tensor:
    """`reference.log_normaliser` by the fastest means of the device."""
    if query.device.type == "cpu":
        return sdpa.log_normaliser(query, past, own, scale)
    if _has_flash(query.device, query.dtype):
        from kvchat.attention import varlen

        return varlen.log_normaliser(query, past, own, scale)
    return reference.log_normaliser(query, past, own, scale)


def _backend(name: BackendName) -> Backend:
    if name == "varlen":
        from kvchat.attention import varlen  # needs a torch with CUDA

        return varlen.attend
    return {"reference": reference.attend, "sdpa": sdpa.attend}[name]


def _interface(name: BackendName) -> Callable[..., tuple[Tensor, None]]:
    """The function that transformers calls in every layer."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        segmented_cache: SegmentedCache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """(1, H * G, q, D) queries and the (1, H, T, D) tail to (1, q, H * G, D)."""
        assert len(query) == 1, "batch 1 only"
        index, sealed = int(module.layer_idx), None  # type: ignore[arg-type]
        if segmented_cache is not None:
            if (step := segmented_cache.step) is not None:
                return step.attend(index, query[0], key[0], value[0], scaling).transpose(0, 1)[None], None
            sealed = segmented_cache.layers[index].sealed
            if segmented_cache.tap is not None:
                more = segmented_cache.padding
                shown = [rows[0, :, : rows.shape[2] - more] for rows in (query, key, value)]
                segmented_cache.tap.observe(index, shown[0], shown[1], shown[2], scaling)
        attend = _backend(backend_for(name, query.device, query.dtype))
        return attend(query[0], sealed, key[0], value[0], scaling).transpose(0, 1)[None], None

    return attention

"""A network of a large model's shape with random weights: speed and memory depend on the shape alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvchat.attention import register
from kvchat.events import Listener
from kvchat.fingerprint import digest
from kvchat.model import Model, choose_device, choose_dtype, load
from kvchat.sections import ModelConfig

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
"""Llama-3.1-8B's configuration."""


def shaped(config: ModelConfig, shape: dict[str, Any], listener: Listener | None = None) -> Model:
    """The configured model's tokenizer and template over a network of `shape`; its weights depend on the shape alone.

    Its vocabulary is larger than the tokenizer's: ids beyond have no text.
    """
    lent = load(config.model_copy(update={"device": "cpu"}), listener)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    network = _network(shape, device, dtype, register(config.attention))
    told = {**lent.fingerprint, "weights": "random", "config": digest(shape), "dtype": str(dtype).rpartition(".")[2]}
    return replace(
        lent,
        network=network,
        fingerprint=told,
        context_window=int(shape["max_position_embeddings"]),
        device=device,
        dtype=dtype,
    )


def _network(shape: dict[str, Any], device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            network = LlamaForCausalLM._from_config(LlamaConfig(**shape), attn_implementation=attention)
        finally:
            torch.set_default_dtype(before)
    return network.eval().requires_grad_(False)


def read_bytes(network: Any) -> int:
    """Bytes of weights that a token reads: all but the embeddings, of which it reads one row."""
    total = sum(parameter.nbytes for parameter in network.parameters())
    return int(total - network.get_input_embeddings().weight.nbytes)

"""Random models small enough for a test, and a tokenizer of single bytes: no downloads, no files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvchat.attention import register
from kvchat.model import Model
from kvchat.template import ChatTemplate

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: str = CHATML, extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """256 bytes, `<|im_start|>`, `<|im_end|>` and any `extra_tokens`: one token a byte, whatever the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ("<|im_start|>", "<|im_end|>", *extra_tokens)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_network(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 3,
    head_dim: int = 16,
    seed: int = 0,
    vocab_size: int = 258,
    attn_implementation: str = "kvchat",
) -> Any:
    """A random decoder of `family` (see FAMILIES) in eval mode; large queries and keys, so attention is not uniform."""
    if attn_implementation == "kvchat":
        attn_implementation = register("auto")
    config = tiny_config(family, heads, kv_heads, layers, head_dim, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
        _sharpen(network, heads * head_dim, kv_heads * head_dim)
    # Parameters only: a loaded model keeps its RoPE frequencies in float32.
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network.eval().requires_grad_(False)


def tiny_config(family: str, heads: int, kv_heads: int, layers: int, head_dim: int, vocab_size: int = 258) -> Any:
    """The configuration of `tiny_network`."""
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        # Phi-3 has no head_dim of its own.
        "hidden_size": 64 if family != "phi3" and 64 % heads == 0 else heads * head_dim,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 257,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if family in ("mistral", "phi3"):
        shape["sliding_window"] = None
    if family != "phi3":
        shape["head_dim"] = head_dim
    else:
        shape["original_max_position_embeddings"] = 4096
    return transformers.AutoConfig.for_model(family, **shape)


def make_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    chat_template: str = CHATML,
    device: str = "cpu",
    **shape: Any,
) -> Model:
    """A `Model` around `tiny_network(family, dtype, **shape)`; equal arguments give equal weights and fingerprints."""
    tokenizer = tiny_tokenizer(chat_template)
    network = tiny_network(family, dtype, **shape).to(device)
    plain = str(dtype).removeprefix("torch.")
    fingerprint = {name: f"tiny-{name}" for name in ("config", "tokenizer", "template", "rope")}
    weights = "-".join([family, *(f"{key}={value}" for key, value in sorted(shape.items()))])
    return Model(
        name=f"tiny-{family}",
        network=network,
        tokenizer=tokenizer,
        template=ChatTemplate(tokenizer),
        stop_ids=frozenset({tokenizer.convert_tokens_to_ids("<|im_end|>")}),
        context_window=4096,
        fingerprint={"weights": weights, **fingerprint, "dtype": plain, "format": "1"},
        device=torch.device(device),
        dtype=dtype,
    )


def _sharpen(network: Any, query_dim: int, kv_dim: int) -> None:
    """Larger query and key projections, and norms and biases that are not the identity."""
    for name, parameter in _attention_parameters(network):
        if name.endswith("qkv_proj.weight"):
            torch.nn.init.normal_(parameter[: query_dim + kv_dim], std=0.15)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)


def _attention_parameters(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, parameter.data) for name, parameter in network.named_parameters() if ".self_attn." in name)

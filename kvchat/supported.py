"""Which architectures run here: decoders in which every layer is plain full attention; read from the configuration."""

from __future__ import annotations

import contextlib
import inspect
import io
import struct
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from kvchat.errors import ModelError
from kvchat.memory import is_out_of_memory

LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
    struct.error,
    zipfile.BadZipFile,
)
"""What transformers raises on files that it cannot read."""

LONGROPE_MARGIN = 1024
"""Tokens kept free below the length at which longrope changes its frequencies, for passes beyond the conversation."""


def read_config(name: str, folder: Path, **where: Any) -> Any:
    """The configuration in `folder`, of a model that can run here; `name` is for messages.

    Raises:
        ModelError: unreadable, or not supported.
    """
    with one_line_errors(f"cannot read the configuration of {name}"):
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **where
        )
    problem = unsupported(config)
    if problem:
        raise ModelError(f"{name} cannot run here: {problem}")
    return config


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn the errors of transformers and of the disk into a `ModelError` of one line, but not a lack of memory."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises plain Exception.
        if is_out_of_memory(error) or (not isinstance(error, LOAD_ERRORS) and type(error) is not Exception):
            raise
        reason = textwrap.shorten(str(error), 240, placeholder=" ...") or type(error).__name__
        raise ModelError(f"{what}: {reason}") from error


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' warnings and progress bars from the terminal; its former settings come back."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        # GGUF loading draws a bar that has no switch.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def unsupported(config: Any) -> str | None:
    """Why a configuration cannot run here and what to do, or None."""
    other = "choose a model with full attention in every layer"
    network = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if config.is_encoder_decoder:
        return f"{config.model_type} is an encoder-decoder, and kvchat runs decoders only; choose a decoder"
    if getattr(config, "text_config", None) is not None:
        return f"{config.model_type} is multimodal, and kvchat runs text models only; choose a text model"
    if network is None or not network.is_backend_compatible():
        return f"transformers has no decoder for {config.model_type} that lets attention be replaced; {other}"
    if network._is_stateful:
        return f"{config.model_type} keeps a recurrent state, and kvchat keeps full attention only; {other}"
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind != "full_attention":
            return f"layer {layer} is {kind}, and kvchat keeps full attention only; {other}"
    return _attention_problem(config, other) or _rope_problem(config)


def cache_keyword(network: Any) -> str:
    """What a network calls the cache that it is given: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def context_window(config: Any) -> int:
    """Tokens of prompt and answers that a supported model can hold."""
    window = int(config.max_position_embeddings)
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            window = min(window, int(original) - LONGROPE_MARGIN)
    return window


def _attention_problem(config: Any, other: str) -> str | None:
    # Where there are layer_types, they decide, and the window is that of layers which do slide.
    window = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        return f"attention sees a sliding window of {window} tokens, and kvchat keeps full attention only; {other}"
    if getattr(config, "attn_logit_softcapping", None):
        return f"attention caps its logits (attn_logit_softcapping), and kvchat keeps plain attention only; {other}"
    if getattr(config, "kv_lora_rank", None):
        return f"attention is multi-head latent (kv_lora_rank), and kvchat keeps plain keys and values only; {other}"
    if config.model_type == "gpt_oss":
        return f"attention has learned sinks, and kvchat keeps plain attention only; {other}"
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        return f"{config.model_type} states no max_position_embeddings; choose a model that does"
    return None


def _rope_problem(config: Any) -> str | None:
    if any(rope.get("rope_type") == "dynamic" for rope in _ropes(config)):
        return "its RoPE is dynamic, so saved keys would go wrong as a conversation grows; choose another rope_type"
    return None


def _ropes(config: Any) -> list[dict[str, Any]]:
    """RoPE settings: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]

"""Weights, tokenizer, chat template and fingerprint of one model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from kvchat import memory
from kvchat.builtin import BUILTIN, models_cache
from kvchat.convert import file_sha256
from kvchat.download import model_folder, weight_files
from kvchat.errors import ConfigError, ModelError, OutOfMemory
from kvchat.events import Listener, Progress
from kvchat.fingerprint import digest
from kvchat.sections import ModelConfig
from kvchat.supported import cache_keyword, context_window, one_line_errors, quiet_libraries, read_config
from kvchat.template import ChatTemplate

FORMAT = "1"
"""Version of what saved KV means."""

_SMALLER = "choose a smaller model, model.dtype bfloat16 or another model.device, or close other programs"

NOT_ARCHITECTURE = {"transformers_version", "dtype", "torch_dtype", "attn_implementation", "use_cache"}


@dataclass(frozen=True)
class Model:
    """A loaded model, in eval mode. Equal fingerprints mean that saved KV may be used again."""

    name: str
    """What `load` was asked for, as an absolute path if it is one."""
    network: Any
    tokenizer: Any
    template: ChatTemplate
    stop_ids: frozenset[int]
    """Tokens that end a reply."""
    context_window: int
    """Tokens."""
    fingerprint: dict[str, str]
    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.network.config

    @cached_property
    def cache_keyword(self) -> str:
        """What the network calls the cache."""
        return cache_keyword(self.network)

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return int(self.config.num_hidden_layers)

    @property
    def num_attention_heads(self) -> int:
        """Query heads of a layer."""
        return int(self.config.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        """H."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """D."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.num_attention_heads)

    @property
    def pairs_per_token(self) -> int:
        """L * H."""
        return self.num_hidden_layers * self.num_key_value_heads

    @property
    def bytes_per_pair(self) -> int:
        """Bytes of a key and a value in the model's dtype."""
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def bf16_bytes_per_token(self) -> int:
        """Bytes of a token's KV in bfloat16, which sizes are told against whatever the model's dtype."""
        return self.pairs_per_token * 2 * self.head_dim * torch.bfloat16.itemsize


def load(config: ModelConfig, listener: Listener | None = None, cache: Path | None = None) -> Model:
    """Find, check and load the model that `config` names; downloads and converts at the first use.

    Args:
        config: name, device, dtype and attention backend.
        listener: told of "download", "convert" (bytes of the source) and "load" (bytes of the weights).
        cache: folder of converted models; None = `models` in the platform's cache folder.

    Raises:
        ModelError: no such model, or one that cannot be read or cannot run here.
        ConfigError: no such device.
    """
    from kvchat.attention import register

    report = listener or (lambda _: None)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    cache = cache or models_cache()
    name = config.name or BUILTIN
    folder = model_folder(name, cache, report)
    files = weight_files(folder)
    settings = read_config(name, folder)
    with quiet_libraries(), one_line_errors(f"cannot load the tokenizer of {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    template = ChatTemplate(tokenizer)
    fingerprint = _fingerprint(folder, [file_sha256(file, cache) for file in files], settings, tokenizer, dtype)
    size = sum(file.stat().st_size for file in files)
    report(Progress("load", 0, size))
    make, release = partial(_network, name, folder, device, dtype, register(config.attention)), memory.release
    try:
        network = memory.again(make, partial(release, device), "loading", device)
    except OutOfMemory:
        needed = f"its weights take {size / 1e9:.2f} GB on disk, and {memory.room(device)}"
        raise ModelError(f"{name} does not fit into memory: {needed}; {_SMALLER}") from None
    report(Progress("load", size, size))
    return Model(
        name=_lasting_name(name),
        network=network,
        tokenizer=tokenizer,
        template=template,
        stop_ids=_stop_ids(network, tokenizer, template),
        context_window=context_window(settings),
        fingerprint=fingerprint,
        device=device,
        dtype=dtype,
    )


def _fingerprint(folder: Path, weights: list[str], settings: Any, tokenizer: Any, dtype: torch.dtype) -> dict[str, str]:
    """The file of the configuration counts, not transformers' object: later versions add fields to that."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    architecture = {key: config[key] for key in config if key not in NOT_ARCHITECTURE and not key.startswith("_")}
    return {
        "weights": digest(weights),
        "config": digest(architecture),
        "tokenizer": digest(tokenizer.backend_tokenizer.to_str()),
        "template": digest(tokenizer.chat_template),
        "dtype": _plain(dtype),
        "rope": digest(getattr(settings, "rope_parameters", None)),
        "format": FORMAT,
    }


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lasting_name(name: str) -> str:
    """A path is made absolute, for a session remembers it."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != BUILTIN and path.exists() else name


def _network(name: str, folder: Path, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    with quiet_libraries(), one_line_errors(f"cannot load {name}"):
        network, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            device_map=None if device.type == "cpu" else {"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    # transformers fills what is missing with random numbers.
    missing = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if missing:
        raise ModelError(f"{name} lacks {len(missing)} weights, first {missing[0]}; get a whole copy of the model")
    return network.eval().requires_grad_(False)


def _stop_ids(network: Any, tokenizer: Any, template: ChatTemplate) -> frozenset[int]:
    declared = getattr(network.generation_config, "eos_token_id", None)
    ends = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id, template.end_of_turn]
    return frozenset(int(end) for end in ends if end is not None)


def choose_device(name: str) -> torch.device:
    """The torch device of a setting.

    Raises:
        ConfigError: not a device, or not one of this machine.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in counts or not (index or "0").isdecimal():
        raise ConfigError(f"there is no device {name!r}; use auto, cpu, cuda, cuda:1 or mps")
    if int(index or 0) >= counts[kind]:
        raise ConfigError(
            f"device {name!r} is not on this machine, which has {counts[kind]} of {kind}; use auto or cpu"
        )
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(index or 0))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return torch.bfloat16 if device.type != "cpu" or _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; else float32 is the faster."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    # torch before 2.13
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)

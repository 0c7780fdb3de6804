"""Settings: frozen values read once from defaults, config.toml, the environment and flags, then handed down.

Later sources win: the defaults below, `config.toml`, `KVCHAT_SECTION__KEY` variables, `--set section.key=value`.
An unknown key is an error that names the known ones. Nothing else in the package reads files or variables for settings.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from kvchat.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parent.parent


class Section(BaseModel):
    """One table of config.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """Which model, and how it runs."""

    name: str = ""
    """Hugging Face id, folder, GGUF file or `smollm2-135m`; empty = the built-in model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    attention: Literal["auto", "reference", "sdpa", "varlen"] = "auto"
    residence: Literal["auto", "encoded", "decoded"] = "auto"
    """How sealed KV lies in memory: as its codec wrote it and attention reads it, or as plain numbers; auto = encoded
    where a kernel reads it (CUDA with Triton)."""
    prefill_chunk_size: int = Field(default=1024, ge=16)
    """Tokens of one forward pass while prefilling; progress and stop are seen between passes."""


class StoreConfig(Section):
    """Where conversations lie."""

    path: str = ""
    """The SQLite file; empty = `sessions/kvchat.db` of a checkout, else the platform's data folder."""
    disk_budget: ByteSize = Field(default=ByteSize(0), ge=0)
    """Most bytes of the database in use, as in "20GiB"; 0 or empty = no limit."""
    min_free: ByteSize = Field(default=ByteSize(1 << 30), ge=0)
    """Bytes of the disk that stay free, as in "1GiB"; 0 or empty = none. A turn of 8000 tokens with a model of 8
    billion weights takes half a gibibyte in 8 bits, and as much again in the log until that is folded in."""

    @field_validator("disk_budget", "min_free", mode="before")
    @classmethod
    def _empty_is_none(cls, size: Any) -> Any:
        return size or 0


class CompressConfig(Section):
    """What is kept of a sealed segment."""

    scorer: Literal["kvzip", "keydiff", "knorm", "lagkv", "streaming", "random"] = "kvzip"
    allocate: Literal["global", "layer", "uniform", "pyramid"] = "global"
    """How pairs of different layers and heads compare: see `kvchat.compress.order`."""
    keep_ratio: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the KV pairs of older segments held in memory; the store keeps all while it has room."""
    budget: Literal["session", "segment"] = "session"
    """Whether `keep_ratio` is meant of all older segments together, the best chunks first, or of each."""
    recent_tokens: int = Field(default=1024, ge=0)
    """Segments with one of the newest so many tokens hold all their pairs."""
    segment_min: int = Field(default=512, ge=1)
    """Turns are joined until a segment has this many tokens."""
    num_sink_tokens: int = Field(default=4, ge=0)
    protect: Literal["prefix", "template"] = "prefix"
    """What is never evicted: system prompt and sinks, or every token of the chat template too."""
    score_chunk: int = Field(default=2000, ge=16)
    """Tokens that one reconstruction pass of KVzip repeats."""
    rank_chunks: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    """Cumulative fractions at which a segment's ranking is cut; `keep_ratio` is added to them."""

    @property
    def method(self) -> str:
        """How new segments are ranked, which is part of their names."""
        return self.scorer if self.allocate == "global" else f"{self.scorer}-{self.allocate}"

    @field_validator("rank_chunks")
    @classmethod
    def _ascending(cls, cuts: tuple[float, ...]) -> tuple[float, ...]:
        if list(cuts) != sorted(set(cuts)) or not cuts or cuts[0] <= 0 or cuts[-1] != 1.0:
            raise ValueError("must rise strictly from above 0 to 1.0")
        if len(cuts) > 32:
            raise ValueError("has more than 32 cuts")
        return cuts


CODEC_NAMES = (
    "raw",
    *(f"k{keys}v{values}" for keys in (8, 4, 3, 2) for values in (8, 4, 3, 2) if keys >= values),
    *("eb2", "eb5", "eb10", "eb20"),
)
"""Names of `kvchat.codecs.CODECS`: k and v with the bits of keys and values, of which keys never have fewer, because
their errors cost more; or eb with the step of quantisation, in percent of the range of what is quantised together."""


def without_repeats(names: Sequence[str]) -> tuple[str, ...]:
    """Codecs by rank without repeating the last, which serves all further chunks."""
    kept = list(names)
    while kept[-2:] == [kept[-1]] * 2:
        kept.pop()
    return tuple(kept)


class CodecConfig(Section):
    """How sealed KV is written down."""

    name: str | tuple[str, ...] = "k8v8"
    """One of CODEC_NAMES, or one for each entry of `compress.rank_chunks`; the last serves all further entries."""

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, name: Any) -> Any:
        names = [name] if isinstance(name, str) else name
        if not isinstance(names, list | tuple) or not names or not all(one in CODEC_NAMES for one in names):
            raise ValueError(f"must be one of {', '.join(CODEC_NAMES)}, or a list of them")
        return name

    @property
    def names(self) -> tuple[str, ...]:
        """The name, or each of them."""
        return (self.name,) if isinstance(self.name, str) else self.name


class GenerateConfig(Section):
    """Sampling of an answer; `temperature` 0 is greedy."""

    max_new_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(default=0.7, ge=0, le=100)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 = off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=10)
    seed: int | None = Field(default=None, ge=0, lt=2**63)


class Config(BaseSettings):
    """All settings. Build it with `Config.load`."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix="KVCHAT_", env_nested_delimiter="__")

    model: ModelConfig = ModelConfig()
    store: StoreConfig = StoreConfig()
    compress: CompressConfig = CompressConfig()
    codec: CodecConfig = CodecConfig()
    generate: GenerateConfig = GenerateConfig()

    @model_validator(mode="after")
    def _codecs_have_intervals(self) -> Config:
        if len(self.codec.names) > len(self.compress.rank_chunks):
            raise ValueError(
                f"setting codec.name has {len(self.codec.names)} codecs for the {len(self.compress.rank_chunks)} "
                "intervals of compress.rank_chunks"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load` merges file, variables and flags itself: only there is the file's path known.
        return (init_settings,)

    @classmethod
    def load(cls, path: Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
        """Settings from the file at `path` (default: the usual places), the environment, then `overrides`.

        `overrides` maps dotted keys to values, as in {"compress.keep_ratio": 0.3}; text values are parsed.

        Raises:
            ConfigError: no such file, not TOML, an unknown key, or a value out of range.
        """
        file = path or default_folder("config") / "config.toml"
        if path and not path.is_file():
            raise ConfigError(f"there is no config file {path}; leave --config out or name an existing file")
        try:
            tree = TomlConfigSettingsSource(cls, file)() if file.is_file() else {}
            tree = _merge(_merge(tree, EnvSettingsSource(cls)()), _nested(overrides or {}))
            return cls(**tree)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from None
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    def sampling(self, given: Mapping[str, Any]) -> GenerateConfig:
        """The sampling settings with some replaced for one turn. Raises ConfigError."""
        try:
            return GenerateConfig(**{**self.generate.model_dump(), **given})
        except ValidationError as error:
            raise ConfigError(_one_line(error, "generate")) from None

    def replaced(self, values: Mapping[str, Any]) -> Config:
        """These settings with some replaced, by dotted key, as in {"compress.keep_ratio": 0.3}. Raises ConfigError."""
        try:
            return Config(**_merge(self.model_dump(), _nested(dict(values))))
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    @property
    def store_path(self) -> Path:
        """Where the database lies."""
        return Path(self.store.path).expanduser() if self.store.path else default_folder("data") / "kvchat.db"


def default_folder(kind: Literal["data", "cache", "config"]) -> Path:
    """Where sessions, converted models or settings lie: in the checkout, but for models, else the platform's folder."""
    if kind != "cache" and (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / "sessions" if kind == "data" else CHECKOUT
    folders = platformdirs.PlatformDirs("kvchat", appauthor=False)
    paths = {"data": folders.user_data_path, "cache": folders.user_cache_path, "config": folders.user_config_path}
    return paths[kind]


def _nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        section, _, name = key.partition(".")
        if not name:
            raise ConfigError(f"setting {key!r} needs a section, as in compress.keep_ratio; sections: {_known(Config)}")
        tree.setdefault(section, {})[name] = value
    return tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, one level deep."""
    both = dict(base)
    for section, values in over.items():
        old = base.get(section)
        both[section] = {**old, **values} if isinstance(old, dict) and isinstance(values, dict) else values
    return both


def _known(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _one_line(error: ValidationError, *section_name: str) -> str:
    """The first problem of a validation, naming the key and, if it is unknown, the keys that exist."""
    problem = error.errors()[0]
    path = [*section_name, *(str(part) for part in problem["loc"])]
    if not path:  # settings that do not go together
        return str(problem["msg"]).removeprefix("Value error, ")
    section = Config.model_fields.get(path[0])
    model = section.annotation if section and len(path) > 1 else Config
    if problem["type"] == "extra_forbidden":
        assert isinstance(model, type) and issubclass(model, BaseModel)
        return f"unknown setting {'.'.join(path)!r}; known here: {_known(model)}"
    return f"setting {'.'.join(path)}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}"

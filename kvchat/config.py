"""Settings: frozen values read once from defaults, config.toml, the environment and flags, then handed down.

Later sources win: the defaults below, `config.toml`, `KVCHAT_SECTION__KEY` variables, `--set section.key=value`.
An unknown key is an error that names the known ones. Nothing else in the package reads files or variables for settings.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from kvchat.errors import ConfigError
from kvchat.sections import (
    OBSERVING,
    SCORER_NAMES,
    CodecConfig,
    CompressConfig,
    EpisodesConfig,
    GenerateConfig,
    ModelConfig,
    RecallConfig,
    StoreConfig,
    TuiConfig,
)

PREFIX = "KVCHAT_"
"""Of variables."""
CHECKOUT = Path(__file__).resolve().parent.parent


OF_SESSIONS = ("compress", "codec", "recall", "generate")
"""Sections that a session can have its own settings of."""


class Config(BaseModel):
    """All settings. Build it with `Config.load`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig = ModelConfig()
    store: StoreConfig = StoreConfig()
    compress: CompressConfig = CompressConfig()
    codec: CodecConfig = CodecConfig()
    recall: RecallConfig = RecallConfig()
    episodes: EpisodesConfig = EpisodesConfig()
    generate: GenerateConfig = GenerateConfig()
    tui: TuiConfig = TuiConfig()
    _given: frozenset[str] = PrivateAttr(default=frozenset())
    """Keys that were set for this run, which a session's own settings do not change."""
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    """Of keys that are not left at their default."""
    _file: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _codecs_have_intervals(self) -> Config:
        if len(self.codec.names) > len(self.compress.rank_chunks):
            raise ValueError(
                f"setting codec.name has {len(self.codec.names)} codecs for the {len(self.compress.rank_chunks)} "
                "intervals of compress.rank_chunks"
            )
        return self

    @model_validator(mode="after")
    def _joins_attention(self) -> Config:
        how, scorer = self.compress.aggregate, self.compress.scorer
        if how != "own" and scorer in SCORER_NAMES and scorer not in OBSERVING:
            raise ValueError(
                f"setting compress.aggregate is {how!r}, and {scorer} observes no attention that could be joined; "
                f"{', '.join(OBSERVING)} do"
            )
        return self

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
            tree = tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}
            variables = _of_environment(cls)
            config = cls(**_merge(_merge(tree, variables), _nested(overrides or {})))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from None
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None
        config._given = frozenset(overrides or {})
        config._file = file
        origins = dict.fromkeys(dotted(tree), "config.toml") | {key: _variable(key) for key in dotted(variables)}
        config._origins = origins | dict.fromkeys(config._given, "this run")
        return config

    @classmethod
    def of_file(cls, tree: Mapping[str, Any]) -> Config:
        """What the tables of a file alone would set. Raises ConfigError."""
        try:
            return cls(**tree)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    @property
    def file(self) -> Path:
        """Where settings are read from and written to; it need not be there."""
        return self._file or default_folder("config") / "config.toml"

    def origins(self) -> dict[str, str]:
        """Where the value of each setting comes from, by dotted key.

        "default", "config.toml", the name of a variable, "this run" (a flag, or code) or "this session".
        """
        return {key: self._origins.get(key, "default") for key in dotted(self.model_dump())}

    def sampling(self, given: Mapping[str, Any]) -> GenerateConfig:
        """The sampling settings with some replaced for one turn. Raises ConfigError."""
        try:
            return GenerateConfig(**{**self.generate.model_dump(), **given})
        except ValidationError as error:
            raise ConfigError(_one_line(error, "generate")) from None

    def replaced(self, values: Mapping[str, Any], origin: str = "this run") -> Config:
        """These settings with some replaced, by dotted key, as in {"compress.keep_ratio": 0.3}. Raises ConfigError."""
        try:
            config = Config(**_merge(self.model_dump(), _nested(dict(values))))
            config._given, config._file = self._given, self._file
            config._origins = self._origins | dict.fromkeys(values, origin)
            return config
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    def for_session(self, settings: Mapping[str, Any], now: Collection[str] = ()) -> Config:
        """These settings with a session's own on top, but for those that were set for this run; `now`: later than that.

        Raises:
            ConfigError: one of them is wrong, or cannot be a session's own.
        """
        if others := [key for key in settings if key.partition(".")[0] not in OF_SESSIONS]:
            raise ConfigError(f"{others[0]} cannot be set for one session; settings of {', '.join(OF_SESSIONS)} can")
        whole = self.replaced(settings)  # whether they go together, whatever is set for this run
        if ":" in whole.compress.scorer and whole.compress.scorer != self.compress.scorer:
            raise ConfigError(
                f"compress.scorer {whole.compress.scorer!r} is code, which no session brings along: set it in "
                "config.toml, a variable or with --set"
            )
        own = {key: value for key, value in settings.items() if key not in self._given or key in now}
        return self.replaced(own, "this session")

    @property
    def store_path(self) -> Path:
        """Where the database lies."""
        return Path(self.store.path).expanduser() if self.store.path else default_folder("data") / "kvchat.db"


def _of_environment(cls: type[Config]) -> dict[str, Any]:
    """What the environment sets, as a tree of sections."""
    if not any(name.upper().startswith(PREFIX) for name in os.environ):
        return {}
    from pydantic_settings import BaseSettings, EnvSettingsSource  # it takes as long to read as all else here

    class Variables(cls, BaseSettings):  # type: ignore[misc, valid-type]
        pass

    return EnvSettingsSource(Variables, env_prefix=PREFIX, env_nested_delimiter="__")()


def default_folder(kind: Literal["data", "cache", "config"]) -> Path:
    """Where sessions, converted models or settings lie: in the checkout, but for models, else the platform's folder."""
    if kind != "cache" and (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / "sessions" if kind == "data" else CHECKOUT
    import platformdirs

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


def dotted(tree: Mapping[str, Any]) -> list[str]:
    """The keys of a tree of sections, as in compress.keep_ratio."""
    return [f"{section}.{name}" for section, values in tree.items() if isinstance(values, Mapping) for name in values]


def _variable(key: str) -> str:
    """The environment's variable that sets it: of the setting itself, or of its section as JSON."""
    own = PREFIX + key.replace(".", "__").upper()
    is_own = any(name.upper() == own or name.upper().startswith(f"{own}__") for name in os.environ)
    return own if is_own else own.partition("__")[0]


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

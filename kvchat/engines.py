"""The models that a worker has loaded, by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from kvchat.builtin import BUILTIN
from kvchat.download import is_here
from kvchat.engine import Engine
from kvchat.errors import ModelError
from kvchat.events import Listener
from kvchat.model import Model
from kvchat.sections import ModelConfig

Loader = Callable[[ModelConfig, Listener], Model]


class Engines:
    """Loads a model when it is first asked for.

    Args:
        config: which model if none is named, and how all of them run.
        load: what loads a model.
        listener: told of its progress.
    """

    def __init__(self, config: ModelConfig, load: Loader, listener: Listener) -> None:
        self._config = config
        self._load = load
        self._listener = listener
        self._loaded: dict[str, Engine] = {}

    def get(self, name: str | None = None) -> Engine:
        """The engine of that model, or of the configured one. Raises ModelError, ConfigError."""
        name = name or self._config.name or BUILTIN
        if name not in self._loaded:
            settings = self._config.model_copy(update={"name": name})
            engine = Engine(self._load(settings, self._listener), settings.prefill_chunk_size, settings.residence)
            self._loaded[name] = self._loaded.setdefault(engine.model.name, engine)
        return self._loaded[name]

    def for_file(self, named: str, model: str | None) -> Engine:
        """`model`, or else the model that a file names, if that is on this machine, or else the configured one."""
        if model is None and is_here(named):
            with suppress(ModelError):
                return self.get(named)
        return self.get(model)

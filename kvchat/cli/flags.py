"""The flags that commands share, each described once.

A command asks for them with one parameter `flags: StoreFlags` or `flags: ModelFlags`; `command` turns it into options.
Flags before the command's name count too; the ones after it win.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvchat.cli.completion import session_names
from kvchat.errors import ConfigError

if TYPE_CHECKING:
    from kvchat.cipher import Key
    from kvchat.config import Config
    from kvchat.events import Listener
    from kvchat.worker import Worker

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="The session.", show_default=False, autocompletion=session_names)]
AnyName = Annotated[
    str, typer.Argument(help="The session; it is created if there is none.", autocompletion=session_names)
]

USAGE_ERROR: type[Exception] = typer.BadParameter.__base__ or Exception  # typer does not export the class itself

WorkerFactory = Callable[["Config", "Listener", "Key | None"], "Worker"]


def real_worker(config: Config, listener: Listener, key: Key | None) -> Worker:
    """The worker that runs the model; importing it takes seconds, so only commands that need it do."""
    from kvchat.worker import Worker

    return Worker(config, listener, key=key)


@dataclass(frozen=True)
class StoreFlags:
    """What a command that reads or writes only the store takes."""

    store: Annotated[Path | None, typer.Option(help="The database with all sessions.")] = None
    config: Annotated[Path | None, typer.Option(help="A settings file instead of the usual config.toml.")] = None
    set: Annotated[
        list[str] | None, typer.Option(metavar="SECTION.KEY=VALUE", help="One setting; may be given again.")
    ] = None

    def settings(self) -> Config:
        """All settings, these flags on top.

        Raises:
            ConfigError: an unknown key or a wrong value.
        """
        from kvchat.config import Config

        return Config.load(self.config, self._overrides())

    @cached_property
    def key(self) -> Key | None:
        """What the store is opened with, asked for once if it must be; None if it is not encrypted.

        Raises:
            StoreError: there is no key.
        """
        from kvchat.keys import find_key

        return find_key(self.settings().store_path)

    def _overrides(self) -> dict[str, Any]:
        overrides = dict(assignment(text) for text in self.set or ())
        return overrides | ({"store.path": str(self.store)} if self.store else {})


@dataclass(frozen=True)
class ModelFlags(StoreFlags):
    """What a command that runs the model takes."""

    model: Annotated[str | None, typer.Option(help="Hugging Face id, folder, GGUF file or built-in name.")] = None
    device: Annotated[str | None, typer.Option(help="Where the model runs, as in cpu or cuda:0.")] = None
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Compute the saved KV again from the text.")] = False
    factory: WorkerFactory = field(default=real_worker, repr=False)

    def connect(self) -> Callable[[Listener], Worker]:
        """What makes a new worker with these settings; the store's key is asked for now. Close the worker."""
        config, key = self.settings(), self.key
        return lambda listener: self.factory(config, listener, key)

    def _overrides(self) -> dict[str, Any]:
        given = {"model.name": self.model, "model.device": self.device}
        return super()._overrides() | {key: value for key, value in given.items() if value}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with its parameter `flags` replaced by the options of that parameter's class."""
    signature = inspect.signature(function, eval_str=True)
    flags = signature.parameters["flags"].annotation
    options = _options(flags)
    own = [parameter for parameter in signature.parameters.values() if parameter.name not in ("flags", "context")]
    wants_context = "context" in signature.parameters
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)

    @functools.wraps(function)
    def run(context: typer.Context, **values: Any) -> None:
        given = {name: values.pop(name) for name in options}
        function(flags=_joined(flags, context.obj, given), **values, **({"context": context} if wants_context else {}))

    run.__signature__ = signature.replace(parameters=[context, *own, *options.values()])  # type: ignore[attr-defined]
    return run


def examples(*lines: str) -> str:
    """The end of a command's help: command lines, one each, which a test runs."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


def _options(flags: type[StoreFlags]) -> dict[str, inspect.Parameter]:
    """The annotated fields of `flags` as keyword parameters."""
    hints: dict[str, Any] = {}
    for base in reversed(flags.__mro__):  # each in the names of its own module
        hints |= inspect.get_annotations(base, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    given = [item for item in fields(flags) if item.name != "factory"]
    return {
        item.name: inspect.Parameter(item.name, kind, default=item.default, annotation=hints[item.name])
        for item in given
    }


def _joined(flags: type[StoreFlags], before: dict[str, Any], after: dict[str, Any]) -> StoreFlags:
    """The flags `before` a command's name, overlaid with those `after` it."""
    both = {item.name: before[item.name] for item in fields(flags) if item.name in before}
    both |= {name: value for name, value in after.items() if value}
    return flags(**both | {"set": [*(before.get("set") or ()), *(after["set"] or ())]})


def assignment(text: str) -> tuple[str, Any]:
    """'compress.keep_ratio=0.3' as key and value; a list is written as in JSON."""
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--set {text!r} has no '='; write section.key=value, as in compress.keep_ratio=0.3")
    if not value.startswith("["):
        return key.strip(), value
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        raise ConfigError(f"--set {key}: {value!r} is not a list, as in [0.5, 1.0]") from None

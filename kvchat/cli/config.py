"""`kvchat config`: what is set, where that comes from, and other values for config.toml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvchat.cli.flags import Json, StoreFlags, command, examples
from kvchat.cli.store import print_json, print_table
from kvchat.errors import ConfigError

if TYPE_CHECKING:
    from kvchat.config import Config

app = typer.Typer()


@app.command(
    "config",
    short_help="Show settings and where they come from, or write some.",
    epilog=examples(
        "kvchat config",
        "kvchat config compress generate.temperature",
        "kvchat config --config mine.toml compress.keep_ratio=0.3 generate.seed=1",
        "kvchat config --config mine.toml generate.seed= --json",
    ),
)
@command
def config_(
    flags: StoreFlags,
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION|KEY|KEY=VALUE]...", help="What to show or set; KEY= sets the default again."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show settings and where each value comes from, or write some into config.toml, whose comments stay.

    Without arguments all are shown. A variable or a flag that sets the same goes on winning over the file.
    """
    asked = keys or []
    if given := [text for text in asked if "=" in text]:
        _write(flags, given)
    rows = _rows(flags.settings(), [text.partition("=")[0].strip() for text in asked])
    if as_json:
        print_json({row.pop("setting"): row for row in rows})
        return
    from kvchat.values import as_text

    print_table([{**row, "value": as_text(row["value"])} for row in _without_meaning(rows)])
    if len(rows) == 1:
        print(rows[0]["meaning"])


def _write(flags: StoreFlags, given: list[str]) -> None:
    """Write KEY=VALUE texts into the file that is read, all or none. Raises ConfigError."""
    from kvchat.config import default_folder
    from kvchat.config_file import write
    from kvchat.values import from_text

    values: dict[str, Any] = {}
    for text in given:
        key, _, value = (part.strip() for part in text.partition("="))
        values[key] = from_text(key, value) if value else None
    write(flags.config or default_folder("config") / "config.toml", values)


def _rows(config: Config, asked: list[str]) -> list[dict[str, Any]]:
    """Setting, value, origin and meaning of the sections and keys asked for, or of all."""
    from kvchat.meanings import MEANINGS
    from kvchat.values import value_of

    origins = config.origins()
    chosen: list[str] = []
    for one in asked:
        # tui.keys.map is shown as the setting that it is a part of
        found = [key for key in origins if one == key or key.startswith(f"{one}.") or one.startswith(f"{key}.")]
        if not found:
            value_of(config, one)  # says which there are
            raise ConfigError(f"there is no setting {one!r}")
        chosen += [key for key in found if key not in chosen]
    return [
        {"setting": key, "value": value_of(config, key), "from": origins[key], "meaning": MEANINGS[key]}
        for key in chosen or origins
    ]


def _without_meaning(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: cell for name, cell in row.items() if name != "meaning"} for row in rows]

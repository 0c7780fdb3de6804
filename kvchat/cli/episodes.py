"""`kvchat episodes`: what a conversation is about, part by part."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvchat.cli.flags import Json, ModelFlags, command, examples
from kvchat.cli.store import open_store, print_json, print_table

if TYPE_CHECKING:
    from kvchat.cli.plain import Status
    from kvchat.episodes.embedder import Embedder
    from kvchat.store.store import SessionInfo

app = typer.Typer()


@app.command(
    short_help="What a session is about, part by part.",
    epilog=examples("kvchat episodes trip", "kvchat episodes trip --json"),
)
@command
def episodes(
    flags: ModelFlags,
    name: Annotated[str, typer.Argument(help="The session.", show_default=False)],
    as_json: Json = False,
) -> None:
    """List the episodes of a session: turns about one matter, and the words that tell them apart."""
    from kvchat.cli.plain import Status
    from kvchat.episodes.clusters import require_clusters
    from kvchat.episodes.listing import episodes, ranges
    from kvchat.episodes.vectors import Vectors

    require_clusters()
    config, status = flags.settings(), Status()
    with open_store(flags) as store:
        info = store.session(name)
        path = store.path(info.tip)
        try:
            embedder = embedder_of(flags, info, status)
            found = episodes(Vectors(store, embedder), path, config.episodes.clusters)
        finally:
            status.clear()
    if as_json:
        print_json([asdict(episode) for episode in found])
        return
    print_table(
        [
            {
                "name": episode.name or "-",
                "turns": ranges(episode.turns),
                "tokens": episode.tokens,
                "since": episode.since[:16].replace("T", " "),
                "until": episode.until[:16].replace("T", " "),
            }
            for episode in found
        ]
    )


def embedder_of(flags: ModelFlags, info: SessionInfo, status: Status) -> Embedder:
    """What the settings name; the session's model is loaded only if vectors by it are missing."""
    config = flags.settings()
    if config.episodes.embedder == "minilm":
        from kvchat.episodes.sentences import Sentences

        return Sentences(listener=status)
    from kvchat.engines import Engines
    from kvchat.episodes.embedder import HiddenStates, Later, own_name
    from kvchat.model import load

    engines = Engines(config.model, load, status)
    return Later(own_name(info.fingerprint), lambda: HiddenStates(engines.get(flags.model or info.model)))

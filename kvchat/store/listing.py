"""All sessions for a listing, and what a search finds, without a walk through the messages of every session.

`queries.INFOS` says what a listing holds, and is quick for one session. For a thousand it would read every message of
every path: two seconds for 100,000 messages. Here two indexes give the tree as pairs of numbers, and of the messages
only openings and hits are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from kvchat.store.queries import BASES, EDGES, ENDS, FIRSTS, HITS, HOLDERS, OPENINGS, TIPS
from kvchat.store.records import Row, SearchHit, SessionInfo, session_of

Query = Callable[..., list[Row]]
"""SQL and its named values to rows."""

# A hit in a prompt that a thousand sessions share has all their messages below it; then all edges are read instead.
MOST_STEPS = 5000
LONGEST_SNIPPET = 400


def list_sessions(query: Query) -> list[SessionInfo]:
    """All sessions, most recently updated first; what `queries.INFOS` gives."""
    rows, parents = query(TIPS), _parents(query)
    # A path that touches a segment holds its first message, for the path holds all that stands before it.
    stored = {row["number"]: (row["nbytes"], row["stored_tokens"]) for row in query(FIRSTS)}
    bases: dict[int, dict[str, int]] = {}
    for basis in query(BASES):
        bases.setdefault(basis["number"], {})[basis["id"]] = basis["nbytes"]
    paths = [_path(row["number"], parents) for row in rows]
    openings = _openings(query, paths)
    infos = []
    for row, path, opening in zip(map(dict, rows), paths, openings, strict=True):
        there = [stored[number] for number in path if number in stored]
        shared = {key: nbytes for number in path for key, nbytes in bases.get(number, {}).items()}
        nbytes = sum(nbytes for nbytes, _ in there) + sum(shared.values())
        sizes = {"nbytes": nbytes, "stored_tokens": sum(tokens for _, tokens in there)}
        infos.append(session_of({**row, **sizes, "opening": opening}))
    return infos


def find_messages(query: Query, match: str, limit: int) -> list[SearchHit]:
    """Messages that match, best first, each in every session that holds it, the most recently updated first."""
    hits = {row["number"]: row for row in query(HITS, match=match, limit=limit)}
    order = "SELECT id, name FROM sessions ORDER BY updated, id"
    names = {row["id"]: (place, row["name"]) for place, row in enumerate(query(order))}
    held = _holders(query, list(hits))
    found = sorted(held, key=lambda pair: (hits[pair[0]]["rank"], -names[pair[1]][0]))[:limit]
    return [
        SearchHit(names[session][1], hit["turn"] if held[number, session] else None, hit["role"], *line)
        for number, session in found
        for hit in (hits[number],)
        for line in (_line(hit["snippet"]),)
    ]


def _holders(query: Query, numbers: Sequence[int]) -> dict[tuple[int, int], bool]:
    """(message, session) for every session that holds one of these messages: whether on its current path."""
    steps, *rows = query(HOLDERS, numbers=json.dumps(numbers), most=MOST_STEPS)
    pairs = [(row["number"], row["session_id"], row["current"]) for row in rows]
    if steps["number"] >= MOST_STEPS:
        wanted, parents = set(numbers), _parents(query)
        pairs = [
            (number, end["session_id"], end["current"])
            for end in query(ENDS)
            for number in wanted.intersection(_path(end["number"], parents))
        ]
    return {(number, session): bool(current) for number, session, current in sorted(pairs)}


def _parents(query: Query) -> dict[int, int]:
    """Number of each message's parent."""
    return {row["child"]: row["parent"] for row in query(EDGES)}


def _path(tip: int | None, parents: Mapping[int, int]) -> list[int]:
    """Numbers of the messages from the root to the tip; a damaged tree that runs in a circle ends where it closes."""
    path: dict[int, None] = {}
    while tip is not None and tip not in path:
        path[tip] = None
        tip = parents.get(tip)
    return list(path)[::-1]


def _openings(query: Query, paths: Sequence[Sequence[int]]) -> list[str]:
    """How the first message of the user begins, of each path; one query for each place where it may stand."""
    openings, pending, place = [""] * len(paths), list(range(len(paths))), 0
    while pending := [index for index in pending if place < len(paths[index])]:
        wanted = json.dumps([paths[index][place] for index in pending])
        found = {row["number"]: row["opening"] for row in query(OPENINGS, numbers=wanted)}
        for index in pending:
            openings[index] = found.get(paths[index][place], "")
        pending = [index for index in pending if paths[index][place] not in found]
        place += 1
    return openings


def _line(snippet: bytes) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A snippet on one line, and where in it the hits are that `queries.HITS` put between two bytes."""
    text, *pieces = " ".join(snippet.decode(errors="surrogateescape").split()).split("\udcfe")
    spans = []
    for piece in pieces:
        hit, _, rest = piece.partition("\udcff")
        spans.append((len(text), len(text) + len(hit)))
        text += hit + rest
    return (text, tuple(spans)) if len(text) <= LONGEST_SNIPPET else _cut(text, spans)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The part of a snippet around its first hit: a word of a snippet may be as long as its message."""
    start = max(0, min((first for first, _ in spans), default=0) - LONGEST_SNIPPET // 4)
    end = start + LONGEST_SNIPPET
    lead, trail = "…" * (start > 0), "…" * (end < len(text))
    moved = [(first - start + len(lead), min(last, end) - start + len(lead)) for first, last in spans if first < end]
    return f"{lead}{text[start:end]}{trail}", tuple(moved)

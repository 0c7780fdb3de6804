"""A document in several conversations: computed once, in a session of its own, and had from there.

In that session the document stands behind nothing but the template's opening, each of its parts sealed by itself. A
conversation that it is attached to says the same messages, and has for each part a segment with the frames of that
session's, whose keys are turned to where the part stands. A part whose tokens are others there, as after a template
that treats the first message in its own way, is computed as any message is.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvchat.documents import MOST_TOKENS, Document
from kvchat.engine import Stop
from kvchat.errors import InputError, SessionNotFound
from kvchat.events import Notice, Progress
from kvchat.residence.room import Cap
from kvchat.session import Conversation
from kvchat.store.store import Message, SegmentRecord, Store
from kvchat.transcript import check_text

LEAST_TOKENS = 32
"""Of a part, however little room there is."""


@dataclass(frozen=True, slots=True)
class Attached:
    """What was attached: parts and tokens of it in the conversation, and how many tokens had to be computed."""

    document: str
    parts: int
    tokens: int
    computed: int


def document_of(title: str, text: str, conversation: Conversation) -> Document:
    """A text cut for the conversation's model and limit of memory. Raises InputError."""
    check_text(text)
    model, residence = conversation.engine.model, conversation.residence
    cap = Cap.of(residence.config.compress, model)
    room = min(model.context_window // 4, cap.tokens // 4 if cap else MOST_TOKENS)

    def count(text: str) -> int:
        low, high = model.template.user(text, first=False).content_span
        return high - low

    return Document.of(title, text, max(LEAST_TOKENS, min(MOST_TOKENS, room)), count, residence.fingerprint)


def is_built(store: Store, document: Document, fingerprint: str) -> bool:
    """Whether all of the document is sealed in its session."""
    path = _path(store, document)
    said = path[_opening(path) :]
    return len(said) == len(document.messages) and _covered(store, path, fingerprint) == len(said)


def build(conversation: Conversation, document: Document, stop: Stop) -> Generator[Progress | Notice, None, int]:
    """Compute and seal what the document's own session lacks, until `stop`; how many tokens that were.

    Raises:
        InputError: the session says something else.
        CapacityError: the document does not fit.
    """
    residence, opening = conversation.residence, _opening(conversation.path)
    known = len(_path(conversation.store, document)) - opening
    if opening:
        yield from _seal_opening(conversation, opening, stop)
    yield from residence.restore(conversation.path)
    lost = [entry.start for entry in residence.known if entry.lost]
    if lost:  # what is long ago is not computed again by itself
        residence.let_go()
        yield from residence.restore(conversation.path[: residence.bounds(conversation.path).index(lost[0])])
    if missing := document.messages[max(0, known) :]:
        conversation.take(missing)
    for last in range(opening + 2, opening + len(document.messages) + 1, 2):
        yield from residence.seal_up_to(conversation.path, last, "import", stop)
        if stop():
            break
        yield from residence.saver.flush(most=1)
    yield from residence.save()
    computed, residence.num_computed = residence.num_computed, 0
    return computed


def _seal_opening(conversation: Conversation, opening: int, stop: Stop) -> Generator[Progress | Notice, None, None]:
    """Have the opening in a segment by itself, so that no part's segment has it."""
    residence, path = conversation.residence, conversation.path
    yield from residence.save()
    for record, _ in conversation.store.cover([message.id for message in path], residence.fingerprint):
        if record.start == 0 and len(record.messages) > opening:
            conversation.store.drop_segment(record.id)
    residence.let_go()
    yield from residence.restore(path[:opening])
    yield from residence.seal_up_to(path[:opening], opening, "import", stop)
    yield from residence.save()
    residence.let_go()


def attach(conversation: Conversation, document: Document, stop: Stop) -> Generator[Progress | Notice, None, Attached]:
    """Take a document in, as its own session has it as far as it does.

    Raises:
        CapacityError: it does not fit; nothing is saved then.
    """
    residence, store = conversation.residence, conversation.store
    yield from residence.restore(conversation.path)
    yield from residence.catch_up(conversation.path, len(conversation.path), "rebuild", stop)
    yield from residence.seal_up_to(conversation.path, len(conversation.path), "rebuild", stop)
    yield from residence.save()
    conversation.take(document.messages)
    path, begun = conversation.path, residence.cache.num_seen
    first, borrowed = len(path) - len(document.messages), 0
    for source, low, high in _sources(store, document, path[first:], residence.fingerprint):
        if residence.cache.num_seen < residence.bounds(path)[first + low]:
            yield from residence.seal_up_to(path, first + low, "import", stop)
        if (yield from residence.borrow(source, path, first + low, first + high)):
            borrowed += source.end - source.start
            yield Progress("import", residence.cache.num_seen, residence.bounds(path)[-1])
    yield from residence.catch_up(path, len(path), "import", stop)
    residence.num_computed = 0
    tokens = sum(len(message.token_ids) for message in path[first:])
    computed = residence.cache.num_seen - begun - borrowed
    return Attached(document.session, len(document.messages) // 2, tokens, computed)


def _path(store: Store, document: Document) -> list[Message]:
    """The document's session as far as it is the document. Raises InputError: it says something else."""
    path: list[Message] = []
    with suppress(SessionNotFound):
        path = store.path(store.session(document.session).tip)
    opening = _opening(path)
    said = [{"role": message.role, "content": message.content} for message in path[opening:]]
    if any(one != other for one, other in zip(said, document.messages, strict=False)):
        raise InputError(f"session {document.session!r} says something else than the document; rename it, or delete it")
    return path[: opening + len(document.messages)]


def _opening(path: Sequence[Message]) -> int:
    """How many messages stand before the first question."""
    return int(bool(path) and path[0].role == "system")


def _covered(store: Store, path: Sequence[Message], fingerprint: str) -> int:
    """How many messages behind the opening lie in segments that another conversation can have."""
    return sum(high - low for _, low, high in _segments(store, path, fingerprint))


def _segments(store: Store, path: Sequence[Message], fingerprint: str) -> list[tuple[SegmentRecord, int, int]]:
    """Sealed segments that lie whole behind the opening, and which messages of those there they cover.

    None that came from a file: who made its KV is not known, and it serves nobody else.
    """
    opening, found = _opening(path), list[tuple[SegmentRecord, int, int]]()
    numbers = {message.id: index - opening for index, message in enumerate(path)}
    for record, used in store.cover([message.id for message in path], fingerprint):
        low = numbers[record.messages[0]]
        if low >= 0 and used == len(record.messages) and record.kind == "sealed" and not record.from_file:
            found.append((record, low, low + used))
    return found


def _sources(
    store: Store, document: Document, said: Sequence[Message], fingerprint: str
) -> list[tuple[SegmentRecord, int, int]]:
    """The segments of the document's session whose messages have the same tokens as those that are `said`."""
    path = _path(store, document)
    own = path[_opening(path) :]
    alike = [one.token_ids == other.token_ids for one, other in zip(own, said, strict=False)]
    return [each for each in _segments(store, path, fingerprint) if all(alike[each[1] : each[2]])]

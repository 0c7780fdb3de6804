"""One conversation: the one place that knows the order of a turn.

    send     check -> commit the user's message -> restore -> prefill -> decode -> commit the reply -> TurnDone
    finish   close the reply's KV -> seal, or save what waits -> hold what the budget allows

`finish` runs after the last visible token. Text and ids are committed before any KV: KV is a derivation, restored
from segments where it can be and computed from ids where it cannot (`residence.py`). Nothing here knows threads or
front ends.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, cast, get_args

from torch import Tensor

from kvchat.config import Config
from kvchat.engine import Engine, Stop
from kvchat.errors import CapacityError, InputError, SessionChanged
from kvchat.events import Delta, Draft, Event, FinishReason, Notice, Progress, TurnDone, Usage
from kvchat.residence import Residence, Steps
from kvchat.sampling import Sampler
from kvchat.sections import GenerateConfig
from kvchat.stats import describe
from kvchat.store import Message, Role, SessionInfo, Store
from kvchat.template import Piece

Drafted = tuple[str, str, Piece]
"""Role, text and ids of a message that is not committed yet."""

INTERRUPTED: FinishReason = "interrupted"


class Conversation:
    """A path of messages and the KV that stands for it.

    Args:
        info: the stored session; its fingerprint is the model's.
        store: where text, ids and segments lie; used from this thread alone.
        engine: the model.
        residence: the KV of this conversation, still empty.
    """

    def __init__(self, info: SessionInfo, store: Store, engine: Engine, residence: Residence) -> None:
        self.info = info
        self.store = store
        self.engine = engine
        self.residence = residence
        self.path: list[Message] = store.path(info.tip)
        self.last: TurnDone | None = None
        self.seal_s = 0.0
        self.failure: Exception | None = None
        """What went wrong in the background since the last call."""
        self._template = engine.model.template

    @property
    def num_tokens(self) -> int:
        """Tokens of the path."""
        return sum(len(message.token_ids) for message in self.path)

    # -- a turn ------------------------------------------------------------------------------------------------------

    def send(self, text: str, settings: GenerateConfig, stop: Stop, submitted: float) -> Iterator[Event]:
        """One turn; `submitted` is the `time.perf_counter()` at which the user sent it.

        Raises:
            InputError: the message is blank.
            CapacityError: the window has no room for it; nothing is saved then.
        """
        self.take([{"role": "user", "content": text}])
        yield from self.answer(settings, stop, submitted)

    def answer(self, settings: GenerateConfig, stop: Stop, submitted: float) -> Iterator[Event]:
        """Answer the path's last message, which is the user's."""
        if not self.path or self.path[-1].role != "user":
            raise InputError("there is no question to answer; send a message first")
        residence, opening = self.residence, self._template.generation_prompt
        yield from residence.prepare(self.path, stop)
        prompt = [*residence.ids(self.path), *opening]
        if residence.cache.num_seen >= len(prompt):  # no opening of a reply, and all is there: logits need a pass
            residence.cut(residence.bounds(self.path)[-2])
        cached = residence.num_reused
        unread = len(prompt) - residence.cache.num_seen
        yield from residence.make_room(self.path, unread, residence.reserved(settings.max_new_tokens))
        logits = yield from residence.prefill(prompt, len(prompt), "prefill", stop)
        yield from self._warn()
        draft, reason = Draft(submitted), INTERRUPTED
        read = min(len(prompt), residence.cache.num_seen) - cached
        if logits is not None:
            reason = yield from self._decode(logits, prompt, settings, stop, draft)
        recalled = tuple(residence.recalled)
        yield self._end_turn(draft, Usage(len(prompt), cached, read, len(draft.ids), recalled), reason)

    def _decode(
        self, logits: Tensor, prompt: Sequence[int], settings: GenerateConfig, stop: Stop, draft: Draft
    ) -> Generator[Event, None, FinishReason]:
        """Generate into `draft`; returns why it ended."""
        model, cache = self.engine.model, self.residence.cache
        most, rows = min(settings.max_new_tokens, self._room()), self.residence.answer_rows(settings.max_new_tokens)
        reason, stream, sample = INTERRUPTED, self._template.stream(), Sampler(settings, prompt, model.device)
        with closing(self.engine.decode(cache, logits, sample, model.stop_ids, stop, rows)) as tokens:
            for token in tokens:
                draft.times.append(time.perf_counter())
                if token in model.stop_ids:
                    reason = "stop"
                    break
                draft.ids.append(token)
                if text := stream.step(token):
                    draft.first_text = draft.first_text or draft.times[-1]
                    yield Delta(text)
                if len(draft.ids) >= most:
                    reason = "length" if most == settings.max_new_tokens else "context"
                    break
        if rest := stream.flush():
            yield Delta(rest)
        return reason

    def _end_turn(self, draft: Draft, usage: Usage, reason: FinishReason) -> TurnDone:
        """Commit the reply, if there is any, and describe the turn."""
        opening, closing = self._template.generation_prompt, self._template.assistant_close
        turn = TurnDone(self._template.text(draft.ids), usage, draft.timings(self.residence.take_load_s()), reason)
        self.last = turn
        if draft.ids or reason == "stop":
            piece = Piece((*opening, *draft.ids, *closing), (len(opening), len(opening) + len(draft.ids)))
            described = turn.to_dict()
            about = {key: described[key] for key in ("usage", "timings", "finish_reason")}
            self._commit([("assistant", turn.text, piece)], **about)
        return turn

    def finish(self) -> Steps:
        """After the last visible token: give the reply's last tokens their KV, seal or save, hold to the budget."""
        begun = time.perf_counter()
        yield from self.residence.settle(self.path)
        timings = self.path[-1].timings if self.path else None
        if timings and timings["seal_s"] is None:
            self.seal_s = time.perf_counter() - begun
            self.path[-1] = replace(self.path[-1], timings={**timings, "seal_s": self.seal_s})
            self.store.set_timings(self.path[-1].id, {**timings, "seal_s": self.seal_s})
        if not len(self.residence.saver):  # else when they are written
            self.store.fold()

    def save(self) -> float:
        """Write all that is not in the store yet; seconds that sealing the last answer's turn took."""
        self._unseen(self.residence.save())
        return self.seal_s

    def restore(self) -> Steps:
        """Bring the KV back before it is needed."""
        yield from self.residence.restore(self.path)

    # -- the path ----------------------------------------------------------------------------------------------------

    def begin(self, system: str | None) -> None:
        """Write the opening of a new conversation."""
        piece = self._template.system(system)
        if piece.ids:
            self._commit([("system", system or "", piece)])

    def take(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Commit messages after the path, text and ids; their KV is not computed yet.

        Raises:
            InputError: an unknown role, a system message that is not the first, a blank message.
            CapacityError: the window has no room for all; nothing is saved then.
        """
        self._commit(self._drafts(messages, self.path))

    def _drafts(self, messages: Sequence[Mapping[str, str]], path: Sequence[Message]) -> list[Drafted]:
        """Messages as they would stand after `path`, all checked. Errors as for `take`."""
        asked = any(message.role == "user" for message in path)
        drafts: list[Drafted] = []
        for number, message in enumerate(messages, 1):
            role, text = str(message.get("role")), message.get("content")
            if not isinstance(text, str) or not (text.strip() or role == "assistant"):
                raise InputError(f"message {number} is empty; write something, or leave it out")
            if role == "system" and (path or drafts):
                raise InputError(f"message {number} is a system message; only the first of a session can be one")
            if not (path or drafts) and role != "system":
                drafts.append(("system", "", self._template.system(None)))
            drafts.append((role, text, self._piece(number, role, text, asked)))
            asked = asked or role == "user"
        if drafts:
            self._require_room(path, drafts)
        return [draft for draft in drafts if draft[2].ids]

    def _require_room(self, path: Sequence[Message], drafts: Sequence[Drafted]) -> None:
        """Raise CapacityError unless each draft finds room when its turn comes."""
        used, window = self.residence.bounds(path)[-1], self.engine.model.context_window
        for number, (_, _, piece) in enumerate(drafts, 1):
            needed = len(piece.ids) + self._around + 1
            if needed > self.residence.longest(used):
                raise CapacityError(
                    f"message {number} has {needed} tokens and does not fit: of the model's window of {window} "
                    f"{self.residence.longest(used)} can be free; shorten it or give it in parts (nothing was cut)"
                )
            used += len(piece.ids)

    @property
    def _around(self) -> int:
        """Tokens around a reply."""
        return len(self._template.generation_prompt) + len(self._template.assistant_close)

    def append(self, messages: Sequence[Mapping[str, str]], stop: Stop) -> Generator[Progress | Notice, None, Usage]:
        """Take in messages, and compute and seal their KV; generates nothing. Errors as for `take`."""
        residence = self.residence
        yield from residence.restore(self.path)
        given = bool(messages) and messages[0].get("role") == "system"
        # A given system message takes the place of the template's own opening, if that is all there is.
        fresh = given and len(self.path) == 1 and self.path[0].role == "system" and not self.path[0].content
        drafts = self._drafts(messages, [] if fresh else self.path)
        if fresh:
            self.rewind(0)
        cached = residence.num_reused
        self._commit(drafts)
        yield from residence.catch_up(self.path, len(self.path), "import", stop)
        residence.num_computed = 0
        return Usage(self.num_tokens, cached, residence.cache.num_seen - cached, 0)

    def rewind(self, index: int) -> None:
        """Go back to just before message `index` of the path; the branch left stays in the store."""
        self.save()  # what is written later must not be of messages that are gone
        self.store.set_tip(self.info.id, self.path[index - 1].id if index else None)
        self.path = self.path[:index]
        self.residence.crop(self.path)

    def configure(self, settings: Mapping[str, Any], base: Config) -> None:
        """Give the session settings of its own on top of `base`; None takes one away. Old segments stay as ranked."""
        own = {key: value for key, value in {**self.info.settings, **settings}.items() if value is not None}
        self.residence.configure(base.for_session(own, settings), self.path)
        self.store.set_settings(self.info.id, own)
        self.info = replace(self.info, settings=own)

    def user_index(self, turns: int) -> int:
        """Index in the path of the user's message `turns` turns ago; 1 = the newest.

        Raises:
            InputError: there are not so many turns.
        """
        asked = self._questions()
        if not 1 <= turns <= len(asked):
            raise InputError(f"this session has {len(asked)} turns; {turns} cannot be taken back")
        return asked[-turns]

    def logprobs(self, prompt: str, continuation: str) -> list[tuple[str, float]]:
        """Natural log-probability of each token of `continuation` as the answer to `prompt`; nothing changes."""
        reply = self._template.assistant(continuation)
        ids, question = reply.ids[slice(*reply.content_span)], self.question(prompt)
        if not ids or not prompt.strip():
            raise InputError("prompt and continuation must not be empty")
        self._require_room(self.path, [("user", prompt, Piece((*question, *ids), (0, 0)))])
        self._unseen(self.restore())
        self._unseen(self.residence.catch_up(self.path, len(self.path), "rebuild", lambda: False))
        values = self.engine.logprobs(self.residence.cache, question, ids)
        return [(self._template.text([token]), value) for token, value in zip(ids, values, strict=True)]

    def question(self, text: str) -> tuple[int, ...]:
        """Ids that would follow the path if `text` were asked: the message and the opening of the reply."""
        asked = any(message.role == "user" for message in self.path)
        return self._template.user(text, first=not asked).ids + self._template.generation_prompt

    def fork(self, name: str, at: int | None) -> None:
        """Store a session that shares this path up to the end of turn `at`; InputError if there is no such turn."""
        asked = self._questions()
        if at is not None and not 1 <= at <= len(asked):
            raise InputError(f"this session has {len(asked)} turns; there is no turn {at} to fork at")
        end = len(self.path) if at is None or at == len(asked) else asked[at]
        self.store.fork(self.store.name_of(self.info.id), name, self.path[end - 1].id if end else None)

    def rebuild(self, retokenise: bool) -> None:
        """Drop the KV of the path, to be computed again; `retokenise` makes new ids from the texts, as a new branch."""
        said = [{"role": message.role, "content": message.content} for message in self.path]
        opening = bool(said) and said[0]["role"] == "system" and not said[0]["content"]
        drafts = self._drafts(said[opening:], []) if retokenise else []
        while cover := self.store.cover([message.id for message in self.path], self.residence.fingerprint):
            for record, _ in cover:
                self.store.drop_segment(record.id)
        if drafts:
            self.rewind(0)
            self._commit(drafts)

    def stats(self) -> dict[str, Any]:
        """Tokens, pairs and bytes of the whole, of each segment and, in proportion, of each turn."""
        self.save()
        self._unseen(self.restore())
        return describe(self)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _questions(self) -> list[int]:
        """Where in the path the user's messages stand."""
        return [index for index, message in enumerate(self.path) if message.role == "user"]

    def _unseen(self, steps: Steps) -> None:
        """Take steps that nobody follows; what they say is told with the next turn."""
        self.residence.notices += [event for event in steps if isinstance(event, Notice)]

    def _piece(self, number: int, role: str, text: str, asked: bool) -> Piece:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"message {number} is not valid Unicode at character {error.start}; mend it there"
            ) from None
        if role not in get_args(Role):
            raise InputError(f"message {number} has the role {role!r}; known roles: {', '.join(get_args(Role))}")
        return self._template.message(role, text, first=not asked)

    def _commit(self, drafts: Sequence[Drafted], **about: Any) -> None:
        """Append messages to the path, in the store first. Raises SessionChanged."""
        tip = parent = self.path[-1].id if self.path else None
        messages = []
        for role, text, piece in drafts:
            messages.append(Message.new(parent, cast(Role, role), text, piece.ids, piece.content_span, **about))
            parent = messages[-1].id
        try:
            self.store.add_messages(self.info.id, messages, tip)
        except SessionChanged as error:
            if messages[-1].role != "assistant" or tip is None:
                raise
            self.store.add_branch(self.info.id, messages)
            raise SessionChanged(f"{error}; this answer is kept beside it, where `kvchat search` finds it") from None
        self.path += messages

    def _room(self) -> int:
        """Tokens that a reply may still have, leaving space for its closing."""
        window = self.engine.model.context_window
        return window - self.residence.cache.position - len(self._template.assistant_close)

    def _warn(self) -> Iterator[Notice]:
        """Say that the window will be full before it is."""
        room, window = self._room(), self.engine.model.context_window
        if room < window // 10:
            yield Notice(
                f"the model's window is nearly full: {room} of {window} tokens are left; "
                "fork from an earlier turn or start a new session to go on"
            )

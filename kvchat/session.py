"""One conversation: the one place that knows the order of a turn.

    send     check -> commit the user's message -> restore -> prefill -> decode -> commit the reply -> TurnDone
    go_on    leave the reply that was cut off -> prefill what of it is not there -> decode -> commit the longer reply
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
from typing import Any

from torch import Tensor

from kvchat.course import Course
from kvchat.drafting import drafts, piece_of, require_room
from kvchat.engine import Engine, Stop
from kvchat.errors import CapacityError, InputError
from kvchat.events import Delta, Draft, Event, FinishReason, Notice, Progress, TurnDone, Usage
from kvchat.residence.residence import Residence, Steps
from kvchat.sampling import Sampler
from kvchat.sections import GenerateConfig
from kvchat.stats import describe
from kvchat.store.store import SessionInfo, Store
from kvchat.template import Piece
from kvchat.unfinished import Unfinished, recover

INTERRUPTED: FinishReason = "interrupted"


class Conversation(Course):
    """A path of messages and the KV that stands for it.

    Args:
        info: the stored session; its fingerprint is the model's.
        store: where text, ids and segments lie; used from this thread alone.
        engine: the model.
        residence: the KV of this conversation, still empty.
    """

    def __init__(self, info: SessionInfo, store: Store, engine: Engine, residence: Residence) -> None:
        super().__init__(info, store, engine, residence)
        self.last: TurnDone | None = None
        self.failure: Exception | None = None
        """What went wrong in the background since the last call."""
        self.unfinished = Unfinished(store, info.id)

    # -- a turn ------------------------------------------------------------------------------------------------------

    def send(self, text: str, settings: GenerateConfig, stop: Stop, submitted: float) -> Iterator[Event]:
        """One turn; `submitted` is the `time.perf_counter()` at which the user sent it.

        Raises:
            InputError: the message is blank.
            CapacityError: the window has no room for it; nothing is saved then.
        """
        self.take([{"role": "user", "content": text}])
        yield from self.answer(settings, stop, submitted)

    def answer(
        self, settings: GenerateConfig, stop: Stop, submitted: float, said: Sequence[int] = (), exact: bool = False
    ) -> Iterator[Event]:
        """Answer the path's last message, which is the user's.

        said    ids with which the answer begins
        exact   their KV stands as it was computed when they were said
        """
        if not self.path or self.path[-1].role != "user":
            raise InputError("there is no question to answer; send a message first")
        if self.unfinished.kept and not said:
            recover(self, beside=True)  # an answer that failed
        residence, opening = self.residence, (*self._template.generation_prompt, *said)
        if not exact:
            yield from residence.prepare(self.path, stop)
        prompt = [*residence.ids(self.path), *opening]
        if residence.cache.num_seen >= len(prompt):  # no opening of a reply, and all is there: logits need a pass
            residence.cut(residence.bounds(self.path)[-2])
        cached = residence.num_reused
        unread = len(prompt) - residence.cache.num_seen
        yield from residence.make_room(self.path, unread, residence.reserved(settings.max_new_tokens))
        if said and self._room() <= unread:
            raise CapacityError("the model's window is full, and the answer cannot go on; rewind, or fork from a turn")
        logits = yield from residence.prefill(prompt, len(prompt), "prefill", stop)
        yield from self._warn()
        draft, reason = Draft(submitted), INTERRUPTED
        read = min(len(prompt), residence.cache.num_seen) - cached
        if logits is not None:
            reason = yield from self._decode(logits, prompt, settings, stop, draft, said)
        recalled = tuple(residence.recalled)
        yield self._end_turn(draft, Usage(len(prompt), cached, read, len(draft.ids), recalled), reason, said)

    def go_on(self, settings: GenerateConfig, stop: Stop, submitted: float) -> Iterator[Event]:
        """Go on with the path's last answer where it was cut off; the shorter one stays as a branch.

        Raises:
            InputError: there is no answer, or the model had ended it itself.
            CapacityError: the window has no room for more.
        """
        path, cut = self.path[:-1], self.path[-1] if self.path else None
        if cut is None or cut.role != "assistant" or not path or path[-1].role != "user":
            raise InputError("there is no answer to go on with; send a message first")
        if cut.finish_reason == "stop":
            raise InputError("the model had ended its answer itself; ask for more in a message")
        said = cut.token_ids[slice(*cut.content_span)]
        self.save()
        self.unfinished.keep(path[-1].id, said)  # should the process die now, the answer is still there
        self.store.set_tip(self.info.id, path[-1].id)
        self.path = path
        recalled = bool((cut.usage or {}).get("recalled"))
        try:
            if not (exact := self.residence.go_back(path, len(said), recalled)):
                yield from self.residence.restore(path[:-1])
            yield from self.answer(settings, stop, submitted, said, exact)
        finally:
            if self.path[-1].role == "user":  # nothing was added
                self.store.add_messages(self.info.id, [cut], path[-1].id)
                self.path = [*path, cut]
                self.residence.go_back(path, len(said), recalled)
                recover(self)  # if it went on and could not be committed, what it said is a branch

    def _decode(
        self,
        logits: Tensor,
        prompt: Sequence[int],
        settings: GenerateConfig,
        stop: Stop,
        draft: Draft,
        said: Sequence[int],
    ) -> Generator[Event, None, FinishReason]:
        """Generate into `draft` what follows `said`; returns why it ended."""
        model, cache, parent = self.engine.model, self.residence.cache, self.path[-1].id
        most, rows = min(settings.max_new_tokens, self._room()), self.residence.answer_rows(settings.max_new_tokens)
        reason, stream, sample = INTERRUPTED, self._template.stream(said), Sampler(settings, prompt, model.device)
        self.unfinished.begin()
        with closing(self.engine.decode(cache, logits, sample, model.stop_ids, stop, rows)) as tokens:
            for token in tokens:
                draft.times.append(time.perf_counter())
                if token in model.stop_ids:
                    reason = "stop"
                    break
                draft.ids.append(token)
                self.unfinished.grow(parent, said, draft.ids)
                if text := stream.step(token):
                    draft.first_text = draft.first_text or draft.times[-1]
                    yield Delta(text)
                if len(draft.ids) >= most:
                    reason = "length" if most == settings.max_new_tokens else "context"
                    break
        if rest := stream.flush():
            yield Delta(rest)
        return reason

    def _end_turn(self, draft: Draft, usage: Usage, reason: FinishReason, said: Sequence[int]) -> TurnDone:
        """Commit the reply, if there is anything new, and describe the turn."""
        opening, closing, ids = self._template.generation_prompt, self._template.assistant_close, (*said, *draft.ids)
        turn = TurnDone(self._template.text(ids), usage, draft.timings(self.residence.take_load_s()), reason)
        self.last = turn
        if draft.ids or reason == "stop":
            piece = Piece((*opening, *ids, *closing), (len(opening), len(opening) + len(ids)))
            described = turn.to_dict()
            about = {key: described[key] for key in ("usage", "timings", "finish_reason")}
            self._commit([("assistant", turn.text, piece)], **about)
            self.unfinished.forget()
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

    def restore(self) -> Steps:
        """Bring the KV back before it is needed."""
        yield from self.residence.restore(self.path)

    # -- besides -----------------------------------------------------------------------------------------------------

    def append(self, messages: Sequence[Mapping[str, str]], stop: Stop) -> Generator[Progress | Notice, None, Usage]:
        """Take in messages, and compute and seal their KV; generates nothing. Errors as for `take`."""
        residence = self.residence
        yield from residence.restore(self.path)
        given = bool(messages) and messages[0].get("role") == "system"
        # A given system message takes the place of the template's own opening, if that is all there is.
        fresh = given and len(self.path) == 1 and self.path[0].role == "system" and not self.path[0].content
        found = drafts(messages, [] if fresh else self.path, residence)
        if fresh:
            self._say_anew(0, found)
        else:
            self._commit(found)
        cached = residence.num_reused
        yield from residence.catch_up(self.path, len(self.path), "import", stop)
        residence.num_computed = 0
        return Usage(self.num_tokens, cached, residence.cache.num_seen - cached, 0)

    def logprobs(self, prompt: str, continuation: str) -> list[tuple[str, float]]:
        """Natural log-probability of each token of `continuation` as the answer to `prompt`; nothing changes."""
        reply = self._template.assistant(continuation)
        ids, question = reply.ids[slice(*reply.content_span)], self.question(prompt)
        if not ids or not prompt.strip():
            raise InputError("prompt and continuation must not be empty")
        require_room(self.path, [("user", prompt, Piece((*question, *ids), (0, 0)))], self.residence)
        self.unseen(self.restore())
        self.unseen(self.residence.catch_up(self.path, len(self.path), "rebuild", lambda: False))
        values = self.engine.logprobs(self.residence.cache, question, ids)
        return [(self._template.text([token]), value) for token, value in zip(ids, values, strict=True)]

    def count(self, text: str) -> int:
        """Tokens that `text` has in a message of the user. Raises InputError: it is no valid Unicode."""
        low, high = piece_of(self._template, "user", text, asked=True).content_span
        return high - low

    def question(self, text: str) -> tuple[int, ...]:
        """Ids that would follow the path if `text` were asked: the message and the opening of the reply."""
        asked = any(message.role == "user" for message in self.path)
        return self._template.user(text, first=not asked).ids + self._template.generation_prompt

    def stats(self) -> dict[str, Any]:
        """Tokens, pairs and bytes of the whole, of each segment and, in proportion, of each turn."""
        self.save()
        self.unseen(self.restore())
        return describe(self)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """Tokens that a reply may still have, leaving space for its closing."""
        window = self.engine.model.context_window
        return window - self.residence.cache.position - len(self._template.assistant_close)

    def _warn(self) -> Iterator[Notice]:
        """Say that the window will be full before it is, where the conversation cannot go on at smaller positions."""
        room, window = self._room(), self.engine.model.context_window
        if room < window // 10 and not self.engine.anatomy.turns:
            yield Notice(
                f"the model's window is nearly full: {room} of {window} tokens are left; "
                "fork from an earlier turn or start a new session to go on"
            )

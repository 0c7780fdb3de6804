"""What lets a conversation have more tokens than its model has positions, and more KV than memory may take.

Before tokens are computed there must be positions and memory for them (`make_room`): older segments give way, and when
positions are used up the conversation is re-based, so that it goes on at a smaller one. What a question concerns comes
back for its answer (`recall`), for the store has all of it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from kvchat.cache.pack import Spans
from kvchat.config import Config
from kvchat.engine import Stop
from kvchat.episodes.embedder import find_embedder
from kvchat.episodes.passages import passages, told_apart
from kvchat.episodes.selectors import Candidate, Selector, Sources, best, find_selector, turns_between
from kvchat.episodes.vectors import Vectors
from kvchat.errors import CapacityError, CodecError, ConfigError, ModelError
from kvchat.events import Notice, Progress
from kvchat.residence.catalogue import Entry, Recalled
from kvchat.residence.holding import Holding
from kvchat.residence.room import Cap, without
from kvchat.residence.sealing import Ranker
from kvchat.sections import LEAST_ROWS
from kvchat.store.records import num_answered, turn_of
from kvchat.store.store import Message

REBASED = (
    "the model's window of {window} tokens was full: the conversation goes on at position {goal}, and older turns come "
    "back when they are asked for"
)
CUT = "; of turn {turn} on, which is long, {stay} of {all} tokens stay, and parts of the rest come back so too"

Steps = Generator[Progress | Notice, None, None]


class Reach(Holding):
    """The part of a `Residence` that knows limits."""

    selector: Selector | None
    """What says which segments a question concerns."""
    vectors: Vectors | None
    """What it compares, if that is vectors."""

    # -- room --------------------------------------------------------------------------------------------------------

    def make_room(self, path: Sequence[Message], tokens: int, answer: int = 0) -> Steps:
        """See to it that so many more tokens have positions and memory, and if possible an answer too.

        Raises:
            CapacityError: they have not, whatever is let go.
        """
        window, cap = self.engine.model.context_window, self.cap
        self.expected = tokens + answer
        if self.cache.position + self.expected > window - self.spare_positions:
            if goal := (yield from self._goal_for(path, tokens, answer)):
                yield from self._rebase(path, goal, tokens + answer)
                return
            if self.cache.position + tokens > window:
                raise CapacityError(f"{tokens} tokens do not fit behind what must stay; send less, or rewind")
        if cap:
            if tokens > cap.tokens // 2:
                raise CapacityError(
                    f"{tokens} tokens do not fit into compress.kv_budget, which has room for {cap.tokens // 2} at "
                    "once; give them in parts, or raise it"
                )
            self.expect(path, tokens + answer)

    def _rebase(self, path: Sequence[Message], goal: int, expected: int) -> Iterator[Notice]:
        """Go on at a smaller position."""
        before = {one.id: one.part for one in self.tiers.residents}
        self.expected, self.offset = expected, self.cache.num_seen + self.cache.gap.length - goal
        self.hold(path)
        told, bounds = REBASED.format(window=self.engine.model.context_window, goal=goal), self.bounds(path)
        for one in self.tiers.residents:
            if one.part.spans and one.part != before.get(one.id) and one.start not in self.recalled:
                stay, turn = sum(high - low for low, high in one.stretches), turn_of(path, bounds.index(one.start))
                told += CUT.format(turn=turn, stay=stay, all=one.end - one.start)
        yield Notice(told)

    def expect(self, path: Sequence[Message], tokens: int) -> None:
        """Have memory for so many more tokens, if there is a limit."""
        self.expected = tokens
        if self.cap:
            self.hold(path)

    def _goal_for(self, path: Sequence[Message], tokens: int, answer: int) -> Generator[Progress | Notice, None, int]:
        """Where the conversation can go on so that so many tokens fit, and if possible an answer; 0 if it cannot.

        Where turns that wait to be sealed would take the room they are sealed, and what came back leaves again.
        """
        for wanted in (tokens + answer, tokens):
            goal = self._goal(path, wanted)
            if not goal and self._goal(path, wanted, alone=True):
                yield from self._give_way(path)
                goal = self._goal(path, wanted)
            if goal:
                return goal
        return 0

    def _goal(self, path: Sequence[Message], tokens: int, alone: bool = False) -> int:
        """Where the conversation can go on after a re-base so that so many tokens fit; 0 if it cannot.

        `alone`: behind nothing but the beginning.
        """
        window = self.engine.model.context_window
        goal = min(window * 5 // 8, window - self.spare_positions - tokens)
        least = self.prefix(path) if alone else self._least(path)
        return goal if self.engine.anatomy.turns and least < goal < self.cache.position else 0

    def _give_way(self, path: Sequence[Message]) -> Steps:
        """Let go what came back, and seal what waits of turns before the path's last message."""
        if self.recalled:
            self.recalled = {}
            self.hold(path)
        last = min(len(path) - 1, bisect_right(self.bounds(path), self.cache.num_seen) - 1)
        if self.bounds(path)[last] > self.cache.tail_start:
            yield from self._sealed(path, last)

    def _sealed(self, path: Sequence[Message], last: int) -> Steps:
        """As `Residence` has it."""
        raise NotImplementedError

    def _least(self, path: Sequence[Message]) -> int:
        """Positions that are in use whatever is let go: of the beginning, of the tail, and of what came back."""
        begun = min(self.prefix(path), self.known[0].end) if self.known else 0
        return self.cache.tail_length + self.cache.gap.length + begun

    @property
    def spare_positions(self) -> int:
        """Positions at the end of the window that are left for scoring."""
        return self.engine.model.context_window // 16 if self.engine.anatomy.turns else 0

    @property
    def _segment_min(self) -> int:
        """Tokens of the tail that make a segment; fewer than the setting where memory has no room for them to wait."""
        least = self.config.compress.segment_min
        return min(least, self.cap.tokens // 4) if self.cap else least

    def longest(self, used: int, path: Sequence[Message]) -> int:
        """The most tokens that can follow so many of a path, of which the beginning counts.

        What the window has left, or has after a re-base behind what stays whatever goes.
        """
        window, cap = self.engine.model.context_window, self.cap
        free = window - self.spare_positions - self.prefix(path) - 1
        most = max(window - used, free if self.engine.anatomy.turns else 0)
        return min(most, cap.tokens // 2) if cap else most

    def reserved(self, answer: int) -> int:
        """Tokens for which there is to be room when an answer of at most so many begins."""
        window, cap = self.engine.model.context_window, self.cap
        around = len(self.engine.model.template.assistant_close)
        return min(answer, window // 4, cap.reserve if cap else window) + around

    def answer_rows(self, answer: int) -> int:
        """Rows a head to which a turn is held while an answer of at most so many tokens is written; 0 = no limit."""
        rows = self.config.compress.answer_rows
        if self.cap is None or self.reserved(answer) >= answer:
            return rows
        most = max(LEAST_ROWS, self.cache.tail_length + self.reserved(answer))
        return min(rows, most) if rows else most

    # -- recall ------------------------------------------------------------------------------------------------------

    def recall(self, path: Sequence[Message]) -> Generator[Progress | Notice, None, None]:
        """Bring back what the path's last message, a question, concerns, until it is answered.

        The newest segments of which all is in memory stay where they are. If all is in memory nothing is looked for.
        """
        yield from ()
        self.recalled = {}
        if (whole := self._unless_all_is_there()) is None:
            return
        bounds = self.bounds(path)
        if self.cache.num_seen > bounds[-2]:  # read before: it is read again, behind what comes
            self.cut(bounds[-2])
        if "attention" in self.config.recall.by:  # the question is read once more
            self.expect(path, len(path[-1].token_ids))
        self._bring_back(self._concerned(path, whole), path)
        self.asked_at = self.cache.num_seen
        self.hold(path)

    def _concerned(self, path: Sequence[Message], whole: Collection[int]) -> list[Candidate]:
        """The turns that the path's last message concerns, but for those of newest segments of which all is there."""
        assert self.selector
        bounds, some = self.bounds(path), [entry for entry in self.known if not entry.lost]
        ends = [(bisect_left(bounds, entry.start), bisect_left(bounds, entry.end)) for entry in some]
        candidates = [turn for first, last in ends for turn in turns_between(path, bounds, first, last)]
        scores = self.selector.scores(path[-1], path, candidates)
        order = best(scores, candidates)[: self.config.recall.turns]
        near = bounds[num_answered(path)] - self.config.compress.recent_tokens
        stay = {entry.start for entry in some if entry.end > near and entry.start in whole}
        # Where nothing tells one from another nothing comes.
        chosen = [one for at in order for one in self._telling(candidates[at], scores[at] > min(scores), path)]
        return [one for one in chosen if self._entry_at(one.start).start not in stay]

    def foreseen(self, path: Sequence[Message], text: str) -> dict[str, int]:
        """Chunks of segments, by their id, that would come back if the user asked `text`, which is being written."""
        # Attention would take a pass over the text, for each state of it.
        if "attention" in self.config.recall.by or (whole := self._unless_all_is_there()) is None:
            return {}
        piece = self.engine.model.template.user(text, first=False)
        asked = Message.new(path[-1].id, "user", text, piece.ids, piece.content_span)
        entries = [self._entry_at(one.start) for one in self._concerned([*path, asked], whole)]
        return {entry.id: entry.num_chunks for entry in entries}

    def embed_turns(self, path: Sequence[Message], stop: Stop) -> Iterator[Notice]:
        """Make the vectors that the next question would wait for, until `stop`; yields nothing."""
        yield from ()
        if self.vectors:
            with suppress(ModelError):  # the embedder cannot be loaded: whoever asks is told
                deque(self.vectors.fill(path, stop), maxlen=0)

    def _telling(self, turn: Candidate, tells: bool, path: Sequence[Message]) -> list[Candidate]:
        """What is to come of a turn, if it tells more than others: of one too long for that a passage that does."""
        window = self.engine.model.context_window
        if turn.end - turn.start <= window * 3 // 8:
            return [turn] if tells else []
        start = self._entry_at(turn.start).start
        away = without([(turn.start, turn.end)], self._staying(path).get(start, ()))
        spans = [span for low, high in away for span in passages(low, high, window // 8)]
        ids, begin = self.ids(path[turn.first : turn.last]), turn.start
        texts = [self.engine.model.template.text(ids[low - begin : high - begin]) for low, high in spans]
        scores = told_apart(path[-1].content, texts)
        most = max(scores, default=0.0)
        if not spans or not (tells or most):
            return []
        low, high = spans[scores.index(most)]
        return [replace(turn, start=low, end=high)]

    def _bring_back(self, turns: Sequence[Candidate], path: Sequence[Message]) -> None:
        """Choose these turns to come, as far as an eighth of the window and what the path's last message leaves.

        The first may take more: a part of a document takes three eighths. What stays where it stands does not come.
        """
        spans: dict[int, list[tuple[int, int]]] = {}
        for turn in turns:
            spans.setdefault(self._entry_at(turn.start).start, []).append((turn.start, turn.end))
        headers = {one.start: one.header for one in self.tiers.residents}
        window, stay = self.engine.model.context_window, self._staying(path)
        asked = len(path[-1].token_ids) + len(self.engine.model.template.generation_prompt) + 1
        free = min(window * 5 // 8, window - self.spare_positions - asked) - self._least(path)
        left, most = min(window // 8, free), min(window * 3 // 8, free)
        for start, some in spans.items():
            entry, back = self._entry_at(start), without(some, stay.get(start, ()))
            found = Recalled(entry, back)
            with suppress(CodecError):  # said when it is to come
                found = Recalled(entry.counted(headers.get(start) or self._resident(entry).header, back), back)
            left -= found.length
            if back and (left >= 0 or (not self.recalled and found.length <= most)):
                self.recalled[start] = found

    def _staying(self, path: Sequence[Message]) -> dict[int, Spans]:
        """The tokens of segments that stay where they stand though others of them come back, by the segment's start."""
        room = self._room(path)
        stands = self._standing(path, self._most(), room)
        return {self.known[at].start: self._beside(self.known[at], spans, room.prefix) for at, spans in stands.items()}

    def _entry_at(self, place: int) -> Entry:
        return self.known[bisect_right(self.known, place, key=lambda entry: entry.start) - 1]

    def _adopt(self, config: Config, ranker: Ranker) -> None:
        """As `Holding._adopt`, and look for old turns so."""
        cap = Cap.of(config.compress, self.engine.model)
        if cap and cap.tokens < LEAST_ROWS:
            raise ConfigError(
                f"compress.kv_budget is {config.compress.kv_budget!r}, for {cap.tokens} tokens of "
                f"{self.engine.model.name}; it must have room for {LEAST_ROWS}"
            )
        super()._adopt(config, ranker)
        embedder = find_embedder(config.episodes, self.engine)
        sources = Sources(self.store, self.engine, self.cache, embedder)
        self.vectors = Vectors(self.store, embedder) if "embedding" in config.recall.by else None
        self.selector = find_selector(config.recall.by, sources) if config.recall.by != "off" else None

    def _unless_all_is_there(self) -> set[int] | None:
        """As `_whole`; None where nothing is looked for: nobody looks, or memory has all that can be had."""
        whole = self._whole() if self.selector and self.known else set[int]()
        found = self.selector and any(entry.start not in whole for entry in self.known if not entry.lost)
        return whole if found else None

    def _whole(self) -> set[int]:
        """The starts of segments of which all that the store has is in memory."""
        held = {one.start: one.chunks for one in self.tiers.residents if not one.part.spans}
        return {one.start for one, most in zip(self.known, self._most(), strict=True) if held.get(one.start, 0) >= most}

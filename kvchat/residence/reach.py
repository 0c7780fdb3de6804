"""What lets a conversation have more tokens than its model has positions, and more KV than memory may take.

Before tokens are computed there must be positions and memory for them (`make_room`): older segments give way, and when
positions are used up the conversation is re-based, so that it goes on at a smaller one. What a question concerns comes
back for its answer (`recall`), for the store has all of it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

from kvchat.config import Config
from kvchat.episodes.embedder import find_embedder
from kvchat.episodes.selectors import Candidate, Selector, Sources, best, find_selector
from kvchat.errors import CapacityError, CodecError, ConfigError
from kvchat.events import Notice, Progress
from kvchat.residence.catalogue import Entry, Recalled
from kvchat.residence.holding import Holding
from kvchat.residence.room import Cap
from kvchat.residence.sealing import Ranker, prefix_length
from kvchat.sections import LEAST_ROWS
from kvchat.store.records import num_answered
from kvchat.store.store import Message

REBASED = (
    "the model's window of {window} tokens was full: the conversation goes on at position {goal}, and older turns come "
    "back when they are asked for"
)


class Reach(Holding):
    """The part of a `Residence` that knows limits."""

    selector: Selector | None
    """What says which segments a question concerns."""

    # -- room --------------------------------------------------------------------------------------------------------

    def make_room(self, path: Sequence[Message], tokens: int, answer: int = 0) -> Iterator[Notice]:
        """See to it that so many more tokens have positions and memory, and if possible an answer too.

        Raises:
            CapacityError: they have not, whatever is let go.
        """
        window, cap = self.engine.model.context_window, self.cap
        self.expected = tokens + answer
        if self.cache.position + self.expected > window - self.spare_positions:
            goal = self._goal(tokens + answer) or self._goal(tokens)
            if goal:
                self.offset = self.cache.num_seen + self.cache.gap.length - goal
                self.hold(path)
                yield Notice(REBASED.format(window=window, goal=goal))
                return
            if self.cache.position + tokens > window:
                raise CapacityError(f"{tokens} tokens do not fit behind the newest turns; send less, or rewind")
        if cap:
            if tokens > cap.tokens // 2:
                raise CapacityError(
                    f"{tokens} tokens do not fit into compress.kv_budget, which has room for {cap.tokens // 2} at "
                    "once; give them in parts, or raise it"
                )
            self.expect(path, tokens + answer)

    def expect(self, path: Sequence[Message], tokens: int) -> None:
        """Have memory for so many more tokens, if there is a limit."""
        self.expected = tokens
        if self.cap:
            self.hold(path)

    def _goal(self, tokens: int) -> int:
        """Where the conversation can go on after a re-base so that so many tokens fit; 0 if it cannot."""
        window = self.engine.model.context_window
        goal = min(window * 5 // 8, window - self.spare_positions - tokens)
        return goal if self.engine.anatomy.turns and self._least() < goal < self.cache.position else 0

    def _least(self) -> int:
        """Positions that are in use whatever is let go: of the first segment, and of the tail."""
        return self.cache.tail_length + self.cache.gap.length + (self.known[0].length if self.known else 0)

    @property
    def spare_positions(self) -> int:
        """Positions at the end of the window that are left for scoring."""
        return self.engine.model.context_window // 16 if self.engine.anatomy.turns else 0

    @property
    def _segment_min(self) -> int:
        """Tokens of the tail that make a segment; fewer than the setting where memory has no room for them to wait."""
        least = self.config.compress.segment_min
        return min(least, self.cap.tokens // 4) if self.cap else least

    def longest(self, used: int) -> int:
        """The most tokens that can follow so many: what the window has left, or half of it after a re-base."""
        window, cap = self.engine.model.context_window, self.cap
        most = max(window - used, window // 2 if self.engine.anatomy.turns else 0)
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
        whole = self._whole() if self.selector and self.known else set[int]()
        if self.selector is None or all(entry.start in whole for entry in self.known if not entry.lost):
            return
        bounds = self.bounds(path)
        if self.cache.num_seen > bounds[-2]:  # read before: it is read again, behind what comes
            self.cut(bounds[-2])
        if "attention" in self.config.recall.by:  # the question is read once more
            self.expect(path, len(path[-1].token_ids))
        some = [entry for entry in self.known if not entry.lost]
        candidates = [turn for entry in some for turn in self._turns(entry, path, bounds)]
        scores = self.selector.scores(path[-1], path, candidates)
        order = best(scores, candidates)[: self.config.recall.turns]
        near = bounds[num_answered(path)] - self.config.compress.recent_tokens
        stay = {entry.start for entry in some if entry.end > near} & whole
        # Where nothing tells one from another nothing comes.
        chosen = [candidates[at] for at in order if scores[at] > min(scores)]
        self._bring_back([one for one in chosen if self._entry_at(one.start).start not in stay], path)
        self.asked_at = self.cache.num_seen
        self.hold(path)

    @staticmethod
    def _turns(entry: Entry, path: Sequence[Message], bounds: Sequence[int]) -> list[Candidate]:
        """The turns of a segment, as selectors see them; the last may be the first message of the next."""
        first, last = bisect_left(bounds, entry.start), bisect_left(bounds, entry.end)
        begins = [at for at in range(first, last) if at == first or path[at].role == "user"]
        return [Candidate(bounds[low], bounds[high], low, high) for low, high in pairwise([*begins, last])]

    def _bring_back(self, turns: Sequence[Candidate], path: Sequence[Message]) -> None:
        """Choose these turns to come, as far as an eighth of the window and what the path's last message leaves.

        The first may take more: a part of a document takes three eighths. With a turn of the first segment comes what
        begins the conversation, which would else be out of memory meanwhile.
        """
        spans: dict[int, list[tuple[int, int]]] = {}
        for turn in turns:
            spans.setdefault(self._entry_at(turn.start).start, []).append((turn.start, turn.end))
        if spans and self.known[0].start in spans:
            prefix = prefix_length(path, self.config.compress.num_sink_tokens)
            spans[self.known[0].start].append((self.known[0].start, min(prefix, self.known[0].end)))
        headers = {one.start: one.header for one in self.tiers.residents}
        window = self.engine.model.context_window
        free = min(window * 5 // 8, window - self.spare_positions - len(path[-1].token_ids)) - self._least()
        left, most = min(window // 8, free), min(window * 3 // 8, free)
        for start, some in spans.items():
            entry = self._entry_at(start)
            self.recalled[start] = Recalled.whole(entry)
            with suppress(CodecError):  # said when it is to come
                header = headers.get(start) or self._resident(entry).header
                self.recalled[start] = Recalled.of(entry, header, tuple(sorted(some)))
            length = self.recalled[start].length
            left -= length
            if left < 0 and (len(self.recalled) > 1 or length > most):
                del self.recalled[start]

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
        self.selector = find_selector(config.recall.by, sources) if config.recall.by != "off" else None

    def _whole(self) -> set[int]:
        """The starts of segments of which all that the store has is in memory."""
        held = {one.start: one.chunks for one in self.tiers.residents}
        return {one.start for one, most in zip(self.known, self._most(), strict=True) if held.get(one.start, 0) >= most}

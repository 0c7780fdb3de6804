"""Facts planted thousands of tokens back in one long session, and asked for at its end.

All given conversations are fed one after the other into one session. The facts are told at about so many tokens before
its end as is asked for, each of another sort, so that every question has one right answer. Each question is asked
behind what recall brings for it, and, to compare, in a fresh session that is given only the turn that tells the fact.
What counts only when a question is asked (`recall.*`) is varied on one feeding.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.baselines import Full
from kvchat.evals.cases import Case, Question, Turn
from kvchat.evals.far_facts import ALL
from kvchat.evals.feeding import about, fed, holding, new_conversation
from kvchat.evals.grid import METHODS, Grid, Line, Setting, lengths
from kvchat.evals.measures import MEASURES, Figures
from kvchat.evals.planted import phrased, telling, value_of
from kvchat.evals.recalling import answer_with_recall, start_of
from kvchat.evals.steady import Gauge, Span, record
from kvchat.session import Conversation

TOLERANCE = 0.2
"""By how much of it a distance may be missed."""

SAMPLE = 200
"""Messages that are searched for at the end, and segments that are asked for."""


def joined(cases: Sequence[Case]) -> Case:
    """One conversation of several, with the first one's system message and no questions."""
    turns: list[Turn] = []
    for case in cases:
        first, *rest = case.turns
        if turns and first[0]["role"] != "user":  # only a session's first turn may lack its user's message
            turns[-1] += first
        else:
            turns.append(first)
        turns += rest
    return Case("+".join(case.name for case in cases), cases[0].system, tuple(turns), ())


def plant(engine: Engine, history: Case, distances: Sequence[int], facts: int, seed: int) -> Case:
    """The history with so many facts at about each distance, in tokens, before its end, where all are asked for.

    Every fact has a turn of its own, at the end of its user's message.

    Raises:
        InputError: distances or facts out of range, or the history is too short.
    """
    wanted = sorted(set(distances))
    if not wanted or wanted[0] < 1 or not 1 <= facts * len(wanted) <= len(ALL):
        raise InputError(f"at most {len(ALL)} facts can be planted in all, at distances from 1; got {facts} at each")
    source = random.Random(f"{seed} {history.name}")
    places = _places(history, lengths(engine, history), wanted, facts)
    texts = "\n".join([history.system or "", *(message["content"] for turn in history.turns for message in turn)])
    turns, questions, taken = [*history.turns], list[Question](), list[str]()
    for sort, (turn, distance) in zip(source.sample(ALL, len(places)), places, strict=True):
        value = value_of(sort, source, texts, taken)
        first, *rest = turns[turn]
        turns[turn] = ({**first, "content": f"{first['content']} {telling(sort, value, source)}"}, *rest)
        questions.append(phrased(sort, value, turn + 1, len(turns), source, f"{sort.id}@{distance}"))
    return replace(history, turns=tuple(turns), questions=tuple(questions))


def _places(history: Case, sizes: Sequence[int], distances: Sequence[int], facts: int) -> list[tuple[int, int]]:
    """Turns, from 0, in which facts are told, and the distance that each is meant for."""
    ends = np.cumsum(sizes)
    back, taken, found = ends[-1] - ends + np.array(sizes) // 2, set[int](), list[tuple[int, int]]()
    for distance in distances:
        nearest = [int(turn) for turn in np.argsort(np.abs(back - distance), kind="stable")]
        usable = [turn for turn in nearest if turn not in taken and history.turns[turn][0]["role"] == "user"]
        chosen = usable[:facts]
        slack = max(TOLERANCE * distance, facts * float(np.median(sizes)))
        if len(chosen) < facts or abs(back[chosen[-1]] - distance) > slack:
            raise InputError(
                f"{history.name} has {ends[-1]} tokens, too few for {facts} facts about {distance} tokens before its "
                "end; give more conversations or smaller distances"
            )
        taken.update(chosen)
        found += [(turn, distance) for turn in sorted(chosen)]
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """How it is fed and looked at: a `Span` every so many tokens; the seed draws what is searched for."""

    every: int = 10_000
    seed: int = 0


class Far(Grid):
    """As `Grid`, of cases from `plant`: one feeding for all settings that differ in sections of `ASKED` only.

    Args:
        plan: see `Plan`.
        tell: told of every `Span`.
    """

    def __init__(
        self,
        *grid: Any,
        plan: Plan | None = None,
        tell: Callable[[Span], None] = lambda _: None,
        **named: Any,
    ) -> None:
        super().__init__(*grid, **named)
        self.plan, self.tell, self.unless = plan or Plan(), tell, {}

    def run(self, cases: Sequence[Case], settings: Sequence[Setting]) -> list[Line]:
        """As ever, what is fed alike together."""
        order = {fed_by(setting): number for number, setting in reversed([*enumerate(settings)])}
        return super().run(cases, sorted(settings, key=lambda setting: order[fed_by(setting)]))

    def _fitted(self, case: Case) -> Case:
        """Of any length."""
        return case

    @contextmanager
    def _measuring(self, case: Case, settings: Sequence[Setting]) -> Iterator[Callable[[Setting], Line]]:
        alone = {question.id: self._alone(case, question) for question in case.questions}
        with Feeding(self, case) as feeding:
            yield lambda setting: self._asked(feeding, setting, alone)

    def _alone(self, case: Case, question: Question) -> Figures:
        """The answer of a fresh session that is given only the turn that tells the fact."""
        with new_conversation(self.engine, self.config, Full) as conversation:
            told = replace(case, turns=case.turns[question.evidence - 1 : question.evidence], questions=())
            for _ in fed(conversation, told, [1], lambda _: None):
                return MEASURES["recall"](conversation, question, None)
        raise AssertionError

    def _asked(self, feeding: Feeding, setting: Setting, alone: Mapping[str, Figures]) -> Line:
        """Figures of all questions under a setting."""
        conversation, begun, figures = feeding.under(setting), time.perf_counter(), list[dict[str, Any]]()
        bounds, template = conversation.residence.bounds(conversation.path), self.engine.model.template
        users = [index for index, message in enumerate(conversation.path) if message.role == "user"]
        skipped = sum(turn[0]["role"] != "user" for turn in feeding.case.turns[:1])
        for question in feeding.case.questions:
            place = bounds[users[question.evidence - 1 - skipped] + 1] - 1
            with_bytes, answer = holding(conversation.residence), answer_with_recall(conversation, question)
            brought, start = answer.brought, start_of(conversation.residence, place)
            figures.append(
                about(question)
                | with_bytes
                | answer.figures
                | {
                    "distance": int(question.id.partition("@")[2]),
                    "back": bounds[-1] - place,
                    "said": template.text(answer.ids),
                    "brought": len(brought.starts),
                    "came": int(start in brought.starts),
                    "right": round(brought.share(start), 4),
                    "recall_ms": round(1000 * brought.seconds, 3),
                    "first_ms": round(1000 * answer.first_s, 3),
                    "alone_match": alone[question.id]["match"],
                    "alone_logprob": alone[question.id]["logprob"],
                }
            )
        return {
            "questions": figures,
            "notices": feeding.notices,
            "seconds": round(time.perf_counter() - begun, 2),
            "spans": feeding.spans,
            "record": feeding.record,
        }


def fed_by(setting: Setting) -> tuple[Any, ...]:
    """What of a setting counts while the history is fed."""
    return setting.method, *(pair for pair in setting.values if not pair[0].startswith("recall."))


class Feeding:
    """One case in a conversation, fed under one setting after another, and only when it must be fed anew."""

    def __init__(self, grid: Far, case: Case) -> None:
        self.grid, self.case = grid, case
        self.notices: list[str] = []
        self.spans: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {}
        self._open = ExitStack()
        self._fed: tuple[tuple[Any, ...], Conversation] | None = None

    def __enter__(self) -> Feeding:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def under(self, setting: Setting) -> Conversation:
        """The conversation with all of the case in it, under a setting."""
        config, how = self.grid._settled(setting)[0], fed_by(setting)
        if self._fed is None or self._fed[0] != how:
            self._open.close()
            self._fed = None  # let its memory go first
            self._fed = how, self._feed(config, setting.method)
        conversation = self._fed[1]
        conversation.residence.configure(config, conversation.path)
        return conversation

    def _feed(self, config: Config, method: str) -> Conversation:
        case, self.notices, gauge = self.case, [], Gauge(self.grid.plan.every, self.grid.tell)
        make, step = METHODS[method], self.grid.step
        conversation = self._open.enter_context(new_conversation(self.grid.engine, config, make))
        stops, before, begun = [*range(step, len(case.turns), step), len(case.turns)], 0, time.perf_counter()
        for turns in fed(conversation, case, stops, lambda notice: self.notices.append(notice.text)):
            conversation.save()
            now = time.perf_counter()
            gauge.add(conversation, turns - before, now - begun, turns == len(case.turns))
            before, begun = turns, time.perf_counter()
        self.spans = [asdict(span) for span in gauge.spans]
        self.record = record(conversation, case, SAMPLE, self.grid.plan.seed)
        return conversation

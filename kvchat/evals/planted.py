"""Recall: small facts planted in the first turns of a real conversation and asked for many turns later.

As in needle tests and their kin (RULER, Hsieh et al., arXiv 2404.06654), the filler is real and the facts are made up,
so that an answer can come from nowhere but the conversation. A fact may be corrected; then only the new value is right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvchat.errors import InputError
from kvchat.evals.cases import Case, Question, Turn
from kvchat.evals.facts import CORRECTIONS, OPENERS, QUESTIONS, SORTS, Sort

LONGEST_TURN = 320
"""Characters of a filler turn, so that facts, filler and a question 100 turns later fit a window of 8192 tokens."""

FACTS_PER_TURN = 2


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact and when it is told: (turn, value), the last of which is right."""

    sort: Sort
    told: tuple[tuple[int, str], ...]


def plant(filler: Case, distances: Sequence[int] = (5, 20, 50, 100), facts: int = 16, seed: int = 0) -> Case:
    """Facts in the first turns of `filler`, each asked for again at every distance.

    The turns are those of `filler` in order, without long ones and those that lack a user's message or a reply. Two
    facts a turn are added to the user's messages from the first turn on; a quarter of them is corrected 2 to 4 turns
    later. The same arguments give the same case.

    Args:
        filler: a conversation; its questions are left out.
        distances: turns between the last telling of a fact and its question, at least 1 each.
        facts: how many, at most one of each of `SORTS`.
        seed: chooses facts, values, corrections and wording.

    Raises:
        InputError: distances or facts out of range, or not enough turns that can be used.
    """
    if not distances or min(distances) < 1:
        raise InputError(f"distances are numbers of turns from 1, got {', '.join(map(str, distances)) or 'none'}")
    if not 1 <= facts <= len(SORTS):
        raise InputError(f"cannot plant {facts} facts; expected 1 to {len(SORTS)}")
    source = random.Random(f"{seed} {filler.name}")  # other facts in every conversation
    usable = [turn for turn in filler.turns if _usable(turn)]
    texts = [filler.system or "", *(message["content"] for turn in usable for message in turn)]
    planted = _facts(facts, source, texts)
    questions = [question for fact in planted for question in _questions(fact, sorted(set(distances)), source)]
    needed = max(question.asked_after for question in questions)
    if needed > len(usable):
        raise InputError(
            f"{filler.name}: {len(usable)} of {len(filler.turns)} turns have a reply and at most {LONGEST_TURN} "
            f"characters, {needed} are needed; give a longer conversation or smaller distances"
        )
    turns = _told(usable[:needed], planted, source)
    return replace(filler, turns=turns, questions=tuple(sorted(questions, key=lambda question: question.asked_after)))


def _usable(turn: Turn) -> bool:
    length = sum(len(message["content"]) for message in turn)
    return turn[0]["role"] == "user" and turn[-1]["role"] == "assistant" and length <= LONGEST_TURN


def _facts(count: int, source: random.Random, filler: Iterable[str]) -> list[Fact]:
    text, taken = "\n".join(filler), list[str]()
    corrected = set(source.sample(range(count), count // 4))
    facts: list[Fact] = []
    for index, sort in enumerate(source.sample(SORTS, count)):
        turns = [index // FACTS_PER_TURN + 1]
        if index in corrected:
            turns.append(turns[0] + source.randint(2, 4))
        facts.append(Fact(sort, tuple((turn, value_of(sort, source, text, taken)) for turn in turns)))
    return facts


def value_of(sort: Sort, source: random.Random, text: str, taken: list[str]) -> str:
    """A value that the filler does not name and that no other value contains; it is then taken."""
    for value in source.sample(sort.values, len(sort.values)):
        known = re.search(rf"\b{re.escape(value)}\b", text, re.IGNORECASE)
        if not known and not any(value in other or other in value for other in taken):
            taken.append(value)
            return value
    raise InputError(f"the conversation names every value that {sort.subject.removeprefix('my ')} could have")


def _told(turns: Sequence[Turn], facts: Sequence[Fact], source: random.Random) -> tuple[Turn, ...]:
    """The turns, with each telling at the end of its user's message."""
    told = list(turns)
    for fact in facts:
        for number, (turn, value) in enumerate(fact.told):
            sentence = _correction(fact.sort, value, source) if number else telling(fact.sort, value, source)
            first, *rest = told[turn - 1]
            told[turn - 1] = ({**first, "content": f"{first['content']} {sentence}"}, *rest)
    return tuple(told)


def telling(sort: Sort, value: str, source: random.Random) -> str:
    """A sentence that tells a fact."""
    sentence = source.choice((f"{sort.subject} is {{}}.", *sort.others)).format(value)
    opener = source.choice(OPENERS)
    return opener + sentence if opener else sentence[0].upper() + sentence[1:]


def _correction(sort: Sort, value: str, source: random.Random) -> str:
    return source.choice(CORRECTIONS).format(sort.subject, value)


def _questions(fact: Fact, distances: Sequence[int], source: random.Random) -> list[Question]:
    sort, (evidence, value) = fact.sort, fact.told[-1]
    asked = [
        phrased(sort, value, evidence, evidence + distance, source, f"{sort.id}@{distance}") for distance in distances
    ]
    return [replace(question, corrected=len(fact.told) > 1) for question in asked]


def phrased(sort: Sort, value: str, evidence: int, asked_after: int, source: random.Random, id: str) -> Question:
    """A question for a fact that was told in turn `evidence`."""
    return Question(
        id=id,
        text=source.choice(QUESTIONS).format(sort.subject),
        answer=value,
        lead=f"Your{sort.subject.removeprefix('my')} is",
        kind=sort.kind,
        evidence=evidence,
        asked_after=asked_after,
    )

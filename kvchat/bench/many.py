"""Many saved sessions, each with a question and what all of its KV answers to it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain

from kvchat.bench.history import drain, made_up, timed
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.evals.cases import GENERAL, Question
from kvchat.evals.measures import ANSWER_TOKENS, Truth, fidelity
from kvchat.events import Listener, Notice
from kvchat.residence.host import HostedStore
from kvchat.residence.residence import Residence
from kvchat.session import Conversation

CAP = 0.25
"""Of all KV in the model's dtype."""

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Subject:
    """A session: its question, what all KV answers, and what prefilling and answering took."""

    name: str
    question: Question
    truth: Truth
    tokens: int
    prefill_s: float
    question_s: float


@dataclass(frozen=True)
class Bench:
    """What all policies share."""

    config: Config
    engine: Engine
    pool: Executor
    subjects: list[Subject]
    trace: list[int]

    @property
    def per_token(self) -> int:
        """Bytes of KV."""
        return self.engine.model.pairs_per_token * self.engine.model.bytes_per_pair

    @property
    def cap(self) -> int:
        """Bytes that may be kept."""
        return int(CAP * sum(one.tokens for one in self.subjects) * self.per_token)

    def open(self, store: HostedStore, config: Config) -> list[Conversation]:
        """All sessions, nothing of them in memory."""
        found = []
        for one in self.subjects:
            residence = Residence(store, self.engine, config, self.pool)
            found.append(Conversation(store.session(one.name), store, self.engine, residence))
        return found

    def ask(self, conversation: Conversation, index: int) -> float:
        """Seconds to the first token of an answer."""
        prompt = conversation.question(self.subjects[index].question.text)
        return timed(lambda: self.engine.greedy(conversation.residence.cache, prompt, 1), self.engine.model.device)

    def kl(self, conversation: Conversation, index: int) -> float:
        """Of a token of the answer."""
        subject = self.subjects[index]
        figures = fidelity(conversation, subject.question, subject.truth)
        return figures["kl"] / figures["tokens"]


def told(texts: Sequence[Messages], say: Listener) -> Iterator[tuple[int, Messages]]:
    """Each with its number, as it is begun."""
    for number, messages in enumerate(texts):
        say(Notice(f"reading session {number + 1} of {len(texts)}"))
        yield number, messages


def part(histories: Sequence[Messages], number: int, tokens: int) -> Messages:
    """The messages of one session: a part of a conversation of its own, or made up."""
    if not histories:
        return made_up(tokens, number)
    history = [one for one in histories[number % len(histories)] if one["role"] != "system"]
    first = number // len(histories) * len(history) // 3 // 2 * 2
    chosen, length = list[Mapping[str, str]](), 0
    for message in history[first:]:
        chosen.append(message)
        length += 8 + len(message["content"]) // 4
        if length >= tokens and len(chosen) % 2 == 0:
            break
    return chosen


def ingest(
    store: HostedStore, engine: Engine, config: Config, pool: Executor, number: int, messages: Messages
) -> Subject:
    """Store a session, sealed; before that, ask all of its exact KV."""
    info = store.create_session(f"s{number}", engine.model.name, engine.model.fingerprint)
    conversation = Conversation(info, store, engine, Residence(store, engine, config, pool))
    conversation.begin(None)
    drain(chain(conversation.append(messages, lambda: False), conversation.finish()))
    conversation.save()
    cache, ids = engine.new_cache(), Residence.ids(conversation.path)
    prefill_s = timed(lambda: drain(engine.prefill(cache, ids, lambda: False)), engine.model.device)
    question = Question("q", random.Random(number).choice(GENERAL), "", "", "plain", 0, 1)
    prompt = conversation.question(question.text)
    question_s = timed(lambda: engine.greedy(cache, prompt, 1), engine.model.device)
    answer = engine.greedy(cache, prompt, ANSWER_TOKENS) or [*engine.model.template.assistant_close[:1]]
    truth = Truth(tuple(answer), engine.predict(cache, prompt, answer).float().log_softmax(-1))
    return Subject(info.name, question, truth, len(ids), prefill_s, question_s)

"""A case fed to a conversation as a chat would feed it, and what of it stands in memory when a question comes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager, nullcontext
from itertools import chain
from pathlib import Path

from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.evals.baselines import held_bytes
from kvchat.evals.cases import Case, Question, asked
from kvchat.evals.epicache import EpiCache
from kvchat.evals.rescoring import OneShot
from kvchat.events import Notice
from kvchat.pool import new_pool
from kvchat.residence.residence import Residence
from kvchat.session import Conversation
from kvchat.store.store import Store

Make = Callable[[Store, Engine, Config, Executor], Residence]
"""What makes the residence of a conversation."""


@contextmanager
def new_conversation(engine: Engine, config: Config, make: Make) -> Iterator[Conversation]:
    """An empty conversation whose KV is such a residence; its store is a temporary one."""
    with (
        tempfile.TemporaryDirectory(prefix="kvchat-eval-") as folder,
        new_pool() as pool,
        closing(Store(Path(folder) / "eval.db")) as store,
    ):
        info = store.create_session("eval", engine.model.name, engine.model.fingerprint)
        yield Conversation(info, store, engine, make(store, engine, config, pool))


def feed(conversation: Conversation, case: Case, heed: Callable[[Notice], None], step: int) -> Iterator[Question]:
    """Feed the case, `step` turns at a time as a chat would, and yield each question when its turn has come."""
    stops = sorted({question.asked_after for question in case.questions})
    for number in fed(conversation, case, sorted({*range(step, stops[-1], step), *stops}), heed):
        if questions := asked(case, number):
            with ready(conversation, questions[0].text) as choose:
                for question in questions:
                    choose(question.text)
                    yield question


def fed(conversation: Conversation, case: Case, stops: Sequence[int], heed: Callable[[Notice], None]) -> Iterator[int]:
    """Feed the case up to each of these numbers of turns, which it yields."""
    conversation.begin(case.system)
    before = 0
    for number in stops:
        messages = [message for turn in case.turns[before:number] for message in turn]
        for event in chain(conversation.append(messages, lambda: False), conversation.finish()):
            if isinstance(event, Notice):
                heed(event)
        before = number
        yield number


@contextmanager
def ready(conversation: Conversation, text: str) -> Iterator[Callable[[str], object]]:
    """Inside, this question can be asked, and another once the callable was told of it."""
    residence = conversation.residence
    with residence.asked(conversation.path) if isinstance(residence, OneShot | EpiCache) else nullcontext():
        choose = residence.choose if isinstance(residence, EpiCache) else bool
        choose(text)
        yield choose


def about(question: Question) -> dict[str, object]:
    """What a result says of its question."""
    told = {"id": question.id, "kind": question.kind, "after": question.asked_after}
    return told | {"distance": question.asked_after - question.evidence, "corrected": question.corrected}


def holding(residence: Residence) -> dict[str, float]:
    """What stands for the history: tokens, and the fractions of all pairs and of the exact KV's bytes."""
    cache, model = residence.cache, residence.engine.model
    kept = cache.num_sealed_rows + cache.tail_length * model.pairs_per_token
    pairs = kept / (cache.num_seen * model.pairs_per_token)
    nbytes = held_bytes(residence) / (cache.num_seen * model.bf16_bytes_per_token)
    return {"history": cache.num_seen, "pairs": round(pairs, 5), "bytes": round(nbytes, 5)}

"""What is measured when a question is asked behind a history, full or compressed.

Letters: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from kvchat.evals.cases import Question
from kvchat.evals.locomo import exact, f1
from kvchat.session import Conversation

Figures = dict[str, float]

ANSWER_TOKENS = 24
"""Longest answer that is generated."""


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """The full cache's greedy answer to a question and its log-probabilities, (T,) and (T, V) float32."""

    ids: tuple[int, ...]
    logprobs: Tensor


def truth(conversation: Conversation, question: Question) -> Truth:
    """Ask the full cache; an answer has at least its end-of-turn token."""
    engine, cache, prompt = conversation.engine, conversation.residence.cache, conversation.question(question.text)
    ids = engine.greedy(cache, prompt, ANSWER_TOKENS)
    if len(ids) < ANSWER_TOKENS:
        ids = [*ids, *engine.model.template.assistant_close[:1]]
    assert ids, "the template ends a reply with nothing, and the model begins with its end"
    return Truth(tuple(ids), engine.predict(cache, prompt, ids).float().log_softmax(-1))


def fidelity(conversation: Conversation, question: Question, truth: Truth | None) -> Figures:
    """The full cache's own answer, teacher-forced: sums over its tokens.

    kl            KL(full || held) over the whole vocabulary, nats
    agree         tokens whose likeliest next token is the full cache's
    logprob       of the answer, natural, and full_logprob under the full cache
    """
    assert truth is not None
    rows = conversation.engine.predict(conversation.residence.cache, conversation.question(question.text), truth.ids)
    held, full = rows.float().log_softmax(-1), truth.logprobs
    return {
        "tokens": len(truth.ids),
        "kl": divergence(full, held),
        "agree": int((held.argmax(-1) == full.argmax(-1)).sum()),
        "logprob": total(held, truth.ids),
        "full_logprob": total(full, truth.ids),
    }


def total(logprobs: Tensor, ids: Sequence[int]) -> float:
    """The sum of (T, V) log-probabilities over T ids, in float64."""
    wanted = torch.tensor(ids, device=logprobs.device)[:, None]
    return float(logprobs.gather(1, wanted).double().sum())


def divergence(full: Tensor, held: Tensor) -> float:
    """KL(full || held) of (T, V) log-probabilities, summed over T, in float64."""
    full, held = full.double(), held.double()
    return float((full.exp() * (full - held)).sum())


def recall(conversation: Conversation, question: Question, truth: Truth | None) -> Figures:
    """Whether the likeliest tokens after the reply's lead are the fact, all of them, and the fact's log-probability.

    One forced pass finds what greedy decoding would: it gives the fact if and only if every token of it is the
    likeliest after those before.
    """
    rows, ids = _forced(conversation, question)
    wanted = torch.tensor(ids, device=rows.device)
    return {
        "tokens": len(ids),
        "match": int(bool((rows.argmax(-1) == wanted).all())),
        "logprob": total(rows.float().log_softmax(-1), ids),
    }


def locomo(conversation: Conversation, question: Question, truth: Truth | None) -> Figures:
    """Token F1 and exact match of the greedy answer, and the log-probability of the right one."""
    engine, cache = conversation.engine, conversation.residence.cache
    ids = engine.greedy(cache, conversation.question(question.text), ANSWER_TOKENS)
    said = engine.model.template.text(ids)
    scores = {"f1": f1(said, question.answer), "match": int(exact(said, question.answer))}
    return recall(conversation, question, None) | scores


def _forced(conversation: Conversation, question: Question) -> tuple[Tensor, tuple[int, ...]]:
    """Logits (T, V) that foretell the expected answer after the reply's lead, and its T ids."""
    lead = _content(conversation, question.lead)
    ids = _content(conversation, f"{question.lead} {question.answer}" if question.lead else question.answer)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(lead, ids, strict=False))))
    opened = (*conversation.question(question.text), *ids[:common])
    return conversation.engine.predict(conversation.residence.cache, opened, ids[common:]), ids[common:]


def _content(conversation: Conversation, text: str) -> tuple[int, ...]:
    """Ids of `text` as a reply has them."""
    if not text:
        return ()
    reply = conversation.engine.model.template.assistant(text)
    return reply.ids[slice(*reply.content_span)]


MEASURES: dict[str, Callable[[Conversation, Question, Truth | None], Figures]] = {
    "fidelity": fidelity,
    "recall": recall,
    "locomo": locomo,
}

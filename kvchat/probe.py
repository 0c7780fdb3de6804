"""Whether a session still answers as it once did: a fixed question, answered greedily on a scratch pass and recorded.

The record holds for one state: the model, the path, and which rank chunks of which segments memory holds, on which
machine. Another state, as after the next turn or with another budget, has no record, and nothing to differ from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor

from kvchat.engine import Engine, Stop, likeliest
from kvchat.errors import CodecError, InputError, OutOfMemory, StoreError
from kvchat.events import Notice
from kvchat.residence.residence import Residence
from kvchat.session import Conversation

QUESTION = "What have we talked about so far? Answer in one sentence."
NUM_TOKENS = 32

Outcome = Literal["same", "recorded", "differs", "no answer", "not asked"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a deep check found: how the probe's answer compares, and everything that is wrong, one line a problem."""

    name: str
    outcome: Outcome
    problems: tuple[str, ...]


def check(conversation: Conversation) -> Finding:
    """Bring the KV back, ask the probe's question, compare with the record or make one, and compare text and tokens."""
    name = conversation.info.name
    problems = [f"session {name!r}: {problem}" for problem in disagreements(conversation)]
    residence = conversation.residence
    for steps in (conversation.restore(), residence.mend(conversation.path, lambda: False), residence.save()):
        problems += [f"session {name!r}: {event.text}" for event in steps if isinstance(event, Notice)]
    try:
        tokens = answer(conversation, lambda: False)
    except CodecError as error:
        problems.append(f"session {name!r}: {error}; open it with --rebuild to compute its KV again")
        return Finding(name, "no answer", tuple(problems))
    if tokens is None:
        return Finding(name, "not asked", tuple(problems))
    state = state_of(conversation)
    recorded = conversation.store.probe(conversation.info.id)
    if recorded is None or recorded[0] != state:
        conversation.store.put_probe(conversation.info.id, state, tokens)
        return Finding(name, "recorded", tuple(problems))
    if recorded[1] == tokens:
        return Finding(name, "same", tuple(problems))
    same = next(index for index in range(NUM_TOKENS) if recorded[1][index : index + 1] != tokens[index : index + 1])
    problems.append(
        f"session {name!r} answers otherwise than recorded, from token {same + 1} of {NUM_TOKENS} on; "
        "open it with --rebuild to compute its KV again"
    )
    return Finding(name, "differs", tuple(problems))


def record(conversation: Conversation, stop: Stop) -> Iterator[Notice]:
    """Record the answer to the probe's question unless that is done, in time that nobody needs; yields nothing.

    What stops it, a store that cannot be written, a lack of memory, or no answer costs only the record.
    """
    with suppress(StoreError, CodecError, OutOfMemory):
        state = state_of(conversation)
        recorded = conversation.store.probe(conversation.info.id)
        if recorded is None or recorded[0] != state:
            tokens = answer(conversation, stop)
            if tokens is not None:
                conversation.store.put_probe(conversation.info.id, state, tokens)
    yield from ()


def answer(conversation: Conversation, stop: Stop) -> tuple[int, ...] | None:
    """The likeliest NUM_TOKENS tokens after the question, past the end of the answer too; the cache is left as it was.

    None if stopped, if the KV of the path is not all there, or if the window has no room.

    Raises CodecError if a logit is not finite, as with KV that is not: the likeliest token then says nothing.
    """
    engine, cache, prompt = conversation.engine, conversation.residence.cache, conversation.question(QUESTION)
    room = engine.model.context_window - cache.position - len(prompt) - NUM_TOKENS
    if not conversation.path or cache.num_seen != conversation.num_tokens or room < 0 or stop():
        return None
    tokens = tuple(engine.answer(cache, prompt, NUM_TOKENS, _likeliest, (), stop))
    return tokens if len(tokens) == NUM_TOKENS else None


def _likeliest(logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise CodecError("with its KV the network computes numbers that are not finite")
    return likeliest(logits)


def state_of(conversation: Conversation) -> str:
    """A hash of all that the answer depends on: saved KV by its name, and by its bytes what was not saved."""
    residence = conversation.residence
    # Of most all tokens are there: so what was recorded of those stays comparable.
    sealed: list[tuple[Any, ...]] = [
        (one.id, one.end, one.chunks, *one.part.spans) for one in residence.tiers.residents
    ]
    waiting = [(one.id, end) for one, end in residence.waiting]
    written = conversation.store.written([*(one[0] for one in sealed), *(one[0] for one in waiting)])
    parts: list[Any] = [
        *(QUESTION, NUM_TOKENS, residence.fingerprint, conversation.path[-1].id if conversation.path else None),
        *(sorted(sealed), sorted(waiting), written, _machine(conversation.engine)),
        *(residence.cache.tail_start, residence.cache.offset, _unsaved(residence)),
    ]
    return "b2:" + blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _unsaved(residence: Residence) -> str:
    """A hash of the exact KV that has no segment, empty if there is none.

    When the session is resumed it is computed again, in sight of sealed KV instead of exact KV, and has no other name.
    The last layer's is enough, for it follows from all that the other layers hold.
    """
    cache, saved = residence.cache, residence.num_saved
    if saved >= cache.num_seen:
        return ""
    tail = torch.stack(cache.layers[-1].tail())[:, :, saved - cache.tail_start :]
    return blake2b(tail.cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _machine(engine: Engine) -> list[object]:
    """What decides how numbers are rounded, besides the model."""
    device = engine.model.device
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    threads = 0 if on_gpu else torch.get_num_threads()
    return [device.type, name, threads, torch.__version__, engine.model.config._attn_implementation, engine.chunk_size]


def disagreements(conversation: Conversation) -> Iterator[str]:
    """Messages of which neither the text came from the tokens nor the tokens from the text.

    One of both holds to the byte for every message: an answer's text is decoded from its tokens, and what is given as
    text is tokenised. So no tolerance is needed for what tokenizers change on the way.
    """
    template, asked = conversation.engine.model.template, False
    for number, message in enumerate(conversation.path, 1):
        decoded = template.text(message.token_ids[slice(*message.content_span)]) == message.content
        if not decoded and _ids(conversation, message.role, message.content, asked) != message.token_ids:
            yield f"message {number} ({message.role}): its tokens do not say its text"
        asked = asked or message.role == "user"


def _ids(conversation: Conversation, role: str, text: str, asked: bool) -> tuple[int, ...]:
    try:
        return conversation.engine.model.template.message(role, text, first=not asked).ids
    except InputError:  # this template has no such role
        return ()

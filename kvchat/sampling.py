"""Logits to a token: transformers' own processors in their usual order, then a seeded draw; temperature 0 is greedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvchat.sections import GenerateConfig

GREEDY = 1e-3
"""Temperatures below it would divide logits beyond float32: the best token is drawn then anyway."""


class Sampler:
    """Draws the tokens of one answer.

    Args:
        settings: temperature, top_p, top_k, min_p, repetition_penalty, seed.
        context: ids already in the conversation, which the repetition penalty counts.
        device: where logits lie.
    """

    def __init__(self, settings: GenerateConfig, context: Sequence[int], device: torch.device) -> None:
        self._greedy = settings.temperature < GREEDY
        self._processors = _processors(settings)
        self._ids = torch.tensor([list(context)], dtype=torch.int64, device=device) if self._processors else None
        self._random = torch.Generator(device)
        if settings.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(settings.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Next token, (1,) int64 where the logits (vocabulary,) of the last position lie; nobody waits for it here."""
        scores = logits.float()[None]
        if self._processors:
            scores = self._processors(self._ids, scores)
        if self._greedy:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
        if self._ids is not None:
            self._ids = torch.cat([self._ids, token], dim=1)
        return token[0]


def _processors(settings: GenerateConfig) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature < GREEDY:
        return processors
    if settings.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(MinPLogitsWarper(settings.min_p))
    return processors


def reader(token: Tensor) -> Callable[[], int]:
    """What gives the token's number once the device has drawn it, without waiting for what is queued behind."""
    if token.device.type != "cuda":
        return partial(int, token)
    arrived, copy = torch.Event("cuda"), torch.empty(1, dtype=torch.int64, pin_memory=True)
    copy.copy_(token, non_blocking=True)
    arrived.record()

    def read() -> int:
        arrived.synchronize()
        return int(copy)

    return read

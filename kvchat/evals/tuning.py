"""Layer budgets searched on recorded conversations: `kvchat tune`.

Each conversation is fed once (`scored.py`); a try only selects anew and answers its questions. How good a try is says
exp(-KL), of the mean KL to the full cache over the tokens of the full cache's own answers: continuous, where right
answers counted over some thirty questions are coarse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvchat.compress.evolve import Search, Shares, num_tries, require_cmaes, search
from kvchat.compress.order import ORDERS, by_shares
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.cases import Case
from kvchat.evals.grid import fitted
from kvchat.evals.scored import Prefill, Way, prefilled
from kvchat.events import Listener, Progress
from kvchat.files import written
from kvchat.fingerprint import digest, fingerprint_id
from kvchat.learned import folder, key, save_shares, version
from kvchat.model import Model

VERSION = 1
"""Raise it when the same search would give other figures."""

Asked = list[tuple[Prefill, frozenset[str]]]
"""Conversations, and the questions of each."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How far is searched.

    Attributes:
        generations: of each group of layers.
        group: layers of a group.
        seed: what is drawn depends on it.
        step: turns fed at once.
    """

    generations: int
    group: int
    seed: int
    step: int


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found: the shares, where they were written, and KL to the full cache of several ways to share."""

    shares: Shares
    file: Path
    rows: list[dict[str, Any]]


def settled(config: Config) -> Config:
    """The settings under which tries are compared.

    Raises:
        InputError: everything is kept, or the codec differs by rank.
    """
    if config.compress.keep_ratio == 1.0:
        raise InputError("with --keep 1 every layer keeps all it has; choose less, as in --keep 0.3")
    if not isinstance(config.codec.name, str):
        raise InputError("layer budgets are searched in one codec for all ranks, as in --set codec.name=raw")
    # Every segment keeps the same, so that all tries have equal bytes: what one budget over all leaves over differs.
    return config.replaced({"compress.allocate": "uniform", "compress.budget": "segment"})


def tune(
    engine: Engine, config: Config, cases: Sequence[Case], plan: Plan, listener: Listener, fresh: bool = False
) -> Tuned:
    """Search the layers' shares for the scorer and `keep_ratio` of `config`, and write them for `allocate` "evolved".

    A search that was stopped goes on, unless `fresh` is set.

    Args:
        cases: all but the last are learned from, and the last tells how good that is; of one alone, half of the
            questions each. All questions are asked at the end.

    Raises:
        InputError: something is missing, there is nothing to search, or too little to learn from.
    """
    require_cmaes()
    config, layers = settled(config), engine.model.num_hidden_layers
    if layers < 2:
        raise InputError(f"{engine.model.name} has one layer: there is nothing to share")
    if len({case.name for case in cases}) < len(cases):
        raise InputError("two of the conversations have the same name; rename a file")
    log = Log(engine.model, config, cases, plan, fresh)
    total, most = num_tries(layers, plan.group, plan.generations), 1 / config.compress.keep_ratio
    with ExitStack() as open_:
        fed = []
        for case in cases:
            fed.append(
                open_.enter_context(prefilled(engine, config, fitted(engine, case), [config.compress], plan.step))
            )
        learned, held = split(fed)
        if all(bool(prefill.choose(config.compress).all()) for prefill in fed):
            raise InputError("nothing is older than compress.recent_tokens; use more of the conversations")
        searched = search(layers, plan.group, plan.generations, most, plan.seed)
        shares = _drive(searched, log, config, learned, total, listener)
        rows = _compared(config, learned, held, shares)
    return Tuned(shares, save_shares(engine.model, config.compress, shares), rows)


def split(fed: Sequence[Prefill]) -> tuple[Asked, Asked]:
    """What is learned from, and what is held out."""
    ids = [[question.id for question, _ in prefill.truths] for prefill in fed]
    if len(fed) > 1:
        whole = [(prefill, frozenset(names)) for prefill, names in zip(fed, ids, strict=True)]
        return whole[:-1], whole[-1:]
    if len(ids[0]) < 2:
        raise InputError("one question is too little to learn from and to hold out; give more questions or files")
    return [(fed[0], frozenset(ids[0][::2]))], [(fed[0], frozenset(ids[0][1::2]))]


class Log:
    """What is known of a search, generation by generation, in a file beside what it finds.

    The tries themselves are there to tell whether it is this search.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, model: Model, config: Config, cases: Sequence[Case], plan: Plan, fresh: bool) -> None:
        compress = config.compress
        name = f"{key(model)}-tune-{compress.scored_by}-{compress.keep_ratio:g}.json"
        self.file = folder(compress) / name.replace(":", "-")
        told = [(case.name, case.system, case.turns, [astuple(q) for q in case.questions]) for case in cases]
        settings = config.model_dump(mode="json", include={"compress", "codec"})
        run = [
            VERSION,
            fingerprint_id(model.fingerprint),
            model.device.type,
            torch.__version__,
            version(model, compress),
        ]
        self.run = digest([run, settings, told, astuple(plan)])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._known = [] if fresh or not self.file.exists() else self._read()
        self._done = 0

    def _read(self) -> list[dict[str, Any]]:
        try:
            tree = json.loads(self.file.read_bytes())
            known = [{"tries": [tuple(row) for row in one["tries"]], "worth": one["worth"]} for one in tree["known"]]
            return known if tree["run"] == self.run else []
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.file} cannot be read ({error}); add --fresh to begin anew") from None

    def recall(self, tries: Sequence[Shares]) -> list[float] | None:
        """How good the next generation was found to be, if that is known."""
        if self._done == len(self._known):
            return None
        one = self._known[self._done]
        if one["tries"] != [*tries]:
            raise InputError(f"{self.file} is of a search that went otherwise; add --fresh to begin anew")
        self._done += 1
        worth: list[float] = one["worth"]
        return worth

    def add(self, tries: Sequence[Shares], worth: Sequence[float]) -> None:
        """Write one generation more. Raises OSError."""
        self._known.append({"tries": [*tries], "worth": [*worth]})
        self._done += 1
        with written(self.file, force=True) as file:
            file.write(json.dumps({"run": self.run, "known": self._known}).encode())


def _drive(searching: Search, log: Log, config: Config, learned: Asked, total: int, listener: Listener) -> Shares:
    """Answer a search to its end."""
    tries, done = next(searching), 0
    while True:
        worth = log.recall(tries)
        if worth is None:
            worth = []
            for shares in tries:
                listener(Progress("evaluate", done + len(worth), total))
                worth.append(math.exp(-_a_token(_figures(config, learned, partial(by_shares, shares=shares)), "kl")))
            log.add(tries, worth)
        done += len(tries)
        listener(Progress("evaluate", done, total))
        try:
            tries = searching.send(worth)
        except StopIteration as finished:
            return tuple(finished.value)


def _figures(config: Config, asked: Asked, order: Way) -> list[dict[str, Any]]:
    return [
        figures for prefill, ids in asked for figures in prefill.measure(prefill.choose(config.compress, order), ids)
    ]


def _a_token(figures: Sequence[dict[str, Any]], what: str) -> float:
    """A figure that is a sum over tokens, a token."""
    return float(sum(one[what] for one in figures) / sum(one["tokens"] for one in figures))


def _compared(config: Config, learned: Asked, held: Asked, shares: Shares) -> list[dict[str, Any]]:
    """One row a way to share, all at the same bytes."""
    named = ("uniform", "pyramid", "layer", "global")
    ways: dict[str, Way] = {"evolved": partial(by_shares, shares=shares), **{name: ORDERS[name] for name in named}}
    rows = []
    for name, order in ways.items():
        figures = _figures(config, held, order)
        rows.append(
            {
                "allocate": name,
                "KL learned from": _a_token(_figures(config, learned, order), "kl"),
                "KL held out": _a_token(figures, "kl"),
                "agree": _a_token(figures, "agree"),
                "pairs": sum(one["pairs"] for one in figures) / len(figures),
            }
        )
    return rows

"""A grid of settings over conversations: each is run through the session path and measured, a JSON line each.

A run that was stopped goes on where it was: lines that are there already are not computed again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, replace
from hashlib import blake2b
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
import transformers

from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.baselines import Full, Window
from kvchat.evals.cases import Case, cut
from kvchat.evals.epicache import EpiCache
from kvchat.evals.feeding import Make, about, feed, holding, new_conversation
from kvchat.evals.measures import ANSWER_TOKENS, MEASURES, Truth, truth
from kvchat.evals.recalling import recalled
from kvchat.evals.rescoring import OneShot, Recompress, SnapRecompress
from kvchat.events import Listener, Progress
from kvchat.fingerprint import fingerprint_id
from kvchat.learned import version
from kvchat.residence.residence import Residence
from kvchat.session import Conversation

METHODS: dict[str, Make] = {
    "session": Residence,
    "full": Full,
    "window": Window,
    "recompress": Recompress,
    "recompress-snapkv": SnapRecompress,
    "one-shot": OneShot,
    "epicache": EpiCache,
}
"""What can be compared; "session" is kvchat itself, with any of its settings."""

INSTRUMENT = 2
"""Raise it when the same run would give other figures: lines of before are then computed again."""

SECTIONS = ("compress", "codec", "recall", "episodes")
"""Of settings that can vary."""
VARIED = tuple(f"{section}." for section in SECTIONS)

Line = dict[str, Any]
KEYS = {"key", "task", "model", "dtype", "case", "method", "settings", "scorer", "keep", "codec", "questions"}
"""What a line has, besides how it came about."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell of the grid: a method, and settings by dotted key."""

    method: str
    values: tuple[tuple[str, Any], ...] = ()


def settings_of(methods: Sequence[str], vary: Mapping[str, Sequence[Any]], config: Config) -> list[Setting]:
    """Every method under every combination of values, but for those that cannot differ from another.

    Raises:
        InputError: an unknown method, a setting that decides nothing here, or no cell is left.
        ConfigError: a value that its setting cannot have.
    """
    if others := [key for key in vary if not key.startswith(VARIED)]:
        raise InputError(f"{others[0]} cannot be varied; settings of {', '.join(SECTIONS)} can")
    found: dict[Setting, None] = {}
    for method in methods:
        if method not in METHODS:
            raise InputError(f"there is no method {method!r}; known: {', '.join(METHODS)}")
        for combination in product(*vary.values()):
            values = dict(zip(vary, combination, strict=True))
            settled = config.replaced(values)
            if method == "full":
                values = {}
            elif method != "session":
                values = {key: value for key, value in values.items() if not _is_ours(key)}
                capped = bool(settled.compress.kv_budget)
                if (settled.compress.keep_ratio == 1.0 and not capped) or not isinstance(settled.codec.name, str):
                    continue
                values |= {"codec.name": "raw"} if method == "epicache" else {}  # its rows are as they were computed
            found[Setting(method, tuple(values.items()))] = None
    if not found:
        raise InputError("nothing is left to measure: baselines evict something and have no ranks to set codecs by")
    return list(found)


def _is_ours(key: str) -> bool:
    """Whether a setting matters to the session alone."""
    return key == "compress.scorer" or key.startswith("recall.")


class Grid:
    """Runs settings over cases.

    Args:
        task: "fidelity", "recall" or "locomo".
        engine: the model.
        config: all settings; a cell's values replace some.
        out: the file of JSON lines, appended to.
        listener: told of progress, cells done and in all.
        step: turns fed at once; more is faster, and segments get a little longer.
    """

    def __init__(self, task: str, engine: Engine, config: Config, out: Path, listener: Listener, step: int = 1) -> None:
        self.task, self.engine, self.config, self.out, self.listener = task, engine, config, out, listener
        self.step = step
        # Methods are compared by what they hold, so nothing comes back for a question but where that is asked for.
        self.unless: dict[str, Any] = {} if "recall.by" in config._given else {"recall.by": "off"}

    def run(self, cases: Sequence[Case], settings: Sequence[Setting]) -> list[Line]:
        """Lines of all cells, computed or found.

        Raises:
            InputError: two cases of one name, a case that is too long, or a file of something else.
        """
        if len({case.name for case in cases}) < len(cases):
            raise InputError("two of the conversations have the same name; rename a file")
        cases = [self._fitted(case) for case in cases]
        done = {line["key"]: line for line in read_lines([self.out])} if self.out.exists() else {}
        cells = {self._key(case, setting): (case, setting) for case in cases for setting in settings}
        left = [key for key in cells if key not in done]
        number = len(cells) - len(left)
        for case, keys in groupby(left, key=lambda key: cells[key][0]):
            mine = [*keys]
            with self._measuring(case, [cells[key][1] for key in mine]) as measure:
                for key in mine:
                    self.listener(Progress("evaluate", number, len(cells)))
                    setting, number = cells[key][1], number + 1
                    line = {"key": key, **self._describe(case, setting), **measure(setting)}
                    done[key] = line
                    with self.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
        self.listener(Progress("evaluate", len(cells), len(cells)))
        return [done[key] for key in cells]

    def _fitted(self, case: Case) -> Case:
        """The case, if it can be run. Raises InputError."""
        return fitted(self.engine, case)

    @contextmanager
    def _measuring(self, case: Case, settings: Sequence[Setting]) -> Iterator[Callable[[Setting], Line]]:
        """What measures the case under one of the settings."""
        truths = self._truths(case) if self.task == "fidelity" else {}
        yield lambda setting: self._measure(case, setting, truths)

    def _key(self, case: Case, setting: Setting) -> str:
        questions = [astuple(question) for question in case.questions]
        config, settled = self._settled(setting)
        model, how = self.engine.model, self.config.model
        run = [self.task, fingerprint_id(model.fingerprint), model.device.type, how.attention, how.prefill_chunk_size]
        run += [INSTRUMENT, ANSWER_TOKENS, torch.__version__, transformers.__version__, self.step]
        parts = [run, case.name, case.system, case.turns, questions, setting.method, settled]
        parts += [version(model, config.compress)]
        return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()

    def _settled(self, setting: Setting) -> tuple[Config, Line]:
        """All settings of a cell, and those that can vary as JSON has them."""
        config = self.config.replaced(self.unless | dict(setting.values))
        return config, config.model_dump(mode="json", include=set(SECTIONS))

    def _describe(self, case: Case, setting: Setting) -> Line:
        (config, settled), model = self._settled(setting), self.engine.model
        given = {f"{section}.{key}": value for section, values in settled.items() for key, value in values.items()}
        return {
            "task": self.task,
            "model": model.name,
            "dtype": model.fingerprint["dtype"],
            "device": model.device.type,
            "case": case.name,
            "method": setting.method,
            "settings": {} if setting.method == "full" else {**given, "eval.step": self.step},
            "scorer": config.compress.scorer,
            "keep": 1.0 if setting.method == "full" else config.compress.keep_ratio,
            "codec": "raw" if setting.method == "full" else "+".join(config.codec.names),
        }

    def _truths(self, case: Case) -> dict[str, Truth]:
        """What the full cache answers, computed once for all settings."""
        found = {}
        with self._conversation(Setting("full")) as conversation:
            for question in feed(conversation, case, self.listener, self.step):
                found[question.id] = truth(conversation, question)
        return found

    def _measure(self, case: Case, setting: Setting, truths: Mapping[str, Truth]) -> Line:
        begun, figures, notices = time.perf_counter(), [], list[str]()
        with self._conversation(setting) as conversation:
            for question in feed(conversation, case, lambda notice: notices.append(notice.text), self.step):
                with recalled(conversation, question.text):
                    measured = MEASURES[self.task](conversation, question, truths.get(question.id))
                    figures.append(about(question) | holding(conversation.residence) | measured)
        return {"questions": figures, "notices": notices, "seconds": round(time.perf_counter() - begun, 2)}

    def _conversation(self, setting: Setting) -> AbstractContextManager[Conversation]:
        """An empty conversation under a setting."""
        return new_conversation(self.engine, self._settled(setting)[0], METHODS[setting.method])


def fitted(engine: Engine, case: Case) -> Case:
    """The case, if the window has room for it, its questions and the passes that score it.

    Raises:
        InputError: it has not, or there is nothing to ask.
    """
    if not case.questions:
        raise InputError(f"{case.name} has no question to ask; use more of it, or another conversation")
    template, window = engine.model.template, engine.model.context_window
    tokens = sum(lengths(engine, case))
    longest = max(len(template.user(question.text, first=False).ids) for question in case.questions)
    room = window - longest - 256
    if tokens > room:
        raise InputError(
            f"{case.name} has {tokens} tokens, and the window of {engine.model.name} has room for {room} before "
            f"the questions; shorten it with --tokens {room // 500 * 500}"
        )
    return case


def shortened(engine: Engine, case: Case, tokens: int) -> Case:
    """As many of the case's first turns as have at most so many tokens."""
    turns, total = 0, 0
    for count in lengths(engine, case):
        total += count
        turns += total <= tokens
    if not turns:
        raise InputError(f"not even the first turn of {case.name} has so few tokens as {tokens}; give more")
    # Results of a part are not those of the whole.
    return replace(cut(case, turns), name=f"{case.name}:{turns}") if turns < len(case.turns) else case


def lengths(engine: Engine, case: Case) -> list[int]:
    """Tokens of each turn, the opening counted with the first."""
    template, counts, first = engine.model.template, list[int](), True
    tokens = len(template.system(case.system).ids)
    for turn in case.turns:
        for said in turn:
            tokens += len(template.message(said["role"], said["content"], first).ids)
            first = first and said["role"] != "user"
        counts.append(tokens)
        tokens = 0
    return counts


def mend(file: Path) -> None:
    """Make the file ready to be appended to: without a last line that a killed run left unfinished.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        text = file.read_bytes()
        file.write_bytes(text[: text.rfind(b"\n") + 1])
    file.open("a").close()


def read_lines(files: Sequence[Path]) -> list[Line]:
    """Lines of result files, the last of each key. Raises InputError for a file of another kind."""
    lines: dict[str, Line] = {}
    for file in files:
        for number, text in enumerate(file.read_bytes().splitlines(), 1):
            try:
                line = json.loads(text)
                known = line.keys() >= KEYS and bool(line["questions"])
            except (ValueError, AttributeError):
                known = False
            if not known:
                raise InputError(f"{file}: line {number} is no result of `kvchat eval`")
            lines[line["key"]] = line
    return list(lines.values())

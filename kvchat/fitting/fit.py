"""The whole of a fit: conversations to segments, some of them held out, segments to weights, weights to figures."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from kvchat import learned
from kvchat.anatomy import Anatomy
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.cases import Case
from kvchat.events import Listener, Progress, followed
from kvchat.fingerprint import digest
from kvchat.fitting import ridge, small
from kvchat.fitting.checkpoint import Checkpoint
from kvchat.fitting.collecting import Segment, collected
from kvchat.fitting.figures import Row, correlations, retained_masses
from kvchat.fitting.policies import Fit, Plan, Sample, written_form
from kvchat.learned import Kind

Form = Literal["ridge", "small", "best"]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit gave."""

    weights: dict[str, Tensor]
    rows: list[Row]
    """Figures on what was held out."""
    trained: int
    """Segments learned from."""
    held_out: int
    """Segments held out."""
    file: Path = field(default_factory=Path)


class Fitting:
    """One fit.

    Args:
        engine: the model.
        config: settings; `compress` says how conversations are cut into segments and where weights are written.
        listener: told of progress.
        work: folder of what is collected and of checkpoints, which stays; None: one that is removed in the end.
    """

    def __init__(self, engine: Engine, config: Config, listener: Listener, work: Path | None = None) -> None:
        self._engine, self._config, self._listener = engine, config, listener
        self._kept = work is not None
        self._work = (work or learned.folder(config.compress)) / "kvchat-fitting"

    def forget(self) -> None:
        """Begin anew: without what an earlier fit left."""
        shutil.rmtree(self._work, ignore_errors=True)

    def gate(self, cases: Sequence[Case], held_out: int, form: Form, steps: int, seed: int) -> Fitted:
        """Fit a gate to all but the last `held_out` cases and write it.

        Raises:
            InputError: too little to learn from, or a model whose parts have other names.
        """
        trained, tested = self._split(cases, held_out, "gate")
        model = self._engine.model
        groups = model.num_attention_heads // model.num_key_value_heads
        shape = small.Shape(model.num_hidden_layers, model.num_key_value_heads, groups)
        found: dict[str, dict[str, Tensor]] = {}
        if form != "small":
            found["ridge"] = followed(ridge.fitted(trained, shape.layers, model.device), self._listener)
        if form != "ridge":
            point = self._point("gate", trained, ["small", steps, seed])
            found["small"] = followed(small.fitted(trained, shape, steps, seed, point, model.device), self._listener)
            found["small"] = {name: part.half() for name, part in found["small"].items()}
        rows = [{"gate": name, **correlations(tested, weights)} for name, weights in found.items()]
        best = max(rows, key=lambda row: float(row["all pairs"]))
        return self._written("gate", Fitted(found[best["gate"]], rows, len(trained), len(tested)))

    def kvp(self, cases: Sequence[Case], held_out: int, plan: Plan) -> Fitted:
        """Fit policies to all but the last `held_out` cases and write them. Errors as for `gate`."""
        trained, tested = self._split(cases, held_out, "kvp")
        model, network = self._engine.model, Anatomy(self._engine.model)
        samples = [Sample(segment, network.rotate, model.device) for segment in trained]
        fit = Fit(samples, plan, self._point("kvp", trained, plan.name()))
        weights = written_form(followed(fit.run(), self._listener), model.num_hidden_layers)
        rows = retained_masses(tested, weights, network, model.device)
        return self._written("kvp", Fitted(weights, rows, len(trained), len(tested)))

    def _split(self, cases: Sequence[Case], held_out: int, kind: Kind) -> tuple[list[Segment], list[Segment]]:
        """Segments to learn from and to test on: those of the last cases, or of one case the last quarter."""
        if len(cases) > 1 and not 1 <= held_out < len(cases):
            raise InputError(f"{held_out} of {len(cases)} conversations cannot be held out; leave one to learn from")
        self._work.mkdir(parents=True, exist_ok=True)
        scored = [kind == "gate" or index >= len(cases) - held_out for index in range(len(cases))]
        parts = [
            self._usable(followed(self._collected(case, kind, how), self._listener), kind)
            for case, how in zip(cases, scored, strict=True)
        ]
        if len(parts) == 1:
            cut = len(parts[0]) - max(1, len(parts[0]) // 4)
            parts = [parts[0][:cut], parts[0][cut:]]
            held_out = 1
        trained, tested = ([one for part in some for one in part] for some in (parts[:-held_out], parts[-held_out:]))
        if not trained or not tested:
            raise InputError("there is too little to learn from and to test on; give longer conversations, or more")
        return trained, tested

    def _collected(self, case: Case, kind: Kind, scored: bool) -> Generator[Progress, None, list[Segment]]:
        return collected(self._engine, case, self._config, kind, self._work, scored)

    def _usable(self, segments: Sequence[Segment], kind: Kind) -> list[Segment]:
        """Those that say something: for policies, those with as much after them as a segment has."""
        least = self._config.compress.segment_min if kind == "kvp" else 0
        return [one for one in segments if one.num_later >= least and bool(one.candidates.any())]

    def _point(self, kind: Kind, segments: Sequence[Segment], how: Any) -> Checkpoint:
        """The checkpoint of a fit of these segments in this way."""
        name = digest([kind, how, [[one.file.parent.name, one.file.name] for one in segments]])
        return Checkpoint(self._work / f"{kind}.safetensors", name)

    def _written(self, kind: Kind, fitted: Fitted) -> Fitted:
        file = learned.save_weights(self._engine.model, kind, self._config.compress, fitted.weights)
        if not self._kept:
            self.forget()
        return Fitted(fitted.weights, fitted.rows, fitted.trained, fitted.held_out, file)

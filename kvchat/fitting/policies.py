"""Policies fitted to the attention of later turns (KVP, arXiv 2602.10238), one for each KV head, all at once.

Every step takes one segment of a conversation: its tokens are the candidates, and a pair matters as much as all later
segments attend to it. Differences from the paper: the candidates are a segment, as kvchat evicts by segments; by
default the gradient is the exact one of the expected reward in place of an estimate from orders drawn (see `orders`,
which has both); and in the end a head's scores are scaled, by a line that keeps their order, to the log of the
attention that one later token pays, so that heads compare.

Letters: A = L * H heads, T candidates, F numbers of a pair, h hidden units.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kvchat.compress.policies import NAMES, Rotate, features, policy_scores
from kvchat.events import Progress
from kvchat.fitting.checkpoint import Checkpoint
from kvchat.fitting.collecting import Segment
from kvchat.fitting.orders import drawn_loss, expected_loss
from kvchat.fitting.small import rate

MOST = 1024
"""Candidates of one step; of a longer segment so many are drawn."""
WARM = 100
"""Steps in which the rate rises."""
CLIP = 5.0
"""Largest norm of one head's gradient."""
SAVED = 50
"""Steps after which a checkpoint is written."""
LEAST = -25.0
"""Log attention is cut off here."""
HALF = 6e4
"""Weights are written in float16 and must lie within."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How policies are fitted. The paper's: 4000 steps of 256 units with rate 5e-5, from drawn orders.

    So many units are 1.6 MB for the built-in model. Measured on it, one conversation learned from and 60 steps: 0.2 and
    0.5 of the pairs retain 0.697 and 0.876 of the later attention by the exact gradient, 0.676 and 0.858 by drawn
    orders, which takes a quarter longer.
    """

    steps: int = 300
    hidden: int = 64
    rate: float = 3e-3
    decay: float = 0.1
    drawn: bool = False
    """Estimate the gradient from orders drawn, as the paper does."""
    seed: int = 0

    def name(self) -> dict[str, object]:
        """As a JSON value."""
        return asdict(self)


class Sample:
    """One segment's candidates as policies see them, and what later tokens paid; nothing is kept in memory."""

    def __init__(self, segment: Segment, rotate: Rotate, device: torch.device) -> None:
        self._segment, self._rotate, self._device = segment, rotate, device

    def inputs(self) -> Tensor:
        """(A, T, F) float32."""
        keys, values = (self._segment.tensor(name).to(self._device) for name in ("keys", "values"))
        layers, heads, tokens, dim = keys.shape
        keys, values = (part.view(layers * heads, tokens, dim) for part in (keys, values))
        found = features(keys, values, self._segment.start, self._rotate)
        return found[:, self._segment.candidates.to(self._device)]

    def importance(self) -> Tensor:
        """(A, T) float32: what one later token pays on average."""
        later = self._segment.later().to(self._device).flatten(0, 1) / self._segment.num_later
        return later[:, self._segment.candidates.to(self._device)]


class Fit:
    """Policies in the making.

    Args:
        samples: what is learned from.
        plan: how.
        point: where it is kept on the way.
    """

    def __init__(self, samples: Sequence[Sample], plan: Plan, point: Checkpoint) -> None:
        self._samples, self._plan, self._point = samples, plan, point
        self._mean, self._scale = _moments(samples[: max(8, len(samples) // 8)])
        weights = _begun(len(self._mean), self._mean.shape[2], plan)
        self.weights = {name: part.to(self._mean.device).requires_grad_() for name, part in weights.items()}
        self._optimizer = torch.optim.AdamW(self.weights.values(), lr=plan.rate, weight_decay=plan.decay)
        self.rewards: list[float] = []
        """Mean reward of each step since the fit began or went on; -1 is the best there is."""

    def run(self) -> Generator[Progress, None, dict[str, Tensor]]:
        """Weights of `Policies` for (A, ...) heads in one, float32."""
        done, steps = self._resume(), self._plan.steps
        for step in range(done, steps):
            self._step(step)
            if (step + 1) % SAVED == 0 or step + 1 == steps:
                self._keep(step + 1)
            yield Progress("fit", step + 1, steps)
        with torch.no_grad():
            return _comparable(self._plain(), self._samples)

    def _step(self, step: int) -> None:
        """Learn from one segment."""
        sample, source = self._drawn_sample(step)
        inputs, importance = sample.inputs(), sample.importance()
        if inputs.shape[1] > MOST:
            chosen = torch.randperm(inputs.shape[1], generator=source)[:MOST].to(inputs.device)
            inputs, importance = inputs[:, chosen], importance[:, chosen]
        scores = policy_scores(self.weights, (inputs - self._mean) * self._scale)
        losses = drawn_loss(scores, importance, source) if self._plan.drawn else expected_loss(scores, importance)
        self._optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self._clip()
        warm = min(WARM, self._plan.steps // 4 + 1)
        self._optimizer.param_groups[0]["lr"] = self._plan.rate * rate(step, self._plan.steps, warm)
        self._optimizer.step()
        self.rewards.append(-float(expected_loss(scores.detach(), importance).mean()))

    def _drawn_sample(self, step: int) -> tuple[Sample, torch.Generator]:
        """The step's segment, all once before any twice, and the step's randomness: a resumed fit has the same."""
        round_, place = divmod(step, len(self._samples))
        order = torch.randperm(len(self._samples), generator=torch.Generator().manual_seed(self._plan.seed + round_))
        source = torch.Generator().manual_seed(self._plan.seed * 1_000_003 + step)
        return self._samples[int(order[place])], source

    def _clip(self) -> None:
        """Every head is an agent of its own, so each has its own norm."""
        parts = [part.grad.view(len(part), -1) for part in self.weights.values() if part.grad is not None]
        norms = torch.cat([part.norm(dim=1, keepdim=True) for part in parts], dim=1).norm(dim=1, keepdim=True)
        for part in parts:
            part.mul_((CLIP / norms.clamp_min(1e-12)).clamp_max(1))

    def _plain(self) -> dict[str, Tensor]:
        """The weights for inputs as they are."""
        parts = {name: part.detach().clone() for name, part in self.weights.items()}
        parts["hidden"] *= self._scale.mT
        parts["hidden_bias"] -= (self._mean @ parts["hidden"])[:, 0]
        return parts

    def _keep(self, step: int) -> None:
        state = self._optimizer.state_dict()["state"]
        moments = {f"{index}.{name}": part for index, parts in state.items() for name, part in parts.items()}
        self._point.save(step, {**self.weights, **moments})

    def _resume(self) -> int:
        done, parts = self._point.load()
        if done:
            groups, states = self._optimizer.state_dict()["param_groups"], dict[int, dict[str, Tensor]]()
            for name in parts.keys() - NAMES:
                index, _, kind = name.partition(".")
                states.setdefault(int(index), {})[kind] = parts[name]
            self._optimizer.load_state_dict({"state": states, "param_groups": groups})
            with torch.no_grad():
                for name, part in self.weights.items():
                    part.copy_(parts[name])
        return done


def _moments(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of the inputs of each head, (A, 1, F)."""
    means, squares = zip(
        *((each.mean(1, keepdim=True), each.square().mean(1, keepdim=True)) for each in map(Sample.inputs, samples)),
        strict=True,
    )
    mean, square = (torch.stack(parts).mean(0) for parts in (means, squares))
    return mean, (square - mean.square()).clamp_min(1e-6).rsqrt()


def _begun(heads: int, width: int, plan: Plan) -> dict[str, Tensor]:
    """Weights to begin with: all tokens alike."""
    source = torch.Generator().manual_seed(plan.seed)
    return {
        "hidden": torch.randn(heads, width, plan.hidden, generator=source) * (2 / width) ** 0.5,
        "hidden_bias": torch.zeros(heads, plan.hidden),
        "out": torch.randn(heads, plan.hidden, generator=source) * 0.1 * plan.hidden**-0.5,
        "out_bias": torch.zeros(heads),
    }


def _comparable(weights: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The same orders in each head, scores scaled to log attention by least squares, and so that the mass is right."""
    pairs = [(policy_scores(weights, sample.inputs()), sample.importance()) for sample in samples]
    scores, paid = (torch.cat(parts, dim=1).double() for parts in zip(*pairs, strict=True))
    logs = paid.log().clamp_min(LEAST)
    spread = scores - scores.mean(1, keepdim=True)
    variance = spread.square().mean(1).clamp_min(1e-12)
    slope = ((spread * (logs - logs.mean(1, keepdim=True))).mean(1) / variance).clamp(1e-3 / variance.sqrt())
    level = paid.sum(1).clamp_min(1e-30).log() - (slope[:, None] * scores).logsumexp(1)
    line = slope.float(), level.float()
    out, bias = weights["out"] * line[0][:, None], weights["out_bias"] * line[0] + line[1]
    return {**weights, "out": out, "out_bias": bias}


def written_form(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of `Policies`: heads by layer, in float16 where that can hold them."""
    parts = {name: part.reshape(layers, -1, *part.shape[1:]).cpu() for name, part in weights.items()}
    fits = all(bool((part.abs() < HALF).all()) for part in parts.values())
    return {name: part.half() if fits else part for name, part in parts.items()}

"""What an order of tokens costs, and how scores are led to a cheaper one (KVP, arXiv 2602.10238).

An order keeps its first b tokens under a budget of b. What all budgets 1 .. T - 1 lose together is its cost: the token
at rank r (1 = best) is lost in r - 1 of them, so the cost is the sum of (r - 1) times importance.

Scores stand for a distribution of orders, Plackett-Luce: tokens are drawn one after the other, each with a probability
proportional to exp(score) among those left. The paper raises the reward, minus the cost over that of the best order, by
a policy gradient from orders drawn. Under Plackett-Luce token j comes before token i with probability
sigmoid(s_j - s_i), so the expected cost is known in closed form, and with it the gradient that the drawn orders only
estimate: `expected_cost` has no variance, `drawn_loss` is the paper's.

Letters: A heads, T tokens, K orders drawn of each head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DRAWN = 16
"""Orders drawn of each head; the paper does not say how many."""


def cost(order: Tensor, importance: Tensor) -> Tensor:
    """Cost (A, ...) of orders (A, ..., T), tokens from best to worst, by importance (A, T)."""
    ranks = torch.arange(order.shape[-1], dtype=importance.dtype, device=order.device)
    flat = order.flatten(1, -2) if order.dim() > 2 else order[:, None]
    found = (importance[:, None].expand(flat.shape).gather(2, flat) * ranks).sum(2)
    return found.view(order.shape[:-1])


def best_cost(importance: Tensor) -> Tensor:
    """Cost (A,) of the order by falling importance (A, T), never 0."""
    tiny = torch.finfo(importance.dtype).tiny
    return cost(importance.argsort(dim=1, descending=True), importance).clamp_min(tiny)


def drawn(scores: Tensor, source: torch.Generator, count: int = DRAWN) -> Tensor:
    """Orders (A, K, T) drawn by Plackett-Luce scores (A, T): scores with Gumbel noise, sorted."""
    noise = torch.rand(len(scores), count, scores.shape[1], generator=source, device=source.device)
    gumbel = -(-noise.clamp_min(1e-20).log()).clamp_min(1e-20).log()
    return (scores.detach()[:, None] + gumbel.to(scores.device)).argsort(dim=2, descending=True)


def log_likelihood(scores: Tensor, orders: Tensor) -> Tensor:
    """Log-probability (A, K) of orders (A, K, T) by scores (A, T), in float32."""
    placed = scores.float()[:, None].expand(orders.shape).gather(2, orders)
    left = placed.flip(2).logcumsumexp(2).flip(2)
    return (placed - left).sum(2)


def advantages(rewards: Tensor) -> Tensor:
    """Of rewards (A, K): each less the mean of the others (leave one out), over the deviation of all."""
    count = rewards.shape[1]
    above = (rewards - rewards.mean(1, keepdim=True)) * (count / (count - 1))
    return above / rewards.std(1, keepdim=True).clamp_min(1e-8)


def drawn_loss(scores: Tensor, importance: Tensor, source: torch.Generator) -> Tensor:
    """(A,) whose gradient is the paper's estimate, from orders drawn."""
    orders = drawn(scores, source)
    rewards = -cost(orders, importance) / best_cost(importance)[:, None]
    return -(advantages(rewards) * log_likelihood(scores, orders)).mean(1)


def expected_loss(scores: Tensor, importance: Tensor) -> Tensor:
    """(A,): the expected cost over that of the best order, minus the paper's expected reward."""
    return expected_cost(scores, importance) / best_cost(importance)


def expected_cost(scores: Tensor, importance: Tensor) -> Tensor:
    """Expected cost (A,) of an order drawn by Plackett-Luce scores (A, T); differentiable by the scores."""
    result: Tensor = _ExpectedCost.apply(scores, importance)  # type: ignore[no-untyped-call]
    return result


class _ExpectedCost(torch.autograd.Function):
    """Head by head, so that the (T, T) numbers of all heads never exist."""

    @staticmethod
    def forward(context: Any, scores: Tensor, importance: Tensor) -> Tensor:
        costs, gradients = [], []
        for score, weight in zip(scores.float(), importance.float(), strict=True):
            before = torch.sigmoid(score[None] - score[:, None])  # [i, j]: j comes before i
            costs.append(before.sum(1).sub_(0.5) @ weight)
            slope = before.addcmul_(before, before, value=-1)
            gradients.append(slope @ weight - slope.sum(1) * weight)
        context.save_for_backward(torch.stack(gradients))
        return torch.stack(costs)

    @staticmethod
    def backward(context: Any, given: Tensor) -> tuple[Tensor, None]:
        (gradients,) = context.saved_tensors
        return given[:, None] * gradients, None

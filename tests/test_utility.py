"""What KV is worth, and what gives way: facts on made-up figures, the greedy against the plain one and the best."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise, product

import pytest

from kvchat.utility import (
    DISK,
    HOST,
    MEMORY,
    Chunk,
    Context,
    Costs,
    Decision,
    Place,
    Uses,
    load_s,
    make_room,
    options,
    qualities,
    quality,
    taken,
    utility,
)

COSTS = Costs(disk=1e9, decode=5e8, fixed_s=0.0005, prefill=500.0)


@dataclass(frozen=True)
class Ranks:
    sizes: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    method: str = "kvzip"


def made_up(source: random.Random, count: int, most: int = 5) -> list[Context]:
    """Contexts of different use, whose chunks are worth less and less."""
    contexts = []
    for index in range(count):
        weights = sorted((source.random() for _ in range(source.randint(1, most))), reverse=True)
        sizes = [source.randint(1, 50) * 10_000 for _ in weights]
        chunks = tuple(Chunk(w / sum(weights), 2 * size, size) for w, size in zip(weights, sizes, strict=True))
        coarser = (0.56, 0.99) if source.random() < 0.7 else None
        contexts.append(Context(f"c{index}", source.randint(100, 800), source.random() * 3, chunks, coarser))
    return contexts


def whole(contexts: list[Context]) -> list[Place]:
    return [Place(*[len(context.chunks)] * 3) for context in contexts]


def used(contexts: list[Context], places: list[Place], tier: int) -> int:
    return sum(taken(context, place, tier) for context, place in zip(contexts, places, strict=True))


def plainly(contexts: list[Context], caps: dict[int, float]) -> tuple[list[Place], list[tuple[int, Place]]]:
    """`make_room`, looking at every option of every context before every step."""
    places, steps = whole(contexts), []
    for tier in (MEMORY, HOST, DISK):
        while used(contexts, places, tier) > caps.get(tier, math.inf):
            found = []
            for index, context in enumerate(contexts):
                for number, option in enumerate(options(context, places[index], tier)):
                    if (freed := taken(context, places[index], tier) - taken(context, option, tier)) > 0:
                        drop = utility(context, places[index], COSTS) - utility(context, option, COSTS)
                        found.append((drop / freed, index, number, option))
            if not found:
                break
            _, index, _, option = min(found, key=lambda one: one[:3])
            places[index] = option
            steps.append((index, option))
    return places, steps


@pytest.mark.parametrize("seed", range(30))
def test_room_is_made_as_by_looking_at_everything_before_every_step(seed: int) -> None:
    source = random.Random(seed)
    contexts = made_up(source, source.randint(1, 12))
    total = used(contexts, whole(contexts), MEMORY)
    caps = {tier: source.random() * total / (tier + 1) for tier in (MEMORY, HOST, DISK)}
    places, decisions = make_room(contexts, whole(contexts), caps, COSTS)
    assert (places, [(one.index, one.after) for one in decisions]) == plainly(contexts, caps)
    assert all(used(contexts, places, tier) <= cap for tier, cap in caps.items())


@pytest.mark.parametrize("seed", range(20))
def test_a_smaller_cap_leaves_part_of_what_a_larger_one_leaves(seed: int) -> None:
    source = random.Random(seed)
    contexts = made_up(source, 8)
    total = used(contexts, whole(contexts), MEMORY)
    for tier, pick in ((MEMORY, "memory"), (DISK, "disk")):
        left: list[list[int]] = []
        for cap in (0.9, 0.6, 0.3, 0.1):
            places, _ = make_room(contexts, whole(contexts), {tier: cap * total / (1 + (tier == DISK))}, COSTS)
            left.append([getattr(place, pick) for place in places])
        for larger, smaller in pairwise(left):
            assert all(low <= high for low, high in zip(smaller, larger, strict=True))


def best_of(contexts: list[Context], cap: float) -> float:
    """The greatest utility that any choice of places on disk has, of those that fit."""
    every = []
    for context in contexts:
        of_one = [Place(0, 0, count, coarse) for count in range(1, len(context.chunks) + 1) for coarse in (False, True)]
        every.append([Place(0, 0, 0), *(one for one in of_one if context.coarser or not one.coarse)])
    fitting = (places for places in product(*every) if used(contexts, list(places), DISK) <= cap)
    return max(sum(utility(*pair, COSTS) for pair in zip(contexts, places, strict=True)) for places in fitting)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_is_worth_nearly_as_much_as_the_best_choice_that_fits(seed: int) -> None:
    source = random.Random(seed)
    contexts = made_up(source, 4, most=3)
    begin = [Place(0, 0, len(context.chunks)) for context in contexts]
    cap = source.uniform(0.2, 0.9) * used(contexts, begin, DISK)
    places, decisions = make_room(contexts, begin, {DISK: cap}, COSTS)
    got = sum(utility(*pair, COSTS) for pair in zip(contexts, places, strict=True))
    best = best_of(contexts, cap)
    # What the greedy misses is, as with any knapsack, at most what its steps took too much of.
    assert best - sum(max(0.0, one.drop) for one in decisions) <= got <= best + 1e-9
    assert got > 0.75 * best


def test_the_least_used_gives_way_and_only_moves_where_that_costs_little() -> None:
    chunks = tuple(Chunk(part, 200_000, 100_000) for part in (0.7, 0.2, 0.1))
    contexts = [Context("often", 500, 5.0, chunks), Context("seldom", 500, 0.1, chunks)]
    places, decisions = make_room(contexts, whole(contexts), {MEMORY: 600_000}, COSTS)
    assert places == [Place(3, 3, 3), Place(0, 3, 3)]
    assert [one.name for one in decisions] == ["seldom"] * 3
    assert str(decisions[0]).startswith("seldom: a chunk moves to host (3/3/3 -> 2/3/3): frees 0.20 MB of memory for ")


def test_a_chunk_that_is_not_worth_its_loading_is_given_up_and_text_is_left_where_computing_is_quick() -> None:
    chunks = (Chunk(1.0, 200, 100), Chunk(0.0, 2_000_000, 1_000_000))
    (place,), (decision,) = make_room([Context("a", 500, 1.0, chunks)], [Place(2, 2, 2)], {MEMORY: 200}, COSTS)
    assert place == Place(1, 1, 1) and "last chunk is given up" in str(decision)
    quick = Costs(disk=1e3, decode=1e3, fixed_s=0.1, prefill=1e9)
    (place,), (decision,) = make_room([Context("a", 500, 1.0, chunks[:1])], [Place(0, 0, 1)], {DISK: 0}, quick)
    assert place == Place(0, 0, 0) and decision.drop < 0 and "only text is left" in str(decision)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_only_to_move_is_neither_given_up_nor_written_anew(seed: int) -> None:
    source, slow = random.Random(seed), Costs(disk=1e3, decode=1e3, fixed_s=1.0, prefill=1e9)
    contexts = made_up(source, 8)
    caps = {tier: source.random() * used(contexts, whole(contexts), MEMORY) / 2 for tier in (MEMORY, HOST)}
    places, decisions = make_room(contexts, whole(contexts), caps, slow, moving=True)
    assert [place.disk for place in places] == [len(context.chunks) for context in contexts]
    assert all(used(contexts, places, tier) <= cap for tier, cap in caps.items())
    assert decisions and all("moves to" in str(one) and one.drop > 0 for one in decisions)
    assert any(
        place.disk < len(context.chunks)
        for place, context in zip(make_room(contexts, whole(contexts), caps, slow)[0], contexts, strict=True)
    )


def test_a_codec_gets_coarser_once_and_takes_and_is_worth_less() -> None:
    context = Context("a", 50_000, 1.0, (Chunk(0.9, 200, 100), Chunk(0.1, 200, 100)), (0.5, 0.9))
    coarse = Place(0, 0, 2, coarse=True)
    (place,), decisions = make_room([context], [Place(0, 0, 2)], {DISK: 100}, COSTS)
    assert [one.after for one in decisions] in ([coarse], [Place(0, 0, 1)])
    assert taken(context, coarse, DISK) == 100 and quality(context, coarse) == pytest.approx(0.9)
    assert load_s(context, coarse, COSTS) < load_s(context, Place(0, 0, 2), COSTS)
    assert not any(option.coarse and option.disk == 2 for option in options(context, coarse, DISK))
    assert place.disk and taken(context, place, DISK) <= 100


def test_qualities_of_a_session_add_up_to_one_and_compare_what_was_ranked_alike() -> None:
    good, poor = Ranks((10, 20, 70), (0.9, 0.5, 0.1)), Ranks((10, 20, 70), (0.3, 0.1, 0.0))
    other = Ranks((50, 50), (-1.0, -3.0), "knorm")
    first, second, third = qualities([good, poor, other])
    assert sum(first) + sum(second) + sum(third) == pytest.approx(1)
    assert sum(third) == pytest.approx(1 / 3) and third[0] == pytest.approx(0.25)
    assert sum(first) / sum(second) == pytest.approx(26 / 5)
    untold = qualities([Ranks((10, 90))])[0]
    assert untold[0] / 10 > untold[1] / 90 and qualities([Ranks((4,), (0.0,))]) == [(0.0,)]
    assert qualities([Ranks((1, 1), (2.0, 0.4), "kvzip-coverage")])[0] == pytest.approx((0.75, 0.25))


def test_uses_fade() -> None:
    uses = Uses(tau_s=10)
    uses.add("a", 0.0)
    uses.add("a", 10.0, 2.0)
    assert uses.frequency("a", 10.0) == pytest.approx(2 + math.exp(-1))
    assert uses.frequency("a", 20.0) == pytest.approx((2 + math.exp(-1)) / math.e)
    assert uses.frequency("a", 5.0) == uses.frequency("a", 10.0) and uses.frequency("b", 1.0) == 0
    uses.forget("a")
    assert uses.frequency("a", 10.0) == 0


def test_a_decision_says_what_from_where_to_where_and_why() -> None:
    said = str(Decision(0, "trip 0-512", DISK, Place(1, 2, 3), Place(0, 0, 0), 1_500_000, 0.25, 0.5))
    assert (
        said
        == "trip 0-512: only text is left (1/2/3 -> text only): frees 1.50 MB of disk for 0.25 s of use, used 0.5 times"
    )

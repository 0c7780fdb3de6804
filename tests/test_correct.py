"""What "correct" means, on tiny random models of several families: the points that need no store.

Turns are sealed with random scores, so that some heads keep nothing, and everything is compared with the same network
under plain dense attention, in which evicted pairs are masked per head.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from kvchat.cache.layer import Piece, RaggedLayer
from kvchat.cache.segment import Ranking
from kvchat.codecs import SegmentHeader, encode_segment
from kvchat.compress.compressor import chunks_within, rank
from kvchat.engine import Engine
from kvchat.residence.tiers import Resident, Tiers
from kvchat.supported import cache_keyword
from tests.tiny import make_model

TURNS = [list(range(5, 45)), [7], list(range(90, 121)), list(range(30, 47))]
"""Token ids of four turns, one of them of one token."""

CUTS = (0.1, 0.3, 0.6, 1.0)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

FAMILIES = [
    ("llama", {"heads": 4, "kv_heads": 4}),
    ("qwen2", {"heads": 6, "kv_heads": 2}),
    ("qwen3", {"heads": 7, "kv_heads": 1}),
    ("mistral", {"heads": 4, "kv_heads": 2}),
    ("phi3", {"heads": 4, "kv_heads": 2}),
]


def counts_of(layer: RaggedLayer) -> list[list[int]]:
    """Rows of each attached piece, per head."""
    counts: dict[tuple[int, int], list[int]] = {}
    for form in layer.forms:
        for head, _, rows, _, start, chunk in form.runs.tolist():
            counts.setdefault((start, chunk), [0] * form.num_heads)[head] = rows
    return list(counts.values())


class Played:
    """Turns played into a cache; each is sealed with seeded random scores, all but the last."""

    def __init__(
        self, engine: Engine, keep: float = 1.0, codec: str = "raw", turns: list[list[int]] | None = None
    ) -> None:
        self.engine = engine
        self.cache = engine.new_cache()
        self.frames: dict[str, dict[tuple[int, int], bytes]] = {}
        self.headers: dict[str, SegmentHeader] = {}
        self.tiers = Tiers(self.cache, self.fetch, ThreadPoolExecutor(1))
        *finished, self.open = turns or TURNS
        for number, turn in enumerate(finished):
            engine.forward(self.cache, turn)
            self.seal(str(number), keep, codec)

    def fetch(self, segment: str, chunks: Any) -> Any:
        return [(c, g, partial(bytes, blob)) for (c, g), blob in self.frames[segment].items() if c in chunks]

    def seal(self, name: str, keep: float, codec: str) -> None:
        start, tokens = self.cache.tail_start, self.cache.tail_length
        tail = [layer.tail() for layer in self.cache.layers]
        keys, values = [k for k, _ in tail], [v for _, v in tail]
        generator = torch.Generator().manual_seed(start)
        scores = torch.rand(len(keys), len(keys[0]), tokens, generator=generator)
        # Most of head 0 of the first layer is worth nothing: it is evicted whole.
        scores[0, 0] = 0
        ranking = rank(scores, [False] * tokens, CUTS, start)
        header, frames = encode_segment(codec, keys, values, ranking)
        self.headers[name] = header
        self.frames[name] = {(chunk, group): blob for chunk, group, blob in frames}
        held = chunks_within(ranking.sizes, keep)
        resident = Resident(name, header, start + tokens, held)
        self.tiers.add({resident: self.tiers.load(resident).pieces()}, tail=tokens)

    def logits(self) -> Tensor:
        """Logits of every token of the open turn, computed on a scratch tail."""
        with self.cache.scratch():
            return self.engine.forward(self.cache, self.open, logits=len(self.open))

    def hold(self, keep: float) -> None:
        self.tiers.hold({one.id: chunks_within(one.header.ranking.sizes, keep) for one in self.tiers.residents})


def dense_logits(engine: Engine, rankings: list[tuple[Ranking, int]]) -> Tensor:
    """The open turn's logits under dense attention; turn t's chunks from `held` on are hidden from later turns."""
    network, hidden, device = engine.model.network, {}, engine.model.device

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        groups, new, length = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        evicted = torch.zeros(key.shape[1], length, dtype=torch.bool, device=device)
        for low, part in hidden.items():
            evicted[:, low : low + part.shape[2]] = torch.from_numpy(part[module.layer_idx]).to(device)
        future = torch.ones(new, length, dtype=torch.bool, device=device).triu(length - new + 1)
        unseen = (evicted[:, None] | future).repeat_interleave(groups, 0)
        key, value = (part[0].repeat_interleave(groups, 0).float() for part in (key, value))
        weights = (query[0].float() @ key.mT * scaling).masked_fill(unseen, -torch.inf).softmax(-1)
        return (weights @ value).to(query.dtype).transpose(0, 1)[None], None

    AttentionInterface.register("dense_masked", attention)
    network.set_attn_implementation("dense_masked")
    cache = DynamicCache()
    try:
        with torch.inference_mode():
            for number, turn in enumerate(TURNS):
                output = network(torch.tensor([turn], device=device), use_cache=True, **{cache_keyword(network): cache})
                if number < len(rankings):
                    ranking, held = rankings[number]
                    hidden[ranking.start] = ranking.chunk_of >= held
    finally:
        network.set_attn_implementation("kvchat")
    return output.logits[0]


@pytest.fixture(params=FAMILIES, ids=[name for name, _ in FAMILIES], scope="module")
def family(request: pytest.FixtureRequest) -> tuple[str, dict[str, int]]:
    return request.param


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"], scope="module")
def engine(request: pytest.FixtureRequest, family: tuple[str, dict[str, int]], device: str) -> Engine:
    return Engine(make_model(family[0], request.param, device=device, **family[1]), 16)


def assert_dense(engine: Engine, actual: Tensor, rankings: list[tuple[Ranking, int]]) -> None:
    """In float32 every logit is within 1e-4 of dense attention's. In bfloat16, which rounds every layer's states,
    the logits are no further from the truth (the same weights in float32) than dense attention's own are.
    """
    dense = dense_logits(engine, rankings).float()
    if engine.model.dtype == torch.float32:
        assert (actual - dense).abs().max() < 1e-4
        return
    wide = replace(engine.model, network=deepcopy(engine.model.network).float(), dtype=torch.float32)
    truth = dense_logits(Engine(wide, engine.chunk_size), rankings)
    assert (actual.float() - truth).abs().mean() < 1.25 * (dense - truth).abs().mean()
    assert (actual.float() - dense).abs().mean() < 2e-2


def test_keeping_everything_exactly_equals_dense_attention(engine: Engine) -> None:
    assert_dense(engine, Played(engine).logits(), [])


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6])
def test_evicted_pairs_never_influence_later_turns(engine: Engine, keep: float) -> None:
    played = Played(engine, keep)
    residents = played.tiers.residents
    assert any(0 in counts for layer in played.cache.layers for counts in counts_of(layer))
    assert_dense(engine, played.logits(), [(one.header.ranking, one.chunks) for one in residents])


@pytest.mark.parametrize("codec", ["raw", "k8v8"])
def test_shrinking_twice_equals_sealing_small_and_growing_back_is_exact(engine: Engine, codec: str) -> None:
    first, *_ = [Played(engine, 1.0, codec, [TURNS[0], TURNS[2]])]
    whole = first.logits()
    first.hold(0.6)
    first.hold(0.1)
    small = Played(engine, 0.1, codec, [TURNS[0], TURNS[2]])
    assert torch.equal(first.logits(), small.logits())
    assert not torch.equal(first.logits(), whole)
    first.hold(0.3)
    first.hold(1.0)
    assert torch.equal(first.logits(), whole)


@pytest.mark.parametrize("codec", ["raw", "k8v8"])
def test_a_frozen_segment_never_changes_when_later_turns_arrive(engine: Engine, codec: str) -> None:
    played = Played(engine, 0.6, codec, TURNS[:2])
    frames = dict(played.frames["0"])
    rows = [layer.sealed.keys[: int(layer.sealed.cu_seqlens[1])].clone() for layer in played.cache.layers]
    engine.forward(played.cache, TURNS[1])
    played.seal("later", 0.6, codec)
    assert played.frames["0"] == frames
    for layer, before in zip(played.cache.layers, rows, strict=True):
        assert torch.equal(layer.sealed.keys[: len(before)], before)


def test_the_order_of_attach_and_detach_does_not_matter(engine: Engine) -> None:
    played = Played(engine, 0.6)
    before = played.logits()
    played.tiers.hold({"0": 1, "1": 1, "2": 2})
    played.tiers.hold({"2": 4})
    played.tiers.hold({"1": 4, "0": 4})
    played.hold(0.6)
    assert torch.equal(played.logits(), before)


def test_what_cannot_be_read_leaves_residents_and_cache_agreeing(engine: Engine) -> None:
    played = Played(engine, 0.1)
    small, tiers = [one.chunks for one in played.tiers.residents], played.tiers
    wanted = {one.id: one.header.ranking.num_chunks for one in tiers.residents}
    tiers.hold(wanted)
    whole = played.logits()
    played.hold(0.1)
    good = dict(played.frames)

    def agree() -> bool:
        return played.cache.pieces == [
            Piece(one.start, chunk) for one in tiers.residents for chunk in range(one.chunks)
        ]

    for name, held in (("0", small[0]), ("2", small[2])):
        played.frames[name] = {at: blob if at[0] < held else blob[:-1] for at, blob in good[name].items()}
    assert [one.id for one in tiers.hold(wanted)] == ["0", "2"]
    assert [one.chunks for one in tiers.residents] == [small[0], wanted["1"], small[2]] and agree()
    played.hold(0.1)
    played.frames = {name: frames for name, frames in good.items() if name != "2"}
    with pytest.raises(KeyError):
        tiers.hold(wanted)
    assert agree()
    played.frames = good
    assert not tiers.hold(wanted) and agree()
    assert torch.equal(played.logits(), whole)


def test_forgetting_a_turn_equals_never_having_had_it(engine: Engine) -> None:
    played, shorter = Played(engine, 0.6), Played(engine, 0.6, turns=[*TURNS[:2], TURNS[3]])
    played.tiers.crop(len(TURNS[0]) + len(TURNS[1]))
    assert torch.equal(played.logits(), shorter.logits())


def test_cropping_inside_a_segment_keeps_its_earlier_rows_as_they_were(engine: Engine) -> None:
    played, cut = Played(engine, 0.6), 25
    played.tiers.crop(cut)
    assert played.cache.num_seen == cut
    for layer in played.cache.layers:
        rows = layer.sealed
        assert (rows.positions < cut).all()
        assert sum(map(sum, counts_of(layer))) == rows.num_kept == int(rows.cu_seqlens[-1])
    before = played.logits()
    played.hold(0.1)
    played.hold(0.6)
    assert torch.equal(played.logits(), before)


def test_positions_go_on_from_the_logical_length(engine: Engine) -> None:
    played = Played(engine, 0.1)
    assert played.cache.num_seen == sum(map(len, TURNS[:-1]))
    assert played.cache.num_sealed_rows < played.cache.num_seen * engine.model.num_key_value_heads


def test_eviction_frees_memory(engine: Engine) -> None:
    model = engine.model
    pair = 2 * model.head_dim * model.dtype.itemsize
    dense = sum(map(len, TURNS[:-1])) * model.num_hidden_layers * model.num_key_value_heads * pair
    played = Played(engine, 1.0)
    assert played.cache.sealed_bytes == dense
    played.hold(0.3)
    # A segment of one token cannot be cut finer than its first chunk.
    assert played.cache.sealed_bytes <= 0.3 * dense

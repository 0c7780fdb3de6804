"""One token through the network from fixed buffers: on a CUDA device a graph that is captured once and then replayed.

Launching a step's kernels one by one from Python takes several times as long as the kernels themselves. A graph holds
addresses, so everything that a step reads or writes lies in buffers that stay: the token, its position, the length of
the tail, the tail's room, and the plans that say where sealed rows lie. Sealing, attaching and rewinding overwrite the
contents of the plans; only a tail that outgrows its room, or plans whose tables must grow, make another capture
necessary. Small modules of the network run as one kernel each (`fused`).

Letters: V vocabulary, H KV heads, G query heads per KV head, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvchat.anatomy import Anatomy
from kvchat.attention.ragged_decode import DecodePlan, Shape
from kvchat.attention.turned import TurnedQuery
from kvchat.cache.coded import Form
from kvchat.cache.layer import RaggedLayer
from kvchat.cache.ragged import SegmentedCache
from kvchat.fused import Forward, fused, prove
from kvchat.model import Model

ROOM = 1
"""Rows that a capture writes to beyond the tail."""


class DecodeStep:
    """The steps of one cache, which is given to every call and must be the same.

    Args:
        model: the loaded model.
        capture: as a CUDA graph; else the same kernels are launched one by one.
    """

    def __init__(self, model: Model, capture: bool) -> None:
        self._model = model
        self._capture = capture
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._position = torch.zeros_like(self._token)
        self._row = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._length = torch.zeros(1, dtype=torch.int32, device=model.device)
        shape = model.num_attention_heads, model.head_dim, model.dtype, model.device
        self._turned = TurnedQuery(Anatomy(model).rotate, *shape)
        self._forwards: dict[nn.Module, Forward] | None = None
        self._plans: list[DecodePlan] = []
        self._forms: frozenset[Form] = frozenset()
        self._read: list[int] = []
        """Versions of the layers that the plans were brought up to; not their rows, which a seal replaces."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._captured: list[int] = []

    @torch.inference_mode()
    def begin(self, cache: SegmentedCache) -> None:
        """Take over where the cache stands, whatever happened to it since the last step."""
        for layer in cache.layers:
            layer.reserve(ROOM)
        if self._forwards is None:
            self._forwards = prove(self._model.network)
        same = self._plan(cache)
        if self._capture and not (same and self._captured == _addresses(cache)):
            self._record(cache)
        self._count(cache)

    def _plan(self, cache: SegmentedCache) -> bool:
        """Bring the plans up to what is sealed; whether a graph that was captured before still reads it."""
        forms = frozenset(form.form for layer in cache.layers for form in layer.forms)
        same = bool(self._plans) and forms <= self._forms
        if not same:
            self._forms |= forms
            self._plans = [self._new_plan() for _ in cache.layers]
            self._read = [-1 for _ in cache.layers]
        shifts = [_shifts(layer) for layer in cache.layers]
        same &= self._turned.arrange({shift for some in shifts for shift in some.values()})
        for index, (plan, layer) in enumerate(zip(self._plans, cache.layers, strict=True)):
            if self._read[index] != layer.version:
                variants = self._turned.variants(shifts[index])
                same &= plan.update([(form, plan.work(form, variants)) for form in layer.forms])
                self._read[index] = layer.version
        return same

    @torch.inference_mode()
    def run(self, cache: SegmentedCache, token: Tensor) -> Tensor:
        """Append `token` (1,); its logits (V,), which the next step overwrites. Nothing waits for the device."""
        if cache.tail_length + 1 > cache.layers[0].room:
            self.begin(cache)
        self._token.copy_(token.view(1, 1))
        if self._graph is None:
            self._logits = self._forward(cache)
        else:
            self._graph.replay()
        for layer in cache.layers:
            layer.tail_length += 1
        assert self._logits is not None
        return self._logits

    def attend(self, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention of the new token in layer `index`: (H * G, 1, D) queries, the tail's whole room (H, C, D)."""
        out = torch.empty_like(query)
        queries = self._turned.of(query.view(len(query), -1))
        self._plans[index].run(queries, keys, values, self._length, out.view(len(query), -1), scale)
        return out

    def _new_plan(self) -> DecodePlan:
        model = self._model
        groups = model.num_attention_heads // model.num_key_value_heads
        shape = Shape(model.num_key_value_heads, groups, model.head_dim)
        return DecodePlan.tuned(shape, sorted(self._forms), model.device)

    def _count(self, cache: SegmentedCache) -> None:
        """Set the device's counters to just before the next token."""
        self._position.fill_(cache.position - 1)
        self._row.fill_(cache.tail_length - 1)
        self._length.fill_(cache.tail_length)

    def _forward(self, cache: SegmentedCache) -> Tensor:
        for counter in (self._position, self._row, self._length):
            counter += 1
        assert self._forwards is not None
        with cache.stepping(self, self._row), fused(self._forwards):
            output: Tensor = self._model.network(
                input_ids=self._token,
                position_ids=self._position,
                segmented_cache=cache,
                use_cache=True,
                logits_to_keep=1,
                **{self._model.cache_keyword: cache},
            ).logits
        return output[0, -1]

    def _record(self, cache: SegmentedCache) -> None:
        """Capture the step. Rows that this writes lie beyond the tail's length, where nobody reads them."""
        self._graph = None
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled, workspaces made
                self._count(cache)
                self._forward(cache)
        torch.cuda.current_stream().wait_stream(stream)
        self._count(cache)
        graph = torch.cuda.CUDAGraph()
        # Other threads may decode frames meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._forward(cache)
        self._graph, self._captured = graph, _addresses(cache)


def _shifts(layer: RaggedLayer) -> dict[int, int]:
    """By how many positions the keys of attached segments are to be turned, by their start; none is 0."""
    attached = {piece.start for piece in layer.pieces} if layer.shifts else set()
    return {start: by for start, by in layer.shifts.items() if by and start in attached}


def _addresses(cache: SegmentedCache) -> list[int]:
    """Where the buffers lie that may move."""
    return [part.data_ptr() for layer in cache.layers for part in (layer.keys, layer.values)]

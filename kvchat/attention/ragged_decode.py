"""Decoding one token over a ragged cache on a CUDA device: rows lie as they were encoded, split along keys.

One launch for each form of rows, the first of which serves the tail too, then one that joins the partial results of
each query head (the scheme of Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Key scales are
folded into the query and value scales into the weights, so that nothing is dequantised number by number; rotated values
are rotated back once, after the sum. `run` neither allocates nor waits for the device, and reads everything that a seal
changes from buffers of its own: a CUDA graph that holds it stays valid. Rows of segments that have moved are read with
a variant of the query that is turned the other way (`turned`).

Letters: H KV heads, G query heads per KV head, V variants of the query, C room of the tail, D head_dim, P programs of a
form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kvchat.attention import overlaps
from kvchat.attention.decode_combine import combine
from kvchat.attention.decode_kernel import attend_rows
from kvchat.attention.worklist import UNMOVED, WorkList
from kvchat.cache.coded import GROUP, CodedKV, Form
from kvchat.codecs.rotate import back_rotation

Part = tuple[CodedKV, WorkList]


@dataclass(frozen=True)
class Tuning:
    """How one form is launched.

    tile      rows a step, the same for each warp; 32 each where keys have 4 bits
    warps     of a program
    stages    one more than the tiles that are under way at once
    programs  P, at least
    packed    two words an instruction through inline assembly, where there are codes
    registers at most so many a thread, or as many as the compiler likes
    """

    tile: int
    warps: int
    stages: int
    programs: int
    packed: bool = True
    registers: int | None = None

    @property
    def tail_tile(self) -> int:
        """Rows a step in the tail: few enough for the buffers of one warp."""
        return 16 if self.warps == 1 else 32

    @property
    def tail_stages(self) -> int:
        """Stages of the tail: fewer where many programs share the buffers of a multiprocessor."""
        return 3 if self.warps == 4 else 2

    @classmethod
    def of(cls, form: Form, multiprocessors: int, head_dim: int = 128) -> Tuning:
        """Defaults."""
        if form.key_bits == 4:
            # Of the variants timed on an H100 the fastest; a few fewer than fit, for the programs of the tail.
            return cls(2 * GROUP, 2, 3, max(multiprocessors, (6 if head_dim <= 128 else 4) * multiprocessors - 64))
        tile = 64 if form == Form(16, 16) else 128
        return cls(tile if head_dim <= 128 else tile // 2, 4, 3, 2 * multiprocessors)


@dataclass(frozen=True)
class Shape:
    """Of all layers: H, G, D, and the soft cap of the logits (0: none)."""

    kv_heads: int
    groups: int
    head_dim: int
    softcap: float = 0.0


@dataclass
class DecodePlan:
    """What the kernels read and write for one layer: tables that a seal overwrites in place, and partial results.

    forms        every form that `update` may ever bring, with its tuning; an absent one costs a launch
    tail_splits  programs of each head's tail
    max_tiles    tiles of a form that the tables have room for
    overlap      launch the kernel that joins partial results while these are computed; compute capability 9 or newer
    """

    shape: Shape
    forms: Mapping[Form, Tuning]
    device: torch.device
    tail_splits: int = 8
    max_tiles: int = 4096
    overlap: bool = False

    def __post_init__(self) -> None:
        # Kernels run on a CPU in Triton's interpreter alone.
        self.interpreted = self.device.type == "cpu"
        assert self.shape.head_dim % 4 == 0 and 64 <= self.shape.head_dim <= 256
        assert all(tuning.programs >= self.shape.kv_heads for tuning in self.forms.values())
        assert all(t.tile == GROUP * t.warps for form, t in self.forms.items() if form.key_bits == 4)
        if not self.forms:
            self.forms = {Form(16, 16): Tuning(64, 4, 3, self.shape.kv_heads)}
        heads, groups, dim = self.shape.kv_heads, self.shape.groups, self.shape.head_dim
        self._scales = dict.fromkeys(self.forms, (torch.float32, torch.float32))
        self._no_lse = torch.empty(heads * groups, device=self.device)
        self._addresses = torch.zeros(len(self.forms), 6, dtype=torch.int64, device=self.device)
        self._boosts = torch.ones(len(self.forms), device=self.device)
        self._spans = torch.zeros(len(self.forms), heads, 2, dtype=torch.int32, device=self.device)
        self._make_room([tuning.programs for tuning in self.forms.values()])
        self._tiles = [self._words(self.max_tiles) for _ in self.forms]
        self._back = back_rotation(dim, self.device)

    @classmethod
    def tuned(cls, shape: Shape, forms: Iterable[Form], device: torch.device) -> DecodePlan:
        """A plan for these forms, launched as suits the device."""
        cuda = device.type == "cuda"
        size = torch.cuda.get_device_properties(device).multi_processor_count if cuda else shape.kv_heads
        tunings = {form: Tuning.of(form, size, shape.head_dim) for form in forms}
        return cls(shape, tunings, device, overlap=overlaps(device))

    def work(self, part: CodedKV, variants: Mapping[int, int] = UNMOVED) -> WorkList:
        """The work list that `update` wants for a part, given the variant of the query for segments by their start."""
        programs = dict(zip(self.forms, self._programs, strict=True))[part.form]
        return WorkList.build(part, len(programs), self.forms[part.form].tile, variants)

    def _make_room(self, programs: Sequence[int]) -> None:
        """Tables and partial results for so many programs of each form."""
        self._firsts = np.cumsum([0, *programs])
        slots = int(self._firsts[-1]) + self.shape.kv_heads * self.tail_splits
        self._out = torch.empty(slots, self.shape.groups, self.shape.head_dim, device=self.device)
        self._lse = torch.empty(slots, self.shape.groups, device=self.device)
        self._programs = [torch.zeros(count, 3, dtype=torch.int32, device=self.device) for count in programs]
        self._starts = [self._words(count) for count in programs]

    def _words(self, tiles: int) -> Tensor:
        return torch.zeros(tiles, dtype=torch.int64, device=self.device)

    def update(self, parts: Sequence[Part]) -> bool:
        """Read these rows from now on, at most one part of a form; for a seal, not for a token.

        The kernel reads addresses: whoever gives the parts keeps them until `run` has read them for the last time.

        Returns whether graphs captured before stay valid: not if a table had to grow or scales changed their dtype.
        """
        given = {part.form: (part, work) for part, work in parts}
        assert len(given) == len(parts) and given.keys() <= self.forms.keys(), (given.keys(), self.forms.keys())
        old = {form: len(table) for form, table in zip(self.forms, self._programs, strict=True)}
        programs = old | {form: len(work.programs) for form, (_, work) in given.items()}
        if not (same := programs == old):
            self._make_room([*programs.values()])
        for index, form in enumerate(self.forms):
            if form in given:
                same &= self._place(index, *given[form])
            else:
                self._programs[index].zero_()
                self._spans[index].zero_()
        return same

    def _place(self, index: int, part: CodedKV, work: WorkList) -> bool:
        """Write one part's tables."""
        assert part.keys.device.type == self.device.type and part.head_dim == self.shape.head_dim
        assert work.tile == self.forms[part.form].tile and len(work.programs) == len(self._programs[index])
        tensors = (part.keys, part.values, part.key_scale, part.key_min, part.value_scale, part.value_min)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors[:4]), "rows must begin at multiples of 16 bytes"
        self._addresses[index].copy_(torch.tensor([tensor.data_ptr() for tensor in tensors]))
        if part.form.value_bits < 16 and part.num_rows:
            # The most that float16 holds of weight times scale, by a power of two: smaller products keep their bits.
            largest = part.value_scale.max().float().clamp_min(1e-30)
            self._boosts[index].copy_(torch.exp2(torch.floor(torch.log2(32768 / largest))))
        self._programs[index].copy_(torch.from_numpy(work.bounds(part.form.key_bits)))
        spans = work.spans + np.array([self._firsts[index], 0], np.int32)
        self._spans[index].copy_(torch.from_numpy(spans.astype(np.int32)))
        same = len(work.tiles) <= len(self._tiles[index])
        if not same:
            self._tiles[index] = self._words(2 * len(work.tiles))
        words = work.words()
        self._tiles[index][: len(words)].copy_(torch.from_numpy(words))
        if len(words):
            self._starts[index].copy_(torch.from_numpy(words[work.programs[:, 0]]))
        scales = (part.key_scale.dtype, part.value_scale.dtype)
        same &= scales == self._scales[part.form]
        self._scales[part.form] = scales
        return same

    def run(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        out: Tensor,
        scale: float,
        lse: Tensor | None = None,
    ) -> None:
        """Attention of one new token into `out`; log-sum-exp of its logits into `lse`.

        query        (V * H * G, D), contiguous, bfloat16 or float16; the tail reads variant 0
        out          (H * G, D), likewise
        keys, values the tail's buffers, (H, C, D) of that dtype, rows contiguous
        length       (1,) int32 on the device: rows of the tail that count, the new token's own among them
        scale        factor on the logits
        lse          (H * G,) float32
        """
        shape, pad = self.shape, triton.next_power_of_2(self.shape.head_dim)
        assert query.is_contiguous() and out.is_contiguous() and keys.stride() == values.stride()
        assert keys.stride()[1:] == (shape.head_dim, 1)
        tail_slot = int(self._firsts[-1])
        for index, (form, tuning) in enumerate(self.forms.items()):
            tail = shape.kv_heads * self.tail_splits if index == 0 else 0
            key_scale, value_scale = (_TRITON[dtype] for dtype in self._scales[form])
            attend_rows[(len(self._programs[index]) + tail, triton.cdiv(shape.groups, 16))](
                query, self._addresses, self._boosts, self._programs[index], self._starts[index], self._tiles[index],
                keys, values, length, self._out, self._lse, tail, int(self._firsts[index]), tail_slot, keys.stride(0),
                scale,
                FORM=index, KEY_BITS=form.key_bits, VALUE_BITS=form.value_bits, SCALE=key_scale,
                VALUE_SCALE=value_scale,
                G=shape.groups, D=shape.head_dim, PAD=pad, TILE=tuning.tile, STAGES=tuning.stages,
                SPLITS=self.tail_splits, TAIL_TILE=tuning.tail_tile, TAIL_STAGES=tuning.tail_stages,
                SOFTCAP=shape.softcap, PACKED=tuning.packed and not self.interpreted, WIDE=self.interpreted,
                OVERLAP=self.overlap, num_warps=tuning.warps,
                **({} if tuning.registers is None else {"maxnreg": tuning.registers}),
            )  # fmt: skip
        rotated = sum(1 << index for index, form in enumerate(self.forms) if form.value_bits == 4)
        # A row is rotated back whole, and loads go ahead of their use; else more programs read at once.
        width, warps, stages = (pad, 16, 3) if rotated else (32, 4, 1)
        slots = min(64, triton.next_power_of_2(2 * max(map(len, self._programs)) // shape.kv_heads))
        combine[(shape.kv_heads * shape.groups, pad // width)](
            self._out, self._lse, self._spans, self._back, out, self._no_lse if lse is None else lse, tail_slot,
            FORMS=len(self.forms), ROTATED=rotated, G=shape.groups, H=shape.kv_heads, D=shape.head_dim, PAD=pad,
            SPLITS=self.tail_splits, SLOTS=slots, MOST=32 * warps, STAGES=stages, WIDTH=width, OVERLAP=self.overlap,
            num_warps=warps, **({"launch_pdl": True} if self.overlap else {}),
        )  # fmt: skip


_TRITON = {torch.float16: tl.float16, torch.float32: tl.float32}


def ragged_decode(
    query: Tensor,
    parts: Sequence[Part],
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_length: Tensor,
    scale: float,
    softcap: float = 0.0,
    variants: int = 1,
) -> tuple[Tensor, Tensor]:
    """One `DecodePlan.run` with a plan of its own: output (H * G, D) and log-sum-exp (H * G,) float32.

    `query` (V * H * G, D), V being `variants`.
    """
    heads, _, dim = tail_keys.shape
    rows = len(query) // variants
    forms = {
        part.form: Tuning(work.tile, work.tile // GROUP if part.form.key_bits == 4 else 4, 3, len(work.programs))
        for part, work in parts
    }
    shape = Shape(heads, rows // heads, dim, softcap)
    plan = DecodePlan(shape, forms, query.device)
    plan.update(parts)
    out, lse = torch.empty_like(query[:rows]), torch.empty(rows, device=query.device)
    plan.run(query, tail_keys, tail_values, tail_length, out, scale, lse)
    return out, lse

"""The query of a new token, turned once for each distance that sealed segments have moved since their keys were made.

<q, R(d) k> = <R(-d) q, k>: rows stay as they were encoded, and who reads them reads another variant of the query.
Variant 0 is the query itself. A token makes all variants in one launch, from tables that a seal overwrites in place.

Letters: V variants, Q query heads, D head_dim.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from itertools import count

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvchat.errors import InputError

Rotate = Callable[[Tensor, Tensor], Tensor]
"""RoPE without its scale of (H, q, D) by (q,) positions, in float32; a negative one turns back."""

ROWS = 8
"""Query heads of a program."""


@triton.jit
def turn_rows(
    query, cos, sin, partner, out, heads, D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Variants (V, Q, D) of a query (Q, D); `cos`, `sin`: (V, D), `partner`: (D,). Grid: V, Q / ROWS."""
    variant = tl.program_id(0)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PAD)
    inside = column < D
    here = (head < heads)[:, None] & inside[None, :]
    other = tl.load(partner + column, mask=inside, other=0)
    c = tl.load(cos + variant * D + column, mask=inside, other=0.0)
    s = tl.load(sin + variant * D + column, mask=inside, other=0.0)
    own = tl.load(query + head[:, None] * D + column[None, :], mask=here, other=0.0).to(tl.float32)
    pair = tl.load(query + head[:, None] * D + other[None, :], mask=here, other=0.0).to(tl.float32)
    turned = own * c[None, :] + pair * s[None, :]
    at = out + (variant * heads + head)[:, None] * D + column[None, :]
    tl.store(at, turned.to(out.dtype.element_ty), mask=here)


class TurnedQuery:
    """Variants of the query of one network, all of whose layers share them: each has read its own before the next.

    Args:
        rotate: the network's RoPE, which must turn channels in pairs, whichever these are; some may stay as they are.
        heads, head_dim, dtype: of a query.
    """

    def __init__(self, rotate: Rotate, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rotate, self._device = rotate, device
        self._heads, self._dim, self._dtype = heads, head_dim, dtype
        self._variants = dict[int, int]()
        """Of the shifts that are turned by; each keeps its own, for layers that have not changed go on with it."""
        self._cos, self._sin = (torch.full((1, head_dim), number, device=device) for number in (1.0, 0.0))
        self._out = torch.empty(0, head_dim, dtype=dtype, device=device)

    @property
    def num_variants(self) -> int:
        """V, a power of two that grows."""
        return len(self._cos)

    def arrange(self, shifts: Collection[int]) -> bool:
        """Have a variant for each of these, 0 aside; for a seal, not for a token.

        Returns whether graphs captured before stay valid: not if there are more variants than ever.

        Raises:
            InputError: the network's RoPE is not such that a query can be turned in the place of keys.
        """
        wanted = {shift for shift in shifts if shift}
        new = sorted(wanted - self._variants.keys())
        if not new:
            return True
        cos, sin = self._table(new)
        kept = {shift: variant for shift, variant in self._variants.items() if shift in wanted}
        free = (variant for variant in count(1) if variant not in kept.values())
        added = dict(zip(new, free, strict=False))
        same = max(added.values()) < self.num_variants
        if not same:
            self._grow(triton.next_power_of_2(max(added.values()) + 1))
        self._variants = kept | added
        at = torch.tensor([*added.values()], device=self._device)
        self._cos[at], self._sin[at] = cos, sin
        return same

    def variants(self, shifts: Mapping[int, int]) -> dict[int, int]:
        """The variant of the query that rows of each segment want, given by how much their keys would be turned."""
        return {start: self._variants[shift] for start, shift in shifts.items() if shift}

    def of(self, query: Tensor) -> Tensor:
        """All variants (V * Q, D) of a query (Q, D), in a buffer that the next call overwrites; alone, the query."""
        if self.num_variants == 1:
            return query
        assert query.is_contiguous() and query.shape == (self._heads, self._dim) and query.dtype == self._dtype
        turn_rows[(self.num_variants, triton.cdiv(self._heads, ROWS))](
            query, self._cos, self._sin, self._pairs[0], self._out, self._heads,
            D=self._dim, PAD=triton.next_power_of_2(self._dim), ROWS=ROWS,
        )  # fmt: skip
        return self._out

    def _grow(self, variants: int) -> None:
        """Make room for so many variants, at first the query itself."""
        more = torch.ones(variants - self.num_variants, self._dim, device=self._device)
        out = torch.empty(variants * self._heads, self._dim, dtype=self._dtype, device=self._device)
        self._cos, self._sin = torch.cat([self._cos, more]), torch.cat([self._sin, 0 * more])
        self._out = out

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """With which channel each is turned, (D,) int32, itself if it is not; and which are the first of a pair."""
        unit = torch.eye(self._dim, device=self._device)
        moved = self._rotate(unit[None], torch.ones(self._dim, dtype=torch.int64, device=self._device))[0]
        most, partner = moved.abs().fill_diagonal_(0).max(0)
        channel = torch.arange(self._dim, device=self._device)
        partner = torch.where(most > 0, partner, channel)
        return partner.int(), channel <= partner

    def _table(self, shifts: list[int]) -> tuple[Tensor, Tensor]:
        """Factors on each channel and on its partner that turn back by `shifts`, (len(shifts), D) each."""
        partner, first = self._pairs
        some = torch.randn(self._dim, generator=torch.Generator().manual_seed(0)).to(self._device)
        back = -torch.tensor(shifts, device=self._device)
        states = torch.stack([first.float(), (~first).float(), some])[:, None].expand(-1, len(shifts), -1)
        of_first, of_second, turned = self._rotate(states, back)
        cos, sin = torch.where(first, of_first, of_second), torch.where(first, of_second, of_first)
        if not torch.allclose(some * cos + some[partner.long()] * sin, turned, atol=1e-4):
            raise InputError("this model's RoPE does not turn numbers in pairs, so its saved KV cannot be moved")
        return cos, sin

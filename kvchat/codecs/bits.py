"""Codes of 2, 3 or 4 bits, packed tightly, row by row; and their way back to numbers by one look-up a byte.

At the end the same for whole numbers from -most to most, several of which are the digits of one byte.

    4 bits  code of channel d in byte d // 2, from bit 4 * (d % 2)
    2 bits  code of channel d in byte d // 4, from bit 2 * (d % 4)
    3 bits  the low two bits of all codes as above, then the high bits: channel d in byte d // 8, bit d % 8

A row that does not fill its last byte ends in zero bits.

Letters: N rows, D head_dim, W bytes of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Codes that one look-up gives. As one number of 8 or 16 bytes they are copied three times as fast as row by row.
_TOGETHER = {2: (4, torch.complex128), 3: (4, torch.complex128), 4: (2, torch.float64)}


def row_bytes(head_dim: int, bits: int) -> int:
    """W."""
    if bits == 3:
        return row_bytes(head_dim, 2) + row_bytes(head_dim, 1)
    return -(-head_dim * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, D) uint8, each below 2 ** bits, as bytes (N, W) uint8."""
    if bits == 3:
        return torch.cat([pack_codes(codes & 3, 2), pack_codes(codes >> 2, 1)], 1)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte))
    padded = padded.view(len(codes), padded.shape[1] // per_byte, per_byte)
    packed = torch.zeros(padded.shape[:2], dtype=torch.uint8, device=codes.device)
    for place in range(per_byte):
        packed |= padded[..., place] << bits * place
    return packed


def level_table(levels: Tensor, bits: int) -> Tensor:
    """For `expand`: the levels (2 ** bits,) float32 of every sequence of codes that is looked up together."""
    together, number = _TOGETHER[bits]
    index = torch.arange(1 << bits * together, device=levels.device).unsqueeze(1)
    place = torch.arange(together, device=levels.device)
    if bits == 3:
        codes = (index >> 2 * place & 3) | (index >> 8 + place & 1) << 2
    else:
        codes = index >> bits * place & (1 << bits) - 1
    return levels[codes].view(number).squeeze(1)


def expand(packed: Tensor, table: Tensor, bits: int, head_dim: int) -> Tensor:
    """Bytes (n, W) as the levels of their codes, (n, D) float32; `table` is `level_table`'s."""
    index = packed.int() if bits != 3 else _three_bits(packed, row_bytes(head_dim, 2))
    numbers = table.index_select(0, index.flatten()).view(torch.float32)
    return numbers.view(len(packed), -1)[:, :head_dim]


def _three_bits(packed: Tensor, low_bytes: int) -> Tensor:
    """The low bits of four codes, and from bit 8 on their high bits, as one index, (n, low_bytes)."""
    low, high = packed[:, :low_bytes].int(), packed[:, low_bytes:].int()
    nibbles = torch.stack([high & 15, high >> 4], 2).flatten(1)[:, :low_bytes]
    return low.add_(nibbles, alpha=256)


def pack_digits(q: npt.NDArray[np.int8], most: int, per_byte: int) -> npt.NDArray[np.uint8]:
    """q (n,) as digits of one number a byte, the first the lowest; the last byte is filled up with zeros."""
    digits = np.full(-(-len(q) // per_byte) * per_byte, most, np.int64)
    digits[: len(q)] += q
    packed: npt.NDArray[np.uint8] = (digits.reshape(-1, per_byte) @ (2 * most + 1) ** np.arange(per_byte)).astype("|u1")
    return packed


def digit_table(most: int, per_byte: int) -> npt.NDArray[np.int8]:
    """What each byte holds, (256, per_byte)."""
    place = (2 * most + 1) ** np.arange(per_byte)
    table: npt.NDArray[np.int8] = (np.arange(256)[:, None] // place % (2 * most + 1) - most).astype(np.int8)
    return table

"""Activations at 8 bits a value: half the bytes of bfloat16, as rows of bytes that can be moved without being read.

    rows = pack(x)                # (n, d_model) -> (n, row_bytes) uint8
    x    = unpack(rows, d_model)  # (n, d_model) bfloat16; bfloat16 rows pass through as they are

A packed row holds d_model int8 values, then a bfloat16 scale for each block of 64 of them: value = int8 * scale, and
scale = the block's largest magnitude / 127. With one scale for a whole row, the few large coordinates of a residual
stream would leave the others few of the 255 steps (Dettmers et al. 2022, arXiv:2208.07339; measured:
docs/benchmarks.md).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # values that share a scale
_ROWS = 2**15  # packed at a time, which bounds the memory for float32 copies

StoreDtype = Literal["bfloat16", "int8"]


def row_bytes(d_model: int, dtype: StoreDtype, block: int = BLOCK) -> int:
    """Bytes of one activation."""
    return 2 * d_model if dtype == "bfloat16" else d_model + 2 * math.ceil(d_model / block)


def empty_rows(n: int, d_model: int, dtype: StoreDtype, pin_memory: bool = False) -> Tensor:
    """Room for n activations on the CPU: (n, d_model) bfloat16, or (n, row_bytes) uint8."""
    if dtype == "bfloat16":
        return torch.empty(n, d_model, dtype=torch.bfloat16, pin_memory=pin_memory)
    return torch.empty(n, row_bytes(d_model, dtype), dtype=torch.uint8, pin_memory=pin_memory)


def pack(x: Tensor, block: int = BLOCK) -> Tensor:
    """(n, d_model), finite, -> (n, row_bytes) uint8, on the same device."""
    if not len(x):
        return torch.empty(0, row_bytes(x.shape[1], "int8", block), dtype=torch.uint8, device=x.device)
    return torch.cat([_pack(part, block) for part in x.split(_ROWS)])


def _pack(x: Tensor, block: int) -> Tensor:
    d_model = x.shape[1]
    blocks = F.pad(x.float(), (0, -d_model % block)).unflatten(1, (-1, block))
    scales = (blocks.abs().amax(2) / 127).to(torch.bfloat16)
    # What counts is the scale as it is stored. Of a block of zeros it is 0.
    values = (blocks / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]).round_().clamp_(-127, 127)
    bytes_ = values.flatten(1)[:, :d_model].to(torch.int8).view(torch.uint8)
    return torch.cat([bytes_, scales.view(torch.uint8)], dim=1)


def unpack(rows: Tensor, d_model: int, block: int = BLOCK) -> Tensor:
    """What `pack` packed, (n, d_model) bfloat16; rows that are not packed as they are."""
    if rows.dtype != torch.uint8:
        return rows
    out = torch.empty(len(rows), d_model, dtype=torch.bfloat16, device=rows.device)
    for part, to in zip(rows.split(_ROWS), out.split(_ROWS), strict=True):
        # In memory of their own: within the rows their address may be odd.
        scales = part[:, d_model:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
        values = F.pad(part[:, :d_model].view(torch.int8).float(), (0, -d_model % block)).unflatten(1, (-1, block))
        to.copy_((values * scales[:, :, None]).flatten(1)[:, :d_model])
    return out

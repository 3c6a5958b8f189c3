"""Arguments for the step ops: parameters of every storage format with fresh or used moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_galore_torch import ops

HYPER: dict[str, Any] = dict(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, seed=3)
WEIGHTS = ["float32", "bfloat16", "float16", "int8"]
MOMENTS = ["float32", "dynamic8"]


def weight_parts(values: Tensor, storage: str, group_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """(data, scales, zeros) of a weight; the last two are empty for float storage."""
    if storage == "int8":
        return ops.int8_quantize(values, group_size)
    data = values.to(getattr(torch, storage), copy=True)
    return data, torch.empty(0), torch.empty(0, dtype=torch.int16)


def weight_value(parts: tuple[Tensor, Tensor, Tensor], group_size: int = 256) -> Tensor:
    """The weight in float32."""
    data, scales, zeros = parts
    return (
        ops.int8_dequantize(data, scales, zeros, group_size, torch.float32)
        if data.dtype == torch.uint8
        else data.float()
    )


def fresh_moments(shape: tuple[int, ...], kind: str, block: int, by_row: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax), all zero."""
    if kind == "float32":
        return torch.zeros(shape), torch.zeros(shape), torch.empty(0), torch.empty(0)
    count = shape[-1] if by_row else torch.Size(shape).numel()
    maxima = (shape[0], -(-count // block)) if by_row else (-(-count // block),)
    first = torch.full(shape, 127, dtype=torch.uint8)
    return first, torch.zeros(shape, dtype=torch.uint8), torch.zeros(maxima), torch.zeros(maxima)


def clone(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[x.clone() for x in one] for one in lists]

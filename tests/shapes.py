"""Shape classes that every kernel meets: less, equal, multiple, greater than a block; zero, one, prime."""

from __future__ import annotations

import torch
from torch import Tensor

LENGTHS = [0, 1, 2, 7, 31, 255, 256, 257, 512, 1000, 1021, 4099]
MATRICES = [(0, 5), (5, 0), (1, 1), (1, 257), (3, 256), (7, 31), (17, 300), (64, 512), (5, 1021)]


def offset(tensor: Tensor) -> Tensor:
    """The same values at an address that is one element off any alignment."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    room[1:] = tensor.reshape(-1)
    return room[1:].view(tensor.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes (so that -0.0 differs from 0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def spread(*size: int, seed: int = 0) -> Tensor:
    """Normal values whose magnitudes vary over six decades, with some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*size, generator=generator) * 10 ** (torch.rand(*size, generator=generator) * 6 - 5)
    x[torch.rand(*size, generator=generator) < 0.02] = 0.0
    return x

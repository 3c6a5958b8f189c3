"""Bases: block power steps, random bases, captured energy (GaLore, arXiv 2403.03507; shifted Cholesky QR, Fukaya et
al., SIAM J. Sci. Comput. 42, 2020).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import RIGHT, Refresh
from .formats import noise

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PASSES = 6
_CLOSE = 1e-5
_FAR = 0.5
_SHIFT = 1e-6
_LEAST = 1e-60
_ENOUGH = (0.9, 0.97, 0.0)  # energy before over energy after a step, from which no further one is taken


def orthonormalise(matrix: Tensor) -> tuple[Tensor, bool]:
    """An orthonormal basis of the columns of a tall matrix by shifted Cholesky QR.

    The triangular factor has a positive diagonal, so column i keeps its orientation.

    Args:
        matrix: float32 or float64 [d, r], r <= d, finite and not all zero.

    Returns:
        [d, r] with max |Q^T Q - I| < 1e-5, and whether Householder QR had to be used.
    """
    q = matrix * _power_of_two_below(matrix)
    q = q / torch.linalg.vector_norm(q)
    identity = torch.eye(q.shape[1], dtype=q.dtype)
    for _ in range(_PASSES):
        gram = q.t() @ q
        distance = (gram - identity).abs().amax().item()
        if distance < _CLOSE:
            return q, False
        if distance >= _FAR:
            gram.diagonal().add_(_SHIFT * torch.linalg.vector_norm(gram))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed.item():
            break
        q = torch.linalg.solve_triangular(factor, q.t(), upper=False).t()
    q, r = torch.linalg.qr(q)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype), True


def _power_of_two_below(matrix: Tensor) -> float:
    """A power of two that brings the largest entry to [1, 2); 1 where that entry is of ordinary size."""
    largest = matrix.abs().amax().item()
    if not 0 < largest < math.inf or 2.0**-20 <= largest <= 2.0**20:
        return 1.0
    return 2.0 ** min(126, 1 - math.frexp(largest)[1])


def _squares(matrix: Tensor) -> float:
    return matrix.square().sum(dtype=torch.float64).item()


def subspace_refresh(
    gradient: Tensor, basis: Tensor, side: int, steps: int = 0, compute_dtype: str = "float32"
) -> Refresh:
    """Block power steps; a float64 gradient and basis are computed with in float64.

    With more basis vectors than the other side has rows, Z is normalised as a whole only.
    """
    exact = gradient.dtype == torch.float64
    matrix = gradient if exact else gradient.float()
    matrix = matrix if side == RIGHT else matrix.t()
    kept = Refresh(basis.clone(), True, 0, 0, 0.0, 0.0)
    if not matrix.isfinite().all() or not matrix.any():
        return kept
    matrix = matrix * _power_of_two_below(matrix)
    total = _squares(matrix)
    dtype = torch.float64 if exact else _DTYPES[compute_dtype]
    rounded = matrix.to(dtype)

    def times(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.to(dtype)).to(matrix.dtype)

    y, fallback = orthonormalise(basis.t().to(matrix.dtype))
    fallbacks = int(fallback)
    product = times(rounded, y)
    energy = energy_old = _squares(product) / total
    taken, most = 0, steps or len(_ENOUGH)
    while taken < most:
        if not _squares(product) >= _LEAST:
            return kept
        if product.shape[1] <= product.shape[0]:
            z, fallback = orthonormalise(product)
            fallbacks += int(fallback)
        else:
            z = product / torch.linalg.vector_norm(product)
        y, fallback = orthonormalise(times(rounded.t(), z))
        fallbacks += int(fallback)
        product = times(rounded, y)
        before, energy = energy, _squares(product) / total
        taken += 1
        if steps == 0 and before >= _ENOUGH[taken - 1] * energy:
            break
    return Refresh(y.t().contiguous(), False, taken, fallbacks, min(energy_old, 1.0), min(energy, 1.0))


def subspace_random(
    rank: int, dim: int, seed: int, id: int, draw: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Sums of four 24-bit uniform integers, less their mean, orthonormalised (here in float64)."""
    drawn = noise(seed, id, 2**63 + draw, 0, 4 * rank * dim).reshape(rank, dim, 4).sum(2, dtype=torch.int64)
    vectors, _ = orthonormalise((drawn - 2 * (2**24 - 1)).double().t() * 2.0**-24)
    return vectors.t().float().contiguous().to(device)


def captured_energy(
    gradient: Tensor, right: Tensor | None = None, left: Tensor | None = None, compute_dtype: str = "float32"
) -> float:
    """The share of ||G||^2 that orthonormal bases of the given rows capture."""
    matrix = gradient if gradient.dtype == torch.float64 else gradient.float()
    matrix = matrix * _power_of_two_below(matrix)
    total = _squares(matrix)
    dtype = torch.float64 if gradient.dtype == torch.float64 else _DTYPES[compute_dtype]
    if right is not None:
        q, _ = orthonormalise(right.t().to(matrix.dtype))
        matrix = (matrix.to(dtype) @ q.to(dtype)).to(matrix.dtype)
    if left is not None:
        q, _ = orthonormalise(left.t().to(matrix.dtype))
        matrix = q.t() @ matrix if right is not None else (q.t().to(dtype) @ matrix.to(dtype)).to(matrix.dtype)
    return min(_squares(matrix) / total, 1.0) if total else 0.0

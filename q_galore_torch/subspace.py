"""Which subspace a gradient is projected on: computing a basis, and when the next one is due.

A basis is a float32 matrix [r, d] with one vector per row, for either side of the weight. ``oriented`` turns a gradient
[m, n] so that its columns are what is projected: [m, n] for the right side (d = n), its transpose for the left (d = m).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

RIGHT, LEFT, FULL = 0, 1, 2
EXACT_SVD_LIMIT = 1024  # above it the first basis of a plain parameter comes from a randomised range finder
PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
_FIXED_SIDES = {"right": RIGHT, "left": LEFT, "full": FULL}
COLD_STEPS = 3  # power steps from a random basis
_PASSES = 6
_CLOSE = 1e-5
_FAR = 0.5
_SHIFT = 1e-6


class Basis(NamedTuple):
    """A new basis.

    Attributes:
        vectors: float32 [r, d], orthonormal rows.
        fallbacks: how often Cholesky gave up and Householder QR took over.
        energy: the share of the gradient's energy that it captures, NaN where it was not made from one.
        power_steps: block power steps taken.
    """

    vectors: Tensor
    fallbacks: int = 0
    energy: float = math.nan
    power_steps: int = 0


def side_of(proj_type: str, rows: int, cols: int) -> int:
    """The projected side of a rows x cols weight.

    ``std`` projects the shorter side (the right one of a square), ``reverse_std`` the other one, ``right`` and ``left``
    the one they name, ``full`` both.
    """
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type must be one of {', '.join(PROJ_TYPES)}, got {proj_type!r}")
    if proj_type in _FIXED_SIDES:
        return _FIXED_SIDES[proj_type]
    return RIGHT if (rows >= cols) == (proj_type == "std") else LEFT


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns as which a weight of two or more dimensions is projected.

    The dimensions are cut in two where the shorter side comes out longest (at the first such place), so that a
    convolution [out, in, h, w] is out x (in h w) and stacked experts [E, out, in] are (E out) x in. The matrix is the
    row-major array itself, so the way back is exact.
    """
    cuts = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return max(cuts, key=min)  # max keeps the first of equals


def oriented(matrix: Tensor, side: int) -> Tensor:
    """A view of [m, n] whose columns are the projected dimension."""
    return matrix if side == RIGHT else matrix.t()


# ---------------------------------------------------------------- orthonormalisation


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
    scaled = q
    identity = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
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
    q, r = torch.linalg.qr(scaled)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype), True


def _power_of_two_below(matrix: Tensor) -> float:
    """A power of two that brings the largest entry to [1, 2); 1 where that entry is already of ordinary size."""
    low, high = torch.aminmax(matrix)  # no copy of the matrix, as abs() would make
    largest = max(-low.item(), high.item())
    if not 0 < largest < math.inf or 2.0**-20 <= largest <= 2.0**20:
        return 1.0
    return 2.0 ** min(126, 1 - math.frexp(largest)[1])


# ---------------------------------------------------------------- bases


def random_basis(rank: int, dim: int, seed: int, id: int, draw: int = 0) -> Basis:
    """A seeded random orthonormal basis, the same on every machine.

    The entries are sums of four uniform integers (close to normal, and free of any machine's rounding); they are
    orthonormalised in float64.

    Args:
        rank: number of vectors.
        dim: their length, at least ``rank``.
        seed: the optimizer's seed.
        id: the parameter's id.
        draw: which of this parameter's bases, default 0.

    Returns:
        float32 [rank, dim] on the CPU.
    """
    digest = hashlib.blake2b(f"{seed} {id} {draw}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    total = torch.zeros(dim, rank, dtype=torch.int64)
    for _ in range(4):
        total += torch.randint(0, 1 << 16, (dim, rank), generator=generator)
    vectors, fallback = orthonormalise(total.double() - 4 * 0.5 * 0xFFFF)
    return Basis(vectors.t().float().contiguous(), int(fallback))


def svd_basis(gradient: Tensor, side: int, rank: int) -> Basis | None:
    """The leading singular vectors of one side, with LAPACK's signs.

    Args:
        gradient: [m, n], any float dtype, finite and not all zero.
        side: right or left.
        rank: number of vectors, at most min(m, n).

    Returns:
        The basis, or None where LAPACK did not converge.
    """
    matrix = oriented(gradient, side).float()
    scale = _power_of_two_below(matrix)
    try:
        _, values, vectors = torch.linalg.svd(matrix * scale if scale != 1.0 else matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        _log.warning("the SVD of a %s gradient failed, the old basis stays: %s", list(gradient.shape), error)
        return None
    values = values.double().square()
    return Basis(vectors[:rank].contiguous(), energy=(values[:rank].sum() / values.sum()).item())


def refresh_basis(gradient: Tensor, side: int, old: Tensor, steps: int | None, compute_dtype: str) -> Basis | None:
    found = power_basis(oriented(gradient, side), old, steps, getattr(torch, compute_dtype))
    right, left = (found.vectors, None) if side == RIGHT else (None, found.vectors)
    return found._replace(energy=captured_energy(gradient, right, left))


def power_basis(
    gradient: Tensor, basis: Tensor, steps: int | None = None, gemm_dtype: torch.dtype | None = None
) -> Basis:
    """Block power steps from an old basis: ``Z = orth(G P^T)``, ``Y = orth(G^T Z)``, the new basis is ``Y^T``.

    Args:
        gradient: oriented gradient [k, d], any float dtype, finite and not all zero.
        basis: the old one, float32 [r, d]; it need not be exactly orthonormal.
        steps: number of steps; None (default) takes one, and a second one where the old basis captured less than 0.9 of
            the energy that the new one captures.
        gemm_dtype: dtype of the products with the gradient, default float32. Gram matrices stay float32.

    Returns:
        The new basis; vector i keeps the orientation of the old vector i.
    """
    matrix = gradient.float()
    scale = _power_of_two_below(matrix)
    matrix = matrix * scale if scale != 1.0 else matrix
    matrix = matrix.to(gemm_dtype or torch.float32)

    def times(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.to(a.dtype)).float()

    y, fallback = orthonormalise(basis.t())
    fallbacks = int(fallback)
    product = times(matrix, y)
    taken = 0
    while True:
        if not (product != 0).any():
            break  # the gradient is orthogonal to the whole basis
        z, first = orthonormalise(product)
        y, second = orthonormalise(times(matrix.t(), z))
        fallbacks += int(first) + int(second)
        taken += 1
        if taken >= (2 if steps is None else steps):
            break
        old, product = product, times(matrix, y)
        if steps is None and old.square().sum() >= 0.9 * product.square().sum():
            break
    return Basis(y.t().contiguous(), fallbacks)


def cold_basis(gradient: Tensor, side: int, rank: int, seed: int, id: int, compute_dtype: str) -> Basis | None:
    """The first basis of a parameter with a full gradient: exact SVD up to 1024, else a randomised range finder.

    Each vector's largest entry is positive.

    Args:
        gradient: [m, n], finite and not all zero.
        side: right or left.
        rank: number of vectors, at most min(m, n).
        seed: the optimizer's seed.
        id: the parameter's id.
        compute_dtype: ``"float32"`` or ``"bfloat16"``, of the range finder's products with the gradient.

    Returns:
        The basis, or None where LAPACK did not converge.
    """
    if min(gradient.shape) <= EXACT_SVD_LIMIT:
        found = svd_basis(gradient, side, rank)
        return None if found is None else found._replace(vectors=canonical_signs(found.vectors))
    start = random_basis(rank, gradient.shape[1 if side == RIGHT else 0], seed, id)
    found = refresh_basis(gradient, side, start.vectors.to(gradient.device), COLD_STEPS, compute_dtype)
    return None if found is None else found._replace(vectors=canonical_signs(found.vectors))


def canonical_signs(vectors: Tensor) -> Tensor:
    """The same rows, each with its entry of largest magnitude positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def matching_signs(vectors: Tensor, old: Tensor) -> Tensor:
    """The same rows, each with ``<new_i, old_i> >= 0``: the kept first moment would change its sign otherwise."""
    return vectors * torch.where((vectors * old).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)


def captured_energy(gradient: Tensor, right: Tensor | None, left: Tensor | None) -> float:
    """``||Q_L G Q_R^T||^2 / ||G||^2`` with Q orthonormal bases of the rows of ``right`` and ``left``.

    Args:
        gradient: [m, n].
        right: [r, n] decoded, it need not be exactly orthonormal; None: not projected on that side.
        left: [r, m] or None.

    Returns:
        The share in [0, 1], 0 for a zero gradient.
    """
    matrix = gradient.float()
    matrix = matrix * _power_of_two_below(matrix)
    total = matrix.square().sum(dtype=torch.float64).item()
    if right is not None:
        matrix = matrix @ orthonormalise(right.float().t())[0]
    if left is not None:
        matrix = orthonormalise(left.float().t())[0].t() @ matrix
    return matrix.square().sum(dtype=torch.float64).item() / total if total else 0.0


# ---------------------------------------------------------------- schedule


def stagger_phase(number: int, gap: int) -> int:
    """The phase of the ``number``-th projected parameter: (number q) mod gap, q nearest 0.618 gap and coprime to it."""
    return number * _stagger_stride(gap) % gap


@lru_cache
def _stagger_stride(gap: int) -> int:
    target = 0.618 * gap
    return min((q for q in range(1, gap + 1) if math.gcd(q, gap) == 1), key=lambda q: (abs(q - target), q))


def first_refresh_steps(count: int) -> list[int]:
    """The steps of the first data-driven refreshes of ``count`` low-rank leaves: never more than 8 in one step."""
    spread = max(8, math.ceil(count / 8))
    return [index % spread for index in range(count)]


def next_phase_step(step: int, phase: int, gap: int) -> int:
    """The first step after ``step`` that is ``phase`` modulo ``gap``."""
    return step + 1 + (phase - step - 1) % gap

"""Which subspace a gradient is projected on: its first basis, its refreshes, and when the next one is due.

A basis is a float32 matrix [r, d] with one vector per row, for either side of the weight: d = n for the right side of
an m x n gradient, d = m for the left. The arithmetic is :mod:`q_galore_torch.ops`'; only the exact SVD is torch's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

_log = logging.getLogger(__name__)

RIGHT, LEFT, FULL = 0, 1, 2
EXACT_SVD_LIMIT = 1024  # above it the first basis of a plain parameter comes from a randomised range finder
PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
_FIXED_SIDES = {"right": RIGHT, "left": LEFT, "full": FULL}
COLD_STEPS = 4  # power steps from a random basis; three reach 0.989 of the SVD's energy at r = d / 8 on i^-0.5


class Basis(NamedTuple):
    """A new basis.

    Attributes:
        vectors: float32 [r, d], orthonormal rows.
        fallbacks: how often Cholesky gave up and Householder QR took over, default 0.
        energy: share of the gradient's energy that it captures, before it is quantised; NaN (default) for a basis that
            no gradient was asked about.
        power_steps: block power steps taken, default 0.
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


# ---------------------------------------------------------------- bases


def random_basis(rank: int, dim: int, seed: int, id: int, draw: int = 0, device: torch.device | str = "cpu") -> Basis:
    """A seeded random orthonormal basis.

    Args:
        rank: number of vectors.
        dim: their length, at least ``rank``.
        seed: the optimizer's seed.
        id: the parameter's id.
        draw: which of this parameter's bases, default 0.
        device: where it is made, default the CPU.

    Raises:
        ValueError: an argument is out of range.
    """
    return Basis(ops.subspace_random(rank, dim, seed, id, draw, device=device))


def refresh_basis(
    gradient: Tensor, side: int, old: Tensor, steps: int | None = None, compute_dtype: str = "float32"
) -> Basis | None:
    """Block power steps from an old basis; vector i keeps the orientation of the old vector i.

    Args:
        gradient: [m, n], any float dtype.
        side: ``RIGHT`` or ``LEFT``.
        old: float32 [r, d]; it need not be exactly orthonormal.
        steps: number of steps; None (default) takes one, and up to two more where the old basis had fallen behind, see
            :func:`q_galore_torch.ops.subspace_refresh`.
        compute_dtype: of the products with the gradient, default ``"float32"``.

    Returns:
        The new basis, or None where the old one stays: the gradient is zero, not finite, or orthogonal to all of it.

    Raises:
        ValueError: an argument has the wrong dtype, shape or value.
    """
    found = ops.subspace_refresh(gradient.contiguous(), old.contiguous(), side, steps or 0, compute_dtype)
    if found.kept:
        return None
    return Basis(found.basis, found.fallbacks, found.energy_new, found.power_steps)


@lru_cache
def _warn_once(message: str) -> None:
    """A failed refresh is tried again in the next step, and fails there for the same reason."""
    _log.warning(message)


def svd_basis(gradient: Tensor, side: int, rank: int) -> Basis | None:
    """The leading singular vectors of one side, with LAPACK's signs.

    Args:
        gradient: [m, n], any float dtype.
        side: ``RIGHT`` or ``LEFT``.
        rank: number of vectors, at most min(m, n).

    Returns:
        The basis, or None where there is none: the gradient is zero or not finite, or LAPACK did not converge.
    """
    matrix = gradient.float()
    largest = matrix.abs().amax().item() if matrix.numel() else 0.0
    if not 0 < largest < math.inf:
        return None
    if not 2.0**-20 <= largest <= 2.0**20:  # squares of the entries must neither overflow nor vanish
        matrix = matrix * 2.0 ** min(126, 1 - math.frexp(largest)[1])
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        _warn_once(f"the SVD of a {list(gradient.shape)} gradient failed, the old basis stays: {error}")
        return None
    energies = values.double().square()
    vectors = right if side == RIGHT else left.t()
    return Basis(vectors[:rank].contiguous(), energy=(energies[:rank].sum() / energies.sum()).item())


def cold_basis(
    gradient: Tensor, side: int, rank: int, seed: int, id: int, compute_dtype: str = "float32"
) -> Basis | None:
    """The first basis of a parameter with a full gradient: exact SVD up to 1024, else a randomised range finder.

    Each vector's largest entry is positive.

    Args:
        gradient: [m, n], any float dtype.
        side: ``RIGHT`` or ``LEFT``.
        rank: number of vectors, at most min(m, n).
        seed: the optimizer's seed.
        id: the parameter's id.
        compute_dtype: of the range finder's products with the gradient, default ``"float32"``.

    Returns:
        The basis, or None where there is none: the gradient is zero or not finite, or LAPACK did not converge.
    """
    if min(gradient.shape) > EXACT_SVD_LIMIT:
        dim = gradient.shape[1 if side == RIGHT else 0]
        start = random_basis(rank, dim, seed, id, device=gradient.device)
        found = refresh_basis(gradient, side, start.vectors, COLD_STEPS, compute_dtype)
    else:
        found = svd_basis(gradient, side, rank)
    return None if found is None else found._replace(vectors=canonical_signs(found.vectors))


def captured_energy(
    gradient: Tensor, right: Tensor | None = None, left: Tensor | None = None, compute_dtype: str = "float32"
) -> float:
    """The share of the gradient's energy that bases capture, see :func:`q_galore_torch.ops.captured_energy`.

    Args:
        gradient: [m, n], any float dtype, finite.
        right: float32 [r, n], decoded; None (default): no right basis.
        left: float32 [r, m], likewise.
        compute_dtype: of the products with the gradient, default ``"float32"``.

    Returns:
        The share in [0, 1], 0 for a zero gradient.

    Raises:
        ValueError: the gradient is not finite, a shape does not fit, or there is no basis.
    """
    return ops.captured_energy(gradient.contiguous(), right, left, compute_dtype)


def canonical_signs(vectors: Tensor) -> Tensor:
    """The same rows, each with its entry of largest magnitude positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def matching_signs(vectors: Tensor, old: Tensor) -> Tensor:
    """The same rows, each with ``<new_i, old_i> >= 0``: the kept first moment would change its sign otherwise."""
    return vectors * torch.where((vectors * old).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)


# ---------------------------------------------------------------- schedule


def stagger_phase(number: int, gap: int) -> int:
    """The phase of the ``number``-th projected parameter: (number q) mod gap, q nearest 0.618 gap and coprime to it."""
    return number * _stagger_stride(gap) % gap


@lru_cache
def _stagger_stride(gap: int) -> int:
    target = 0.618 * gap
    # A gap below 2^31 has at most nine prime factors, so that one of any 40 integers in a row is coprime to it
    # (Jacobsthal's function).
    near = range(max(1, int(target) - 40), min(gap, int(target) + 40) + 1)
    return min((q for q in near if math.gcd(q, gap) == 1), key=lambda q: (abs(q - target), q))


def first_refresh_steps(count: int) -> list[int]:
    """The steps of the first data-driven refreshes of ``count`` low-rank leaves: never more than 8 in one step."""
    spread = max(8, math.ceil(count / 8))
    return [index % spread for index in range(count)]


def next_phase_step(step: int, phase: int, gap: int) -> int:
    """The first step after ``step`` that is ``phase`` modulo ``gap``."""
    return step + 1 + (phase - step - 1) % gap

"""Bases and their schedule: orthonormality on every kind of gradient, captured energy, orientation, the stagger.

The numbers are compared with float64 formulas (torch.linalg.svd, torch.linalg.qr, exact power iteration), the refresh
as a whole with its definition in plain PyTorch run in float64.
"""

from __future__ import annotations

import collections
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
from q_galore_torch import ops, reference, subspace
from q_galore_torch.reference.subspace import orthonormalise
from q_galore_torch.subspace import LEFT, RIGHT

SIDES = [RIGHT, LEFT]
DTYPES = ["float32", "bfloat16"]
# Power steps from a random start, over the SVD's energy: at least 0.993 on i^-0.5 at d / 8 (12 seeds), more if steeper.
COLD_SHARE = 0.99


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum_matrix(rows: int, cols: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 matrix with the given singular values, and its right singular vectors as rows."""
    rng = generator(seed)
    count = len(values)
    u, _ = torch.linalg.qr(torch.randn(rows, count, generator=rng, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(cols, count, generator=rng, dtype=torch.float64))
    return u * values.double() @ v.t(), v.t()


def gap_from_orthonormal(basis: Tensor) -> float:
    rows = basis.double()
    return (rows @ rows.t() - torch.eye(len(rows), dtype=torch.float64)).abs().max().item()


def oriented(gradient: Tensor, side: int) -> Tensor:
    """[m, n] or its transpose: the projected dimension is the columns'."""
    return gradient if side == RIGHT else gradient.t()


def exact_energy(gradient: Tensor, basis: Tensor, side: int) -> float:
    """E in float64, with LAPACK's orthonormal basis."""
    q, _ = torch.linalg.qr(basis.double().t())
    matrix = oriented(gradient, side).double()
    return ((matrix @ q).norm() / matrix.norm()).square().item()


def sine_of_largest_angle(found: Tensor, exact: Tensor) -> float:
    """Between two subspaces, each given by orthonormal rows."""
    rows = found.double()
    return torch.linalg.matrix_norm(rows - rows @ exact.double().t() @ exact.double(), 2).item()


NOISE = torch.randn(96, 64, generator=generator(1))
GRADIENTS = {
    "noise": NOISE,
    "constant": torch.ones(96, 64),
    "rank one": torch.arange(1.0, 97)[:, None] * torch.linspace(-1, 1, 64),
    "one entry": torch.zeros(96, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(2.0)),
    "one column": torch.zeros(96, 64).index_fill(1, torch.tensor([7]), 1.0),
    "1e-30": torch.randn(96, 64, generator=generator(2)) * 1e-30,
    "1e30": torch.randn(96, 64, generator=generator(3)) * 1e30,
    "1e-38": torch.randn(96, 64, generator=generator(4)) * 1e-38,
    "3e38": torch.randn(96, 64, generator=generator(5)).clamp(-1, 1) * 3e38,
    "steep": spectrum_matrix(96, 64, 10.0 ** -torch.arange(64.0))[0].float(),
}


# ---------------------------------------------------------------- a refresh


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_refresh_is_orthonormal_and_reports_true_energies(kind: str, side: int, wide: bool, compute_dtype: str) -> None:
    gradient = GRADIENTS[kind].t().contiguous() if wide else GRADIENTS[kind]
    dim = gradient.shape[1] if side == RIGHT else gradient.shape[0]
    # bfloat16 rounds G, Q and their product by 2^-9 on average; where few entries count, all in one direction.
    tolerance = 2e-5 if compute_dtype == "float32" else 1.2e-2
    for rank in (1, 16, dim):  # with dim = 96 there are more vectors than the other side has rows
        start = ops.subspace_random(rank, dim, 0, 0, 0)
        found = ops.subspace_refresh(gradient, start, side, compute_dtype=compute_dtype)
        assert not found.kept and found.power_steps in (1, 2, 3)
        assert gap_from_orthonormal(found.basis) < 1e-4
        assert found.energy_old == pytest.approx(exact_energy(gradient, start, side), abs=tolerance)
        assert found.energy_new == pytest.approx(exact_energy(gradient, found.basis, side), abs=tolerance)
        assert found.energy_new >= found.energy_old - tolerance


def broken(kind: str) -> Tensor:
    gradient = NOISE.clone()
    if kind == "zero":
        return torch.zeros_like(gradient)
    if kind == "orthogonal":  # to every vector of the basis used below, on either side
        gradient[:, :16] = 0.0
        gradient[:16] = 0.0
        return gradient
    gradient[95, 63] = float(kind)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["zero", "nan", "inf", "-inf", "orthogonal"])
def test_a_gradient_without_direction_keeps_the_basis_bit_for_bit(kind: str, side: int, dtype: torch.dtype) -> None:
    basis = torch.eye(96)[:16, : 64 if side == RIGHT else 96].contiguous() * 0.7
    gradient = broken(kind).to(dtype)
    for steps in (0, 3):
        found = ops.subspace_refresh(gradient, basis, side, steps)
        assert found[1:] == (True, 0, 0, 0.0, 0.0)
        assert torch.equal(found.basis, basis)
    assert subspace.refresh_basis(gradient, side, basis) is None


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_basis_without_direction_is_kept(value: float) -> None:
    basis = torch.full((4, 64), value)
    found = ops.subspace_refresh(NOISE, basis, RIGHT)
    assert found.kept and torch.equal(found.basis.isnan(), basis.isnan())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_refresh_follows_the_definition_in_float64(steps: int, side: int) -> None:
    gradient, _ = spectrum_matrix(96, 64, torch.linspace(3, 0.1, 64), seed=3)
    start = ops.subspace_random(12, 64 if side == RIGHT else 96, 1, 2, 3)
    exact = reference.subspace_refresh(gradient, start.double(), side, steps)
    found = ops.subspace_refresh(gradient.float(), start, side, steps)
    torch.testing.assert_close(found.basis.double(), exact.basis, rtol=0, atol=1e-4)
    assert found.power_steps == exact.power_steps == steps
    assert found.energy_old == pytest.approx(exact.energy_old, abs=1e-5)
    assert found.energy_new == pytest.approx(exact.energy_new, abs=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
@settings(max_examples=60)
def test_refresh_of_any_shape(rows: int, cols: int, data: st.DataObject) -> None:
    side = data.draw(st.sampled_from(SIDES))
    dim, other = (cols, rows) if side == RIGHT else (rows, cols)
    rank = data.draw(st.integers(1, dim))
    steps = data.draw(st.integers(0, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    gradient = torch.randn(rows, cols, generator=generator(rows * 41 + cols)).to(dtype)
    start = torch.randn(rank, dim, generator=generator(rank))
    found = ops.subspace_refresh(gradient, start, side, steps)
    assert not found.kept and gap_from_orthonormal(found.basis) < 1e-4
    assert found.energy_new == pytest.approx(exact_energy(gradient, found.basis, side), abs=1e-4)
    if rank >= other:
        assert found.energy_new > 0.999


def test_refresh_takes_what_does_not_fit_a_tile() -> None:
    """G is cast a tile at a time: more than one, the last one ragged, both ways round."""
    gradient = torch.randn(700, 1900, generator=generator(0)).to(torch.bfloat16)
    for side, dim in ((RIGHT, 1900), (LEFT, 700)):
        start = ops.subspace_random(8, dim, 0, 0, 0)
        found = ops.subspace_refresh(gradient, start, side, 1)
        exact = reference.subspace_refresh(gradient.double(), start.double(), side, 1)
        torch.testing.assert_close(found.basis.double(), exact.basis, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [63, 64, 65, 129, 200])
def test_refresh_beyond_one_block_of_the_factorisations(rank: int) -> None:
    gradient, _ = spectrum_matrix(400, 300, torch.arange(1.0, 301) ** -0.5)
    start = ops.subspace_random(rank, 300, 0, 0, 0)
    exact = reference.subspace_refresh(gradient, start.double(), RIGHT, 1)
    found = ops.subspace_refresh(gradient.float(), start, RIGHT, 1)
    torch.testing.assert_close(found.basis.double(), exact.basis, rtol=0, atol=1e-4)
    assert found.fallbacks == 0


def test_householder_takes_over_from_cholesky() -> None:
    gradient = torch.zeros(300, 200)
    gradient[:, :70] = torch.randn(300, 70, generator=generator(0))  # exact zeros: no rounding that a shift could lift
    found = ops.subspace_refresh(gradient, ops.subspace_random(150, 200, 0, 0, 0), RIGHT)
    assert found.fallbacks > 0 and gap_from_orthonormal(found.basis) < 1e-5
    assert found.energy_new == pytest.approx(1.0, abs=1e-5)
    basis = subspace.refresh_basis(gradient, RIGHT, ops.subspace_random(150, 200, 0, 0, 0))
    assert basis is not None and basis.fallbacks == found.fallbacks


def test_refresh_of_a_rank_deficient_gradient_needs_no_householder() -> None:
    """Only rounding tells the surplus vectors apart; one pass leaves such a Z ill-conditioned, so it takes more."""
    values = torch.cat([torch.ones(64), torch.zeros(236)])
    gradient = spectrum_matrix(400, 300, values)[0].float()
    found = ops.subspace_refresh(gradient, ops.subspace_random(128, 300, 0, 0, 0), RIGHT)
    assert found.fallbacks == 0 and gap_from_orthonormal(found.basis) < 1e-5
    assert found.energy_new == pytest.approx(1.0, abs=1e-5)


def test_refresh_takes_further_steps_where_the_old_basis_had_fallen_behind() -> None:
    """The energies before and after each step, in exact arithmetic, against 0.9 and then 0.97."""
    gradient, right = spectrum_matrix(96, 64, torch.cat([torch.ones(8), torch.full((56,), 0.2)]))
    near, far = right[:8].float(), ops.subspace_random(8, 64, 0, 0, 0)
    turned = (math.cos(0.6) * right[:8] + math.sin(0.6) * right[8:16]).float()
    for old, steps in ((near, 1), (turned, 2), (far, 3)):
        energies, basis = [exact_energy(gradient, old, RIGHT)], old.double()
        for _ in range(3):
            basis = torch.linalg.qr(gradient.t() @ (gradient @ basis.t()))[0].t()
            energies.append(exact_energy(gradient, basis, RIGHT))
        enough = [
            before >= share * after
            for before, after, share in zip(energies, energies[1:], (0.9, 0.97, 0.0), strict=False)
        ]
        assert enough.index(True) + 1 == steps == ops.subspace_refresh(gradient.float(), old, RIGHT).power_steps
    assert ops.subspace_refresh(gradient.float(), near, RIGHT, 3).power_steps == 3
    assert ops.subspace_refresh(gradient.float(), far, RIGHT, 1).power_steps == 1


@pytest.mark.parametrize("side", SIDES)
def test_refresh_keeps_orientation(side: int) -> None:
    """The kept first moment would change its sign otherwise: flipping an old vector flips the new one alone."""
    gradient, right = spectrum_matrix(96, 64, torch.cat([torch.linspace(3, 1, 16), torch.full((48,), 0.05)]), seed=5)
    matrix = gradient.float() if side == RIGHT else gradient.float().t().contiguous()
    old = right[:16].float() + 0.02 * torch.randn(16, 64, generator=generator(0))
    found = ops.subspace_refresh(matrix, old, side).basis
    assert ((found * old).sum(1) > 0.5).all()
    signs = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    flipped = ops.subspace_refresh(matrix, signs * old, side).basis
    torch.testing.assert_close(flipped, signs * found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_warm_step_follows_a_moving_subspace(side: int) -> None:
    values = torch.cat([torch.linspace(3, 1, 16), torch.full((48,), 0.05)])
    first, right = spectrum_matrix(96, 64, values, seed=5)
    turn = torch.linalg.matrix_exp(0.02 * (lambda a: a - a.t())(torch.randn(64, 64, dtype=torch.float64)))
    moved = first @ turn
    best = exact_energy(moved, torch.linalg.svd(moved).Vh[:16], RIGHT)
    given_side = moved.float() if side == RIGHT else moved.float().t().contiguous()
    warm = subspace.refresh_basis(given_side, side, right[:16].float())
    assert warm is not None and warm.fallbacks == 0 and warm.power_steps == 1
    assert warm.energy >= 0.995 * best
    assert exact_energy(moved, right[:16], RIGHT) < 0.99 * best


SPECTRA = {
    "i^-0.5": torch.arange(1.0, 257) ** -0.5,
    "i^-1": torch.arange(1.0, 257) ** -1.0,
    "exponential 1e3": torch.logspace(0, -3, 256),
}


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_cold_steps_from_a_random_basis_reach_the_svd_s_energy(name: str, compute_dtype: str) -> None:
    values = SPECTRA[name]
    gradient, _ = spectrum_matrix(320, 256, values)
    best = float((values[:64] ** 2).sum() / (values**2).sum())
    start = ops.subspace_random(64, 256, 0, 0, 0)
    found = ops.subspace_refresh(gradient.float(), start, RIGHT, subspace.COLD_STEPS, compute_dtype)
    assert exact_energy(gradient, found.basis, RIGHT) >= COLD_SHARE * best
    assert found.energy_new == pytest.approx(exact_energy(gradient, found.basis, RIGHT), abs=2e-3)
    assert gap_from_orthonormal(found.basis) < 1e-4


@pytest.mark.parametrize("name", SPECTRA)
def test_bfloat16_products_keep_the_energy(name: str) -> None:
    gradient = spectrum_matrix(320, 256, SPECTRA[name], seed=2)[0].float()
    start = ops.subspace_random(64, 256, 0, 0, 0)
    exact, rounded = (ops.subspace_refresh(gradient, start, RIGHT, 1, dtype).basis for dtype in DTYPES)
    assert exact_energy(gradient, rounded, RIGHT) >= 0.999 * exact_energy(gradient, exact, RIGHT)


@pytest.mark.parametrize(("rows", "cols"), [(160, 64), (64, 160), (64, 64)])
@pytest.mark.parametrize("side", SIDES)
def test_bases_agree_with_the_exact_subspace_by_principal_angles(rows: int, cols: int, side: int) -> None:
    values = torch.cat([torch.linspace(4, 2, 12), torch.linspace(0.4, 0.1, 52)])  # separated: 2 against 0.4
    gradient, _ = spectrum_matrix(rows, cols, values, seed=7)
    matrix = gradient.float()
    exact = torch.linalg.svd(oriented(gradient, side), full_matrices=False).Vh[:12]
    svd, cold = subspace.svd_basis(matrix, side, 12).vectors, subspace.cold_basis(matrix, side, 12, 0, 0)
    start = ops.subspace_random(12, exact.shape[1], 0, 0, 0)
    power = subspace.refresh_basis(matrix, side, start, 3)
    assert svd is not None and cold is not None and power is not None
    assert sine_of_largest_angle(svd, exact) < 1e-5
    assert sine_of_largest_angle(cold.vectors, exact) < 1e-5
    assert sine_of_largest_angle(power.vectors, exact) < 5e-3
    # and the power steps are those of exact arithmetic
    p = start.double()
    for _ in range(3):
        p = torch.linalg.qr(oriented(gradient, side).t() @ (oriented(gradient, side) @ p.t()))[0].t()
    assert sine_of_largest_angle(power.vectors, p) < 1e-4


# ---------------------------------------------------------------- first and random bases


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_svd_and_cold_bases_are_orthonormal(kind: str, side: int) -> None:
    vectors = subspace.svd_basis(GRADIENTS[kind], side, 16).vectors
    assert vectors is not None and gap_from_orthonormal(vectors) < 1e-4
    cold = subspace.cold_basis(GRADIENTS[kind], side, 16, seed=0, id=0)
    assert cold is not None and gap_from_orthonormal(cold.vectors) < 1e-4
    assert cold.energy == pytest.approx(exact_energy(GRADIENTS[kind], cold.vectors, side), abs=2e-5)


@pytest.mark.parametrize("limit", [8, 1024])
@pytest.mark.parametrize("kind", ["zero", "nan", "inf"])
def test_no_cold_basis_of_a_broken_gradient(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "EXACT_SVD_LIMIT", limit)
    assert subspace.cold_basis(broken(kind), RIGHT, 8, seed=0, id=0) is None
    assert subspace.svd_basis(broken(kind), LEFT, 8) is None


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_cold_basis_captures_what_the_svd_does(decay: float, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(1.0, 513) ** -decay
    gradient = spectrum_matrix(600, 512, values)[0].float()
    best = float((values[:64] ** 2).sum() / (values**2).sum())
    monkeypatch.setattr(subspace, "EXACT_SVD_LIMIT", 8)  # the randomised range finder
    cold = subspace.cold_basis(gradient, side, 64, seed=0, id=3)
    assert cold is not None and cold.fallbacks == 0 and cold.power_steps == subspace.COLD_STEPS
    assert exact_energy(gradient, cold.vectors, side) >= COLD_SHARE * best
    largest = cold.vectors.gather(1, cold.vectors.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_random_basis_is_seeded() -> None:
    a = subspace.random_basis(8, 40, seed=1, id=2)
    assert gap_from_orthonormal(a.vectors) < 1e-5 and math.isnan(a.energy)
    assert torch.equal(a.vectors, subspace.random_basis(8, 40, seed=1, id=2).vectors)
    for other in (dict(seed=2, id=2), dict(seed=1, id=3), dict(seed=1, id=2, draw=1), dict(seed=1 + 2**32, id=2)):
        assert (subspace.random_basis(8, 40, **other).vectors - a.vectors).abs().max() > 0.1
    state = torch.get_rng_state()
    subspace.random_basis(8, 40, seed=1, id=2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("rank", "dim"), [(1, 1), (3, 7), (40, 40), (130, 300)])
def test_random_basis_is_the_definition_s(rank: int, dim: int) -> None:
    expected = reference.subspace_random(rank, dim, 5, 6, 7)
    tolerance = 1e-3 if rank == dim else 2e-5  # a square matrix may be close to singular
    for level in ops.simd_levels():
        ops.set_simd_level(level)
        torch.testing.assert_close(ops.subspace_random(rank, dim, 5, 6, 7), expected, rtol=0, atol=tolerance)


def test_random_basis_has_no_preferred_direction() -> None:
    """Each entry of one random unit vector has mean 0 and mean square 1 / d, over 400 draws."""
    draws = torch.stack([ops.subspace_random(1, 16, 0, 0, draw)[0] for draw in range(400)]).double()
    assert draws.mean(0).abs().max() < 5 / math.sqrt(400 * 16)
    assert (draws.square().mean(0) * 16 - 1).abs().max() < 5 * math.sqrt(2 / 400)


# ---------------------------------------------------------------- captured energy


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 5e37])
def test_captured_energy_does_not_depend_on_the_gradient_s_size(scale: float) -> None:
    right, left = torch.randn(16, 64, generator=generator(6)), torch.randn(20, 96, generator=generator(7))
    ql, qr = (torch.linalg.qr(x.double().t())[0] for x in (left, right))
    gradient = NOISE * scale
    matrix = gradient.double()
    total = matrix.square().sum()
    for bases, exact in (
        ((right, None), matrix @ qr),
        ((None, left), ql.t() @ matrix),
        ((right, left), ql.t() @ matrix @ qr),
    ):
        share = float(exact.square().sum() / total)
        scaled = [None if b is None else b * 3.0 for b in bases]
        assert subspace.captured_energy(gradient, *scaled) == pytest.approx(share, rel=1e-4)
        assert ops.captured_energy(gradient, *scaled, "bfloat16") == pytest.approx(share, rel=5e-3)
        assert reference.captured_energy(gradient, *scaled) == pytest.approx(share, rel=1e-4)
    assert subspace.captured_energy(torch.zeros(4, 64), right) == 0.0


def test_captured_energy_of_both_sides_of_any_shape() -> None:
    for rows, cols, left_rank, right_rank in ((5, 90, 5, 3), (90, 5, 3, 5), (1, 1, 1, 1), (31, 33, 31, 33)):
        gradient = torch.randn(rows, cols).to(torch.float16)
        right, left = torch.randn(right_rank, cols), torch.randn(left_rank, rows)
        exact = reference.captured_energy(gradient.double(), right.double(), left.double())
        assert ops.captured_energy(gradient, right, left) == pytest.approx(exact, abs=1e-5)


# ---------------------------------------------------------------- refusals


def test_wrong_arguments_are_refused() -> None:
    gradient, basis = torch.randn(12, 8), torch.randn(3, 8)
    for call, message in (
        (lambda: ops.subspace_refresh(gradient, basis, 2), r"side must be 0 \(right\) or 1 \(left\), got 2"),
        (lambda: ops.subspace_refresh(gradient, basis, 1), r"basis must be contiguous float32 \[\*, 12\] on cpu, got"),
        (lambda: ops.subspace_refresh(gradient.double(), basis, 0), "gradient must be contiguous float32 or bfloat16"),
        (lambda: ops.subspace_refresh(gradient.t(), basis, 0), "gradient must be contiguous .* not contiguous"),
        (lambda: ops.subspace_refresh(gradient, torch.randn(9, 8), 0), "at most 8 vectors of length 8, got 9"),
        (lambda: ops.subspace_refresh(gradient, torch.randn(13, 8), 0), "basis must be at most 8 vectors .*, got 13"),
        (lambda: ops.captured_energy(gradient, torch.randn(13, 8)), "right must be at most 8 vectors .*, got 13"),
        (lambda: ops.subspace_refresh(gradient, basis, 0, -1), "steps must be from 0 to 2147483647, got -1"),
        (lambda: ops.subspace_refresh(gradient, basis, 0, 0, "float16"), "compute_dtype must be .* got 'float16'"),
        (lambda: ops.subspace_random(9, 8, 0, 0, 0), "rank must be from 0 to dim = 8, got 9"),
        (lambda: ops.subspace_random(3, 8, 0, -1, 0), "id must be in 32 bits, got -1"),
        (lambda: ops.subspace_random(3, 8, 0, 0, 2**32), "draw must be in 32 bits, got 4294967296"),
        (lambda: ops.captured_energy(gradient), "expected vectors on at least one side, got none"),
        (lambda: ops.captured_energy(gradient, None, basis), r"left must be contiguous float32 \[\*, 12\]"),
        (lambda: ops.captured_energy(gradient / 0, basis), "gradient: holds a value that is not finite"),
        (lambda: ops.captured_energy(gradient, basis * 0), "basis: expected finite vectors, not all zero"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_empty_arrays_are_a_success() -> None:
    assert ops.subspace_refresh(torch.zeros(0, 8), torch.zeros(3, 8), RIGHT).kept
    assert ops.subspace_refresh(torch.randn(5, 8), torch.zeros(0, 8), RIGHT).kept
    assert ops.subspace_random(0, 8, 0, 0, 0).shape == (0, 8)
    assert ops.captured_energy(torch.zeros(0, 8), torch.randn(3, 8)) == 0.0


@pytest.mark.skipif(emulated.wanted(), reason="emulated kernels run in the caller's float mode, a GPU's do not")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-38, 1e-40, 3e38])
def test_refresh_does_not_depend_on_the_caller_s_float_mode(size: float, dtype: torch.dtype) -> None:
    """The host judged max |G|, and divided by its scale of 2^-127, where denormals may be read as zeros."""
    gradient, basis = (torch.rand(40, 30) * size).to(dtype), ops.subspace_random(5, 30, 1, 2, 3)
    expected, energy = ops.subspace_refresh(gradient, basis, RIGHT), ops.captured_energy(gradient, basis)
    assert torch.set_flush_denormal(True)
    try:
        found, flushed = ops.subspace_refresh(gradient, basis, RIGHT), ops.captured_energy(gradient, basis)
    finally:
        torch.set_flush_denormal(False)
    assert not expected.kept and not found.kept
    assert torch.allclose(found.basis, expected.basis, atol=1e-5)
    assert found.energy_new == pytest.approx(expected.energy_new, abs=1e-5)
    assert flushed == pytest.approx(energy, abs=1e-5)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_bases_are_orthonormal_whatever_torch_s_matmul_precision(precision: str) -> None:
    """At "medium" a CPU with bfloat16 units rounds the factors of float32 products, and no basis came out."""
    gradient = torch.randn(300, 200)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        start = ops.subspace_random(32, 200, 0, 0, 0)
        found = ops.subspace_refresh(gradient, start, RIGHT)
        energy = ops.captured_energy(gradient, found.basis)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert gap_from_orthonormal(start) < 1e-4
    assert not found.kept and gap_from_orthonormal(found.basis) < 1e-4
    assert energy == pytest.approx(exact_energy(gradient, found.basis, RIGHT), abs=1e-5)


# ---------------------------------------------------------------- the definition's orthonormalisation


def test_orthonormalise_keeps_orientation_and_counts_householder() -> None:
    matrix = torch.randn(200, 30)
    q, fallback = orthonormalise(matrix)
    assert not fallback
    triangular = q.t() @ matrix
    assert (triangular.diagonal() > 0).all()
    assert torch.tril(triangular, -1).abs().max() < 1e-3 * triangular.abs().max()
    dead = matrix.clone()
    dead[:, 5] = 0.0  # exactly zero: no rounding noise that a shift could lift
    q, fallback = orthonormalise(dead)
    assert fallback and gap_from_orthonormal(q.t()) < 1e-5
    assert ((q.t() @ dead).diagonal() > -1e-5).all()


# ---------------------------------------------------------------- signs and schedule


def test_signs() -> None:
    vectors = torch.tensor([[0.1, -0.9], [0.9, 0.1]])
    assert torch.equal(subspace.canonical_signs(vectors), torch.tensor([[-0.1, 0.9], [0.9, 0.1]]))
    old = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert torch.equal(subspace.matching_signs(vectors, old), torch.tensor([[0.1, -0.9], [-0.9, -0.1]]))


@given(st.integers(1, 2000))
def test_stagger_stride_is_coprime_and_nearest(gap: int) -> None:
    stride = (subspace.stagger_phase(1, gap) or gap) if gap > 1 else 1
    assert math.gcd(stride, gap) == 1
    nearer = [q for q in range(1, gap + 1) if abs(q - 0.618 * gap) < abs(stride - 0.618 * gap)]
    assert all(math.gcd(q, gap) != 1 for q in nearer)
    count = min(gap, 50)
    assert len({subspace.stagger_phase(i, gap) for i in range(count)}) == count


@pytest.mark.parametrize("gap", [2**31 - 1, 2**31 - 2, 223_092_870, 1_000_000])
def test_a_gap_longer_than_any_run_has_its_stride_at_once(gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers up to the gap were tried: minutes at 10^9, the way to say "never". 223092870 has nine primes."""
    calls, gcd = [], math.gcd

    def counted(a: int, b: int) -> int:
        calls.append(a)
        assert len(calls) < 1000
        return gcd(a, b)

    monkeypatch.setattr(math, "gcd", counted)
    stride = subspace.stagger_phase(1, gap)
    monkeypatch.undo()
    assert math.gcd(stride, gap) == 1
    reach = abs(stride - 0.618 * gap)
    nearer = [q for q in range(stride - 100, stride + 100) if abs(q - 0.618 * gap) < reach]
    assert reach < 50 and all(math.gcd(q, gap) != 1 for q in nearer)


def test_stagger_of_56_matrices_at_gap_200_refreshes_at_most_two_at_once() -> None:
    for count, gap in ((56, 200), (56, 50), (300, 200), (5, 7)):
        busy = collections.Counter(subspace.stagger_phase(i, gap) for i in range(count))
        assert max(busy.values()) <= math.ceil(count / gap) + 1


@pytest.mark.parametrize("count", [0, 1, 8, 64, 65, 200])
def test_first_refreshes_are_spread(count: int) -> None:
    steps = subspace.first_refresh_steps(count)
    assert len(steps) == count
    assert max(collections.Counter(steps).values(), default=0) <= 8
    assert max(steps, default=0) < max(8, math.ceil(count / 8))


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(0, 299))
def test_next_phase_step_is_the_first_after(step: int, gap: int, number: int) -> None:
    phase = number % gap
    found = subspace.next_phase_step(step, phase, gap)
    assert step < found <= step + gap and found % gap == phase


def test_side_of() -> None:
    assert [subspace.side_of("std", *shape) for shape in ((4, 3), (3, 3), (3, 4))] == [RIGHT, RIGHT, LEFT]
    assert [subspace.side_of("reverse_std", *shape) for shape in ((4, 3), (3, 3), (3, 4))] == [LEFT, LEFT, RIGHT]
    assert [subspace.side_of(name, 3, 4) for name in ("right", "left", "full")] == [RIGHT, LEFT, subspace.FULL]
    with pytest.raises(ValueError, match="proj_type must be one of std, .*, full, got 'both'"):
        subspace.side_of("both", 3, 4)

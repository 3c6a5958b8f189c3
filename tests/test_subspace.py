"""Bases and their schedule: orthonormality on every kind of gradient, captured energy, orientation, the stagger."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from q_galore_torch import subspace
from q_galore_torch.subspace import LEFT, RIGHT


def spectrum_matrix(rows: int, cols: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 matrix with the given singular values, and its right singular vectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    u, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(cols, count, generator=generator, dtype=torch.float64))
    return u * values.double() @ v.t(), v.t()


def gap_from_orthonormal(basis: Tensor) -> float:
    rows = basis.double()
    return (rows @ rows.t() - torch.eye(len(rows), dtype=torch.float64)).abs().max().item()


GRADIENTS = {
    "noise": torch.randn(96, 64, generator=torch.Generator().manual_seed(1)),
    "constant": torch.ones(96, 64),
    "rank one": torch.arange(1.0, 97)[:, None] * torch.linspace(-1, 1, 64),
    "one entry": torch.zeros(96, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(2.0)),
    "one column": torch.zeros(96, 64).index_fill(1, torch.tensor([7]), 1.0),
    "tiny": torch.randn(96, 64, generator=torch.Generator().manual_seed(2)) * 1e-30,
    "huge": torch.randn(96, 64, generator=torch.Generator().manual_seed(3)) * 1e30,
    "steep": spectrum_matrix(96, 64, 10.0 ** -torch.arange(64.0))[0].float(),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_power_basis_is_orthonormal(kind: str, rank: int) -> None:
    start = subspace.random_basis(rank, 64, seed=0, id=0)
    found = subspace.power_basis(GRADIENTS[kind], start.vectors)
    assert gap_from_orthonormal(found.vectors) < 1e-4


@pytest.mark.parametrize("kind", GRADIENTS)
def test_svd_and_cold_bases_are_orthonormal(kind: str) -> None:
    vectors = subspace.svd_basis(GRADIENTS[kind], 16)
    assert vectors is not None and gap_from_orthonormal(vectors) < 1e-4
    cold = subspace.cold_basis(GRADIENTS[kind], 16, seed=0, id=0)
    assert cold is not None and gap_from_orthonormal(cold.vectors) < 1e-4


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_captured_energy_does_not_depend_on_the_gradient_s_size(scale: float) -> None:
    gradient = GRADIENTS["noise"]
    basis = subspace.svd_basis(gradient, 16)
    assert basis is not None
    expected = subspace.captured_energy(gradient, basis)
    assert 0.3 < expected < 0.7
    assert subspace.captured_energy(gradient * scale, basis * 3.0) == pytest.approx(expected, rel=1e-3)
    assert subspace.captured_energy(torch.zeros(4, 64), basis) == 0.0


def test_orthonormalise_keeps_orientation_and_counts_householder() -> None:
    matrix = torch.randn(200, 30)
    q, fallback = subspace.orthonormalise(matrix)
    assert not fallback
    triangular = q.t() @ matrix
    assert (triangular.diagonal() > 0).all()
    assert torch.tril(triangular, -1).abs().max() < 1e-3 * triangular.abs().max()
    dead = matrix.clone()
    dead[:, 5] = 0.0  # exactly zero: no rounding noise that a shift could lift
    q, fallback = subspace.orthonormalise(dead)
    assert fallback and gap_from_orthonormal(q.t()) < 1e-5
    assert ((q.t() @ dead).diagonal() > -1e-5).all()


def test_orthonormalise_of_one_vector_normalises_it() -> None:
    q, fallback = subspace.orthonormalise(torch.tensor([[3e-20], [-4e-20]]))
    torch.testing.assert_close(q, torch.tensor([[0.6], [-0.8]]))
    assert not fallback


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_cold_basis_captures_what_the_svd_does(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(1.0, 513) ** -decay
    gradient = spectrum_matrix(600, 512, values)[0].float()
    best = float((values[:64] ** 2).sum() / (values**2).sum())
    monkeypatch.setattr(subspace, "EXACT_SVD_LIMIT", 8)  # the randomised range finder
    cold = subspace.cold_basis(gradient, 64, seed=0, id=3)
    assert cold is not None and cold.fallbacks == 0
    assert subspace.captured_energy(gradient, cold.vectors) >= 0.99 * best
    largest = cold.vectors.gather(1, cold.vectors.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_warm_step_follows_a_moving_subspace() -> None:
    values = torch.cat([torch.linspace(3, 1, 16), torch.full((48,), 0.05)])
    first, _ = spectrum_matrix(96, 64, values, seed=5)
    basis = subspace.svd_basis(first.float(), 16)
    assert basis is not None
    turn = torch.linalg.matrix_exp(0.02 * (lambda a: a - a.t())(torch.randn(64, 64, dtype=torch.float64)))
    moved = (first @ turn).float()
    best = subspace.svd_basis(moved, 16)
    assert best is not None
    warm = subspace.power_basis(moved, basis)
    share = subspace.captured_energy(moved, warm.vectors) / subspace.captured_energy(moved, best)
    assert share >= 0.995
    assert subspace.captured_energy(moved, basis) < 0.99 * subspace.captured_energy(moved, best)
    assert warm.fallbacks == 0


def test_power_basis_takes_a_second_step_when_the_first_gains_much(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = subspace.orthonormalise

    def counting(matrix: Tensor) -> tuple[Tensor, bool]:
        calls.append(tuple(matrix.shape))
        return real(matrix)

    gradient, right = spectrum_matrix(96, 64, torch.cat([torch.ones(8), torch.full((56,), 0.2)]))
    monkeypatch.setattr(subspace, "orthonormalise", counting)
    subspace.power_basis(gradient.float(), right[:8].float())
    assert len(calls) == 3  # the old basis, Z, Y
    calls.clear()
    subspace.power_basis(gradient.float(), subspace.random_basis(8, 64, 0, 0).vectors)
    assert len(calls) == 5 + 1  # the random basis took one
    calls.clear()
    subspace.power_basis(gradient.float(), right[:8].float(), steps=3)
    assert len(calls) == 7


def test_power_basis_of_an_orthogonal_gradient_keeps_the_basis() -> None:
    gradient = torch.zeros(8, 6)
    gradient[:, 5] = 1.0
    basis = torch.eye(6)[:2]
    torch.testing.assert_close(subspace.power_basis(gradient, basis).vectors, basis)


def test_power_basis_in_bfloat16_captures_nearly_the_same() -> None:
    gradient = spectrum_matrix(160, 96, torch.arange(1.0, 97) ** -1.0)[0].float()
    start = subspace.random_basis(24, 96, seed=0, id=0).vectors
    exact = subspace.captured_energy(gradient, subspace.power_basis(gradient, start, 3).vectors)
    rounded = subspace.captured_energy(gradient, subspace.power_basis(gradient, start, 3, torch.bfloat16).vectors)
    assert rounded >= 0.999 * exact


@pytest.mark.parametrize(("rows", "cols"), [(160, 64), (64, 160), (64, 64)])
def test_bases_agree_with_the_exact_subspace_by_principal_angles(rows: int, cols: int) -> None:
    values = torch.cat([torch.linspace(4, 2, 12), torch.linspace(0.4, 0.1, 52)])  # separated: 2 against 0.4
    gradient, right = spectrum_matrix(rows, cols, values, seed=7)
    side = subspace.side_of("std", rows, cols)
    assert side == (RIGHT if rows >= cols else LEFT)
    matrix = subspace.oriented(gradient.float(), side)
    _, _, vh = torch.linalg.svd(subspace.oriented(gradient, side), full_matrices=False)
    for found, bound in (
        (subspace.svd_basis(matrix, 12), 1e-5),
        (subspace.cold_basis(matrix, 12, 0, 0), 1e-5),
        (subspace.power_basis(matrix, subspace.random_basis(12, min(rows, cols), 0, 0).vectors, 3), 5e-3),
    ):
        assert found is not None
        vectors = found if isinstance(found, Tensor) else found.vectors
        outside = vectors.double() - vectors.double() @ vh[:12].t() @ vh[:12]
        assert torch.linalg.matrix_norm(outside, 2) < bound  # the sine of the largest angle
    assert right.shape == (64, cols)


def test_random_basis_is_seeded() -> None:
    a = subspace.random_basis(8, 40, seed=1, id=2)
    assert gap_from_orthonormal(a.vectors) < 1e-5
    assert torch.equal(a.vectors, subspace.random_basis(8, 40, seed=1, id=2).vectors)
    for other in (dict(seed=2, id=2), dict(seed=1, id=3), dict(seed=1, id=2, draw=1)):
        assert not torch.equal(a.vectors, subspace.random_basis(8, 40, **other).vectors)
    # The draw itself is integers: these are the same on every machine.
    first = torch.tensor([0.07238037139, 0.19235841929, 0.00616199290, 0.10094606876])
    torch.testing.assert_close(a.vectors[0, :4], first, rtol=0, atol=1e-7)
    state = torch.get_rng_state()
    subspace.random_basis(8, 40, seed=1, id=2)
    assert torch.equal(state, torch.get_rng_state())


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


def test_side_of_refuses_what_is_not_there_yet() -> None:
    with pytest.raises(ValueError, match="proj_type must be 'std', got 'full'"):
        subspace.side_of("full", 3, 4)

"""What a refresh does to the moments: kept, rotated into the new basis, or reset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from galore_reference import decoded_basis, decoded_moments, low_rank_stream
from q_galore_torch.optim.moments import rotated

BETAS = (0.9, 0.999)


def orthonormal(rank: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64, generator=generator))[0].t()


def test_a_rotation_within_the_subspace_keeps_the_direction_in_weight_space() -> None:
    generator = torch.Generator().manual_seed(0)
    old = orthonormal(6, 20, generator)
    new = orthonormal(6, 6, generator) @ old
    m = torch.randn(6, 30, dtype=torch.float64, generator=generator)
    turned, _ = rotated(m, m.square() + 1, [new @ old.t()], BETAS, 40)
    torch.testing.assert_close(new.t() @ turned, old.t() @ m)


def test_the_second_moment_is_that_of_independent_coordinates() -> None:
    """Of coordinates with given means and independent variances, the mean square in the new basis, by sampling."""
    generator = torch.Generator().manual_seed(0)
    turn, updates = orthonormal(5, 5, generator), 40
    mean = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    spread = torch.rand(5, 3, dtype=torch.float64, generator=generator) + 0.1
    bias1, bias2 = 1 - BETAS[0] ** updates, 1 - BETAS[1] ** updates
    first, second = rotated(mean * bias1, (spread.square() + mean.square()) * bias2, [turn], BETAS, updates)
    draws = mean + spread * torch.randn(200_000, 5, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(first / bias1, (turn @ draws).mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(second / bias2, (turn @ draws).square().mean(0), rtol=0.02, atol=0)


def test_both_sides_turn_where_both_are_projected() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = orthonormal(4, 4, generator), orthonormal(4, 4, generator)
    m = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    v = m.square() + torch.rand(4, 4, dtype=torch.float64, generator=generator)
    first, second = rotated(m, v, [left, right], BETAS, 3)
    torch.testing.assert_close(first, left @ m @ right.t())
    variance = v / (1 - 0.999**3) - (m / (1 - 0.9**3)).square()
    expected = torch.einsum("ia,jb,ab->ij", left.square(), right.square(), variance) + (first / (1 - 0.9**3)).square()
    torch.testing.assert_close(second, expected.abs() * (1 - 0.999**3))


def test_a_second_moment_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(8, 40, generator=generator)
    v = 1e-3 * m.square()  # less than the square of the mean, as after a change of the gradient's scale
    _, second = rotated(m, v, [orthonormal(8, 8, generator).float()], BETAS, 5)
    assert second.min() >= 0


def optimizer(moments: str, **options: Any) -> tuple[nn.Parameter, qg.QGaLoreAdamW8bit]:
    weight = nn.Parameter(torch.zeros(40, 24))
    group = {"params": [weight], "rank": 6, "update_proj_gap": 4, "moments": moments, "lazy_rule": "fixed", **options}
    return weight, qg.QGaLoreAdamW8bit([group], lr=0.01, min_8bit_size=0)


def steps(weight: nn.Parameter, opt: qg.QGaLoreAdamW8bit, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        weight.grad = gradient
        opt.step()


@pytest.mark.parametrize("subspace", ["warm", "svd"])
@pytest.mark.parametrize("moments_dtype", ["float32", "dynamic8"])
def test_rotate_turns_the_moments_before_the_step(subspace: str, moments_dtype: str) -> None:
    """The refresh at step 4 against the formulas in float64: moments turned by P_new P_old^T, then Adam's step on R."""
    gradients = low_rank_stream(40, 24, 5)
    weight, opt = optimizer("rotate", subspace=subspace, moments_dtype=moments_dtype, proj_format="float32")
    steps(weight, opt, gradients[:4])
    state, old = opt.state[weight], decoded_basis(opt, weight).double()
    m, v = decoded_moments(state)
    steps(weight, opt, gradients[4:])
    new = decoded_basis(opt, weight).double()
    assert state["refreshes"] == 2 and not torch.equal(old, new)
    turn = new @ old.t()
    mean = m / (1 - 0.9**4)
    variance = turn.square() @ (v / (1 - 0.999**4) - mean.square())
    m, v = turn @ m, (variance + (turn @ mean).square()).abs() * (1 - 0.999**4)
    r = new @ gradients[4].double().t()
    m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r.square()
    got_m, got_v = decoded_moments(state)
    # Two encodings of 8-bit moments, each within half a step of the top decade (0.0071 and 0.0036 of a block's absmax).
    exact = moments_dtype == "float32"
    torch.testing.assert_close(got_m, m, rtol=1e-4 if exact else 0, atol=1e-9 if exact else 2 * 0.0071 * m.abs().max())
    torch.testing.assert_close(got_v, v, rtol=1e-4 if exact else 0, atol=1e-15 if exact else 2 * 0.0036 * v.max())
    if not exact:
        assert (got_v[v > 0] > 0).all()


def test_keep_leaves_the_moments_alone() -> None:
    gradients = low_rank_stream(40, 24, 5)
    weight, opt = optimizer("keep", moments_dtype="float32", proj_format="float32")
    steps(weight, opt, gradients[:4])
    m, v = decoded_moments(opt.state[weight])
    steps(weight, opt, gradients[4:])
    r = decoded_basis(opt, weight).double() @ gradients[4].double().t()
    got_m, got_v = decoded_moments(opt.state[weight])
    torch.testing.assert_close(got_m, 0.9 * m + 0.1 * r, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(got_v, 0.999 * v + 0.001 * r.square(), rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("moments_dtype", ["float32", "dynamic8"])
def test_reset_restarts_the_bias_correction_but_not_the_step(moments_dtype: str) -> None:
    """The step after a reset is the first step of a new optimizer with the same basis: N = R / (|R| + eps)."""
    gradients = low_rank_stream(40, 24, 5)
    weight, opt = optimizer("reset", moments_dtype=moments_dtype, proj_format="float32", weight_decay=0.0)
    steps(weight, opt, gradients[:4])
    before = weight.detach().double().clone()
    steps(weight, opt, gradients[4:])
    basis = decoded_basis(opt, weight).double()
    r = basis @ gradients[4].double().t()
    update = (r / (r.abs() + 1e-8)).t() @ basis
    torch.testing.assert_close(weight.detach().double(), before - 0.01 * 0.25 * update, rtol=0, atol=1e-6)
    assert (opt.state[weight]["step"], opt.state[weight]["bias_step"]) == (5, 1)


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_low_rank_leaves_carry_their_moments_over_too(moments: str) -> None:
    torch.manual_seed(0)
    model = qg.prepare_model(nn.Sequential(nn.Linear(16, 24, bias=False)), 4, ".*")
    groups = qg.param_groups(model, update_proj_gap=3, moments=moments, moments_dtype="float32", proj_format="float32")
    opt = qg.QGaLoreAdamW8bit(groups)
    state, x = opt.state[model[0].leaf], torch.randn(30, 16)
    for step in range(4):
        old, m, t = decoded_basis(opt, model[0].leaf).double(), state["exp_avg"].double().clone(), state["bias_step"]
        model(x).square().sum().backward()
        m = 0.9 * m + 0.1 * model[0].leaf.grad.double()
        opt.step()
        opt.zero_grad()
        new = decoded_basis(opt, model[0].leaf).double()
        refreshed = step in (0, 3)
        assert torch.equal(old, new) != refreshed
        if refreshed and moments != "keep":
            m = torch.zeros_like(m) if moments == "reset" else new @ old.t() @ m
        torch.testing.assert_close(state["exp_avg"].double(), m, rtol=1e-4, atol=1e-6 * m.abs().max().item())
        assert state["bias_step"] == (0 if refreshed and moments == "reset" else t + 1)
        assert state["step"] == step + 1

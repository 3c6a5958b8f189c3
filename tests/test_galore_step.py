"""The projected step against the definition and against float64, for every side, format and gradient kind."""

from __future__ import annotations

import pytest
import torch

from q_galore_torch import ops, reference
from shapes import same_bits, spread
from steps import HYPER, MOMENTS, WEIGHTS, clone, fresh_moments, weight_parts, weight_value

SIDES = pytest.mark.parametrize("side", [ops.RIGHT, ops.LEFT], ids=["right", "left"])
SHAPES = [(1, 1), (40, 24), (7, 300), (515, 41), (33, 521)]


def make(m, n, rank, side, *, storage="float32", moments="float32", proj_format="float32", block=256, integer=False):
    """Lists of one matrix; `integer`: a basis of -1, 0, 1, with which R of an integer gradient is exact."""
    dim, other = (n, m) if side == ops.RIGHT else (m, n)
    rank = min(rank, dim)
    if integer:
        basis = torch.randint(-1, 2, (rank, dim)).float()
    else:
        basis = torch.linalg.qr(torch.randn(dim, rank))[0].t().contiguous()
    weight = weight_parts(torch.randn(m, n), storage)
    states = fresh_moments((rank, other), moments, block, by_row=True)
    projector = ops.projector_quantize(basis, proj_format, 64)
    return [[x] for x in weight], [[x] for x in states], [[x] for x in projector]


def run(
    module,
    weights,
    states,
    projector,
    grad,
    side,
    step,
    *,
    proj_format="float32",
    proj_block=64,
    low_rank=False,
    **options,
):
    stats = torch.zeros(1, 2, dtype=torch.int64)
    module.galore_step_(
        *weights,
        [grad],
        *states,
        *projector,
        [side],
        [step],
        [step + 5],
        [4],
        stats,
        proj_format=proj_format,
        proj_block=proj_block,
        low_rank=low_rank,
        **{**HYPER, "scale": 0.25, **options},
    )
    return stats


@SIDES
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("m, n", SHAPES)
def test_galore_moments_equal_reference(side, moments, m, n):
    """With small integers every GEMM sum is exact, so R and the moments must be equal bit for bit."""
    weights, states, projector = make(m, n, 12, side, moments=moments, integer=True)
    levels = {level: (clone(weights), clone(states)) for level in ops.simd_levels()}
    for step in (1, 2):
        grad = torch.randint(-8, 9, (m, n)).float()
        run(reference, weights, states, projector, grad, side, step)
        for level, (our_weights, our_states) in levels.items():
            ops.set_simd_level(level)
            run(ops, our_weights, our_states, projector, grad, side, step)
            assert all(same_bits(a[0], b[0]) for a, b in zip(our_states, states, strict=True)), level
            torch.testing.assert_close(our_weights[0][0], weights[0][0], rtol=1e-5, atol=1e-6)


@SIDES
@pytest.mark.parametrize("storage", WEIGHTS)
@pytest.mark.parametrize("m, n", SHAPES)
def test_galore_rank_one_equals_reference(side, storage, m, n):
    """At rank one the update is a product without a sum: weights too are equal bit for bit."""
    weights, states, projector = make(m, n, 1, side, storage=storage, moments="dynamic8", integer=True)
    levels = {level: (clone(weights), clone(states)) for level in ops.simd_levels()}
    for step in (1, 2):
        grad = torch.randint(-8, 9, (m, n)).float()
        stats = run(reference, weights, states, projector, grad, side, step)
        for level, (our_weights, our_states) in levels.items():
            ops.set_simd_level(level)
            assert torch.equal(run(ops, our_weights, our_states, projector, grad, side, step), stats)
            for got, want in zip(our_weights + our_states, weights + states, strict=True):
                assert same_bits(got[0], want[0]), level


@SIDES
@pytest.mark.parametrize("proj_format", ["float32", "int8", "int4"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n", SHAPES)
def test_galore_equals_float64_formula(side, proj_format, grad_dtype, m, n):
    """One step from used float32 moments, from G and from R, against the formula in float64."""
    for low_rank in (False, True):
        weights, states, projector = make(m, n, 12, side, proj_format=proj_format)
        dim = n if side == ops.RIGHT else m
        basis = ops.projector_dequantize(*(x[0] for x in projector), proj_format, 64, dim).double()
        states[0][0].normal_()
        states[1][0].normal_().square_()
        before = [x[0].double() for x in (weights[0], states[0], states[1])]
        grad = torch.randn(m, n).to(grad_dtype)
        if low_rank:
            grad = torch.randn(states[0][0].shape).to(grad_dtype)
            projected = grad.double()
        else:
            projected = basis @ (grad.double().t() if side == ops.RIGHT else grad.double())
        # A large rate, so that the rounding of the float32 weight itself does not drown the update's error.
        run(ops, weights, states, projector, grad, side, 3, proj_format=proj_format, low_rank=low_rank, lr=1.0)
        m1 = 0.9 * before[1] + 0.1 * projected
        v1 = 0.999 * before[2] + 0.001 * projected**2
        direction = (m1 / (1 - 0.9**3)) / ((v1 / (1 - 0.999**3)).sqrt() + 1e-8)
        update = direction.t() @ basis if side == ops.RIGHT else basis.t() @ direction
        exact = before[0] * (1 - 0.1) - 0.25 * update
        error = (weights[0][0].double() - exact).norm() / (exact - before[0]).norm().clamp(min=1e-9)
        assert error < 1e-5
        torch.testing.assert_close(states[0][0].double(), m1, rtol=1e-5, atol=1e-5)


@SIDES
@pytest.mark.parametrize("proj_format", list(ops.PROJ_FORMATS))
def test_galore_in_every_projector_format_equals_reference(side, proj_format):
    """Float32 weights and moments after one step, with blocks of 16 and with one scale for the whole basis."""
    for proj_block in (0, 16):
        weights, states, _ = make(33, 70, 5, side)
        basis = torch.linalg.qr(torch.randn(70 if side == ops.RIGHT else 33, 5))[0].t().contiguous()
        projector = [[x] for x in ops.projector_quantize(basis, proj_format, proj_block)]
        before = weights[0][0].clone()
        levels = {level: (clone(weights), clone(states)) for level in ops.simd_levels()}
        grad = torch.randn(33, 70)
        run(reference, weights, states, projector, grad, side, 1, proj_format=proj_format, proj_block=proj_block)
        assert not torch.equal(before, weights[0][0])
        for level, (our_weights, our_states) in levels.items():
            ops.set_simd_level(level)
            run(ops, our_weights, our_states, projector, grad, side, 1, proj_format=proj_format, proj_block=proj_block)
            for got, want in zip(our_weights[:1] + our_states[:2], weights[:1] + states[:2], strict=True):
                torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)


@SIDES
def test_galore_low_rank_gradient_equals_full_gradient(side):
    """Given R = P G^T or P G as the step computes it, the two ways are the same step."""
    weights, states, projector = make(60, 90, 16, side)
    other_weights, other_states = clone(weights), clone(states)
    grad = torch.randn(60, 90)
    basis = projector[0][0]
    projected = basis @ (grad.t() if side == ops.RIGHT else grad)
    run(ops, weights, states, projector, grad, side, 1)
    run(ops, other_weights, other_states, projector, projected.contiguous(), side, 1, low_rank=True)
    torch.testing.assert_close(weights[0][0], other_weights[0][0], rtol=1e-5, atol=1e-6)


@SIDES
@pytest.mark.parametrize("low_rank", [False, True])
def test_galore_bfloat16_gemms_are_close(side, low_rank):
    weights, states, projector = make(300, 520, 32, side, proj_format="int4")
    states[1][0].fill_(1.0)  # N smooth in R: from v = 0 it is the sign of R, which no rounding approximates
    start = weights[0][0].clone()
    expected_weights, expected_states = clone(weights), clone(states)
    grad = torch.randn(states[0][0].shape if low_rank else (300, 520))
    options = dict(proj_format="int4", low_rank=low_rank)
    run(ops, weights, states, projector, grad, side, 1, compute_dtype="bfloat16", weight_decay=0.0, **options)
    run(ops, expected_weights, expected_states, projector, grad, side, 1, weight_decay=0.0, **options)
    moved = (expected_weights[0][0] - start).norm()
    assert (weights[0][0] - expected_weights[0][0]).norm() < 0.01 * moved


@SIDES
def test_galore_int8_update_arrives_on_average(side):
    """100 steps of the same direction on INT8 weights: the mean movement is the exact one (3 %)."""
    weights, states, projector = make(128, 256, 8, side, storage="int8")
    before = weight_value(tuple(x[0] for x in weights))
    exact = before.double().clone()
    grad = torch.randn(128, 256)
    float_weights = [[before.clone()], [torch.empty(0)], [torch.empty(0, dtype=torch.int16)]]
    float_states = clone(states)
    for step in range(1, 101):
        run(ops, weights, states, projector, grad, side, step, lr=1e-3)
        run(ops, float_weights, float_states, projector, grad, side, step, lr=1e-3)
    moved = float_weights[0][0].double() - exact
    arrived = weight_value(tuple(x[0] for x in weights)).double() - exact
    share = (arrived * moved).sum() / moved.square().sum()
    assert abs(share - 1) < 0.03


def test_galore_list_equals_one_by_one():
    sizes = [(40, 24), (24, 40), (515, 260)]
    made = [
        make(m, n, 8, i % 2, storage="int8", moments="dynamic8", proj_format="int4") for i, (m, n) in enumerate(sizes)
    ]
    alone = [[clone(part) for part in one] for one in made]
    grads = [spread(m, n, seed=m) for m, n in sizes]
    stats = torch.zeros(3, 2, dtype=torch.int64)
    lists = [[one[part][k][0] for one in made] for part in range(3) for k in range(len(made[0][part]))]
    options = dict(proj_format="int4", proj_block=64, low_rank=False, scale=0.25, **HYPER)
    ops.galore_step_(*lists[:3], grads, *lists[3:], [0, 1, 0], [1] * 3, [6] * 3, [4] * 3, stats, **options)
    for i, (weights, states, projector) in enumerate(alone):
        one = run(ops, weights, states, projector, grads[i], i % 2, 1, proj_format="int4")
        assert torch.equal(one[0], stats[i])
        for got, want in zip(made[i][0] + made[i][1], weights + states, strict=True):
            assert same_bits(got[0], want[0])


def test_galore_refuses_bad_input_and_changes_nothing():
    weights, states, projector = make(40, 24, 8, ops.RIGHT, storage="int8", moments="dynamic8", proj_format="int4")
    before = clone(weights + states)
    grad = torch.randn(40, 24)
    cases = [
        (dict(grad=torch.randn(24, 40)), r"grads\[0\] must be .* \[40, 24\] on cpu, got float32 \[24, 40\]"),
        (dict(grad=grad.t()), r"grads\[0\] must be .* not contiguous"),
        (dict(side=1), r"proj_codes\[0\] must be contiguous uint8 \[\*, 20\] on cpu, got uint8 \[8, 12\]"),
        (dict(side=2), r"sides\[0\] must be 0 \(right\) or 1 \(left\), got 2"),
        (dict(low_rank=True), r"grads\[0\] must be .* \[8, 40\]"),
        (dict(proj_format="fp5"), r"proj_format must be one of"),
        (dict(compute_dtype="float16"), r"compute_dtype must be"),
        (dict(scale=float("inf")), r"lr, scale, weight_decay and eps must be finite"),
    ]
    for change, message in cases:
        arguments = dict(grad=grad, side=0, step=1, proj_format="int4", **{}) | change
        with pytest.raises(ValueError, match=message):
            run(ops, weights, states, projector, **arguments)
    assert all(same_bits(a[0], b[0]) for a, b in zip(weights + states, before, strict=True))

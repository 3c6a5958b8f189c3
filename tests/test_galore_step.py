"""The projected step against the definition and against float64, for every side, format and gradient kind."""

from __future__ import annotations

import pytest
import torch

import emulated
from q_galore_torch import ops, reference
from shapes import same_bits, spread
from steps import HYPER, MOMENTS, WEIGHTS, clone, fresh_moments, weight_parts, weight_value

SIDES = pytest.mark.parametrize("side", [ops.RIGHT, ops.LEFT, ops.FULL], ids=["right", "left", "full"])
SHAPES = [(1, 1), (40, 24), (7, 300), (515, 41), (33, 521)]


def make(m, n, rank, side, *, storage="float32", moments="float32", proj_format="float32", block=256, integer=False):
    """Lists of one matrix; `integer`: bases of -1, 0, 1, with which R of an integer gradient is exact.

    The projector has three lists, or six on both sides: P_L, then P_R.
    """
    dims = {ops.RIGHT: [n], ops.LEFT: [m], ops.FULL: [m, n]}[side]
    rank = min(rank, *dims)
    projector = []
    for dim in dims:
        if integer:
            basis = torch.randint(-1, 2, (rank, dim)).float()
        else:
            basis = torch.linalg.qr(torch.randn(dim, rank))[0].t().contiguous()
        projector += ops.projector_quantize(basis, proj_format, 64)
    weight = weight_parts(torch.randn(m, n), storage)
    other = {ops.RIGHT: m, ops.LEFT: n, ops.FULL: rank}[side]
    states = fresh_moments((rank, other), moments, block, by_row=True)
    return [[x] for x in weight], [[x] for x in states], [[x] for x in projector]


def bases(projector, side, proj_format, m, n):
    """(P_L, P_R) in float64, the identity for a side that is not projected."""
    dims = {ops.RIGHT: [n], ops.LEFT: [m], ops.FULL: [m, n]}[side]
    decoded = [
        ops.projector_dequantize(*(x[0] for x in projector[3 * i : 3 * i + 3]), proj_format, 64, dim).double()
        for i, dim in enumerate(dims)
    ]
    left = torch.eye(m).double() if side == ops.RIGHT else decoded[0]
    return left, torch.eye(n).double() if side == ops.LEFT else decoded[-1]


class Exact:
    """The step in float64, in one formula for every side: S = P_L G P_R^T, of which R is S, or S^T on the right."""

    def __init__(self, weights, states, projector, side, proj_format="float32"):
        self.weight = weight_value(tuple(x[0] for x in weights)).double()
        self.m, self.v = (x[0].double().clone() for x in states[:2])
        self.left, self.right = bases(projector, side, proj_format, *self.weight.shape)
        self.turned, self.norm = side == ops.RIGHT, 0.0

    def step(self, grad, t, *, low_rank=False, lr=0.01, weight_decay=0.1, scale=0.25, limit=0.0):
        """One step; whether the limit held N back."""
        r = grad.double()
        if not low_rank:
            r = self.left @ r @ self.right.t()
            r = r.t() if self.turned else r
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.999 * self.v + 0.001 * r**2
        n = (self.m / (1 - 0.9**t)) / ((self.v / (1 - 0.999**t)).sqrt() + 1e-8)
        held = limit > 0 and self.norm > 0 and n.norm().item() > limit * self.norm
        if held:
            n = n * (limit * self.norm / n.norm())
        self.norm = n.norm().item()
        update = self.left.t() @ (n.t() if self.turned else n) @ self.right
        self.weight = self.weight * (1 - lr * weight_decay) - lr * scale * update
        return held


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
    projector, right = projector[:3], projector[3:]
    options.update(zip(("right_codes", "right_scales", "right_zeros"), right, strict=bool(right)))
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
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("flag", [torch.inf, 1.1e18, 1e18])
def test_a_flagged_matrix_is_left_alone(side, low_rank, flag):
    """Weight, moments and norm stay as they are, whatever the gradient holds; a flag of 1e18 is none."""
    weights, states, projector = make(40, 24, 8, side, storage="int8", moments="dynamic8")
    before, norms = clone([*weights, *states]), torch.full((1,), 3.0, dtype=torch.float64)
    shape = tuple(states[0][0].shape) if low_rank else (40, 24)
    gradient = torch.full(shape, torch.nan) if flag > 1e18 else torch.ones(shape)
    options = dict(low_rank=low_rank, absmax=torch.tensor([flag]), norms=norms, norm_growth_limit=1.01)
    stats = run(ops, weights, states, projector, gradient, side, 2, proj_format="float32", **options)
    same = [same_bits(x[0], y[0]) for x, y in zip([*weights, *states], before, strict=True)]
    if flag > 1e18:
        assert all(same) and norms.item() == 3.0 and not stats.any()
    else:
        assert not same[0] and not same[3] and norms.item() != 3.0


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
        states[0][0].normal_()
        states[1][0].normal_().square_()
        exact = Exact(weights, states, projector, side, proj_format)
        before = exact.weight
        grad = torch.randn(states[0][0].shape if low_rank else (m, n)).to(grad_dtype)
        # A large rate, so that the rounding of the float32 weight itself does not drown the update's error.
        run(ops, weights, states, projector, grad, side, 3, proj_format=proj_format, low_rank=low_rank, lr=1.0)
        exact.step(grad, 3, low_rank=low_rank, lr=1.0)
        error = (weights[0][0].double() - exact.weight).norm() / (exact.weight - before).norm().clamp(min=1e-9)
        assert error < 1e-5
        torch.testing.assert_close(states[0][0].double(), exact.m, rtol=1e-5, atol=1e-5)


@SIDES
@pytest.mark.parametrize("storage", WEIGHTS)
@pytest.mark.parametrize("m, n", [(48, 20), (20, 48), (24, 24)], ids=["tall", "wide", "square"])
def test_galore_follows_float64_over_steps(side, storage, m, n):
    """Four large steps at every size of rank; a float64 weight is never further away than four roundings."""
    for rank in (1, 7, min(m, n)):
        weights, states, projector = make(m, n, rank, side, storage=storage, proj_format="int8")
        states[1][0].fill_(0.5)  # from v = 0 the first N is the sign of R, which no rounding approximates
        exact = Exact(weights, states, projector, side, "int8")
        start = exact.weight
        for step in range(1, 5):
            grad = torch.randn(m, n)
            options = dict(proj_format="int8", lr=2.0, weight_decay=0.02, stochastic_round=False)
            run(ops, weights, states, projector, grad, side, step, **options)
            exact.step(grad, step, lr=2.0, weight_decay=0.02)
        value = weight_value(tuple(x[0] for x in weights)).double()
        largest = max(start.abs().max().item(), exact.weight.abs().max().item())
        half = {"float32": 2.0**-20, "bfloat16": 2.0**-9, "float16": 2.0**-12}
        room = 4 * (0.6 * weights[1][0].max().item() if storage == "int8" else largest * half[storage])
        assert (value - exact.weight).abs().max() <= room < (exact.weight - start).abs().max(), rank


@SIDES
@pytest.mark.parametrize("proj_format", list(ops.PROJ_FORMATS))
def test_galore_in_every_projector_format_equals_reference(side, proj_format):
    """Float32 weights and moments after one step, with blocks of 16 and with one scale for the whole basis."""
    for proj_block in (0, 16):
        weights, states, _ = make(33, 70, 5, side)
        projector = []
        for dim in {ops.RIGHT: [70], ops.LEFT: [33], ops.FULL: [33, 70]}[side]:
            basis = torch.linalg.qr(torch.randn(dim, 5))[0].t().contiguous()
            projector += [[x] for x in ops.projector_quantize(basis, proj_format, proj_block)]
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
    """Given R as the step computes it, the two ways are the same step."""
    weights, states, projector = make(60, 90, 16, side)
    other_weights, other_states = clone(weights), clone(states)
    grad = torch.randn(60, 90)
    left, right = bases(projector, side, "float32", 60, 90)
    projected = (left @ grad.double() @ right.t()).float()
    projected = projected.t() if side == ops.RIGHT else projected
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
    sizes = [(40, 24), (24, 40), (515, 260), (70, 300)]
    sides = [ops.RIGHT, ops.LEFT, ops.FULL, ops.RIGHT]
    made = [
        make(m, n, 8, side, storage="int8", moments="dynamic8", proj_format="int4")
        for (m, n), side in zip(sizes, sides, strict=True)
    ]
    alone = [[clone(part) for part in one] for one in made]
    grads = [spread(m, n, seed=m) for m, n in sizes]
    stats, norms = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([3.0, 0, 3, 1e9], dtype=torch.float64)
    lists = [[one[part][k][0] for one in made] for part in range(3) for k in range((3, 4, 3)[part])]
    rights = [[one[2][-3 + k][0] for one in made] for k in range(3)]  # those of one-sided matrices are not read
    options = dict(proj_format="int4", proj_block=64, low_rank=False, scale=0.25, norm_growth_limit=1.5, **HYPER)
    options.update(zip(("right_codes", "right_scales", "right_zeros"), rights, strict=True))
    own = [x.reshape(1).clone() for x in norms]
    ops.galore_step_(*lists[:3], grads, *lists[3:], sides, [1] * 4, [6] * 4, [4] * 4, stats, norms=norms, **options)
    assert norms[[0, 2]].tolist() == [4.5, 4.5] and 4.5 < norms[1] < norms[3] < 1e3
    for i, (weights, states, projector) in enumerate(alone):
        more = dict(norm_growth_limit=1.5, norms=own[i])
        one = run(ops, weights, states, projector, grads[i], sides[i], 1, proj_format="int4", **more)
        assert torch.equal(one[0], stats[i]) and own[i] == norms[i]
        for got, want in zip(made[i][0] + made[i][1], weights + states, strict=True):
            assert same_bits(got[0], want[0])


@SIDES
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("m, n", [(40, 24), (24, 40), (515, 41)])
def test_galore_norm_limit_follows_float64(side, low_rank, compute, m, n):
    """Gradients that grow at once are held back, in the weights and in the norm kept; the moments are as ever."""
    weights, states, projector = make(m, n, 12, side)
    states[1][0].fill_(1.0)
    plain = clone(weights), clone(states)
    exact = Exact(weights, states, projector, side)
    start, norms, held = exact.weight, torch.zeros(1, dtype=torch.float64), []
    more = dict(low_rank=low_rank, compute_dtype=compute, weight_decay=0.0, lr=1.0)
    for step, size in enumerate((1.0, 1.0, 30.0, 0.01, 0.01), start=1):
        grad = size * torch.randn(states[0][0].shape if low_rank else (m, n))
        run(ops, weights, states, projector, grad, side, step, norm_growth_limit=3.0, norms=norms, **more)
        untouched = torch.full((1,), torch.nan, dtype=torch.float64)
        run(ops, *plain, projector, grad, side, step, norms=untouched, **more)
        assert untouched.isnan().all()
        held.append(exact.step(grad, step, low_rank=low_rank, weight_decay=0.0, lr=1.0, limit=3.0))
        assert norms.item() == pytest.approx(exact.norm, rel=1e-6 if compute == "float32" else 0.01)
    assert not held[0] and held[2] and not held[4]
    assert all(same_bits(a[0], b[0]) for a, b in zip(states, plain[1], strict=True))
    error = (weights[0][0].double() - exact.weight).norm() / (exact.weight - start).norm()
    assert error < (1e-5 if compute == "float32" else 0.02)
    assert (plain[0][0][0].double() - exact.weight).norm() > 0.1 * (exact.weight - start).norm()


@SIDES
@pytest.mark.parametrize("storage", WEIGHTS)
def test_galore_norm_limit_gives_the_same_bits_at_every_level(side, storage):
    """R has 64 x 1200 elements on the right, enough for several threads to add its squares."""
    weights, states, projector = make(1200, 300, 64, side, storage=storage, moments="dynamic8", proj_format="int4")
    start, grads = (clone(weights), clone(states)), [torch.randn(1200, 300) * size for size in (1, 1, 50)]
    expected = None
    for level in ops.simd_levels():
        ops.set_simd_level(level)
        weights, states = (clone(part) for part in start)
        norms, kept = torch.zeros(1, dtype=torch.float64), []
        for step, grad in enumerate(grads, start=1):
            more = dict(proj_format="int4", norm_growth_limit=0.5, norms=norms)
            run(ops, weights, states, projector, grad, side, step, **more)
            kept.append(norms.clone())
        assert kept[1] == 0.5 * kept[0] and kept[2] == 0.5 * kept[1]
        got = [x[0] for x in weights + states] + kept
        expected = got if expected is None else expected
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), level


@SIDES
def test_galore_norm_limit_equals_reference(side):
    """Rank one and integers: a held step gives the reference's codes, too."""
    weights, states, projector = make(300, 200, 1, side, storage="int8", moments="dynamic8", integer=True)
    other = clone(weights), clone(states)
    norms = torch.zeros(2, 1, dtype=torch.float64)
    for step in range(1, 4):
        grad = torch.randint(-8, 9, (300, 200)).float()
        run(ops, weights, states, projector, grad, side, step, norm_growth_limit=0.5, norms=norms[0])
        run(reference, *other, projector, grad, side, step, norm_growth_limit=0.5, norms=norms[1])
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-14, atol=0)
    assert all(same_bits(a[0], b[0]) for a, b in zip(weights + states, other[0] + other[1], strict=True))


def test_galore_refuses_bad_input_and_changes_nothing():
    weights, states, projector = make(40, 24, 8, ops.RIGHT, storage="int8", moments="dynamic8", proj_format="int4")
    before = clone(weights + states)
    grad, one = torch.randn(40, 24), torch.ones(1, dtype=torch.float64)
    cases = [
        (dict(grad=torch.randn(24, 40)), r"grads\[0\] must be .* \[40, 24\] on cpu, got float32 \[24, 40\]"),
        (dict(grad=grad.t()), r"grads\[0\] must be .* not contiguous"),
        (dict(side=1), r"proj_codes\[0\] must be contiguous uint8 \[\*, 20\] on cpu, got uint8 \[8, 12\]"),
        (dict(side=3), r"sides\[0\] must be 0 \(right\), 1 \(left\) or 2 \(full\), got 3"),
        (dict(side=2), r"right_codes must be a list of 1, got 0"),
        (dict(right_codes=[grad]), r"right_scales must be a list of 1, got 0"),
        (dict(norm_growth_limit=1.1), r"norms must be contiguous float64 \[1\] on cpu, got float64 \[0\]"),
        (dict(norm_growth_limit=1.1, norms=torch.ones(1)), r"norms must be contiguous float64 .*, got float32 \[1\]"),
        (dict(norm_growth_limit=-1.0, norms=one), r"norm_growth_limit: expected 0 \(off\) or a finite .*, got -1"),
        (dict(norm_growth_limit=float("nan"), norms=one), r"norm_growth_limit: expected 0 .*, got -?nan"),
        (dict(low_rank=True), r"grads\[0\] must be .* \[8, 40\]"),
        (dict(proj_format="fp5"), r"proj_format must be one of"),
        (dict(compute_dtype="float16"), r"compute_dtype must be"),
        (dict(scale=float("inf")), r"lr, scale, weight_decay and eps must be finite"),
    ]
    if not emulated.wanted():  # norms of a device are not read
        limit = dict(norm_growth_limit=1.1)
        cases.append((dict(norms=-one, **limit), "norm_growth_limit needs a norm that is finite and >= 0, got -1"))
        cases.append((dict(norms=one / 0, **limit), "norm_growth_limit needs a norm that is .*, got inf"))
    for change, message in cases:
        arguments = dict(grad=grad, side=0, step=1, proj_format="int4", **{}) | change
        with pytest.raises(ValueError, match=message):
            run(ops, weights, states, projector, **arguments)
    assert all(same_bits(a[0], b[0]) for a, b in zip(weights + states, before, strict=True)) and one == 1


def test_galore_refuses_numbers_beyond_32_bits(monkeypatch):
    """2^32 + k once passed for format k."""
    weights, states, projector = make(40, 24, 8, ops.RIGHT)
    before = clone(weights + states)
    monkeypatch.setitem(ops.PROJ_FORMATS, "far", 2**32)
    monkeypatch.setitem(ops._COMPUTE, "far", 2**32)
    for change, message in (
        (dict(proj_format="far"), r"proj_format must be the number of a format, got 4294967296"),
        (dict(compute_dtype="far"), r"compute_format must be 0 \(float32\) or 1 \(bfloat16\), got 4294967296"),
    ):
        with pytest.raises(ValueError, match=message):
            run(ops, weights, states, projector, **(dict(grad=torch.randn(40, 24), side=0, step=1) | change))
    assert all(same_bits(a[0], b[0]) for a, b in zip(weights + states, before, strict=True))


def test_galore_refuses_bad_right_bases_and_changes_nothing():
    weights, states, projector = make(40, 24, 8, ops.FULL, storage="int8", moments="dynamic8", proj_format="int4")
    before = clone(weights + states)
    codes, scales, zeros = (x[0] for x in projector[3:])
    swapped, narrow, grad = (
        projector[3:] + projector[:3],
        [[x[:7].clone()] for x in (codes, scales, zeros)],
        torch.randn(40, 24),
    )
    cases = [
        (swapped, {}, r"proj_codes\[0\] must be contiguous uint8 \[\*, 20\] on cpu, got uint8 \[8, 12\]"),
        (projector[:3] * 2, {}, r"right_codes\[0\] must be contiguous uint8 \[\*, 12\] on cpu, got uint8 \[8, 20\]"),
        (projector[:3] + narrow, {}, r"right_codes\[0\] must be 8 vectors like proj_codes, got uint8 \[7, 12\]"),
        (projector[:4] + [[scales[:7]]] + projector[5:], {}, r"right_scales\[0\] must be contiguous bfloat16 \[8, 1\]"),
        (projector[:5] + [[zeros.char()]], {}, r"right_zeros\[0\] must be contiguous uint8 \[8, 1\] .*, got int8"),
        (projector, dict(low_rank=True), r"grads\[0\] must be .* \[8, 8\] on cpu, got float32 \[40, 24\]"),
        (projector[:5] + [[]], {}, r"right_zeros must be a list of 1, got 0"),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            run(ops, weights, states, given, grad, ops.FULL, 1, proj_format="int4", **options)
    assert all(same_bits(a[0], b[0]) for a, b in zip(weights + states, before, strict=True))

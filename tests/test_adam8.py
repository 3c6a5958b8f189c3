"""The unprojected step: 8-bit and float32 Adam on every weight format, bit for bit against the definition."""

from __future__ import annotations

import pytest
import torch

from q_galore_torch import ops, reference
from shapes import LENGTHS, offset, same_bits, spread
from steps import HYPER, MOMENTS, WEIGHTS, clone, fresh_moments, weight_parts


def make(sizes, storage, moments, *, group_size=256, block=256, shift=False):
    move = offset if shift else (lambda x: x)
    weights = [weight_parts(spread(*s, seed=i).clamp(-100, 100), storage, group_size) for i, s in enumerate(sizes)]
    states = [fresh_moments(s, moments, block, by_row=False) for s in sizes]
    return [[move(x[k]) for x in weights] for k in range(3)], [[move(x[k]) for x in states] for k in range(4)]


def run(module, weight_lists, moment_lists, grads, step, *, group_size=256, block=256, **hyper):
    count = len(grads)
    stats = torch.zeros(count, 2, dtype=torch.int64)
    module.adam8_step_(
        *weight_lists,
        grads,
        *moment_lists,
        [step] * count,
        [step + 5] * count,
        list(range(count)),
        stats,
        group_size=group_size,
        block=block,
        **{**HYPER, **hyper},
    )
    return stats


@pytest.mark.parametrize("storage", WEIGHTS)
@pytest.mark.parametrize("moments", MOMENTS)
def test_adam8_equals_reference(storage, moments):
    """Codes, scales, moments and floats at every SIMD level, over three steps, all lengths, aligned and not."""
    sizes = [(n,) for n in LENGTHS] + [(17, 33)]
    for shift, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        expected = make(sizes, storage, moments, shift=shift)
        levels = {level: make(sizes, storage, moments, shift=shift) for level in ops.simd_levels()}
        for step in (1, 2, 3):
            grads = [spread(*s, seed=step * 100 + i).to(dtype) for i, s in enumerate(sizes)]
            stats = run(reference, *expected, grads, step, stochastic_round=step != 3)
            for level, (weights, states) in levels.items():
                ops.set_simd_level(level)
                assert torch.equal(run(ops, weights, states, grads, step, stochastic_round=step != 3), stats)
                for got, want in zip(weights + states, expected[0] + expected[1], strict=True):
                    assert all(map(same_bits, got, want)), (level, step, dtype)


@pytest.mark.parametrize("group_size, block", [(1, 1), (7, 5), (64, 256), (1000, 64), (256, 2048), (300, 7000)])
def test_adam8_any_group_and_block(group_size, block):
    sizes = [(1021,), (1,)] if group_size == 1 else [(5000,), (1021,), (1,)]
    expected = make(sizes, "int8", "dynamic8", group_size=group_size, block=block)
    levels = {level: (clone(expected[0]), clone(expected[1])) for level in ops.simd_levels()}
    grads = [spread(*s, seed=9) for s in sizes]
    for step in (1, 2):
        run(reference, *expected, grads, step, group_size=group_size, block=block)
        for level, lists in levels.items():
            ops.set_simd_level(level)
            run(ops, *lists, grads, step, group_size=group_size, block=block)
            for got, want in zip(lists[0] + lists[1], expected[0] + expected[1], strict=True):
                assert all(map(same_bits, got, want)), level


def test_adam8_float32_agrees_with_torch_adamw():
    """An independent AdamW in float64, 20 steps."""
    w = torch.randn(3000)
    reference_parameter = torch.nn.Parameter(w.double())
    adamw = torch.optim.AdamW([reference_parameter], lr=0.01, weight_decay=0.1)
    weights, states = [[w.clone()], [torch.empty(0)], [torch.empty(0, dtype=torch.int16)]], None
    states = [[x] for x in fresh_moments((3000,), "float32", 256, by_row=False)]
    for step in range(1, 21):
        g = torch.randn(3000)
        reference_parameter.grad = g.double()
        adamw.step()
        run(ops, weights, states, [g], step)
    moved = (reference_parameter.detach() - w.double()).norm()
    assert (weights[0][0].double() - reference_parameter.detach()).norm() <= 1e-5 * moved


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_adam8_steps_stay_adams_when_gradients_stop(scale):
    """A second moment far below its block's largest must not become zero while the first moment survives."""
    generator = torch.Generator().manual_seed(1)
    first = scale * torch.randn(16384, generator=generator)
    parameter = torch.nn.Parameter(torch.zeros(16384))
    adamw = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
    weights = [[torch.zeros(16384)], [torch.empty(0)], [torch.empty(0, dtype=torch.int16)]]
    states = [[x] for x in fresh_moments((16384,), "dynamic8", 256, by_row=False)]
    for step in range(1, 21):
        gradient = first if step == 1 else torch.zeros(16384)
        parameter.grad = gradient
        adamw.step()
        before = weights[0][0].clone()
        run(ops, weights, states, [gradient], step, lr=1e-3, weight_decay=0.0)
        assert (weights[0][0] - before).abs().max() < 2e-3
    assert weights[0][0].abs().max() < 2 * parameter.detach().abs().max()


def test_adam8_results_do_not_depend_on_the_thread_count():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        weights, states = make([(100_003,)], "int8", "dynamic8")
        for step in (1, 2):
            run(ops, weights, states, [spread(100_003, seed=step)], step)
        results.append([one[0] for one in weights + states])
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize("storage", WEIGHTS)
def test_adam8_without_update_changes_no_byte(storage):
    """lr 0: weights keep every byte under stochastic rounding, groups of one element and constants too."""
    values = torch.cat([torch.randn(512), torch.full((256,), 0.3), torch.tensor([7.0])])
    parts = weight_parts(values, storage)
    before = [x.clone() for x in parts]
    states = [[x] for x in fresh_moments((769,), "dynamic8", 256, by_row=False)]
    for step in range(1, 30):
        run(ops, [[x] for x in parts], states, [torch.randn(769)], step, lr=0.0)
    assert all(map(same_bits, parts, before))


def test_adam8_bfloat16_rounding_is_unbiased():
    """The mean over many draws equals the exact update within sampling error; nearest rounding would lose it all."""
    n = 100_000
    weights = [[torch.full((n,), 1.0, dtype=torch.bfloat16)], [torch.empty(0)], [torch.empty(0, dtype=torch.int16)]]
    states = [[x] for x in fresh_moments((n,), "float32", 256, by_row=False)]
    run(ops, weights, states, [torch.ones(n)], 1, lr=1e-4, weight_decay=0.0)
    step = 2.0**-8  # spacing of bfloat16 below 1
    mean = (1.0 - weights[0][0].double()).mean().item()
    fraction = 1e-4 / step
    assert abs(mean - 1e-4) < 5 * step * (fraction * (1 - fraction) / n) ** 0.5 + 1e-9


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("moments", MOMENTS)
def test_adam8_leaves_flagged_parameters_alone(storage, moments):
    """A gradient over 1e18 or not finite changes nothing of its parameter; the others are updated as ever."""
    sizes, flags = [(300,), (40,), (5000,), (513,)], torch.tensor([1.0, torch.inf, 1e18, 1.1e18])
    weights, states = make(sizes, storage, moments)
    expected = clone(weights), clone(states)
    grads = [spread(*s, seed=i) for i, s in enumerate(sizes)]
    grads[1][7], grads[3][512] = torch.nan, 1.1e18
    stats = run(ops, weights, states, grads, 1, absmax=flags)
    assert torch.equal(run(reference, *expected, grads, 1, absmax=flags), stats)
    untouched = make(sizes, storage, moments)
    for lists, wanted, before in zip(weights + states, sum(expected, []), sum(untouched, []), strict=True):
        assert all(map(same_bits, lists, wanted))
        assert same_bits(lists[1], before[1]) and same_bits(lists[3], before[3])
    assert not same_bits(weights[0][2], untouched[0][0][2])


def test_adam8_refuses_bad_input_and_changes_nothing():
    weights, states = make([(300,), (40,)], "int8", "dynamic8")
    grads = [torch.randn(300), torch.randn(40)]
    before = clone(weights + states)
    cases = [
        (
            dict(grads=[grads[0], torch.randn(41)]),
            r"adam8_step_: grads\[1\] must be .* \[40\] on cpu, got float32 \[41\]",
        ),
        (dict(grads=[grads[0], grads[1].double()]), r"grads\[1\] must be contiguous float32 or .*, got float64 \[40\]"),
        (dict(grads=grads[:1]), r"grads must be a list of 2, got 1"),
        (dict(beta1=1.0), r"betas: expected \[0, 1\), got \(1, 0.999\)"),
        (dict(lr=float("nan")), r"lr, scale, weight_decay and eps must be finite"),
        (dict(absmax=torch.ones(3)), r"absmax must be contiguous float32 \[2\] on cpu, got float32 \[3\]"),
        (dict(group_size=0), r"group_size must be from 1"),
        (dict(group_size=128), r"scales\[0\] must be contiguous float32 \[3\]"),
    ]
    for change, message in cases:
        arguments = {"grads": grads, **change}
        given = arguments.pop("grads")
        with pytest.raises(ValueError, match=message):
            stats = torch.zeros(2, 2, dtype=torch.int64)
            ops.adam8_step_(*weights, given, *states, [1, 1], [1, 1], [0, 1], stats, **{**HYPER, **arguments})
    for got, want in zip(weights + states, before, strict=True):
        assert all(map(same_bits, got, want))

"""What the optimizer does when: stagger, retries, the public code's lazy rule, gradients that are not finite, the order
of update and refresh."""

from __future__ import annotations

import collections
import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import q_galore_torch as qg
from galore_reference import decoded_basis, low_rank_stream
from q_galore_torch.optim import schedule
from q_galore_torch.subspace import next_phase_step, stagger_phase


def matrices(count: int, rows: int = 12, cols: int = 8) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(rows, cols)) for _ in range(count)]


def refreshes(opt: qg.QGaLoreAdamW8bit) -> list[int]:
    return [entry["refreshes"] for entry in opt.telemetry() if "refreshes" in entry]


def tiny_model(layers: int, width: int = 12) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


# ---------------------------------------------------------------- stagger


def test_plain_parameters_refresh_at_their_phases() -> None:
    parameters, gap = matrices(9), 10
    opt = qg.QGaLoreAdamW8bit([{"params": parameters, "rank": 2, "update_proj_gap": gap}])
    seen: dict[int, list[int]] = collections.defaultdict(list)
    for step in range(25):
        before = refreshes(opt)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        opt.step()
        for index, (old, new) in enumerate(zip(before, refreshes(opt), strict=True)):
            if new > old:
                seen[index].append(step)
    for index in range(9):
        phase = stagger_phase(index, gap)
        first = next_phase_step(0, phase, gap)
        assert seen[index] == [0, *range(first, 25, gap)]
    at_once = collections.Counter(step for steps in seen.values() for step in steps if step > 0)
    assert max(at_once.values()) <= math.ceil(9 / gap) + 1


def test_low_rank_leaves_are_spread_from_the_start_and_then_follow_their_phases() -> None:
    layers, gap = 20, 30
    model = qg.prepare_model(tiny_model(layers), 2, ".*", weight_bits=None)
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=gap))
    leaves, seen = [layer.leaf for layer in model], collections.defaultdict(list)
    for step in range(70):
        wanted = [index for index, leaf in enumerate(leaves) if leaf.binding.due]
        due = [index for index in wanted if not schedule.is_pending(opt.state[leaves[index]])]
        assert len(due) <= 8
        model(torch.randn(5, 12)).square().sum().backward()
        assert [i for i, leaf in enumerate(leaves) if leaf.binding.stash is not None] == wanted
        before = refreshes(opt)
        opt.step()
        opt.zero_grad()
        assert [i for i, (a, b) in enumerate(zip(before, refreshes(opt), strict=True)) if b > a] == due
        assert all(leaf.binding.stash is None for leaf in leaves)
        for index in due:
            seen[index].append(step)
    for index in range(layers):
        first = index % 8
        later = next_phase_step(first, stagger_phase(index, gap), gap)
        assert seen[index] == [first, *range(later, 70, gap)]


@pytest.mark.parametrize("kind", ["plain", "leaf"])
def test_no_step_has_two_of_56_matrices_and_the_phases_survive_a_resume(kind: str) -> None:
    """After the first bases, with a gap of 200; the dates are the same after a resume."""

    def make() -> tuple[list[Any], list[Any], qg.QGaLoreAdamW8bit]:
        if kind == "plain":
            parameters = matrices(56, 3, 2)
            groups = [{"params": parameters, "rank": 1, "subspace": "random"}]
            return parameters, parameters, qg.QGaLoreAdamW8bit(groups, lr=0.0)
        layers = list(qg.prepare_model(tiny_model(56, 2), 1, ".*", weight_bits=None))
        groups = qg.param_groups(nn.Sequential(*layers), subspace="random")
        return layers, [layer.leaf for layer in layers], qg.QGaLoreAdamW8bit(groups, lr=0.0)

    owners, parameters, opt = make()
    gradient, counts, seen = torch.ones(parameters[0].shape), [], []
    for step in range(430):
        if step == 250:
            state = copy.deepcopy(opt.state_dict())
            owners, parameters, opt = make()
            opt.load_state_dict(state)
        before = [s["refreshes"] for s in opt.state.values()]
        for parameter in parameters:
            parameter.grad = gradient
        opt.step()
        new = [i for i, (a, s) in enumerate(zip(before, opt.state.values(), strict=True)) if s["refreshes"] > a]
        seen += [(step, index) for index in new]
        counts.append(len(new))
    first = 1 if kind == "plain" else max(8, math.ceil(56 / 8))
    assert sum(counts[:first]) >= 56 and max(counts[:first]) <= (56 if kind == "plain" else 8)
    assert max(counts[first:]) == 1  # no two phases of so few are the same
    for index in range(56):
        dates = [step for step, i in seen if i == index and step >= first]
        assert [date % 200 for date in dates] == [stagger_phase(index, 200)] * len(dates) and len(dates) >= 2


def test_phases_count_both_kinds_and_ids_count_all() -> None:
    model = qg.prepare_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 2, ["0"])
    opt = qg.QGaLoreAdamW8bit([{"params": [model[1].weight], "rank": 2}, {"params": [model[1].bias, model[0].bias]}])
    opt.add_param_group({"params": [model[0].leaf], "rank": 2})
    states = list(opt.state.values())
    assert [s["id"] for s in states] == [0, 1, 2, 3]
    assert [s["number"] for s in states if "number" in s] == [0, 1]
    assert states[3]["phase"] == stagger_phase(1, 200)


# ---------------------------------------------------------------- zero gradients and retries


def test_a_zero_gradient_keeps_the_basis_and_is_retried_without_moving_the_phase() -> None:
    weight = nn.Parameter(torch.randn(12, 8))
    opt = qg.QGaLoreAdamW8bit([{"params": [weight], "rank": 2, "update_proj_gap": 5, "proj_format": "float32"}])
    history = []
    for step in range(12):
        weight.grad = torch.zeros(12, 8) if step in (0, 5, 6) else torch.randn(12, 8)
        before = decoded_basis(opt, weight)
        opt.step()
        if not torch.equal(before, decoded_basis(opt, weight)):
            history.append(step)
    assert history == [1, 7, 10]  # 0 and 5 retried, 10 as if nothing had happened


def test_a_basis_is_not_taken_from_a_failed_svd(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    weight = nn.Parameter(torch.randn(12, 8))
    opt = qg.QGaLoreAdamW8bit([{"params": [weight], "rank": 2}])

    def failing(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    weight.grad = torch.randn(12, 8)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", failing)
        opt.step()
    assert refreshes(opt) == [0] and "the old basis stays" in caplog.text
    opt.step()
    assert refreshes(opt) == [1]


def test_a_parameter_without_gradient_waits() -> None:
    first, second = matrices(2)
    opt = qg.QGaLoreAdamW8bit([{"params": [first, second], "rank": 2}])
    for step in range(6):
        first.grad = torch.randn_like(first)
        second.grad = torch.randn_like(second) if step % 2 else None
        opt.step()
    assert [entry["step"] for entry in opt.telemetry()] == [6, 3]


# ---------------------------------------------------------------- the public code's rule


def test_lazy_rule_upstream_is_the_public_one() -> None:
    """Signed cosine of LAPACK's first vectors, a queue that is never cleared, no cap, no stagger: compared with a
    direct transcription of the rule."""
    generator = torch.Generator().manual_seed(1)
    options = dict(rank=4, update_proj_gap=2, lazy_rule="upstream", cos_threshold=0.3, queue_size=3, gamma_proj=1.5)
    opt = qg.QGaLoreAdamW8bit([{"params": matrices(2, 24, 16), **options, "quant": False}])
    parameters = opt.param_groups[0]["params"]
    fixed = torch.randn(24, 1, generator=generator) @ torch.randn(1, 16, generator=generator)
    gap, queue, past, basis, expected, lowest = 2, [], None, None, [], 1.0
    for step in range(60):
        gradient = 4 * fixed + torch.randn(24, 16, generator=generator)
        gradient = -gradient if step in (4, 6, 8) else gradient  # may turn LAPACK's sign of the first vector
        if basis is None or step % gap == 0:
            basis = torch.linalg.svd(gradient, full_matrices=False)[2][:4]
            expected.append(step)
            if past is not None:
                queue = [*queue, F.cosine_similarity(past, basis[0], dim=0).item()][-3:]
                lowest = min(lowest, *queue)
                if len(queue) == 3 and sum(queue) / 3 >= 0.3:
                    gap = int(gap * 1.5)
            past = basis[0].clone()
        for parameter in parameters:
            parameter.grad = gradient.clone()
        opt.step()
        for parameter in parameters:
            torch.testing.assert_close(decoded_basis(opt, parameter), basis, rtol=0, atol=0)
    report = opt.telemetry()
    assert [entry["gap"] for entry in report] == [gap, gap] and gap > 4 and lowest < -0.9
    assert refreshes(opt) == [len(expected)] * 2
    assert report[0]["similarity"] == pytest.approx(queue[-1])


def test_lazy_rule_upstream_judges_the_side_that_is_renewed() -> None:
    """With both sides of 4 x 40 at rank 4 the left basis is never renewed: its cosine was 1 and stretched every gap."""
    generator, weight = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(4, 40))
    group = {"params": [weight], "rank": 4, "proj_type": "full", "update_proj_gap": 2, "lazy_rule": "upstream"}
    opt, past = qg.QGaLoreAdamW8bit([{**group, "cos_threshold": 0.9, "queue_size": 1}]), None
    for step in range(9):
        weight.grad = torch.randn(4, 40, generator=generator)
        opt.step()
        if step % 2 == 0:
            vector = torch.linalg.svd(weight.grad, full_matrices=False)[2][0]
            if past is not None:
                cosine = F.cosine_similarity(past, vector, dim=0).item()
                assert opt.telemetry()[0]["similarity"] == pytest.approx(cosine, abs=1e-5)
            past = vector
    assert opt.telemetry()[0]["gap"] == 2


def test_fixed_rule_never_moves_the_gap() -> None:
    weight = nn.Parameter(torch.zeros(24, 16))
    opt = qg.QGaLoreAdamW8bit([{"params": [weight], "rank": 4, "update_proj_gap": 2, "lazy_rule": "fixed"}])
    for gradient in low_rank_stream(24, 16, 21):
        weight.grad = gradient
        opt.step()
    entry = opt.telemetry()[0]
    assert (entry["gap"], entry["refreshes"], entry["similarity"]) == (2, 11, None)


def test_lazy_rule_upstream_is_refused_for_low_rank_layers() -> None:
    model = qg.prepare_model(tiny_model(1), 2, ".*")
    with pytest.raises(ValueError, match="lazy_rule='upstream' needs full gradients, but 0.coordinates is low-rank"):
        qg.QGaLoreAdamW8bit(qg.param_groups(model, lazy_rule="upstream"))


# ---------------------------------------------------------------- order of update and refresh


def test_plain_parameters_refresh_before_the_step_and_leaves_after_it() -> None:
    x = torch.randn(20, 12)
    for grad_mode in ("full", "low_rank"):
        torch.manual_seed(0)
        model = qg.prepare_model(tiny_model(1), 3, ".*", weight_bits=8, grad_mode=grad_mode)
        groups = qg.param_groups(model, update_proj_gap=3, proj_format="float32", weight_decay=0.0)
        opt = qg.QGaLoreAdamW8bit(groups, lr=0.1, nonfinite="raise")
        layer = model[0]
        for _ in range(7):
            before, basis = layer.dequantize(), decoded_basis(opt, layer.leaf)
            model(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
            moved = layer.dequantize() - before
            used = decoded_basis(opt, layer.leaf) if grad_mode == "full" else basis
            outside = moved - moved @ used.t() @ used
            # INT8 rounding leaves noise of about one step per element outside of the subspace.
            assert outside.norm() <= 2.0 * layer.scales.max() * math.sqrt(moved.numel())
            assert (moved @ used.t()).norm() > 3 * outside.norm()
        assert refreshes(opt) == [3]  # full: 0, 3, 6; low rank: 0, 3, 6 (phase 0)


def test_first_data_driven_basis_of_a_leaf_takes_more_power_steps_later_ones_are_warm() -> None:
    from q_galore_torch import subspace

    torch.manual_seed(0)
    model = qg.prepare_model(tiny_model(1), 3, ".*", weight_bits=None)
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=2, proj_format="float32"))
    layer, x = model[0], torch.randn(20, 12)
    start = subspace.random_basis(3, 12, seed=0, id=0).vectors
    torch.testing.assert_close(decoded_basis(opt, layer.leaf), start)
    for step in range(3):
        old, weight = decoded_basis(opt, layer.leaf), layer.weight.detach().clone()
        model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
        gradient = 2 * (x @ weight.t()).t() @ x
        steps = {0: subspace.COLD_STEPS, 2: None}
        found = subspace.refresh_basis(gradient, subspace.RIGHT, old, steps[step]) if step in steps else None
        expected = old if found is None else found.vectors
        torch.testing.assert_close(decoded_basis(opt, layer.leaf), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the stash


def due_layer() -> tuple[nn.Module, qg.QGaLoreAdamW8bit, Any]:
    torch.manual_seed(0)
    model = qg.prepare_model(tiny_model(1), 3, ".*", weight_bits=None)
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=50))
    assert model[0].leaf.binding.due
    return model, opt, model[0].leaf.binding


def test_the_stash_is_the_sum_of_full_gradients_over_the_window() -> None:
    model, _, binding = due_layer()
    a, b = torch.randn(6, 12), torch.randn(4, 12)
    for x in (a, b):
        model(x).square().sum().backward()
    full = sum(2 * (x @ model[0].weight.t()).t() @ x for x in (a, b))
    assert binding.stash.dtype == torch.float32
    torch.testing.assert_close(binding.stash, full)


def test_zero_grad_drops_the_stash_and_the_layer_stays_due() -> None:
    model, opt, binding = due_layer()
    model(torch.randn(6, 12)).sum().backward()
    opt.zero_grad()
    assert binding.stash is None and binding.due
    opt.step()  # nothing to do
    x = torch.randn(6, 12)
    model(x).square().sum().backward()
    torch.testing.assert_close(binding.stash, 2 * (x @ model[0].weight.t()).t() @ x)
    opt.step()
    assert refreshes(opt) == [1] and binding.stash is None and not binding.due


def test_model_zero_grad_drops_the_stash_too() -> None:
    model, _, binding = due_layer()
    model(torch.randn(6, 12)).sum().backward()
    model.zero_grad()
    x = torch.randn(6, 12)
    model(x).square().sum().backward()
    torch.testing.assert_close(binding.stash, 2 * (x @ model[0].weight.t()).t() @ x)


def test_a_layer_called_twice_in_one_backward_sums_both() -> None:
    model, opt, binding = due_layer()
    x = torch.randn(6, 12)
    layer = model[0]
    layer(layer(x)).sum().backward()
    twin = nn.Linear(12, 12, bias=False)
    twin.weight = nn.Parameter(layer.weight.detach().clone())
    twin(twin(x)).sum().backward()
    torch.testing.assert_close(binding.stash, twin.weight.grad)
    torch.testing.assert_close(layer.leaf.grad, binding.basis(torch.float32) @ twin.weight.grad.t())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_broken_or_zero_stash_changes_no_basis(value: float) -> None:
    model, opt, binding = due_layer()
    model(torch.randn(6, 12)).sum().backward()
    binding.stash.fill_(value)
    before = decoded_basis(opt, model[0].leaf)
    opt.step()
    assert torch.equal(before, decoded_basis(opt, model[0].leaf))
    assert refreshes(opt) == [0] and binding.stash is None and binding.due


def test_a_step_that_a_grad_scaler_skips_drops_the_stash() -> None:
    model, opt, binding = due_layer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    weight = model[0].weight.detach().clone()
    scaler.scale(model(torch.randn(6, 12) * 1e30).square().sum()).backward()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    assert binding.stash is None and binding.due and scaler.get_scale() == 2.0**15
    assert torch.equal(weight, model[0].weight) and opt.telemetry()[0]["step"] == 0


# ---------------------------------------------------------------- gradients that are not finite


def everything(opt: qg.QGaLoreAdamW8bit) -> list[Tensor]:
    tensors = [p.detach().clone() for g in opt.param_groups for p in g["params"]]
    return tensors + [v.clone() for s in opt.state.values() for v in s.values() if isinstance(v, Tensor)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e18])
@pytest.mark.parametrize("rank", [None, 4])
def test_nonfinite_raise_names_the_parameter_and_writes_nothing(value: float, rank: int | None) -> None:
    good, bad = matrices(2)
    opt = qg.QGaLoreAdamW8bit([{"params": [("good", good), ("layers.3.bad", bad)], "rank": rank}])
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    opt.step()
    bad.grad[3, 5] = value
    before = everything(opt)
    with pytest.raises(qg.NonFiniteGradientError, match="^the gradient of layers.3.bad .*nothing was updated$"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(opt), strict=True))
    assert [entry["step"] for entry in opt.telemetry()] == [1, 1]


def test_nonfinite_skip_leaves_that_parameter_alone(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = matrices(2)
    opt = qg.QGaLoreAdamW8bit([("good", good), ("bad", bad)], nonfinite="skip")
    good.grad, bad.grad = torch.ones_like(good), torch.full_like(bad, float("nan"))
    old_good, old_bad = good.detach().clone(), bad.detach().clone()
    opt.step()
    assert torch.equal(bad, old_bad) and not torch.equal(good, old_good)
    assert [entry["step"] for entry in opt.telemetry()] == [1, 0]
    assert "the gradient of bad is not finite: left alone in this step" in caplog.text


def test_a_nonfinite_r_drops_its_stash() -> None:
    model, opt, binding = due_layer()
    model(torch.full((2, 12), float("inf"))).sum().backward()
    with pytest.raises(qg.NonFiniteGradientError, match="the gradient of 0.coordinates is not finite"):
        opt.step()
    assert binding.stash is None and binding.due


def test_plain_projected_gradients_are_limited_so_that_r_can_be_squared() -> None:
    weight = nn.Parameter(torch.zeros(100, 25))
    opt = qg.QGaLoreAdamW8bit([{"params": [weight], "rank": 4}])
    weight.grad = torch.zeros(100, 25)
    weight.grad[0, 0] = 0.99e18 / 5
    opt.step()
    weight.grad[0, 0] = 1.01e18 / 5
    with pytest.raises(qg.NonFiniteGradientError, match=r"has an entry of size 2.02e\+17, over 2e\+17"):
        opt.step()


def test_tiny_gradients_give_full_steps() -> None:
    weight = nn.Parameter(torch.zeros(24, 16))
    opt = qg.QGaLoreAdamW8bit([{"params": [weight], "rank": 4, "scale": 1.0}], lr=0.1, eps=1e-40)
    weight.grad = torch.randn(24, 16) * 1e-15
    opt.step()
    assert weight.abs().max() > 0.01 and torch.isfinite(weight).all()

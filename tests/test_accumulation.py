"""Several backward passes of one update, and what may happen between them: parameters without gradient, zero_grad(),
skipped steps, passes that are not accumulated, clipping. The sums are compared with plain torch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg

WIDTH = 24


def layers(bits: int | None = None, count: int = 2, **options: Any) -> nn.Sequential:
    """Low-rank layers and an ordinary head; ``options`` of prepare_model."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count)), nn.Linear(WIDTH, 16))
    return qg.prepare_model(model, 4, [str(i) for i in range(count)], weight_bits=bits, **options)  # type: ignore[return-value]


def optimizer(model: nn.Sequential, gap: int = 3, **options: Any) -> qg.QGaLoreAdamW8bit:
    """Everything of the model; the head is a projected matrix with an ordinary gradient."""
    head = model[-1].weight
    groups = qg.param_groups(model, update_proj_gap=gap, proj_format="float32", moments_dtype="float32")
    groups[0]["params"] = [p for p in groups[0]["params"] if p is not head]
    groups.append({"params": [head], "rank": 4, "update_proj_gap": gap, "proj_format": "float32"})
    return qg.QGaLoreAdamW8bit(groups, lr=0.01, **options)


def batch(step: int, size: int = 12) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum() / 12


def in_float64(model: nn.Sequential, inputs: list[Tensor]) -> list[Tensor]:
    """G of every linear layer, summed over micro-batches by autograd of plain layers in float64."""
    plain = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in model)).double()
    for twin, layer in zip(plain, model, strict=True):
        weight = layer.dequantize() if isinstance(layer, qg.QGaLoreLinear) else layer.weight
        twin.load_state_dict({"weight": weight, "bias": layer.bias})
    for x in inputs:
        loss_of(plain, x.double()).backward()
    return [twin.weight.grad for twin in plain]


def everything(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "state": opt.state_dict()["state"]})


def same(a: Any, b: Any) -> bool:
    """Equal structures, bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def refreshes(opt: qg.QGaLoreAdamW8bit) -> list[int]:
    return [entry["refreshes"] for entry in opt.telemetry() if "refreshes" in entry]


def train(model: nn.Sequential, opt: qg.QGaLoreAdamW8bit, first: int, last: int, parts: int = 1) -> None:
    for step in range(first, last):
        for x in batch(step).chunk(parts):
            loss_of(model, x).backward()
        opt.step()
        opt.zero_grad()


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("proj_type", ["right", "left", "full"])
def test_r_and_the_stash_are_those_of_the_summed_gradient(bits: int | None, proj_type: str) -> None:
    model = layers(bits, proj_type=proj_type)
    opt = optimizer(model)
    train(model, opt, 0, 1)
    assert refreshes(opt) == [1, 0, 1]  # so that the second layer is due, and the first is not
    assert model[0].leaf.binding.projects == (proj_type != "left")  # it keeps X P^T in place of X
    inputs = list(batch(0).split([5, 1, 4, 2]))
    expected = in_float64(model, inputs)
    for x in inputs:
        loss_of(model, x).backward()
    for layer, full in zip(model[:2], expected, strict=False):
        binding = layer.leaf.binding
        basis = binding.basis(torch.float32).double()
        projected = basis @ (full.t() if proj_type == "right" else full)
        if proj_type == "full":
            projected = projected @ binding.right_basis(torch.float32).double().t()
        assert layer.leaf.grad.dtype == torch.float32 and relative(layer.leaf.grad, projected) < 5e-6
    assert relative(model[1].leaf.binding.stash, expected[1]) < 5e-6 and model[0].leaf.binding.stash is None
    assert relative(model[2].weight.grad, expected[2]) < 5e-6
    opt.step()
    assert refreshes(opt)[:2] == [1, 1]


@pytest.mark.parametrize("parts", [2, 6])
def test_micro_batches_train_like_one_batch(parts: int) -> None:
    """Over refreshes of leaves and of the head. The rounding of the sums differs, and eps keeps Adam from blowing that
    up where R is next to nothing."""
    results = []
    for count in (1, parts):
        model = layers()
        opt = optimizer(model, eps=1e-3)
        train(model, opt, 0, 8, count)
        results.append((model, opt))
    (model, opt), (split, split_opt) = results
    assert [e.get("refreshes") for e in opt.telemetry()] == [e.get("refreshes") for e in split_opt.telemetry()]
    start = layers()
    for layer, other, before in zip(model, split, start, strict=True):
        assert relative(other.weight - before.weight, layer.weight - before.weight) < 1e-3


@pytest.mark.parametrize("bits", [8, None])
def test_the_same_accumulation_gives_the_same_bits(bits: int | None) -> None:
    results = []
    for _ in range(2):
        model = layers(bits)
        opt = optimizer(model)
        train(model, opt, 0, 6, 3)
        results.append(everything(model, opt))
    assert same(*results)


def test_the_leaf_s_dtype_decides_how_exact_the_sum_is() -> None:
    """Of bfloat16 layers: 64 micro-batches summed in float32 lose nothing that their own rounding has not lost."""
    errors = {}
    for grad_dtype in ("float32", "bfloat16"):
        model = layers(8, grad_dtype=grad_dtype).to(torch.bfloat16)
        optimizer(model)
        leaf, exact = model[0].leaf, torch.zeros(()).double()
        for step in range(64):
            leaf.grad = None
            loss_of(model, batch(step, 4).bfloat16()).backward()
            exact = exact + leaf.grad.double()
        leaf.grad = None
        for step in range(64):
            loss_of(model, batch(step, 4).bfloat16()).backward()
        assert leaf.grad.dtype == getattr(torch, grad_dtype)
        errors[grad_dtype] = relative(leaf.grad, exact)
    assert errors["float32"] < 1e-6 < 1e-3 < errors["bfloat16"] < 0.03


# ---------------------------------------------------------------- parameters without gradient


class Experts(nn.Module):
    """Experts, of which each batch uses those that it names."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        for index in used:
            x = x + self.experts[index](x).tanh()
        return x


def test_a_layer_without_gradient_keeps_state_step_and_due_date() -> None:
    """The expert that rests is refreshed by its own count of steps: as if the updates without it had not been."""
    torch.manual_seed(0)
    model = qg.prepare_model(Experts(2), 4, ["experts"], weight_bits=8)
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=3, weight_decay=0.1), lr=0.01)
    rare = model.experts[1].leaf
    used_at, dates, waited_due, waited_pending = [0, 3, 4, 9, 10, 11, 12, 19], [], False, False
    for step in range(20):
        before, codes = copy.deepcopy(opt.state[rare]), model.experts[1].qweight.clone()
        due = rare.binding.due
        for part, x in enumerate(batch(step).chunk(2)):  # in one of two micro-batches only
            loss_of(lambda x: x, model(x, [0, 1] if step in used_at and part == step % 2 else [0])).backward()
        opt.step()
        opt.zero_grad()
        state = opt.state[rare]
        if step in used_at:
            assert state["step"] == before["step"] + 1 and not torch.equal(codes, model.experts[1].qweight)
            dates += [before["step"]] if state["refreshes"] > before["refreshes"] else []
            assert not due or state["refreshes"] > before["refreshes"] or before["past_proj_codes"].numel() > 0
        else:
            assert same(before, state) and torch.equal(codes, model.experts[1].qweight) and rare.binding.due == due
            waited_pending |= state["past_proj_codes"].numel() > 0
            waited_due |= due and not state["past_proj_codes"].numel()
    assert state["step"] == len(used_at) and waited_due and waited_pending
    busy, resting = (
        [e["refreshes"] for e in opt.telemetry() if e["name"].startswith(f"experts.{i}.c")] for i in (0, 1)
    )
    assert dates[0] == 1 and busy > resting  # two leaves' first bases are spread over steps 0 and 1
    phase = state["phase"]
    assert all(date % 3 == phase for date in dates[1:]) and len(dates) >= 3


@pytest.mark.parametrize("bits", [8, None])
def test_a_layer_frozen_in_the_middle_rests_and_goes_on(bits: int | None) -> None:
    model = layers(bits)
    opt = optimizer(model)
    train(model, opt, 0, 2)
    frozen = [model[0].leaf, model[0].bias, model[2].weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = copy.deepcopy([opt.state[p] for p in frozen])
    weights = [model[0].dequantize(), model[2].weight.detach().clone()]
    train(model, opt, 2, 6, 2)
    assert all(same(old, opt.state[p]) for old, p in zip(before, frozen, strict=True))
    assert torch.equal(weights[0], model[0].dequantize()) and torch.equal(weights[1], model[2].weight)
    for parameter in frozen:
        parameter.requires_grad_(True)
    train(model, opt, 6, 9)
    assert [opt.state[p]["step"] for p in frozen] == [5, 5, 5] and opt.state[model[1].leaf]["step"] == 9
    assert not torch.equal(weights[0], model[0].dequantize())


# ---------------------------------------------------------------- windows that come to nothing


def zeroed(who: str, set_to_none: bool) -> Callable[..., None]:
    def interrupt(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> None:
        {"model": model, "optimizer": opt}[who].zero_grad(set_to_none)  # type: ignore[attr-defined]

    return interrupt


def by_hand(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def skipped_by_a_scaler(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, batch(50)) * float("inf")).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0
    model.zero_grad()


def refused(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> None:
    loss_of(model, batch(50)).mul(float("nan")).backward()
    with pytest.raises(qg.NonFiniteGradientError):
        opt.step()
    model.zero_grad()


def skipped_by_the_optimizer(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> None:
    for group in opt.param_groups:
        group["nonfinite"] = "skip"
    loss_of(model, batch(50)).mul(float("nan")).backward()
    opt.step()
    for group in opt.param_groups:
        group["nonfinite"] = "raise"
    model.zero_grad()


def failing_backward(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> None:
    """The pass breaks where G of the last layer is known and its R is not yet accumulated."""

    def fail(gradient: Tensor) -> None:
        raise ArithmeticError

    hooks = [layer.leaf.register_hook(fail) for layer in model if isinstance(layer, qg.QGaLoreLinear)]  # type: ignore[union-attr]
    with pytest.raises(ArithmeticError):
        loss_of(model, batch(50)).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()


INTERRUPTS: dict[str, Callable[..., None]] = {
    "optimizer to None": zeroed("optimizer", True),
    "optimizer to zero": zeroed("optimizer", False),
    "model to None": zeroed("model", True),
    "model to zero": zeroed("model", False),
    "by hand": by_hand,
    "skipped by a GradScaler": skipped_by_a_scaler,
    "NaN, raise": refused,
    "NaN, skip": skipped_by_the_optimizer,
    "backward raises": failing_backward,
}


@pytest.mark.parametrize("already", [0, 1])
@pytest.mark.parametrize("warm", [0, 3, 4])
@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_an_interrupted_window_leaves_no_trace(interrupt: str, warm: int, already: int) -> None:
    """Before step 0, 3 (later bases) and 4 (comparison of two), after ``already`` micro-batches: the next window is
    that of a run without the interrupted one, with the G of float64 in the stash."""
    models = layers(), layers()
    opts = [optimizer(model) for model in models]
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 0, warm)
    model, opt = models[0], opts[0]
    due = [layer.leaf.binding.due for layer in model[:2]]
    assert any(due)
    for number in range(already):
        loss_of(model, batch(40 + number)).backward()
    INTERRUPTS[interrupt](model, opt)
    assert due == [layer.leaf.binding.due for layer in model[:2]]
    assert same(everything(model, opt), everything(models[1], opts[1]))
    inputs = [batch(60), batch(61)]
    expected = in_float64(model, inputs)
    for each in models:
        for x in inputs:
            loss_of(each, x).backward()
    for layer, full, was_due in zip(model[:2], expected, due, strict=False):
        stash = layer.leaf.binding.stash
        assert (stash is not None) == was_due and (stash is None or relative(stash, full) < 1e-5)
    before = [opt.state[layer.leaf]["refreshes"] for layer in model[:2]]
    for each in opts:
        each.step()
    assert same(everything(model, opt), everything(models[1], opts[1]))
    renewed = [opt.state[layer.leaf]["refreshes"] - old for layer, old in zip(model[:2], before, strict=False)]
    assert any(renewed) or warm == 4
    for layer, full, count in zip(model[:2], expected, renewed, strict=False):
        if count and warm == 0:  # three power steps find the leading singular vectors
            _, _, right = torch.linalg.svd(full)
            basis = layer.leaf.binding.basis(torch.float32).double()
            best = (full @ right[:4].t()).norm()
            assert (full @ basis.t()).norm() > 0.98 * best


@pytest.mark.parametrize("kind", ["grad of the input", "grad of the leaf", "backward for the input only"])
@pytest.mark.parametrize("place", ["before", "between"])
def test_passes_that_accumulate_nothing_add_nothing_to_the_stash(kind: str, place: str) -> None:
    """Saliency maps and gradient penalties run the layers' backward too. Their G once joined the stash, so that the
    basis was that of another gradient than R's."""
    model = layers()
    opt = optimizer(model)
    model[0].leaf.binding.due = model[1].leaf.binding.due = True
    inputs = list(batch(0).chunk(2))
    expected = in_float64(model, inputs)
    for number, x in enumerate(inputs):
        if place == "before" or number == 1:
            other = batch(70).requires_grad_()
            if kind == "grad of the input":
                torch.autograd.grad(loss_of(model, other), other)
            elif kind == "grad of the leaf":
                torch.autograd.grad(loss_of(model, other), [model[0].leaf, model[1].leaf])
            else:
                loss_of(model, other).backward(inputs=[other])
        loss_of(model, x).backward()
    for layer, full in zip(model[:2], expected, strict=False):
        assert relative(layer.leaf.binding.stash, full) < 1e-5
        assert not layer.leaf.binding._pending
    opt.step()


def test_loading_a_state_inside_a_window_drops_r_of_the_bases_before() -> None:
    """step() took the coordinates in one basis for those in another."""
    model = layers()
    opt = optimizer(model)
    train(model, opt, 0, 3)
    saved = copy.deepcopy(opt.state_dict())
    train(model, opt, 3, 8)
    loss_of(model, batch(8)).backward()
    opt.load_state_dict(saved)
    weights = [layer.weight.detach().clone() for layer in model]
    opt.step()
    assert [torch.equal(old, layer.weight) for old, layer in zip(weights, model, strict=True)] == [True, True, False]
    assert [opt.state[layer.leaf]["step"] for layer in model[:2]] == [3, 3]
    loss_of(model, batch(9)).backward()
    opt.step()
    assert not torch.equal(weights[0], model[0].weight) and opt.state[model[0].leaf]["step"] == 4


def test_two_passes_over_one_graph_count_twice() -> None:
    model = layers()
    optimizer(model)
    model[0].leaf.binding.due = True
    loss = loss_of(model, batch(0))
    loss.backward(retain_graph=True)
    once, stash = model[0].leaf.grad.clone(), model[0].leaf.binding.stash.clone()
    loss.backward()
    assert torch.equal(model[0].leaf.grad, 2 * once) and torch.equal(model[0].leaf.binding.stash, 2 * stash)


# ---------------------------------------------------------------- clipping


def clip_by_torch(model: nn.Module, opt: qg.QGaLoreAdamW8bit, largest: float) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)


def clip_by_us(model: nn.Module, opt: qg.QGaLoreAdamW8bit, largest: float) -> Tensor:
    return qg.clip_grad_norm_(opt, largest)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("clip", [clip_by_torch, clip_by_us])
def test_a_clipped_update_is_that_of_scaled_gradients(clip: Any, bits: int | None) -> None:
    """Two micro-batches each; G of due layers stays as it is: a basis has no scale."""
    models = layers(bits), layers(bits)
    opts = [optimizer(model) for model in models]
    clipped = 0
    for step in range(6):
        for model in models:
            for x in batch(step).chunk(2):
                loss_of(model, x).backward()
        stashes = [layer.leaf.binding.stash for layer in models[0][:2]]
        stashes = [None if stash is None else stash.clone() for stash in stashes]
        twins = [p for p in models[1].parameters() if p.grad is not None]
        expected = torch.stack([p.grad.double().square().sum() for p in twins]).sum().sqrt()
        largest = 0.5 if step % 2 else 100.0
        norm = clip(models[0], opts[0], largest)
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
        if norm > largest:
            clipped += 1
            for parameter in twins:
                parameter.grad *= largest / (norm + 1e-6)
        for layer, stash in zip(models[0][:2], stashes, strict=False):
            now = layer.leaf.binding.stash
            assert (now is None) == (stash is None) and (now is None or torch.equal(now, stash))
        for opt in opts:
            opt.step()
            opt.zero_grad()
        assert same(everything(models[0], opts[0]), everything(models[1], opts[1]))
    assert clipped == 3


def test_clipping_does_not_change_what_a_basis_is() -> None:
    bases = []
    for largest in (1e-3, float("inf")):
        model = layers(count=1)
        opt = optimizer(model)
        loss_of(model, batch(0)).backward()
        qg.clip_grad_norm_(opt, largest)
        opt.step()
        assert opt.telemetry()[-2]["refreshes"] == 1
        bases.append(model[0].leaf.binding.basis(torch.float32))
    assert torch.equal(*bases)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_no_gradient(value: float) -> None:
    """torch's function makes every gradient NaN of one: step() then blamed the first parameter."""
    model = layers()
    opt = optimizer(model)
    loss_of(model, batch(0)).backward()
    model[1].leaf.grad[2, 3] = value
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert not qg.clip_grad_norm_(opt, 0.5).isfinite()
    with pytest.raises(RuntimeError, match="non-finite"):
        qg.clip_grad_norm_(opt, 0.5, error_if_nonfinite=True)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, after, strict=True))
    with pytest.raises(qg.NonFiniteGradientError, match="^the gradient of 1.coordinates is not finite"):
        opt.step()


def test_clipping_without_any_gradient_measures_zero() -> None:
    model = layers()
    assert qg.clip_grad_norm_(optimizer(model), 1.0) == 0.0

"""Per-layer updates: the same as the ordinary mode bit for bit, one gradient at a time, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import q_galore_torch as qg
from q_galore_torch import NonFiniteGradientError, QGaLoreAdamW8bit, enable_per_layer

RANK, VOCABULARY = 16, 40


class Model(nn.Module):
    """Embedding tied to the head, a linear layer that is called twice, norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.up, self.down = nn.Linear(64, 160), nn.Linear(160, 64, bias=False)
        self.twice = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, VOCABULARY)
        self.head.weight = self.embed.weight
        self.spare = nn.Linear(64, 64)
        self.use_spare = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.relu(self.up(x)))
        x = self.twice(torch.tanh(self.twice(x)))
        if self.use_spare:
            x = x + self.spare(x)
        return self.head(self.norm(x))


MATRICES = ["up", "down", "twice", "spare"]
MODES: dict[str, dict[str, Any]] = {
    "int8": {},
    "float": {"weight_bits": None},
    "both sides": {"proj_type": "full"},
    "full gradients": {"grad_mode": "full"},
    "plain": {"weight_bits": None, "grad_mode": "full"},
}


def build(
    nonfinite: str = "raise", moments_dtype: str = "dynamic8", subspace: str = "warm", **options: Any
) -> tuple[Any, QGaLoreAdamW8bit]:
    model = qg.prepare_model(Model(), rank=RANK, target_modules=MATRICES, **options)
    groups = qg.param_groups(model, rank=RANK, update_proj_gap=4, subspace=subspace)
    return model, QGaLoreAdamW8bit(groups, lr=0.01, nonfinite=nonfinite, moments_dtype=moments_dtype)


def losses_of(model: nn.Module, seed: int, count: int = 1) -> list[Tensor]:
    """The losses of ``count`` micro-batches, divided by their number."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(count):
        tokens = torch.randint(0, VOCABULARY, (4, 9), generator=generator)
        logits = model(tokens[:, :-1])
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / count)
    return losses


def train(model: Model, optimizer: QGaLoreAdamW8bit, steps: int, count: int = 1, first: int = 0) -> list[float]:
    """An ordinary loop; ``spare`` is used in some micro-batches only, and not in the last ones of a window."""
    seen = []
    for step in range(first, first + steps):
        for index in range(count):
            model.use_spare = step % 3 == 0 and index == 0
            loss = losses_of(model, 100 * step + index)[0] / count
            loss.backward()
            seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Equal bit for bit, whatever the modes remember of their last norm."""
    assert type(left) is type(right), path
    if isinstance(left, Tensor):
        assert left.equal(right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left.keys() - {"last_grad_norm"}:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    else:
        assert left == right, path


def gradients(optimizer: QGaLoreAdamW8bit) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_thirty_steps_are_those_of_the_ordinary_mode(mode: str, count: int) -> None:
    model, optimizer = build(**MODES[mode])
    expected = train(model, optimizer, 30, count)
    other, per_layer = build(**MODES[mode])
    handle = enable_per_layer(per_layer, count)
    assert train(other, per_layer, 30, count) == expected
    assert_same(other.state_dict(), model.state_dict())
    assert_same(per_layer.state_dict(), optimizer.state_dict())
    assert sum(entry.get("refreshes", 0) for entry in optimizer.telemetry()) > 8
    assert not gradients(per_layer)
    handle.remove()
    assert train(other, per_layer, 3, count, first=30) == train(model, optimizer, 3, count, first=30)


@pytest.mark.parametrize("mode", MODES)
def test_one_gradient_exists_at_a_time(mode: str) -> None:
    model, optimizer = build(**MODES[mode])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    seen: list[int] = []

    def watch(_: Tensor) -> None:
        held = [p.grad.nbytes for p in parameters if p.grad is not None]
        held += [
            p.binding.stash.nbytes for p in parameters if getattr(p, "binding", None) and p.binding.stash is not None
        ]
        seen.append(sum(held))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(watch)
    enable_per_layer(optimizer)
    train(model, optimizer, 10)
    largest = 4 * max(p.numel() for p in parameters)
    stash = 4 * 64 * 160 if mode not in ("full gradients", "plain") else 0  # a due layer's full gradient
    assert len(seen) > 10 * 6
    assert 0 < max(seen) <= largest + stash
    assert sorted(seen)[len(seen) // 2] <= largest


def test_each_parameter_and_the_scheduler_take_one_step_per_update() -> None:
    model, optimizer = build()
    model.use_spare = True
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    enable_per_layer(optimizer, accumulation_steps=4)
    for update in range(5):
        for loss in losses_of(model, update, 4):
            loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert {state["step"] for state in optimizer.state.values()} == {5}
    assert scheduler.last_epoch == 5
    assert all(group["lr"] == pytest.approx(0.01 / 6) for group in optimizer.param_groups)
    for name in ("embed.weight", "norm.weight", "norm.bias", "head.bias", "up.bias", "up.qweight"):
        assert not model.state_dict()[name].equal(before[name]), name


def test_a_window_may_end_early() -> None:
    model, optimizer = build()
    other, per_layer = build()
    enable_per_layer(per_layer, accumulation_steps=4)
    for m, o in ((model, optimizer), (other, per_layer)):
        train(m, o, 2, 3)
    assert_same(other.state_dict(), model.state_dict())


def test_zero_grad_begins_a_window_again_and_is_harmless_at_its_ends() -> None:
    model, optimizer = build()
    other, per_layer = build()
    enable_per_layer(per_layer, accumulation_steps=2)
    losses_of(other, 99)[0].backward()
    per_layer.zero_grad()
    for step in range(3):
        for m, o in ((model, optimizer), (other, per_layer)):
            o.zero_grad()
            for loss in losses_of(m, step, 2):
                loss.backward()
            if o is per_layer:
                o.zero_grad()  # after the updates of the last pass
            o.step()
            o.zero_grad(set_to_none=False)
    assert_same(other.state_dict(), model.state_dict())


def test_zero_grad_before_step_keeps_gradients_that_wait_for_it() -> None:
    """Those of a layer that the last pass did not reach; all others have been updated."""
    model, optimizer = build()
    other, per_layer = build()
    enable_per_layer(per_layer, accumulation_steps=2)
    for step in range(5):
        for m, o in ((model, optimizer), (other, per_layer)):
            for index in range(2):
                m.use_spare = index == 0
                losses_of(m, 2 * step + index)[0].backward()
            if o is per_layer:
                o.zero_grad()
            o.step()
            o.zero_grad()
    assert per_layer.state[other.spare.leaf]["step"] == 5
    assert_same(other.state_dict(), model.state_dict())
    assert_same(per_layer.state_dict(), optimizer.state_dict())


def test_a_backward_too_many_is_refused() -> None:
    model, optimizer = build()
    handle = enable_per_layer(optimizer)
    losses_of(model, 0)[0].backward()
    with pytest.raises(RuntimeError, match="more backward passes than accumulation_steps=1 came before step"):
        losses_of(model, 1)[0].backward()
    handle.abort_window()
    train(model, optimizer, 1)
    assert optimizer.state[model.embed.weight]["step"] == 2


def test_a_closure_is_run_before_the_update_is_closed() -> None:
    model, optimizer = build()
    enable_per_layer(optimizer)

    def closure() -> Tensor:
        loss = losses_of(model, 0)[0]
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert optimizer.state[model.embed.weight]["step"] == 1


# ---------------------------------------------------------------- exceptions


class Fails(torch.autograd.Function):
    """Raises in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("planted")


def failing_backward(model: Model, seed: int) -> None:
    """A backward pass that gets through the head, the norm and ``twice``, and fails before ``up``."""
    handle = model.down.register_forward_hook(lambda _, __, output: Fails.apply(output))
    try:
        losses_of(model, seed)[0].backward()
    finally:
        handle.remove()


def test_an_exception_in_the_last_pass_needs_abort_window() -> None:
    model, optimizer = build()
    handle = enable_per_layer(optimizer, accumulation_steps=2)
    train(model, optimizer, 1, 2)
    losses_of(model, 0)[0].backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError, match="planted"):
        failing_backward(model, 1)
    for call in (optimizer.step, optimizer.state_dict, handle.remove):
        with pytest.raises(RuntimeError, match="abort_window"):
            call()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="abort_window"):
        losses_of(model, 2)[0].backward()
    handle.abort_window()
    after = model.state_dict()
    changed = {name for name in after if not after[name].equal(before[name])}
    assert changed >= {"twice.qweight", "norm.weight", "head.bias"}
    assert not changed & {"embed.weight", "up.qweight", "up.bias", "down.qweight"}
    steps = {name: optimizer.state[p]["step"] for name, p in model.named_parameters() if p in optimizer.state}
    assert (steps["twice.coordinates"], steps["up.coordinates"], steps["embed.weight"]) == (2, 1, 1)
    assert not gradients(optimizer)
    train(model, optimizer, 3, 2)
    assert optimizer.state[model.embed.weight]["step"] == 4


def test_after_an_exception_in_an_earlier_pass_nothing_was_updated() -> None:
    model, optimizer = build()
    enable_per_layer(optimizer, accumulation_steps=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError, match="planted"):
        failing_backward(model, 0)
    with pytest.raises(RuntimeError, match="abort_window"):
        optimizer.step()
    assert_same(model.state_dict(), before)
    optimizer.zero_grad()
    assert not gradients(optimizer)
    other, ordinary = build()
    assert train(model, optimizer, 2, 2) == train(other, ordinary, 2, 2)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_gradients_that_are_not_finite(nonfinite: str) -> None:
    model, optimizer = build(nonfinite=nonfinite)
    handle = enable_per_layer(optimizer)
    up = model.up.qweight.clone()
    hook = model.up.register_forward_hook(lambda _, __, output: output * math.inf)
    if nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError):
            losses_of(model, 0)[0].backward()
        handle.abort_window()
    else:
        losses_of(model, 0)[0].backward()
        optimizer.step()
        assert optimizer.state[model.up.leaf]["step"] == 0
    hook.remove()
    assert model.up.qweight.equal(up)
    train(model, optimizer, 1)
    assert not model.up.qweight.equal(up)
    assert all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())


@pytest.mark.parametrize("whole", [False, True], ids=["below a trained head", "everything"])
def test_reentrant_checkpointing_is_refused_where_it_splits_a_gradient(whole: bool) -> None:
    model, optimizer = build()
    handle = enable_per_layer(optimizer)
    x = model.embed(torch.arange(8).view(1, 8))
    x = checkpoint(model.twice, x, use_reentrant=True)
    x = checkpoint(model.twice, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        (x if whole else model.norm(x)).square().mean().backward()
    handle.abort_window()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_losses(reentrant: bool) -> None:
    runs = []
    for checkpointed in (False, True):
        model, optimizer = build()
        plain = model.up.forward
        if checkpointed:
            model.up.forward = lambda x, f=plain: checkpoint(f, x, use_reentrant=reentrant)  # type: ignore[method-assign]
        enable_per_layer(optimizer)
        runs.append(train(model, optimizer, 6))
    assert runs[0] == runs[1]


def test_a_state_dict_inside_a_window_is_refused() -> None:
    model, optimizer = build()
    enable_per_layer(optimizer, accumulation_steps=2)
    saved = optimizer.state_dict()
    losses_of(model, 0)[0].backward()
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict(saved)):
        with pytest.raises(RuntimeError, match="1 of 2 backward passes"):
            call()


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("count", [1, 3])
def test_global_clipping_is_that_of_torch(count: int) -> None:
    model, optimizer = build()
    other, per_layer = build()
    handle = enable_per_layer(per_layer, count, max_grad_norm=0.3)
    for step in range(12):
        for loss in losses_of(model, step, count):
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.3)
        optimizer.step()
        optimizer.zero_grad()
        for loss in losses_of(other, step, count):
            loss.backward()
        per_layer.step()
        assert handle.grad_norm == norm.item() > 0.3
    assert_same(other.state_dict(), model.state_dict())
    assert_same(per_layer.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_the_norm_is_that_over_all_gradients(mode: str) -> None:
    model, optimizer = build(**MODES[mode])
    other, per_layer = build(**MODES[mode])
    handle = enable_per_layer(per_layer, 2)
    assert math.isnan(handle.grad_norm)
    for step in range(4):
        for m in (model, other):
            for loss in losses_of(m, step, 2):
                loss.backward()
        squares = sum(g.double().square().sum().item() for g in gradients(optimizer))
        for o in (optimizer, per_layer):
            o.step()
            o.zero_grad()
        assert handle.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-6)


# No rounding and no singular vectors of rounding noise, so that float64 can be followed.
SMOOTH: dict[str, Any] = {**MODES["plain"], "moments_dtype": "float32", "subspace": "random"}


def clipped_by_hand(clip: str, largest: float, steps: int) -> Model:
    """The ordinary mode with gradients scaled by the formulas in float64."""
    model, optimizer = build(**SMOOTH)
    last = 0.0
    for step in range(steps):
        losses_of(model, step)[0].backward()
        norms = [g.double().norm().item() for g in gradients(optimizer)]
        for gradient, norm in zip(gradients(optimizer), norms, strict=True):
            reference = norm if clip == "per_parameter" else last
            gradient.mul_(min(1.0, largest / (reference + 1e-6)))
        last = math.hypot(*norms)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("clip", ["per_parameter", "last_norm"])
def test_clipping_without_keeping_gradients(clip: str) -> None:
    expected = clipped_by_hand(clip, 0.2, 8)
    model, optimizer = build(**SMOOTH)
    enable_per_layer(optimizer, max_grad_norm=0.2, clip=clip)
    for step in range(8):
        losses_of(model, step)[0].backward()
        assert not gradients(optimizer)
        optimizer.step()
    for value, reference in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=2e-5)
    unclipped, ordinary = build(**SMOOTH)
    train(unclipped, ordinary, 8)
    assert (unclipped.up.weight - model.up.weight).abs().max() > 1e-3


def test_the_first_update_is_not_clipped_by_a_norm_that_is_not_there() -> None:
    model, optimizer = build()
    other, clipped = build()
    enable_per_layer(clipped, max_grad_norm=1e-9, clip="last_norm")
    assert train(other, clipped, 1) == train(model, optimizer, 1)
    assert_same(other.state_dict(), model.state_dict())


def test_the_last_norm_survives_a_resume() -> None:
    runs = []
    for interrupted in (False, True):
        model, optimizer = build()
        enable_per_layer(optimizer, max_grad_norm=0.2, clip="last_norm")
        train(model, optimizer, 4)
        if interrupted:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model, optimizer = build()
            enable_per_layer(optimizer, max_grad_norm=0.2, clip="last_norm")
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        runs.append(train(model, optimizer, 3, first=4))
        assert optimizer.param_groups[0]["last_grad_norm"] > 0.2
    assert runs[0] == runs[1]


def test_projected_parameters_with_full_gradients_cannot_be_clipped_globally() -> None:
    _, optimizer = build(**MODES["plain"])
    with pytest.raises(ValueError, match="clip='per_parameter' or 'last_norm'"):
        enable_per_layer(optimizer, max_grad_norm=1.0)
    model, optimizer = build()
    handle = enable_per_layer(optimizer, max_grad_norm=1.0)
    added = nn.Parameter(torch.ones(16, 16))
    with pytest.raises(ValueError, match="clip='per_parameter' or 'last_norm'"):
        optimizer.add_param_group({"params": [added], "rank": 4})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, 1)
    handle.remove()


# ---------------------------------------------------------------- the handle


def test_what_is_refused() -> None:
    model, optimizer = build()
    sgd: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="must be a QGaLoreAdamW8bit, got SGD"):
        enable_per_layer(sgd)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"accumulation_steps": 0}, "accumulation_steps must be an integer >= 1, got 0"),
        ({"accumulation_steps": 2.0}, "accumulation_steps must be an integer >= 1, got 2.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number > 0 or None, got 0.0"),
        ({"max_grad_norm": True}, "max_grad_norm must be a number > 0 or None, got True"),
        ({"max_grad_norm": 1.0, "clip": "local"}, "clip must be one of .*, got 'local'"),
        ({"clip": "last_norm"}, "clip='last_norm' needs a max_grad_norm"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            enable_per_layer(optimizer, **options)
    with pytest.raises(TypeError, match="ddp must be a DistributedDataParallel or None, got Model"):
        enable_per_layer(optimizer, ddp=model)
    losses_of(model, 0)[0].backward()
    with pytest.raises(RuntimeError, match="hold gradients already"):
        enable_per_layer(optimizer)
    optimizer.zero_grad()
    handle = enable_per_layer(optimizer)
    with pytest.raises(RuntimeError, match="already"):
        enable_per_layer(optimizer)
    with pytest.raises(RuntimeError, match="give max_grad_norm to enable_per_layer"):
        qg.clip_grad_norm_(optimizer, 1.0)
    handle.remove()
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"):
        handle.abort_window()


def test_a_gradient_scaler_is_refused() -> None:
    model, optimizer = build()
    handle = enable_per_layer(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(losses_of(model, 0)[0]).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with per-layer updates"):
        scaler.step(optimizer)
    optimizer.step()
    handle.remove()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(losses_of(model, 0)[0]).backward()
    scaler.step(optimizer)
    assert optimizer.state[model.embed.weight]["step"] == 2


def test_parameters_that_come_later() -> None:
    model, optimizer = build()
    model.norm.weight.requires_grad_(False)
    enable_per_layer(optimizer)
    train(model, optimizer, 1)
    extra = nn.Parameter(torch.ones(64))
    optimizer.add_param_group({"params": [extra]})
    model.norm.weight.requires_grad_(True)
    hook = model.norm.register_forward_hook(lambda _, __, output: output * extra)
    for update in range(2):
        losses_of(model, update)[0].backward()
        # what has no hook yet waits for step()
        assert len(gradients(optimizer)) == (2 if update == 0 else 0)
        optimizer.step()
    hook.remove()
    assert optimizer.state[extra]["step"] == optimizer.state[model.norm.weight]["step"] == 2


def test_a_copy_of_the_optimizer_is_in_the_ordinary_mode() -> None:
    model, optimizer = build()
    enable_per_layer(optimizer)
    train(model, optimizer, 1)
    other, twin = copy.deepcopy((model, optimizer))
    losses_of(other, 5)[0].backward()
    assert len(gradients(twin)) > 5
    twin.step()
    twin.zero_grad()
    losses_of(model, 5)[0].backward()
    optimizer.step()
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.usefixtures("process_group")
def test_a_model_in_ddp_must_be_given() -> None:
    model, optimizer = build()
    reference, ordinary = build()
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    with pytest.raises(RuntimeError, match="give it to enable_per_layer as ddp="):
        enable_per_layer(optimizer)
    handle = enable_per_layer(optimizer, ddp=wrapped, max_grad_norm=0.5, clip="per_parameter")
    handle.remove()
    enable_per_layer(optimizer, ddp=wrapped)
    model.use_spare = reference.use_spare = True
    for step in range(6):
        losses_of(wrapped, step)[0].backward()
        optimizer.step()
        losses_of(reference, step)[0].backward()
        ordinary.step()
        ordinary.zero_grad()
        assert not gradients(optimizer)
    assert_same(model.state_dict(), reference.state_dict())

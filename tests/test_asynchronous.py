"""Steps on a device that works asynchronously: the host reads no number in a step without a refresh, and hears of a
gradient that is not finite later. CPU tensors stand for such a device here."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import q_galore_torch as qg
from q_galore_torch.optim import finite, galore_adamw

aten = torch.ops.aten
READS = {"item", "tolist", "numpy", "cpu", "equal", "nonzero", "is_nonzero", "allclose", "tensor", "as_tensor"}
READS |= {"__bool__", "__float__", "__int__", "__index__", "__contains__"}


class HostReadsNothing(TorchFunctionMode):
    """Raises where Python asks a tensor for a number, or makes one from numbers of the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            raise AssertionError(f"the host would wait for {name}")
        return func(*args, **(kwargs or {}))


class NothingIsRead(TorchDispatchMode):
    """Raises where torch itself reads a number of a tensor, or copies one to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        if read or (func == aten._to_copy.default and kwargs.get("device") is not None):
            raise AssertionError(f"the host would wait for {func}")
        return func(*args, **kwargs)


class Copy:
    """A copy to the host that arrives when it is told to, or when somebody waits for it."""

    late: list[Copy] = []
    delayed = False

    def __init__(self, numbers: Tensor) -> None:
        self.values, self.here = numbers.clone(), not Copy.delayed
        Copy.late.append(self)

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.here = True

    def tolist(self) -> list[float]:
        assert self.here
        with torch._C.DisableTorchFunction():
            return self.values.tolist()


@pytest.fixture(autouse=True)
def _asynchronous(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def copied(numbers: Tensor) -> tuple[Copy, Copy]:
        copy = Copy(numbers)
        return copy, copy

    monkeypatch.setattr(galore_adamw, "asynchronous", lambda device: True)
    monkeypatch.setattr(finite, "_copied", copied)
    Copy.delayed = False
    Copy.late.clear()
    yield


def synchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(galore_adamw, "asynchronous", lambda device: False)


MODES: dict[str, dict[str, Any]] = {
    "int8": {},
    "both sides": {"proj_type": "full"},
    "full gradients": {"grad_mode": "full"},
    "plain": {"weight_bits": None, "grad_mode": "full"},
}
CLIPS: dict[str, dict[str, Any] | None] = {
    "ordinary": None,
    "per layer": {},
    "two micro-batches": {"accumulation_steps": 2},
    "global": {"max_grad_norm": 0.1},
    "last norm": {"max_grad_norm": 0.1, "clip": "last_norm"},
    "per parameter": {"max_grad_norm": 0.1, "clip": "per_parameter"},
}


# clip="global" is refused where full gradients are projected.
COMBINATIONS = pytest.mark.parametrize(
    ("mode", "clip"), [(m, c) for m in MODES for c in CLIPS if c != "global" or m in ("int8", "both sides")]
)


def build(nonfinite: str = "raise", gap: int = 1000, **options: Any) -> tuple[nn.Module, qg.QGaLoreAdamW8bit]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48), nn.LayerNorm(48))
    qg.prepare_model(model, rank=8, target_modules=["0", "2"], **options)
    groups = qg.param_groups(model, rank=8, update_proj_gap=gap, norm_growth_limit=1.05)
    return model, qg.QGaLoreAdamW8bit(groups, lr=0.01, nonfinite=nonfinite, min_8bit_size=64)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 48, generator=generator)
    (model(x).square().mean() * scale).backward()


def train(model: nn.Module, optimizer: qg.QGaLoreAdamW8bit, count: int, passes: int = 1, clip: bool = False) -> None:
    for step in range(count):
        for index in range(passes):
            backward(model, 10 * step + index)
        if clip:
            qg.clip_grad_norm_(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: qg.QGaLoreAdamW8bit) -> list[Tensor]:
    states = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    return [x.detach().clone() for x in [*model.state_dict().values(), *states]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(left, right, strict=True))


# ---------------------------------------------------------------- no waiting


@COMBINATIONS
def test_a_step_without_a_refresh_reads_nothing(mode: str, clip: str) -> None:
    model, optimizer = build(**MODES[mode])
    options = CLIPS[clip]
    passes = (options or {}).get("accumulation_steps", 1)
    if options is not None:
        qg.enable_per_layer(optimizer, **options)
    train(model, optimizer, 12, passes)  # the first refreshes, and the comparisons after them
    before = everything(model, optimizer)
    Copy.delayed = True
    # The forward makes its input from a generator: only what follows it is watched.
    losses = [model(torch.randn(16, 48)).square().mean() for _ in range(passes)]
    with HostReadsNothing(), NothingIsRead():
        for loss in losses:
            loss.backward()
        if options is None:
            qg.clip_grad_norm_(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert not same(before, everything(model, optimizer))
    assert not any(copy.here for copy in Copy.late[-1:]), "the step did not say that it has to be told"


def test_the_modes_would_notice() -> None:
    """The test above can fail."""
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x.any()), lambda: x.new_tensor([1.0]).cpu()):
        with pytest.raises(AssertionError, match="would wait"), HostReadsNothing(), NothingIsRead():
            read()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        torch.full_like(x, x[0])  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="_to_copy"), NothingIsRead():
        x.to("meta")


@COMBINATIONS
def test_updates_are_those_of_a_device_that_is_waited_for(
    mode: str, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for waits in (False, True):
        if waits:
            synchronous(monkeypatch)
        model, optimizer = build(gap=6, **MODES[mode])
        options = CLIPS[clip]
        handle = None if options is None else qg.enable_per_layer(optimizer, **options)
        train(model, optimizer, 20, (options or {}).get("accumulation_steps", 1), clip=options is None)
        norm = torch.tensor(math.nan if handle is None else handle.grad_norm)
        found.append([*everything(model, optimizer), norm.nan_to_num()])
    # The norm of all gradients may differ in its last bit, so that what is clipped by it is only close.
    for left, right in zip(*found, strict=True):
        if clip in ("ordinary", "per layer", "two micro-batches") and left is not found[0][-1]:
            assert left.equal(right)
        elif left.is_floating_point():
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- gradients that are not finite


def spoilt(
    model: nn.Module, optimizer: qg.QGaLoreAdamW8bit, value: float = math.nan
) -> tuple[list[Tensor], list[Tensor]]:
    """A step with a gradient that is not finite, of layer 2, told of later; its numbers before and after."""
    leaf, layer = model[2].leaf, model[2]  # type: ignore[index]
    parts = lambda: [x.clone() for x in (layer.qweight, layer.scales, *_tensors(optimizer.state[leaf]))]  # noqa: E731
    backward(model, 77)
    leaf.grad.view(-1)[5] = value
    before = parts()
    delayed, Copy.delayed = Copy.delayed, True
    optimizer.step()
    Copy.delayed = delayed
    optimizer.zero_grad()
    return before, parts()


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [state[key] for key in ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "norm")]


@pytest.mark.parametrize("value", [math.nan, -math.inf, 2e18])
def test_the_next_step_names_the_parameter(value: float) -> None:
    model, optimizer = build()
    train(model, optimizer, 12)
    other = everything(model[0], optimizer)  # type: ignore[index]
    before, after = spoilt(model, optimizer, value)
    assert same(before, after) and not same(other, everything(model[0], optimizer))  # type: ignore[index]
    backward(model, 78)
    Copy.late[-1].here = True
    here = everything(model, optimizer)
    what = "is not finite" if value != 2e18 else r"has an entry of size 2e\+18, over 1e\+18"
    told = f"^the gradient of 2.coordinates {what}; its step 12 left it alone and updated the others$"
    with pytest.raises(qg.NonFiniteGradientError, match=told):
        optimizer.step()
    assert not same(here, everything(model, optimizer)), "the step that tells of it has been made"
    optimizer.check()


@pytest.mark.parametrize("asked", ["check", "state_dict"])
def test_check_and_state_dict_wait_and_tell_once(asked: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 12)
    Copy.delayed = True
    spoilt(model, optimizer)
    with pytest.raises(qg.NonFiniteGradientError, match="2.coordinates is not finite; its step 12"):
        getattr(optimizer, asked)()
    getattr(optimizer, asked)()
    optimizer.step()


def test_a_copy_that_is_late_is_told_of_later() -> None:
    model, optimizer = build()
    train(model, optimizer, 12)
    Copy.delayed = True
    spoilt(model, optimizer)
    late = Copy.late[-1]
    train(model, optimizer, 2)
    late.here = True
    with pytest.raises(qg.NonFiniteGradientError, match="its step 12"):
        optimizer.step()


def test_when_a_number_arrives_decides_nothing() -> None:
    """Replicas hear of it at different times. The one that heard first used to lose the update that it raised in."""
    found = []
    for arrives in (0, 2):
        Copy.delayed = False
        model, optimizer = build()
        train(model, optimizer, 12)
        Copy.delayed = True
        spoilt(model, optimizer)
        late, told = Copy.late[-1], 0
        for step in range(4):
            late.here |= step == arrives
            backward(model, step)
            try:
                optimizer.step()
            except qg.NonFiniteGradientError:
                told += 1
            optimizer.zero_grad()
        assert told == 1
        found.append(everything(model, optimizer))
    assert same(*found)


@pytest.mark.parametrize("per_layer", [False, True])
def test_all_gradients_of_a_step_are_told_of_at_once(per_layer: bool) -> None:
    """Only the first one of an operator call was; per layer, where each is one, the others' were later errors."""
    model, optimizer = build()
    if per_layer:
        qg.enable_per_layer(optimizer)
    train(model, optimizer, 12)
    Copy.delayed = True
    (model(torch.ones(4, 48)).sum() * math.nan).backward()
    optimizer.step()
    told = "^the gradient of .* is not finite; its step 12 left it .*; left alone as well: .*, .*, .* and 2 more$"
    with pytest.raises(qg.NonFiniteGradientError, match=told) as error:
        optimizer.check()
    assert len({name for name in ("0.", "2.", "3.") if name in str(error.value)}) >= 2
    optimizer.check()


def test_groups_that_skip_are_logged_beside_an_error(caplog: pytest.LogCaptureFixture) -> None:
    weights = [nn.Parameter(torch.ones(8)) for _ in range(2)]
    groups = [{"params": [("loud", weights[0])]}, {"params": [("quiet", weights[1])]}]
    optimizer = qg.QGaLoreAdamW8bit(groups)
    optimizer.param_groups[1]["nonfinite"] = "skip"
    for weight in weights:
        weight.grad = torch.full((8,), math.nan)
    with pytest.raises(qg.NonFiniteGradientError, match="gradient of loud .* updated the others$"):
        optimizer.step()
    assert [r.message for r in caplog.records] == ["the gradient of quiet is not finite: left alone in its step 0"]


def test_training_per_layer_goes_on_after_the_error() -> None:
    """The step that raised used to leave its update open, and each backward pass after it was refused."""
    model, optimizer = build()
    qg.enable_per_layer(optimizer)
    train(model, optimizer, 12)
    Copy.delayed = True
    model(torch.full((4, 48), math.nan)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for late in Copy.late:
        late.here = True
    backward(model, 1)
    with pytest.raises(qg.NonFiniteGradientError):
        optimizer.step()
    optimizer.zero_grad()
    before = everything(model, optimizer)
    train(model, optimizer, 1)
    assert not same(before, everything(model, optimizer))


def test_skip_only_logs(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build(nonfinite="skip")
    train(model, optimizer, 12)
    before, after = spoilt(model, optimizer)
    assert same(before, after) and not caplog.records
    optimizer.check()
    assert [r.message for r in caplog.records] == [
        "the gradient of 2.coordinates is not finite: left alone in its step 12"
    ]


def test_loading_a_state_forgets_what_the_old_one_met() -> None:
    model, optimizer = build()
    train(model, optimizer, 12)
    saved = copy.deepcopy(optimizer.state_dict())
    spoilt(model, optimizer)
    optimizer.load_state_dict(saved)
    optimizer.check()


def test_plain_projected_gradients_have_a_lower_limit() -> None:
    """So that R = P G^T can be squared; without the factor the flag of 9e17 would be none."""
    weight = nn.Parameter(torch.zeros(40, 25))
    optimizer = qg.QGaLoreAdamW8bit([{"params": [("weight", weight)], "rank": 4}])
    weight.grad = torch.randn(40, 25)
    optimizer.step()
    before = everything(nn.Module(), optimizer)
    weight.grad = torch.full((40, 25), 9e17)
    Copy.delayed = True
    optimizer.step()
    assert same(before, everything(nn.Module(), optimizer))
    with pytest.raises(qg.NonFiniteGradientError, match=r"has an entry of size 9e\+17, over 2e\+17"):
        optimizer.check()


def test_a_step_with_a_refresh_looks_first() -> None:
    """It waits anyway, so that nothing is written where a gradient is not finite."""
    model, optimizer = build()
    backward(model, 1)
    model[2].leaf.grad[0, 0] = math.nan  # type: ignore[index]
    before = everything(model, optimizer)
    with pytest.raises(qg.NonFiniteGradientError, match="2.coordinates is not finite; nothing was updated"):
        optimizer.step()
    assert same(before, everything(model, optimizer))


@pytest.mark.parametrize("clip", [None, "global", "last_norm", "per_parameter"])
def test_what_is_flagged_does_not_unclip_the_others(clip: str | None) -> None:
    """The norm is that of the gradients that are used."""
    model, optimizer = build(nonfinite="skip")
    options: dict[str, Any] = {} if clip is None else {"max_grad_norm": 0.1, "clip": clip}
    handle = qg.enable_per_layer(optimizer, **options)
    train(model, optimizer, 12)
    ordinary = handle.grad_norm
    hook = model[2].leaf.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[index]
    backward(model, 110)  # that of the last step
    optimizer.step()
    hook.remove()
    assert 0 < handle.grad_norm < ordinary * 1.5
    assert all(x.isfinite().all() for x in everything(model, optimizer) if x.is_floating_point())
    assert optimizer.state_dict()["param_groups"][0]["last_grad_norm"] == handle.grad_norm


# ---------------------------------------------------------------- capture


def test_a_step_under_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build()
    backward(model, 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="a step of QGaLoreAdamW8bit cannot be captured in a CUDA graph"):
        optimizer.step()
    assert same(before, everything(model, optimizer))

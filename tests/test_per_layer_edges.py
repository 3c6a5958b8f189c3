"""Per-layer updates where something fails, changes or is unusual: always what the ordinary mode would have done, or an
error."""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch import NonFiniteGradientError, QGaLoreAdamW8bit, enable_per_layer
from test_per_layer import build, failing_backward, gradients, losses_of, train


def everything(model: nn.Module, optimizer: QGaLoreAdamW8bit) -> list[Any]:
    states = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    leaves = [p for p in model.parameters() if getattr(p, "binding", None) is not None]
    due = [p.binding.due for p in leaves]  # type: ignore[union-attr]
    assert len(due) == 4
    return copy.deepcopy([*model.state_dict().values(), *states, *due])


def same(left: list[Any], right: list[Any]) -> bool:
    """Bit for bit."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def both(count: int = 1, **options: Any) -> list[tuple[Any, QGaLoreAdamW8bit]]:
    """A model in the ordinary mode and its twin with per-layer updates."""
    ordinary, per_layer = build(**options), build(**options)
    enable_per_layer(per_layer[1], count)
    return [ordinary, per_layer]


# ---------------------------------------------------------------- failures


def write_to_a_leaf(model: Any, optimizer: QGaLoreAdamW8bit) -> None:
    with torch.no_grad():
        model.up.leaf.data.fill_(1.0)


def break_the_rate(model: Any, optimizer: QGaLoreAdamW8bit) -> None:
    optimizer.param_groups[0]["lr"] = -1.0


@pytest.mark.parametrize("harm", [write_to_a_leaf, break_the_rate])
@pytest.mark.parametrize("count", [1, 2])
def test_a_pass_that_ends_in_its_first_hook_cannot_be_closed(harm: Any, count: int) -> None:
    """The checks before an update raise there, when one parameter has its gradient and the others have not: step()
    updated that one parameter."""
    model, optimizer = build()
    handle = enable_per_layer(optimizer, count)
    losses = losses_of(model, 0, count)
    for loss in losses[:-1]:
        loss.backward()
    harm(model, optimizer)
    with pytest.raises((RuntimeError, ValueError), match="something wrote to the zero leaf|lr must be"):
        losses[-1].backward()
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(RuntimeError, match="cannot close the update: a backward pass of this update failed"):
        optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {0}
    handle.abort_window()
    other, ordinary = build()
    assert train(model, optimizer, 3, count) == train(other, ordinary, 3, count)


@pytest.mark.parametrize("count", [1, 2])
def test_an_aborted_window_is_an_update_of_what_was_reached(count: int) -> None:
    """In first, due and later updates: the others' states, counts and due dates are as before."""
    results = []
    for model, optimizer in both(count):
        for step in range(9):
            losses = losses_of(model, step, count)
            for loss in losses[:-1]:
                loss.backward()
            if step not in (0, 1, 2, 4, 7):
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
                continue
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            before = [None if p.grad is None else p.grad.clone() for p in parameters]
            with pytest.raises(ArithmeticError):
                failing_backward(model, step)
            if optimizer._per_layer is not None:
                optimizer._per_layer.abort_window()
                continue
            for parameter, old in zip(parameters, before, strict=True):
                if old is not None and torch.equal(old, parameter.grad):
                    parameter.grad = None  # not reached
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
    assert same(*results)


@pytest.mark.parametrize("count", [1, 2])
def test_skipped_gradients_are_those_that_the_ordinary_mode_skips(count: int) -> None:
    results = []
    for model, optimizer in both(count, nonfinite="skip"):
        for step in range(8):
            module = {1: model.up, 4: model.twice, 5: model.norm}.get(step)
            hook = None
            if module is not None:
                hook = module.register_full_backward_hook(lambda _, inputs, __: tuple(g * math.inf for g in inputs))
            for loss in losses_of(model, step, count):
                loss.backward()
            if hook is not None:
                hook.remove()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.state[model.embed.weight]["step"] < 8 == optimizer.state[model.head.bias]["step"]
        results.append(everything(model, optimizer))
    assert same(*results)


def test_an_error_says_what_was_updated() -> None:
    """In a hook the layers above are updated already; at a boundary nothing is."""
    for options, outcome in (
        ({}, "had reached before it was updated"),
        ({"max_grad_norm": 1.0}, "nothing was updated"),
    ):
        model, optimizer = build()
        enable_per_layer(optimizer, **options)  # type: ignore[arg-type]
        model.up.register_forward_hook(lambda _, __, output: output * math.nan)
        with pytest.raises(NonFiniteGradientError, match=outcome):
            losses_of(model, 0)[0].backward()
            optimizer.step()


def test_a_pass_of_another_thread_at_the_same_time_is_refused() -> None:
    model, optimizer = build()
    handle = enable_per_layer(optimizer, 2)
    losses, errors, barrier = losses_of(model, 0, 2), [], threading.Barrier(2, timeout=20)
    hook = model.twice.bias.register_hook(lambda _: barrier.wait() and None)

    def run(loss: Tensor) -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            errors.append(str(error))
            barrier.abort()

    threads = [threading.Thread(target=run, args=(loss,)) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert errors and any("another thread runs one" in error for error in errors)
    with pytest.raises(RuntimeError, match="abort_window"):
        optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {0}
    handle.abort_window()
    train(model, optimizer, 1, 2)


# ---------------------------------------------------------------- what happens between


def test_a_group_that_is_added_inside_a_window_costs_no_stash() -> None:
    """Bindings were made anew, and a due layer then took its basis from the later micro-batches alone."""
    results = []
    for (model, optimizer), add in zip(both(2), (False, True), strict=True):
        for step in range(3):
            first, second = losses_of(model, step, 2)
            first.backward()
            assert step or model.up.leaf.binding.stash is not None or model.down.leaf.binding.stash is not None
            if add and step == 0:
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
            second.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([*model.state_dict().values()])
    assert same(*results)


def test_two_losses_with_two_passes_and_one_graph_twice() -> None:
    results = []
    for model, optimizer in both(2):
        for step in range(6):
            loss = losses_of(model, step)[0]
            if step % 2:
                loss.backward(retain_graph=True)
                loss.backward()
            else:
                trunk = model.twice(model.embed(torch.arange(9).view(1, 9)))
                trunk.square().mean().backward(retain_graph=True)
                model.spare(trunk).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
    assert same(*results)


def test_passes_without_accumulation_are_no_passes() -> None:
    results = []
    for model, optimizer in both():
        for step in range(5):
            loss = losses_of(model, step)[0]
            torch.autograd.grad(loss, [model.up.leaf, model.embed.weight], retain_graph=True)
            if optimizer._per_layer is not None:
                assert not optimizer._per_layer.is_open
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
    assert same(*results)


def test_a_pass_inside_of_a_forward_is_an_ordinary_one() -> None:
    """As of an autograd function that trains something in its forward; it was taken for reentrant checkpointing."""
    model, optimizer = build()
    enable_per_layer(optimizer)

    class Trains(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            with torch.enable_grad():
                losses_of(model, 0)[0].backward()
            optimizer.step()
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0] * 2

    Trains.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert optimizer.state[model.embed.weight]["step"] == 1


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_updates_inside_of_an_autocast_block(cast: torch.dtype) -> None:
    """backward() is called in it, and with it every update; rotated moments must not be rounded."""
    results = []
    for model, optimizer in both():
        for group in optimizer.param_groups:
            if group["rank"] is not None:
                group["moments"] = "rotate"
        for step in range(6):
            with torch.autocast("cpu", cast):
                loss = losses_of(model, step)[0]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
    assert same(*results)


def test_a_model_that_is_cast_goes_on_in_its_hooks() -> None:
    results = []
    for model, optimizer in both():
        train(model, optimizer, 2)
        model.to(torch.bfloat16)
        losses_of(model, 5)[0].backward()
        assert optimizer._per_layer is None or not gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, 2, first=2)
        results.append(everything(model, optimizer))
    assert same(*results)


@pytest.mark.parametrize("first", ["ordinary", "per layer"])
def test_checkpoints_are_the_same_in_both_modes(first: str) -> None:
    model, optimizer = build()
    expected = train(model, optimizer, 10)
    model, optimizer = build()
    if first == "per layer":
        enable_per_layer(optimizer)
    seen = train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = build()
    if first == "ordinary":
        enable_per_layer(optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert seen + train(model, optimizer, 5, first=5) == expected


# ---------------------------------------------------------------- norms


def test_the_last_norm_is_that_of_the_last_update_with_gradients() -> None:
    """Windows without a gradient, or whose gradients were all skipped, leave it; remove() forgets it, since later
    updates are not measured."""
    model, optimizer = build(nonfinite="skip")
    handle = enable_per_layer(optimizer, max_grad_norm=0.2, clip="last_norm")
    train(model, optimizer, 2)
    norm = handle.grad_norm
    assert norm > 0.2
    optimizer.step()
    (losses_of(model, 0)[0] * math.nan).backward()
    optimizer.step()
    assert handle.grad_norm == norm and {float(g["last_grad_norm"]) for g in optimizer.param_groups} == {norm}
    handle.remove()
    assert {group["last_grad_norm"] for group in optimizer.param_groups} == {0.0}


def test_a_float16_norm_beyond_float16_clips() -> None:
    """torch's norm of a float16 gradient is float16: infinite here, and the update was scaled to nothing."""
    for per_layer in (False, True):
        weight = nn.Parameter(torch.ones(300, 300, dtype=torch.float16))
        optimizer = QGaLoreAdamW8bit([weight], lr=0.1, weight_decay=0.0)
        handle = enable_per_layer(optimizer, max_grad_norm=1.0, clip="per_parameter") if per_layer else None
        (weight * 300.0).sum(dtype=torch.float32).backward()
        norm = qg.clip_grad_norm_(optimizer, 1.0).item() if handle is None else math.nan
        if handle is None:
            assert weight.grad is not None and weight.grad.norm() == pytest.approx(1.0, rel=0.01)
        optimizer.step()
        assert (handle.grad_norm if handle else norm) == pytest.approx(300.0 * 300.0, rel=1e-4)
        assert (weight - 0.9).abs().max() < 1e-3


def test_a_norm_that_overflows_neither_clips_to_nothing_nor_spoils_the_checkpoint() -> None:
    weight = nn.Parameter(torch.ones(100, 100))
    optimizer = QGaLoreAdamW8bit([weight], lr=0.1, weight_decay=0.0)
    enable_per_layer(optimizer, max_grad_norm=1.0, clip="last_norm")
    for expected in (0.9, 0.8):
        (weight * 5e17).sum().backward()  # its sum of squares is beyond float32
        optimizer.step()
        assert weight.detach().mean() == pytest.approx(expected, rel=1e-3)
    optimizer.load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------- lives


def test_nothing_is_kept_alive() -> None:
    """Without the garbage collector, in the middle of a window."""
    gc.collect()
    gc.disable()
    try:
        model, optimizer = build()
        handle = enable_per_layer(optimizer, 2)
        train(model, optimizer, 1, 2)
        losses_of(model, 0)[0].backward()
        watched = [weakref.ref(x) for x in (model, optimizer, handle, model.up.leaf, model.embed.weight)]
        del model, optimizer, handle
        assert [ref() for ref in watched] == [None] * 5
    finally:
        gc.enable()


def test_a_handle_whose_optimizer_is_gone_does_nothing() -> None:
    """As in a notebook that makes a new optimizer: backward() raised, and remove() could not help."""
    model, optimizer = build()
    handle = enable_per_layer(optimizer)
    del optimizer
    gc.collect()
    optimizer = QGaLoreAdamW8bit(qg.param_groups(model, rank=16), lr=0.01)
    losses_of(model, 0)[0].backward()
    assert len(gradients(optimizer)) > 5
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()
    again = enable_per_layer(optimizer)
    losses_of(model, 1)[0].backward()
    assert not gradients(optimizer)
    optimizer.step()
    assert again.grad_norm > 0


def test_one_gradient_tensor_is_alive_at_a_time() -> None:
    """Counted by references to what autograd hands to each parameter, and not by ``.grad``."""
    model, optimizer = build()
    enable_per_layer(optimizer)
    seen: list[weakref.ref[Tensor]] = []
    counts = []

    def watch(gradient: Tensor) -> None:
        seen.append(weakref.ref(gradient))
        counts.append(sum(ref() is not None for ref in seen))

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_hook(watch)
    train(model, optimizer, 3)
    assert len(counts) > 20 and max(counts) == 1

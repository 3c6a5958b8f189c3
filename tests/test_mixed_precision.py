"""Autocast with and without a GradScaler, bfloat16 weights, activation checkpointing: the same training, in other
precisions, and steps that are skipped whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import q_galore_torch as qg
from shapes import same_bits

TOKENS, WIDTH, HIDDEN = 23, 24, 40


class Block(nn.Module):
    """An MLP beside the stream, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding, two blocks and a head, which learns a map of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, TOKENS)
        self.use_reentrant: bool | None = None  # of checkpointing; None: without

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


def build(
    bits: int | None = 8, dtype: torch.dtype = torch.float32, mode: str = "low_rank", **options: Any
) -> tuple[Model, qg.QGaLoreAdamW8bit]:
    torch.manual_seed(0)
    model = Model().to(dtype)
    qg.prepare_model(model, 8, ["blocks"], weight_bits=bits, grad_mode=mode, **options)
    groups = qg.param_groups(model, update_proj_gap=8, scale=1.0)
    return model, qg.QGaLoreAdamW8bit(groups, lr=0.01)


def leaves(model: nn.Module) -> Iterator[Any]:
    return (m.leaf for m in model.modules() if isinstance(m, qg.QGaLoreLinear))


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    tokens = torch.randint(TOKENS, (64,), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(tokens).float(), (5 * tokens + 3) % TOKENS)


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def train(
    model: nn.Module,
    opt: qg.QGaLoreAdamW8bit,
    steps: int,
    cast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    largest: float | None = None,
) -> list[float]:
    """``steps`` updates of two micro-batches each; clipped to ``largest`` if given."""
    losses = []
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for step in range(steps):
        total = 0.0
        for micro in range(2):
            with autocast(cast):
                loss = loss_of(model, 2 * step + micro) / 2
            scaler.scale(loss).backward()
            total += loss.item()
        if largest is not None:
            scaler.unscale_(opt)
            qg.clip_grad_norm_(opt, largest)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(total)
    return losses


def everything(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> list[Any]:
    """Every tensor and number of model and optimizer, and what is due."""
    states = [value for state in opt.state_dict()["state"].values() for value in state.values()]
    due = [leaf.binding is not None and leaf.binding.due for leaf in leaves(model)]
    return copy.deepcopy([*model.state_dict().values(), *states, *due])


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        same_bits(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------- the loss falls as in float32


@pytest.fixture(scope="module")
def float32_losses() -> dict[int | None, list[float]]:
    """Of INT8 and float weights."""
    return {bits: train(*build(bits), 40) for bits in (8, None)}


PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16 under autocast": (torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_close_to_float32(
    precision: str, bits: int | None, float32_losses: dict[int | None, list[float]]
) -> None:
    dtype, cast = PRECISIONS[precision]
    model, opt = build(bits, dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if cast == torch.float16 else None
    losses = train(model, opt, 40, cast, scaler)
    expected = float32_losses[bits]
    assert expected[-1] < 0.2 * expected[0]
    assert losses[-1] < 0.2 * losses[0]
    assert all(abs(a - b) < 0.15 for a, b in zip(losses, expected, strict=True))
    assert all(state["step"] == 40 for state in opt.state.values())
    assert all(entry["refreshes"] >= 4 for entry in opt.telemetry() if "refreshes" in entry)


def test_stochastic_rounding_lets_bfloat16_weights_learn_by_steps_below_their_spacing() -> None:
    """All of them: embedding, norms, biases, head and the float weights behind low-rank leaves. To nearest, weights of
    size one hardly move."""
    moved = {}
    for rounding in (True, False):
        model, opt = build(None, torch.bfloat16)
        for group in opt.param_groups:
            group.update(lr=1e-4, weight_decay=0.0, stochastic_round=rounding)
        start = copy.deepcopy(model.state_dict())
        train(model, opt, 10)
        moved[rounding] = {key: (value != start[key]).float().mean() for key, value in model.state_dict().items()}
    norms = [key for key in moved[True] if key.endswith("norm.weight")]  # ones, whose spacing is 0.004 or 0.008
    assert norms and all(moved[True][key] > 0 for key in moved[True])
    assert all(moved[False][key] == 0 for key in norms)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("bits", "mode"), [(8, "low_rank"), (None, "low_rank"), (8, "full")])
def test_gradients_have_the_right_dtypes(bits: int | None, mode: str, precision: str) -> None:
    """R is float32 whatever the layer computes in, so that micro-batches sum in it; the others' are their weights'."""
    dtype, cast = PRECISIONS[precision]
    model, _ = build(bits, dtype, mode)
    with autocast(cast):
        loss = loss_of(model)
    loss.backward()
    low_rank = [id(leaf) for leaf in leaves(model)] if mode == "low_rank" else []
    for parameter in model.parameters():
        if parameter.requires_grad:
            wanted = torch.float32 if id(parameter) in low_rank else dtype
            assert parameter.grad is not None and parameter.grad.dtype == wanted
    if mode == "low_rank":
        stashes = [leaf.binding.stash for leaf in leaves(model) if leaf.binding.due]
        assert stashes and all(stash.dtype == torch.float32 for stash in stashes)


# ---------------------------------------------------------------- where autocast begins and ends


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_backward_inside_and_outside_of_autocast_are_the_same(cast: torch.dtype) -> None:
    results = []
    for inside in (True, False):
        model, _ = build()
        with autocast(cast):
            loss = loss_of(model)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append([*(p.grad for p in model.parameters()), *(leaf.binding.stash for leaf in leaves(model))])
    assert len([x for x in results[0] if x is not None]) > 10
    assert same(*results)


@pytest.mark.parametrize("moments", ["keep", "rotate"])
@pytest.mark.parametrize("subspace", ["warm", "svd"])
def test_a_step_inside_of_autocast_rounds_nothing(moments: str, subspace: str) -> None:
    """Rotated moments were multiplied in bfloat16 there."""
    results = []
    for cast in (None, torch.bfloat16):
        torch.manual_seed(0)
        model = Model()
        qg.prepare_model(model, 8, ["blocks"])
        options: dict[str, Any] = dict(update_proj_gap=2, moments=moments, subspace=subspace)
        groups = qg.param_groups(model, **options)
        groups[0]["params"] = [p for p in groups[0]["params"] if p is not model.head.weight]
        opt = qg.QGaLoreAdamW8bit([*groups, {"params": [model.head.weight], "rank": 4, **options}], lr=0.01)
        for step in range(6):
            loss_of(model, step).backward()
            with autocast(cast):
                opt.step()
            opt.zero_grad()
        assert all(entry["refreshes"] >= 2 for entry in opt.telemetry() if "refreshes" in entry)
        results.append(everything(model, opt))
    assert same(*results)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, None])
def test_activation_checkpointing_changes_no_bit(
    bits: int | None, cast: torch.dtype | None, use_reentrant: bool
) -> None:
    """Gradients and stashes over two micro-batches, and training through refreshes. A reentrant pass runs in a backward
    of its own."""
    results = []
    for reentrant in (None, use_reentrant):
        model, opt = build(bits)
        model.use_reentrant = reentrant
        for step in range(2):
            with autocast(cast):
                loss = loss_of(model, step)
            loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        stashes = [leaf.binding.stash.clone() for leaf in leaves(model) if leaf.binding.stash is not None]
        assert stashes
        opt.zero_grad()
        train(model, opt, 4, cast)
        results.append([*gradients, *stashes, *everything(model, opt)])
    assert same(*results)


# ---------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("largest", [None, 0.5])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(bits: int | None, largest: float | None) -> None:
    """R and plain gradients are unscaled; G of due layers is not, and its basis is the same."""
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)):
        model, opt = build(bits)
        losses = train(model, opt, 12, scaler=scaler, largest=largest)
        results.append([*losses, *everything(model, opt)])
        assert scaler is None or scaler.get_scale() == 2.0**14
    assert same(*results)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("bits", [8, None])
def test_an_overflow_skips_the_whole_step(bits: int | None, clipped: bool) -> None:
    """Codes, moments, bases and counts stay bit for bit, the scale shrinks, and the training goes on."""
    model, opt = build(bits)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    largest = 1.0 if clipped else None
    first = train(model, opt, 3, torch.float16, scaler, largest)
    assert scaler.get_scale() == 2.0**10
    scaler.update(2.0**40)  # far beyond float16
    before = everything(model, opt)
    losses = train(model, opt, 5, torch.float16, scaler, largest)
    assert same(before, everything(model, opt)) and scaler.get_scale() == 2.0**35
    assert losses[0] == loss_twice(model, 0) and all(leaf.grad is None for leaf in leaves(model))
    later = train(model, opt, 45, torch.float16, scaler, largest)
    skipped = 48 - opt.state[model.head.weight]["step"]
    assert 10 < skipped < 30 and scaler.get_scale() == 2.0 ** (35 - skipped)
    assert later[-1] < 0.5 * first[0]


def loss_twice(model: nn.Module, step: int) -> float:
    """As :func:`train` reports it under float16 autocast."""
    with torch.no_grad(), autocast(torch.float16):
        return sum((loss_of(model, 2 * step + micro) / 2).item() for micro in range(2))


@pytest.mark.parametrize("which", ["a low-rank leaf", "a bias"])
def test_one_broken_gradient_skips_every_parameter(which: str) -> None:
    model, opt = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(model, opt, 2, scaler=scaler)
    before = everything(model, opt)
    broken = next(leaves(model)) if which == "a low-rank leaf" else model.blocks[1].up.bias
    scaler.scale(loss_of(model)).backward()
    broken.grad.view(-1)[3] = float("nan")
    scaler.step(opt)
    scaler.update()
    model.zero_grad()
    assert same(before, everything(model, opt)) and scaler.get_scale() == 2.0
    train(model, opt, 1, scaler=scaler)
    assert all(state["step"] == 3 for state in opt.state.values())


def test_a_bfloat16_leaf_is_unscaled_too() -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**8)):
        model, opt = build(grad_dtype="bfloat16")
        train(model, opt, 3, scaler=scaler)
        results.append(everything(model, opt))
    assert same(*results)


def test_the_full_gradient_of_a_due_layer_may_be_beyond_float16() -> None:
    """R = P G averages over rows of G: it fits where a single entry of G is infinite in float16, and then no scaler
    shrinks the scale and the layer stayed due for ever."""
    torch.manual_seed(0)
    model = qg.prepare_model(nn.Sequential(nn.Linear(64, 32, bias=False)), 4, ["0"])
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model), lr=0.01)
    x, upstream = torch.randn(6, 64), torch.zeros(6, 32)
    upstream[:, 3] = torch.tensor([300.0, 100.0, -50.0, 20.0, 10.0, 5.0])
    x[:, 7] = 150 * upstream[:, 3].sign()
    with autocast(torch.float16):
        y = model(x)
    y.backward(upstream.half())
    leaf = model[0].leaf
    expected = upstream.double().t() @ x.half().double()
    assert expected.abs().max() > torch.finfo(torch.float16).max and leaf.grad.isfinite().all()
    assert relative(leaf.binding.stash, expected) < 1e-5
    opt.step()
    assert opt.telemetry()[0]["refreshes"] == 1

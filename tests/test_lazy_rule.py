"""lazy_rule="energy": the similarity of two bases in a row, and what it does to the gap, on gradients made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch import ops

ROWS, COLS, RANK, GAP = 48, 32, 4, 4


def signal(moving_from: float = math.inf, moving_to: float = math.inf, rate: float = 0.25) -> Iterator[Tensor]:
    """Gradients of a four-dimensional row space under noise; while it moves it rotates by ``rate`` rad a step."""
    generator = torch.Generator().manual_seed(0)
    space, _ = torch.linalg.qr(torch.randn(COLS, 2 * RANK, generator=generator))
    angle, step = 0.0, 0
    while True:
        angle += rate if moving_from <= step < moving_to else 0.0
        basis = math.cos(angle) * space[:, :RANK] + math.sin(angle) * space[:, RANK:]
        noise = 0.05 * torch.randn(ROWS, COLS, generator=generator)
        yield torch.randn(ROWS, RANK, generator=generator) @ basis.t() + noise
        step += 1


def white_noise() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(ROWS, COLS, generator=generator)


class Plain:
    """A float weight whose gradient is set."""

    def __init__(self, **options: Any) -> None:
        self.parameter: Any = nn.Parameter(torch.zeros(ROWS, COLS))
        self.opt = qg.QGaLoreAdamW8bit([{"params": [self.parameter], **defaults(options)}], lr=0.0)

    def step(self, gradient: Tensor) -> dict[str, Any]:
        self.parameter.grad = gradient
        self.opt.step()
        return self.opt.telemetry()[0]


class Leaf:
    """A low-rank layer with a given full gradient: its input is the identity, its output weighted by G."""

    def __init__(self, **options: Any) -> None:
        options = defaults(options)
        rank = options.pop("rank")
        self.layer = qg.prepare_model(nn.Sequential(nn.Linear(COLS, ROWS, bias=False)), rank, ".*", weight_bits=None)[0]
        self.parameter = self.layer.leaf
        self.opt = qg.QGaLoreAdamW8bit([{"params": [self.parameter], "rank": rank, **options}], lr=0.0)

    def step(self, gradient: Tensor) -> dict[str, Any]:
        self.opt.zero_grad()
        (self.layer(torch.eye(COLS)) * gradient.t()).sum().backward()
        self.opt.step()
        return self.opt.telemetry()[0]


def defaults(options: dict[str, Any]) -> dict[str, Any]:
    return {"rank": RANK, "update_proj_gap": GAP, "proj_format": "float32", **options}


KINDS = [Plain, Leaf]
Kind = Callable[..., Any]


def run(target: Any, stream: Iterator[Tensor], steps: int) -> list[dict[str, Any]]:
    return [target.step(next(stream)) for _ in range(steps)]


# ---------------------------------------------------------------- what streams do to the gap


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_subspace_stretches_the_gap_to_the_cap(kind: Kind) -> None:
    log = run(kind(queue_size=2), signal(), 300)
    gaps = [entry["gap"] for entry in log]
    assert sorted(set(gaps)) == [4, 8, 16, 32, 64] and gaps == sorted(gaps)
    assert min(entry["similarity"] for entry in log if entry["similarity"] is not None) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotating_subspace_stays_at_the_base_gap(kind: Kind) -> None:
    log = run(kind(queue_size=2), signal(moving_from=0), 80)
    assert {entry["gap"] for entry in log} == {GAP}
    assert log[-1]["refreshes"] >= 80 // GAP


@pytest.mark.parametrize("kind", KINDS)
def test_a_subspace_that_starts_to_move_comes_back_to_the_base_gap(kind: Kind) -> None:
    gaps = [entry["gap"] for entry in run(kind(queue_size=2), signal(moving_from=70, moving_to=140), 200)]
    assert gaps[69] >= 16
    back = gaps.index(GAP, 70)
    assert back <= 70 + gaps[69] + 1
    assert set(gaps[back:140]) == {GAP}
    assert gaps[-1] > GAP  # at rest again it stretches again


@pytest.mark.parametrize("rank", [1, 4, 16, 31])
@pytest.mark.parametrize("kind", KINDS)
def test_pure_noise_does_not_stretch_the_gap(kind: Kind, rank: int) -> None:
    log = run(kind(rank=rank), white_noise(), 120)
    assert {entry["gap"] for entry in log} == {GAP} and log[-1]["refreshes"] >= 29
    assert {entry["similarity"] for entry in log} == {None, 0.0}


# ---------------------------------------------------------------- the similarity


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("proj_format", ["float32", "int4"])
def test_similarity_judges_both_bases_on_the_next_gradient(kind: Kind, proj_format: str) -> None:
    """Against the formula in float64, with the decoded bases before and after the refresh."""
    target, stream, seen = kind(proj_format=proj_format, energy_threshold=1.0), signal(moving_from=0, rate=0.03), 0
    bases, gradients = [], []
    for _ in range(30):
        before = decoded(target)
        gradients.append(next(stream))
        entry = target.step(gradients[-1])
        if not torch.equal(before, decoded(target)):
            bases.append((before, decoded(target)))
            assert entry["last_refresh"] == len(gradients) - 1
            exact = torch.linalg.svdvals(gradients[-1].double()).square()
            assert entry["captured_energy"] == pytest.approx(energy(gradients[-1], bases[-1][1]), abs=0.02)
            assert entry["captured_energy"] <= (exact[:RANK].sum() / exact.sum()).item() + 1e-6
        elif len(bases) > 1 and entry["last_refresh"] == len(gradients) - 2:
            old, new = (energy(gradients[-1], basis) for basis in bases[-1])
            chance = RANK / COLS
            assert entry["similarity"] == pytest.approx(min(1.0, (old - chance) / (new - chance)), abs=1e-4)
            assert entry["held_out_energy"] == pytest.approx(new, abs=1e-5)
            seen += 1
        if len(bases) == 1:
            assert entry["similarity"] is None  # the basis before the first one is random, or none
    assert seen >= 4


def decoded(target: Any) -> Tensor:
    state, group = target.opt.state[target.parameter], target.opt.param_groups[0]
    parts = (state[f"proj_{part}"] for part in ("codes", "scales", "zeros"))
    return ops.projector_dequantize(*parts, group["proj_format"], group["proj_block"], COLS)


def energy(gradient: Tensor, basis: Tensor) -> float:
    q, _ = torch.linalg.qr(basis.double().t())
    return ((gradient.double() @ q).square().sum() / gradient.double().square().sum()).item()


def test_a_due_leaf_forms_its_gradient_in_two_steps_in_a_row_but_for_the_first() -> None:
    target, stream, formed = Leaf(), signal(), []
    for step in range(14):
        if target.parameter.binding.due:
            formed.append(step)
        target.step(next(stream))
    assert formed == [0, 4, 5, 8, 9, 12, 13]


def test_a_zero_gradient_leaves_the_two_bases_waiting() -> None:
    for kind in KINDS:
        target, stream = kind(), signal()
        run(target, stream, GAP + 1)
        target.step(torch.zeros(ROWS, COLS))
        assert target.opt.telemetry()[0]["similarity"] is None
        assert target.opt.state[target.parameter]["past_proj_codes"].numel() > 0
        assert target.step(next(stream))["similarity"] > 0.95
        assert target.opt.state[target.parameter]["past_proj_codes"].numel() == 0


@pytest.mark.parametrize("subspace", ["warm", "svd"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_orthogonal_to_the_whole_basis_gets_a_new_one(kind: Kind, subspace: str) -> None:
    """Inputs of another kind, or other units alive: R is exactly zero, and no power step leads out of the old basis.

    The matrix was due for ever after and learned nothing more; only a plain one with ``svd`` came out of it.
    """
    target, stream = kind(subspace=subspace), signal()
    half = torch.arange(COLS) < COLS // 2
    for step in range(3 * GAP):
        gradient = next(stream)
        entry = target.step(torch.where(half if step < 2 * GAP else ~half, gradient, 0.0))
        assert entry["last_refresh"] == step // GAP * GAP
    assert energy(gradient * ~half, decoded(target)) > 0.9
    assert entry["captured_energy"] > 0.9 and entry["similarity"] == 0.0


def test_a_refresh_every_step_is_compared_before_the_next_one() -> None:
    for kind in KINDS:
        log = run(kind(update_proj_gap=1, queue_size=100), signal(), 12)
        assert [entry["refreshes"] for entry in log] == list(range(1, 13))
        assert [entry["similarity"] is None for entry in log] == [True, True] + 10 * [False]


def test_a_whole_side_does_not_hide_what_both_sides_capture() -> None:
    """At rank 4 of 4 x 40 only the right basis is renewed; it is the one that leaves something out."""
    generator, weight = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(4, 40))
    group = {"params": [weight], "rank": 4, "proj_type": "full", "update_proj_gap": 2, "proj_format": "float32"}
    opt = qg.QGaLoreAdamW8bit([group], lr=0.0)
    for step in range(5):
        weight.grad = torch.randn(4, 40, generator=generator)
        opt.step()
        if step % 2 == 0:
            state = opt.state[weight]
            right = ops.projector_dequantize(
                *(state[f"right_{p}"] for p in ("codes", "scales", "zeros")), "float32", 256, 40
            )
            assert opt.telemetry()[0]["captured_energy"] == pytest.approx(energy(weight.grad, right), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_refresh_or_comparison_takes_none_of_their_time(kind: Kind) -> None:
    """A plain parameter's seconds grew in every step, so that a log of what changed had every matrix in every step."""
    log = run(kind(update_proj_gap=8), signal(), 18)
    idle = [step for step in range(1, 18) if step % 8 > 1]
    assert len({entry["seconds"] for entry in log}) > 2
    assert [log[step] for step in idle] == [{**log[step - 1], "step": step + 1} for step in idle]


def test_random_subspaces_are_not_compared() -> None:
    target = Leaf(subspace="random")
    log = run(target, signal(), 30)
    assert not target.parameter.binding.due
    assert {(entry["gap"], entry["similarity"], entry["captured_energy"]) for entry in log} == {(GAP, None, None)}


# ---------------------------------------------------------------- queue, factor, cap


def refresh_steps(log: list[dict[str, Any]]) -> list[int]:
    return sorted({entry["last_refresh"] for entry in log} - {-1})


def test_the_queue_is_cleared_at_each_stretch() -> None:
    """Step 0 is not compared; then three similarities a gap, the third one judged a step after its refresh."""
    log = run(Plain(queue_size=3), signal(), 64)
    assert refresh_steps(log) == [0, 4, 8, 12, 20, 28, 36, 52]
    gaps = [entry["gap"] for entry in log]
    assert [gaps.index(gap) for gap in (8, 16)] == [13, 37]


def test_gaps_are_whole_multiples_of_the_base_gap_and_the_cap_is_one_too() -> None:
    gaps = {entry["gap"] for entry in run(Plain(gamma_proj=1.3, queue_size=1, max_proj_gap=23), signal(), 150)}
    assert gaps == {4, 8, 12, 16, 20}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_stretched_in_a_due_step_counts_from_that_step(kind: Kind) -> None:
    """It counted from a step later by the new gap less the old one. With a gap of 1 every step compares and is due."""
    log = run(kind(update_proj_gap=1, queue_size=1, max_proj_gap=4), signal(), 16)
    assert refresh_steps(log) == [0, 1, 2, 6, 10, 14]
    target, stream, log = kind(queue_size=1, max_proj_gap=8), signal(), []
    for step in range(26):  # the comparison waits through three empty gradients until the next basis is due
        gradient = next(stream)
        log.append(target.step(torch.zeros(ROWS, COLS) if step in (5, 6, 7) else gradient))
    assert refresh_steps(log) == [0, 4, 8, 16, 24]


def test_the_threshold_decides() -> None:
    for threshold, stretched in ((0.7, True), (0.999, False)):
        stream = signal(moving_from=0, rate=0.08)
        gaps = {entry["gap"] for entry in run(Plain(energy_threshold=threshold, queue_size=2), stream, 40)}
        assert (gaps != {GAP}) == stretched


def test_stretched_gaps_keep_the_phases() -> None:
    """However the gaps of 56 matrices differ, no step after the first has more than ceil(56 / 20) + 1 = 4 new bases."""
    parameters = [nn.Parameter(torch.zeros(12, 8)) for _ in range(56)]
    opt = qg.QGaLoreAdamW8bit([{"params": parameters, "rank": 2, "update_proj_gap": 20, "queue_size": 1}], lr=0.0)
    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(12, 2, generator=generator), torch.randn(2, 8, generator=generator)
    done = 0
    for step in range(130):
        for index, parameter in enumerate(parameters):
            still = fixed[0] @ fixed[1] + 0.01 * torch.randn(12, 8, generator=generator)
            parameter.grad = still if index % 2 else torch.randn(12, 8, generator=generator)
        opt.step()
        before, done = done, sum(state["refreshes"] for state in opt.state.values())
        assert done - before <= 4 or step == 0
    gaps = [entry["gap"] for entry in opt.telemetry()]
    assert set(gaps[0::2]) == {20} and min(gaps[1::2]) >= 40

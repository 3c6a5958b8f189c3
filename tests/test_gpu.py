"""What only a GPU shows: steps that wait for nothing, and work that stays in the stream it was put in."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from elsewhere import CPU_ONLY, Elsewhere, on_cpu
from q_galore_torch import reference

GPU = torch.device("cuda")
GAP = 1000  # of refreshes: none falls into the steps that are looked at
FIRST_BASES = 10  # steps in which the first bases are made


class Model(nn.Module):
    """Two INT8 layers, one with a bias, projected on either side, and a norm that is not projected."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 320)
        self.norm = nn.LayerNorm(320)
        self.down = nn.Linear(320, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.relu(self.up(x))))


def training(device: torch.device, **options: Any) -> tuple[nn.Module, qg.QGaLoreAdamW8bit]:
    """A prepared model, the same each time, and its optimizer."""
    torch.manual_seed(0)
    model = Model().to(device)
    qg.prepare_model(model, rank=16, target_modules="all-linear")
    return model, qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=GAP), lr=0.01, **options)


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def trained(device: torch.device, within: Callable[[], Any], late: Callable[[], None]) -> list[Tensor]:
    """All of a model and its optimizer after some steps.

    Args:
        device: Where.
        within: What the last three steps run within.
        late: What is put before their inputs are written: whoever does not wait in the same stream reads old ones.
    """
    model, optimizer = training(device)
    inputs = [
        torch.randn(32, 64, generator=torch.Generator().manual_seed(i)).to(device) for i in range(FIRST_BASES + 3)
    ]
    x = torch.zeros(32, 64, device=device)
    for number, batch in enumerate(inputs):
        if device.type == "cuda" and number == FIRST_BASES:
            torch.cuda.synchronize()  # what runs within another stream from here on needs these steps done
        with within() if number >= FIRST_BASES else nullcontext():
            if number >= FIRST_BASES:
                late()
            x.copy_(batch)
            backward(model, x)
            optimizer.step()
            optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    state = [v for entry in optimizer.state_dict()["state"].values() for v in entry.values() if isinstance(v, Tensor)]
    return [t.detach().cpu() for t in [*model.state_dict().values(), *state]]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want) > 10
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_the_training_of_these_tests_is_reproducible() -> None:
    """On the CPU, where the tests below cannot run: two trainings are equal, and the late steps run as they should."""
    ran: list[int] = []
    want = trained(torch.device("cpu"), nullcontext, lambda: None)
    assert_same(trained(torch.device("cpu"), nullcontext, lambda: ran.append(1)), want)
    assert len(ran) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_step_without_refresh_waits_for_nothing(nonfinite: str) -> None:
    model, optimizer = training(GPU, nonfinite=nonfinite)
    x = torch.randn(32, 64, device=GPU)
    for number in range(FIRST_BASES + 3):
        backward(model, x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number >= FIRST_BASES else "default")
        try:
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    optimizer.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_work_stays_in_the_current_stream() -> None:
    """Inputs come late on a side stream, behind an event; a kernel on another stream would not wait for them."""
    want = trained(GPU, nullcontext, lambda: None)
    side, blocked = torch.cuda.Stream(), torch.cuda.Stream()

    def late() -> None:
        with torch.cuda.stream(blocked):
            torch.cuda._sleep(200_000_000)
            event = torch.cuda.Event()
            event.record(blocked)
        side.wait_event(event)

    torch.cuda.synchronize()
    assert_same(trained(GPU, lambda: torch.cuda.stream(side), late), want)


# ---------------------------------------------------------------- what carries the other tests to a GPU


def test_elsewhere_makes_tensors_there() -> None:
    """The meta device stands for the GPU: no values, but a place."""
    meta = torch.device("meta")
    with Elsewhere(meta):
        assert torch.zeros(3).device == meta
        assert torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True).device == meta
        assert torch.zeros(3, device="cpu").device.type == "cpu"
        assert nn.Linear(3, 4).weight.device == meta
    assert torch.zeros(3).device.type == "cpu"


def test_tests_of_the_cpu_alone_exist() -> None:
    """A renamed test must not fail on a GPU for being left out of the list."""
    files = Path(__file__).parent.glob("test_*.py")
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert set(CPU_ONLY) <= written


def test_what_the_host_reads_stays_there() -> None:
    """Under a default device (the meta device stands for a GPU), which would make each reading wait for it."""
    model = Model()
    groups = [{"params": [model.up.weight], "rank": 16}]
    with Elsewhere(torch.device("meta")):
        (state,) = [s for s in qg.QGaLoreAdamW8bit(groups).state.values() if "queue" in s]
    assert state["queue"].device.type == state["measured"].device.type == "cpu"


def test_definitions_run_on_copies_that_are_brought_back() -> None:
    mode = Elsewhere(torch.device("cpu"))
    seen = []

    def define(values: list[Tensor], untouched: Tensor) -> tuple[Tensor, int]:
        seen.append((values[0], mode.device))
        values[0].add_(1)
        return values[0] * 2, 7

    value, untouched = torch.ones(2), torch.ones(2)
    result, number = on_cpu(define, mode)([value], untouched)
    assert seen[0][0] is not value
    assert seen[0][1] is None
    assert mode.device == torch.device("cpu")
    assert value.tolist() == [2, 2]
    assert result.tolist() == [4, 4]
    assert number == 7
    assert torch.equal(on_cpu(reference.absmax, mode)([value]), reference.absmax([value]))

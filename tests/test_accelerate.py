"""accelerate without the Trainer: prepare, accumulate, clip_grad_norm_, save_state and load_state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")

import accelerate
from accelerate.state import AcceleratorState

from loop_support import BATCHES, loss_of, network, optimizer_of
from test_state import differences


class Run:
    """A model and its optimizer in accelerate's hands."""

    def __init__(self, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # one per process; the tests differ in its precision
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        model = network()
        loader = DataLoader(BATCHES, batch_size=None)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer_of(model), loader)
        self.norms: list[float] = []

    def train(self, batches: Any = None, max_norm: float = 1e9) -> None:
        for batch in self.loader if batches is None else batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, batch))
                if self.accelerator.sync_gradients:
                    self.norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)))
                self.optimizer.step()
                self.optimizer.zero_grad()

    def everything(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})


def by_hand(accumulation: int = 1, max_norm: float = 1e9) -> dict[str, Any]:
    """The same training in a plain loop."""
    model = network()
    opt = optimizer_of(model)
    for index, batch in enumerate(BATCHES):
        (loss_of(model, batch) / accumulation).backward()
        if (index + 1) % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            opt.step()
            opt.zero_grad()
    return {"model": model.state_dict(), "optimizer": opt.state_dict()}


def test_prepare_leaves_the_state_as_it_is() -> None:
    """prepare() loads the optimizer's own state dict into it, where torch's method casts codes to float32."""
    assert differences(Run().everything()["optimizer"], optimizer_of(network()).state_dict()) == []


@pytest.mark.parametrize(("accumulation", "max_norm"), [(1, 1e9), (4, 1e9), (1, 0.05), (4, 0.05)])
def test_training_is_that_of_a_plain_loop(accumulation: int, max_norm: float) -> None:
    run = Run(gradient_accumulation_steps=accumulation)
    run.train(max_norm=max_norm)
    assert differences(run.everything(), by_hand(accumulation, max_norm)) == []
    assert len(run.norms) == 8 // accumulation and min(run.norms) > 0.05


def test_bf16_keeps_the_state_in_its_dtypes() -> None:
    run, exact = Run(mixed_precision="bf16"), Run()
    for each in (run, exact):
        each.train()
    assert run.norms == pytest.approx(exact.norms, rel=0.05) and run.norms != exact.norms
    assert [t.dtype for t in run.model.state_dict().values()] == [t.dtype for t in exact.model.state_dict().values()]


@pytest.mark.parametrize("safe", [True, False])
def test_saved_state_is_loaded_bit_for_bit(safe: bool, tmp_path: Path) -> None:
    whole, resumed = Run(), Run()
    whole.train(BATCHES[:5])
    whole.accelerator.save_state(str(tmp_path), safe_serialization=safe)
    whole.train(BATCHES[5:])
    resumed.train(BATCHES[:2])
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(BATCHES[5:])
    assert differences(whole.everything(), resumed.everything()) == []


def test_unwrapped_optimizer_is_ours() -> None:
    """Its telemetry is read through the wrapper."""
    run = Run()
    run.train()
    assert [entry["refreshes"] > 0 for entry in run.optimizer.optimizer.telemetry() if "refreshes" in entry] == [
        True
    ] * 2

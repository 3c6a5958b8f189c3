"""Models and states that change their device; the meta device stands for another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch.nn.backward import lent

MODES: dict[str, dict[str, Any]] = {"low rank": {}, "both sides": {"proj_type": "full"}, "full": {"grad_mode": "full"}}


def build(device: str = "cpu", **options: Any) -> tuple[nn.Sequential, qg.QGaLoreAdamW8bit]:
    torch.manual_seed(0)
    model = qg.prepare_model(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 8)), 8, ["0"], **options).to(device)
    groups = qg.param_groups(model, rank=8, norm_growth_limit=1.1)
    return model, qg.QGaLoreAdamW8bit(groups, lr=0.01, min_8bit_size=64)  # type: ignore[return-value]


def step(model: nn.Module, optimizer: qg.QGaLoreAdamW8bit) -> None:
    model(torch.randn(4, 48)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def places(optimizer: qg.QGaLoreAdamW8bit) -> dict[str, set[str]]:
    """The devices of each tensor of the leaves' states (on the way to meta torch replaces ordinary parameters)."""
    found: dict[str, set[str]] = {}
    for state in (state for state in optimizer.state.values() if "number" in state):
        for key, value in state.items():
            if isinstance(value, Tensor):
                found.setdefault(key, set()).add(value.device.type)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_state_is_made_where_the_model_is_and_stays_there(mode: str) -> None:
    """All but what the host reads to decide on the next refresh."""
    for device in ("meta", "cpu"):
        model, optimizer = build(device, **MODES[mode])
        if device == "cpu":
            step(model, optimizer)
        host = {"queue", "measured"}
        for key, devices in places(optimizer).items():
            assert devices == {"cpu" if key in host else device}, key
        assert {p.device.type for p in model.parameters()} == {device}


@pytest.mark.parametrize("mode", MODES)
def test_a_state_follows_the_model_by_loading_it(mode: str) -> None:
    model, optimizer = build(**MODES[mode])
    step(model, optimizer)
    model.to("meta")
    optimizer.load_state_dict(optimizer.state_dict())
    assert places(optimizer) == places(build("meta", **MODES[mode])[1])
    optimizer.load_state_dict(build(**MODES[mode])[1].state_dict())  # of the CPU
    assert places(optimizer)["exp_avg"] == {"meta"} and places(optimizer)["queue"] == {"cpu"}


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_was_moved_away_from_its_state_is_refused(mode: str) -> None:
    model, optimizer = build(**MODES[mode])
    model.to("meta")
    told = r"is on meta and its optimizer state on cpu: make the optimizer after model.to\(device\), or let"
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with pytest.raises(RuntimeError, match=told):
        optimizer.step()
    if mode != "full":  # whose backward needs nothing of the optimizer
        with pytest.raises(RuntimeError, match=f"^0 {told}"):
            lent(model[0])

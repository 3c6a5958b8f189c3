"""Checkpoints of torch.distributed.checkpoint: the same run goes on, bit for bit, from any step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state

import q_galore_torch as qg
from q_galore_torch.integrations.dcp import LoadPlanner
from test_state import differences

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make(seed: int = 0) -> tuple[nn.Module, qg.QGaLoreAdamW8bit]:
    """A low-rank layer, a full-mode one and a float one; new bases, comparisons and longer gaps within a few steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 12, bias=False), nn.LayerNorm(12))
    qg.prepare_model(model, 4, ["0"])
    qg.prepare_model(model, 4, ["1"], grad_mode="full")
    qg.prepare_model(model, 4, ["2"], grad_mode="full", weight_bits=None)
    groups = qg.param_groups(model, update_proj_gap=3, queue_size=2, energy_threshold=0.05, moments="rotate")
    return model, qg.QGaLoreAdamW8bit(groups, lr=0.01, min_8bit_size=16)


def train(model: nn.Module, opt: qg.QGaLoreAdamW8bit, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(20, 12, generator=torch.Generator().manual_seed(step))
        (model(x) - x.flip(1)).square().sum().backward()
        opt.step()
        opt.zero_grad()


def state_of(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> dict[str, Any]:
    return {
        "model": dcp_state.get_model_state_dict(model),
        "optimizer": dcp_state.get_optimizer_state_dict(model, opt),
    }


def test_a_resume_from_any_step_is_bit_equal(tmp_path: Path) -> None:
    model, opt = make()
    shapes = set()
    for step in range(9):
        state = state_of(model, opt)
        leaf = state["optimizer"]["state"]["0.coordinates"]
        shapes.add((leaf["past_proj_codes"].shape, leaf["queue"].shape))
        dcp.save(state, checkpoint_id=tmp_path / str(step))
        train(model, opt, step, step + 1)
    train(model, opt, 9, 12)
    assert len(shapes) >= 3  # what DCP by itself refuses to load
    for step in range(9):
        resumed, its_opt = make(seed=1)
        if step % 2:
            train(resumed, its_opt, 50, 55)  # a load into an optimizer that is not new
        state = state_of(resumed, its_opt)
        dcp.load(state, checkpoint_id=tmp_path / str(step), planner=LoadPlanner())
        dcp_state.set_model_state_dict(resumed, state["model"])
        dcp_state.set_optimizer_state_dict(resumed, its_opt, state["optimizer"])
        train(resumed, its_opt, step, 12)
        assert differences(model.state_dict(), resumed.state_dict()) == []
        assert differences(opt.state_dict(), its_opt.state_dict()) == []


def test_only_the_optimizers_own_tensors_may_differ_in_shape(tmp_path: Path) -> None:
    dcp.save({"model": {"queue": torch.zeros(3), "past_x": torch.zeros(2)}}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load({"model": {"queue": torch.zeros(4)}}, checkpoint_id=tmp_path, planner=LoadPlanner())


def copied(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": opt.state_dict()})


def test_dcp_finds_the_state_made_and_takes_no_step_to_make_it() -> None:
    model, opt = make()
    before = copied(model, opt)
    dcp_state._init_optim_state(opt)
    assert differences(before, copied(model, opt)) == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_on_zero_gradients_at_rate_zero_only_counts() -> None:
    """Other tools make missing state this way. Steps count, as torch's AdamW counts them, and nothing else changes.

    A state that is loaded afterwards replaces all of it.
    """
    model, opt = make()
    train(model, opt, 0, 5)
    saved = copied(model, opt)
    train(model, opt, 5, 9)

    other, fresh = make(seed=1)
    start = copied(other, fresh)
    for group in fresh.param_groups:
        group["lr"] = 0.0
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fresh.step()
    fresh.zero_grad()
    for group in fresh.param_groups:
        group["lr"] = 0.01
    changed = differences(start, copied(other, fresh))
    assert {path.rpartition("/")[2] for path in changed} == {"step", "bias_step"}
    assert all(state["step"] == 1 for state in fresh.state.values())

    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(other, fresh, 5, 9)
    assert differences(copied(model, opt), copied(other, fresh)) == []

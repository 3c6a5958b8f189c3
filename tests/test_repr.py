"""What optimizer and layers say of themselves, and that a cause is told of once and not once a layer."""

from __future__ import annotations

import copy
import gc
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn

import q_galore_torch as qg
from q_galore_torch.utils.simulate_quantization import prepare_model_for_int8_training_simulation


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 256), nn.LayerNorm(256))


def prepared(**options: Any) -> nn.Module:
    return qg.prepare_model(network(), rank=16, target_modules=["0", "2"], **options)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        opt.step()


def state_bytes(opt: torch.optim.Optimizer, parameters: list[Any]) -> int:
    tensors = [value for p in parameters for value in opt.state[p].values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


# ------------------------------------------------------------ repr


def test_optimizer_says_what_it_trains_and_how() -> None:
    model = prepared()
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=50), lr=0.01, weight_decay=0.0)
    first, regular, matrices, last = repr(opt).splitlines()
    sizes = [f"{state_bytes(opt, group['params']) / 1024:.1f} KiB" for group in opt.param_groups]
    assert first.startswith("QGaLoreAdamW8bit(0 steps done, state ") and last == ")"
    assert regular == f"  (0): 4 tensors of 896 weights in float32, lr 0.01, dynamic8 moments, state {sizes[0]}"
    assert matrices == (
        "  (1): 2 tensors of 40,960 weights in INT8, lr 0.01, rank 16 std, int4 projector in blocks of 256, "
        "warm subspaces every 50 steps (energy rule, now 50, at most 800), scale 0.25, dynamic8 moments, "
        f"state {sizes[1]}"
    )


def test_optimizer_repr_follows_the_training() -> None:
    model = prepared()
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=50), lr=torch.tensor(0.01))
    train(model, opt, 3)
    assert "(3 steps done, " in repr(opt) and "now 50, " in repr(opt)
    opt.state[model[0].coordinates]["gap"] = 400
    assert "now 50 to 400, " in repr(opt)
    copied = copy.deepcopy((model, opt))
    assert repr(copied[1]) == repr(opt)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"proj_format": "float32"}, "float32 projector, warm"),
        ({"proj_format": "fp8", "proj_block": 0}, "fp8 projector with one scale, warm"),
        ({"lazy_rule": "fixed", "subspace": "random"}, "random subspaces every 200 steps, scale"),
        ({"moments_dtype": "float32", "weight_decay": 0.5}, "weight_decay 0.5"),
    ],
)
def test_optimizer_names_the_formats(options: dict[str, Any], words: str) -> None:
    model = prepared()
    assert words in repr(qg.QGaLoreAdamW8bit(qg.param_groups(model, **options)))


def test_optimizer_tells_weights_apart_by_how_they_are_stored() -> None:
    model = network()
    args = Namespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
    prepare_model_for_int8_training_simulation(model, args, ["0"])
    opt = qg.QGaLoreAdamW8bit([{"params": [model[0].weight, model[2].weight, model[2].bias.data.bfloat16()]}])
    assert (
        "1 tensor of 8,192 weights in float32 on an INT8 grid + 1 tensor of 32,768 weights in float32 + "
        "1 tensor of 256 weights in bfloat16, lr"
    ) in repr(opt)
    model = prepared(weight_bits=None).bfloat16()
    assert "2 tensors of 40,960 weights in bfloat16, lr" in repr(qg.QGaLoreAdamW8bit(qg.param_groups(model)))


def test_optimizer_of_a_model_that_is_gone_still_has_a_repr() -> None:
    model = prepared()
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model))
    del model
    gc.collect()
    assert "2 tensors of 0 weights in a layer that is gone" in repr(opt)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "rank=16, proj_type=std (right), R=[16, 128] float32, weight=8 bits, group_size=256, grad_mode=low_rank)"),
        ({"proj_type": "left"}, "rank=16, proj_type=left (left), R=[16, 64] float32"),
        ({"proj_type": "full", "grad_dtype": "bfloat16"}, "rank=16, proj_type=full (both), R=[16, 16] bfloat16"),
        ({"weight_bits": None}, "weight=float32, grad_mode=low_rank)"),
        ({"grad_mode": "full"}, "rank=16, proj_type=std (right), weight=8 bits, group_size=256, grad_mode=full)"),
    ],
)
def test_layer_says_what_is_projected_and_stored(options: dict[str, Any], words: str) -> None:
    text = repr(prepared(**options)[0])
    assert text.startswith("QGaLoreLinear(in_features=64, out_features=128, bias=True, ") and words in text


def test_layer_that_rounds_to_nearest_says_so() -> None:
    layer = prepared()[0]
    layer.stochastic_round = False
    assert "group_size=256, round=nearest, grad_mode=low_rank)" in repr(layer)


# ------------------------------------------------------------ once per cause


def test_svd_that_fails_in_every_step_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("never converges")

    monkeypatch.setattr(torch.linalg, "svd", failing)
    weights = [nn.Parameter(torch.randn(12, 8)) for _ in range(2)]
    opt = qg.QGaLoreAdamW8bit([{"params": weights, "rank": 2}])
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(12, 8)
        opt.step()
    expected = "the SVD of a [12, 8] gradient failed, the old basis stays: never converges"
    assert [r.message for r in caplog.records] == [expected]


def test_clipped_ranks_of_all_groups_are_told_together(caplog: pytest.LogCaptureFixture) -> None:
    def matrices() -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(8, 20)), nn.Parameter(torch.zeros(16, 20))]

    opt = qg.QGaLoreAdamW8bit([{"params": matrices(), "rank": 16, "lr": rate} for rate in (0.1, 0.2, 0.3)])
    assert [r.message for r in caplog.records] == ["rank 16 is larger than the shorter side of 3 matrices: clipped"]
    caplog.clear()
    opt.add_param_group({"params": matrices(), "rank": 32})
    assert [r.message for r in caplog.records] == ["rank 32 is larger than the shorter side of 2 matrices: clipped"]


def test_layers_of_other_types_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), *(Special(8, 8) for _ in range(3)))
    qg.prepare_model(model, rank=4, target_modules=["0", "1", "2", "3"])
    expected = "3 layers that target_modules matches are of type Special, not nn.Linear: left as they are"
    assert [r.message for r in caplog.records] == [expected]


def test_skipped_gradients_of_a_step_are_told_together(caplog: pytest.LogCaptureFixture) -> None:
    parameters = [(f"p{i}", nn.Parameter(torch.zeros(4))) for i in range(6)]
    opt = qg.QGaLoreAdamW8bit(parameters, nonfinite="skip")
    for name, parameter in parameters:
        parameter.grad = torch.full((4,), float("nan") if name != "p0" else 1.0)
    opt.step()
    expected = "the gradient of p1 is not finite: left alone in this step; left alone as well: p2, p3, p4 and 1 more"
    assert [r.message for r in caplog.records] == [expected]

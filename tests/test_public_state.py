"""Optimizer states in bitsandbytes' layout, of the public code and of torch.optim, into QGaLoreAdamW8bit."""

from __future__ import annotations

import copy
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from galore_reference import decoded_moments
from public_files import (
    PublicProjector,
    bitsandbytes_decoded,
    bitsandbytes_moment,
    dynamic_map,
    public_decoded,
    public_model,
    save_as_public,
)
from q_galore_torch.optim.public_state import PROJECTORS
from q_galore_torch.utils.setup import load_model_weight, load_optimizer_state

BLOCKS = [256, 2048, 0]
LARGE, SMALL = (70, 100), (10,)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape)) for shape in (LARGE, SMALL)]


def moments(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    first = torch.randn(shape) * torch.logspace(-4, 0, shape[-1])
    return first, first.square() * torch.rand(shape) + 1e-7 * torch.rand(shape)


def public_state(block: int = 256, nested: bool = False) -> dict[str, Any]:
    """A state dict of a bitsandbytes optimizer with one large and one small parameter."""
    torch.manual_seed(4)
    large = {"step": 7}
    for index, value in enumerate(moments(LARGE), 1):
        large.update(bitsandbytes_moment(value, index, block))
    if nested:
        large = {"step": 7, "__bnb_optimizer_quant_state__": {k: v for k, v in large.items() if k != "step"}}
    small = dict(zip(("step", "state1", "state2"), (7, *moments(SMALL)), strict=True))
    group = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.05, "initial_lr": 0.03}
    return {"state": {0: large, 1: small}, "param_groups": [{**group, "alpha": 0.0, "t_alpha": None, "params": [0, 1]}]}


@pytest.mark.parametrize("nested", [False, True])
def test_public_state_with_our_blocks_keeps_every_code(nested: bool) -> None:
    opt, saved = qg.QGaLoreAdamW8bit(parameters()), public_state(256)
    opt.load_state_dict(public_state(256, nested))
    state = opt.state[opt.param_groups[0]["params"][0]]
    large = saved["state"][0]
    vanished = (large["state2"] == 0) & (large["state1"] != 127)
    assert torch.equal(state["exp_avg"], large["state1"])
    assert torch.equal(state["exp_avg_sq"][~vanished], large["state2"][~vanished])
    assert torch.equal(state["exp_avg_absmax"], large["absmax1"])
    assert torch.equal(state["exp_avg_sq_absmax"], large["absmax2"])
    assert (state["step"], state["bias_step"]) == (7, 7)


def test_public_state_gives_a_vanished_second_moment_the_smallest_entry() -> None:
    """m over the root of nothing would be a step of any size."""
    saved = public_state(256)
    saved["state"][0]["state2"][0, :5] = 0
    saved["state"][0]["state1"][0, :5] = torch.tensor([126, 127, 128, 200, 127], dtype=torch.uint8)
    opt = qg.QGaLoreAdamW8bit(parameters())
    opt.load_state_dict(saved)
    codes = opt.state[opt.param_groups[0]["params"][0]]["exp_avg_sq"]
    assert codes[0, :5].tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("moments_dtype", ["dynamic8", "float32"])
@pytest.mark.parametrize("block", BLOCKS)
def test_public_state_decodes_to_the_files_moments(block: int, moments_dtype: str) -> None:
    saved = public_state(block)
    opt = qg.QGaLoreAdamW8bit(parameters(), moments_dtype=moments_dtype)
    opt.load_state_dict(saved)
    large, small = opt.param_groups[0]["params"]
    for index, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        assert torch.equal(opt.state[small][name], saved["state"][1][f"state{index}"])
    state = dict(opt.state[large])
    expected = [bitsandbytes_decoded(saved["state"][0], index, block) for index in (1, 2)]
    if moments_dtype == "float32":
        for name, value in zip(("exp_avg", "exp_avg_sq"), expected, strict=True):
            torch.testing.assert_close(state[name].double(), value, rtol=1e-6, atol=0)
        return
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name].view(1, -1)
        state[f"{name}_absmax"] = state[f"{name}_absmax"].view(1, -1)
    for got, value, index in zip(decoded_moments(state), expected, (1, 2), strict=True):
        blocks = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % 256)).view(-1, 256)
        largest = blocks.abs().amax(dim=1).repeat_interleave(256)[: value.numel()]
        scaled, entries = value.flatten() / largest, dynamic_map(index == 1).double()
        nearest = 0.0 if block == 256 else (scaled[:, None] - entries).abs().amin(dim=1)
        # A moment that would vanish takes the smallest entry instead.
        assert ((got.flatten() - value.flatten()).abs() <= (1.001 * nearest + 1e-6) * largest).all()


def test_public_state_takes_the_groups_rates_and_keeps_our_options() -> None:
    opt = qg.QGaLoreAdamW8bit(parameters(), lr=1.0, seed=5, stochastic_round=False)
    opt.load_state_dict(public_state())
    (group,) = opt.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.02, (0.8, 0.99), 1e-6, 0.05)
    assert (group["initial_lr"], group["seed"], group["stochastic_round"]) == (0.03, 5, False)
    assert "alpha" not in group


def test_public_state_leaves_the_saved_dict_alone() -> None:
    saved = public_state()
    before = copy.deepcopy(saved)
    opt = qg.QGaLoreAdamW8bit(parameters())
    opt.load_state_dict(saved)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert saved["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(saved["state"][0][key]), torch.as_tensor(value)), key


def test_public_state_of_a_parameter_that_never_had_a_gradient_is_ours() -> None:
    saved = public_state()
    del saved["state"][1]
    opt = qg.QGaLoreAdamW8bit(parameters())
    opt.load_state_dict(saved)
    steps = [opt.state[p]["step"] for p in opt.param_groups[0]["params"]]
    assert steps == [7, 0]


def adam(weight: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    """torch's AdamW, the independent reference of what comes after."""
    p = nn.Parameter(weight.clone())
    opt = torch.optim.AdamW([p], **options)
    for gradient in gradients:
        p.grad = gradient
        opt.step()
    return p.detach()


def test_public_state_of_bitsandbytes_itself_goes_on_as_it_would() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = dict(lr=1e-2, weight_decay=0.1)
    theirs, ours = parameters(), parameters()
    gradients = [[torch.randn(p.shape) for p in theirs] for _ in range(20)]

    def train(opt: torch.optim.Optimizer, ps: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
        for step in steps:
            for p, gradient in zip(ps, step, strict=True):
                p.grad = gradient.clone()
            opt.step()

    first = bnb.optim.AdamW8bit(theirs, **options)
    train(first, theirs, gradients[:10])
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    saved = first.state_dict()
    opt = qg.QGaLoreAdamW8bit(ours)
    opt.load_state_dict(saved)
    quantised = saved["state"][0].get("__bnb_optimizer_quant_state__", saved["state"][0])
    assert torch.equal(opt.state[ours[0]]["exp_avg"], quantised["state1"])
    assert torch.equal(opt.state[ours[0]]["exp_avg_absmax"], quantised["absmax1"])
    train(first, theirs, gradients[10:])
    train(opt, ours, gradients[10:])
    starts = parameters()
    for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        exact = adam(starts[index].detach(), [step[index] for step in gradients], **options)
        assert (p - q).norm() <= 0.02 * (exact - starts[index]).norm()
        assert (p - exact).norm() <= 0.05 * (exact - starts[index]).norm()


def test_public_state_map_is_bitsandbytes_own() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        torch.testing.assert_close(functional.create_dynamic_map(signed=signed), dynamic_map(signed), rtol=1e-6, atol=0)


def test_public_state_of_torch_adamw_goes_on_as_it_would() -> None:
    options: dict[str, Any] = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    gradients = [torch.randn(LARGE) for _ in range(8)]
    p, ours = parameters()[0], parameters()[0]
    first = torch.optim.AdamW([p], **options)
    for gradient in gradients[:4]:
        p.grad = gradient
        first.step()
    with torch.no_grad():
        ours.copy_(p)
    opt = qg.QGaLoreAdamW8bit([ours], moments_dtype="float32")
    opt.load_state_dict(first.state_dict())
    for gradient in gradients[4:]:
        ours.grad = gradient
        opt.step()
    torch.testing.assert_close(
        ours.detach(), adam(parameters()[0].detach(), gradients, **options), rtol=1e-5, atol=1e-6
    )


def broken(path: str, value: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        saved = public_state()
        if value is None:
            del saved["state"][0][path]
        else:
            saved["state"][0][path] = value
        return saved

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken("state2", None), r"of an Adam in bitsandbytes' layout .*, got absmax1, absmax2, qmap1"),
        (broken("gnorm_vec", torch.ones(100)), "got absmax1, absmax2, gnorm_vec"),
        (broken("qmap1", None), "state1 of .* holds codes, which need qmap1"),
        (broken("absmax2", torch.ones(5)), "absmax2 of .* each block of 256 or 2048 of 7000 values, got 5"),
        (broken("absmax2", torch.full((28,), float("nan"))), "the scales of state2 of .* are not finite"),
        (broken("state1", torch.ones(70, 99)), r"state1 of .* must have shape \[70, 100\], got \[70, 99\]"),
        (broken("state1", torch.full(LARGE, float("inf"))), "state1 of .* values that are not finite"),
        (broken("state1", torch.ones(LARGE, dtype=torch.int32)), "state1 of .* must be uint8 or float"),
        (broken("projector", 1), "is projected in the saved state, and its group here has no rank"),
    ],
)
def test_public_state_refuses_what_it_cannot_read_and_changes_nothing(
    make: Callable[[], dict[str, Any]], message: str
) -> None:
    opt = qg.QGaLoreAdamW8bit(parameters(), lr=0.5)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(make())
    assert opt.param_groups[0]["lr"] == 0.5
    assert all(opt.state[p]["step"] == 0 for p in opt.param_groups[0]["params"])


def test_public_state_refuses_other_groups() -> None:
    with pytest.raises(ValueError, match=r"the saved groups have \[2\] parameters, this optimizer's \[1\]"):
        qg.QGaLoreAdamW8bit(parameters()[:1]).load_state_dict(public_state())


# ---------------------------------------------------------------- projected parameters


def projected() -> qg.QGaLoreAdamW8bit:
    large, small = parameters()
    return qg.QGaLoreAdamW8bit([{"params": [small]}, {"params": [large], "rank": 4, "update_proj_gap": 3}], lr=0.1)


def public_checkpoint() -> dict[str, Any]:
    """What the public pretraining loop saves."""
    state = {0: public_state()["state"][1], 1: {"step": 7, "projector": PublicProjector()}}
    for index, value in enumerate(moments((70, 4)), 1):
        state[1].update(bitsandbytes_moment(value, index, 256))
    group = {key: value for key, value in public_state()["param_groups"][0].items() if key != "params"}
    groups = [{**group, "params": [0]}, {**group, "params": [1], "rank": 4, "quant": True, "cos_threshold": 0.4}]
    return {"optimizer": {"state": state, "param_groups": groups}, "update_step": 7, "config": {"dtype": "bfloat16"}}


def test_public_state_of_a_projected_parameter_is_refused_and_explained() -> None:
    opt = projected()
    with pytest.raises(ValueError, match="is projected, and its saved moments .*load_optimizer_state"):
        opt.load_state_dict(public_checkpoint()["optimizer"])
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("wrapped", [True, False])
def test_load_optimizer_state_takes_all_but_the_projected_states(
    wrapped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = public_checkpoint()
    save_as_public(saved if wrapped else saved["optimizer"], tmp_path / "optimizer.pt")
    opt = projected()
    (small,), (large,) = (group["params"] for group in opt.param_groups)
    with caplog.at_level(logging.INFO):
        rest = load_optimizer_state(opt, tmp_path / "optimizer.pt")
    assert rest == ({"update_step": 7, "config": {"dtype": "bfloat16"}} if wrapped else {})
    assert torch.equal(opt.state[small]["exp_avg"], saved["optimizer"]["state"][0]["state1"])
    assert (opt.state[small]["step"], opt.state[large]["step"]) == (7, 0)
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.02]
    assert opt.param_groups[1]["update_proj_gap"] == 3
    assert "1 projected parameters start with fresh subspaces and moments" in caplog.text
    for _ in range(2):
        small.grad, large.grad = torch.randn(SMALL), torch.randn(LARGE)
        opt.step()
    assert opt.telemetry()[1]["refreshes"] == 1


@pytest.mark.parametrize("path", PROJECTORS[1:])
def test_load_optimizer_state_takes_galore_torchs_floats(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_name, _, name = path.rpartition(".")
    kind = type(name, (), {"__module__": module_name})
    for part in (module_name.partition(".")[0], module_name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    setattr(sys.modules[module_name], name, kind)
    first, second = moments(SMALL)
    state = {
        0: {"step": 7, "exp_avg": first, "exp_avg_sq": second},
        1: {"step": 7, "projector": kind(), "exp_avg": torch.ones(70, 4), "exp_avg_sq": torch.ones(70, 4)},
    }
    group = {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True}
    groups = [{**group, "params": [0]}, {**group, "params": [1], "rank": 4, "dim": 2}]
    torch.save({"state": state, "param_groups": groups}, tmp_path / "optimizer.pt")
    large, small = parameters()
    opt = qg.GaLoreAdamW([{"params": [small]}, {"params": [large], "rank": 4}])
    load_optimizer_state(opt, tmp_path / "optimizer.pt")
    assert torch.equal(opt.state[small]["exp_avg_sq"], second)
    assert (opt.state[small]["step"], opt.state[large]["step"]) == (7, 0)


@pytest.mark.parametrize("grad_mode", ["low_rank", "full"])
def test_a_public_checkpoint_of_model_and_optimizer_trains_on(grad_mode: str, tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    entries = public_model(model, ["0"])
    torch.save(entries, tmp_path / "pytorch_model.bin")
    others = [model[0].bias, model[2].weight, model[2].bias]  # the order of model.parameters()
    state: dict[int, dict[str, Any]] = {
        index: dict(zip(("step", "state1", "state2"), (5, *moments(tuple(p.shape))), strict=True))
        for index, p in enumerate(others)
    }
    state[3] = {"step": 5, "projector": PublicProjector(), "state1": torch.ones(96, 4), "state2": torch.ones(96, 4)}
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    groups = [{**group, "params": [0, 1, 2]}, {**group, "params": [3], "rank": 4}]
    save_as_public({"optimizer": {"state": state, "param_groups": groups}}, tmp_path / "optimizer.pt")

    resumed = copy.deepcopy(model)
    with torch.no_grad():
        resumed[0].weight.zero_()
    qg.prepare_model(resumed, rank=4, target_modules=["0"], grad_mode=grad_mode)
    load_model_weight(resumed, tmp_path / "pytorch_model.bin")
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(resumed, update_proj_gap=4))
    load_optimizer_state(opt, tmp_path / "optimizer.pt")
    assert torch.equal(resumed[0].dequantize(), public_decoded(entries, "0").float())
    for index, p in enumerate((resumed[0].bias, resumed[2].weight, resumed[2].bias)):
        assert torch.equal(opt.state[p]["exp_avg"], state[index]["state1"])
    x, target, losses = torch.randn(32, 64), torch.randn(32, 8), []
    for _ in range(30):
        loss = nn.functional.mse_loss(resumed(x), target)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * max(losses[:3])


def test_public_state_goes_into_int8_weights_without_a_rank() -> None:
    model = qg.prepare_model(
        nn.Sequential(nn.Linear(100, 70, bias=False)), rank=4, target_modules=["0"], grad_mode="full"
    )
    opt = qg.QGaLoreAdamW8bit(model.parameters())
    saved = public_state(256)
    del saved["state"][1], saved["param_groups"][0]["params"][1]
    opt.load_state_dict(saved)
    assert torch.equal(opt.state[model[0].leaf]["exp_avg"], saved["state"][0]["state1"])


def test_load_optimizer_state_runs_no_code_of_a_projector(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("code ran",)

    saved = public_checkpoint()
    saved["optimizer"]["state"][1]["projector"].queue = Evil()
    save_as_public(saved, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="objects other than tensors"):
        load_optimizer_state(projected(), tmp_path / "optimizer.pt")


def test_load_optimizer_state_reads_our_own_file(tmp_path: Path) -> None:
    opt = projected()
    for p in (p for group in opt.param_groups for p in group["params"]):
        p.grad = torch.randn_like(p)
    opt.step()
    torch.save({"optimizer": opt.state_dict(), "epoch": 2}, tmp_path / "ours.pt")
    fresh = projected()
    assert load_optimizer_state(fresh, tmp_path / "ours.pt") == {"epoch": 2}
    assert [entry["refreshes"] for entry in fresh.telemetry()[1:]] == [1]


# ------------------------------------------------------------ what no Adam of those projects writes


def torch_state(**options: Any) -> tuple[nn.Parameter, dict[str, Any]]:
    """The state dict of torch.optim.AdamW after a step of one parameter."""
    parameter = nn.Parameter(torch.randn(8, 8))
    opt = torch.optim.AdamW([parameter], lr=0.01, **options)
    parameter.square().sum().backward()
    opt.step()
    return parameter, opt.state_dict()


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"amsgrad": True}, {}, r"got exp_avg, exp_avg_sq, max_exp_avg_sq, step$"),
        ({"maximize": True}, {}, "the saved optimizer has maximize=True"),
        ({}, {"step": torch.tensor(-5.0)}, r"step of .* must be an integer >= 0, got tensor\(-5\.\)"),
        ({}, {"step": torch.tensor(float("nan"))}, r"step of .* must be an integer >= 0, got tensor\(nan\)"),
        ({}, {"step": "x"}, "step of .* must be an integer >= 0, got 'x'"),
        ({}, {"exp_avg_sq": torch.full((8, 8), -1.0)}, "state2 of .* is a second moment and holds values below zero"),
    ],
)
def test_public_state_that_no_adam_has_is_refused(
    options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    parameter, saved = torch_state(**options)
    saved["state"][0].update(change)
    opt = qg.QGaLoreAdamW8bit([parameter])
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert opt.state[parameter]["step"] == 0 and opt.param_groups[0]["lr"] == 1e-3


def test_public_state_must_be_a_dict_for_each_parameter() -> None:
    parameter, saved = torch_state()
    saved["state"][1] = [1]
    saved["param_groups"][0]["params"] = [0, 1]
    opt = qg.QGaLoreAdamW8bit([parameter, nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="the saved state of parameter 1 of group 0 .* must be a dict, got list"):
        opt.load_state_dict(saved)


def test_load_optimizer_state_refuses_an_entry_that_is_no_dict(tmp_path: Path) -> None:
    torch.save({"optimizer": None}, tmp_path / "optimizer.pt")
    opt = qg.QGaLoreAdamW8bit([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"the entry 'optimizer' of .*optimizer\.pt must be a dict, got NoneType"):
        load_optimizer_state(opt, tmp_path / "optimizer.pt")

"""The optimizer's life around the step: state dicts, resuming in another process, copies, schedulers, closures."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from resume_program import build, train

PROGRAM = Path(__file__).with_name("resume_program.py")


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures differ, bit for bit."""
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        found = [] if list(a) == list(b) else [f"{path}: keys"]
        return found + [d for key in a if key in b for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        found = [] if len(a) == len(b) else [f"{path}: length"]
        return found + [d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def leaves_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves_of(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves_of(item)]
    return [value]


def saved(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> dict[str, Any]:
    """Model and optimizer after a trip through torch.save and a weights-only load."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_in_a_fresh_process_is_bit_equal(dtype: str, tmp_path: Path) -> None:
    model, opt = build(getattr(torch, dtype))
    train(model, opt, 0, 20)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, opt, 20, 40)
    command = [sys.executable, str(PROGRAM), str(tmp_path / "checkpoint.pt"), str(tmp_path / "result.pt"), dtype]
    subprocess.run(command, check=True, cwd=PROGRAM.parent.parent, timeout=120, env=environment())
    resumed = torch.load(tmp_path / "result.pt", weights_only=True)
    assert differences(saved(model, opt), resumed) == []
    assert max(entry.get("refreshes", 0) for entry in opt.telemetry()) >= 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(
            (kind, options)
            for kind in ("plain", "leaf")
            for options in ({}, {"moments": "rotate"}, {"moments": "reset"})
        ),
        ("plain", {"lazy_rule": "upstream"}),
    ],
)
def test_a_resume_at_any_step_is_bit_equal(kind: str, options: dict[str, Any]) -> None:
    """Also while two bases wait to be compared, with similarities in the queue, and with a stretched gap."""

    def make() -> tuple[nn.Module, qg.QGaLoreAdamW8bit]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False))
        schedule = {"update_proj_gap": 2, "queue_size": 2, "energy_threshold": 0.05, "cos_threshold": 0.0, **options}
        if kind == "leaf":
            qg.prepare_model(model, 4, ".*")
            return model, qg.QGaLoreAdamW8bit(qg.param_groups(model, **schedule), lr=0.01, min_8bit_size=16)
        groups = [{"params": list(model.parameters()), "rank": 4, **schedule}]
        return model, qg.QGaLoreAdamW8bit(groups, lr=0.01, min_8bit_size=16)

    def step(model: nn.Module, opt: qg.QGaLoreAdamW8bit, number: int) -> None:
        opt.zero_grad()
        model(torch.randn(20, 12, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        opt.step()

    model, opt = make()
    history = [saved(model, opt)]
    for number in range(16):
        step(model, opt, number)
        history.append(saved(model, opt))
    if options.get("lazy_rule") != "upstream":
        assert any(entry["optimizer"]["state"][0]["past_proj_codes"].numel() for entry in history)
        assert any(entry["optimizer"]["state"][0]["queue"].numel() for entry in history)
    assert history[-1]["optimizer"]["state"][0]["gap"] > 2
    for start in range(16):
        other, resumed = make()
        other.load_state_dict(history[start]["model"])
        resumed.load_state_dict(history[start]["optimizer"])
        for number in range(start, min(16, start + 4)):
            step(other, resumed, number)
            assert differences(saved(other, resumed), history[number + 1]) == []


def environment() -> dict[str, str]:
    import os

    root = str(PROGRAM.parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def test_state_holds_tensors_numbers_and_strings_and_its_keys_never_change() -> None:
    model, opt = build(torch.float32)
    before = opt.state_dict()
    keys = [list(state) for state in before["state"].values()]
    kinds = [[v.dtype if isinstance(v, Tensor) else type(v) for v in s.values()] for s in before["state"].values()]
    train(model, opt, 0, 9)
    after = opt.state_dict()
    assert [list(state) for state in after["state"].values()] == keys
    assert [
        [v.dtype if isinstance(v, Tensor) else type(v) for v in s.values()] for s in after["state"].values()
    ] == kinds
    assert all(isinstance(x, (Tensor, int, float, str, type(None))) for x in leaves_of(after))
    assert all(type(x) is Tensor for x in leaves_of(after) if isinstance(x, Tensor))
    assert after["param_groups"][1]["seed"] == 5


def test_loading_casts_nothing_even_for_bfloat16_parameters() -> None:
    model, opt = build(torch.bfloat16)
    train(model, opt, 0, 3)
    state = saved(model, opt)
    other_model, other = build(torch.bfloat16)
    other.load_state_dict(state["optimizer"])
    assert differences(opt.state_dict(), other.state_dict()) == []
    kept = state["optimizer"]["state"][0]["exp_avg"]
    assert other.state_dict()["state"][0]["exp_avg"].data_ptr() != kept.data_ptr()


def test_loading_its_own_state_before_the_first_step_changes_nothing() -> None:
    model, opt = build(torch.float32)
    opt.load_state_dict(opt.state_dict())
    twin_model, twin = build(torch.float32)
    train(model, opt, 0, 5)
    train(twin_model, twin, 0, 5)
    assert differences(saved(model, opt), saved(twin_model, twin)) == []


def test_a_loaded_optimizer_lends_the_loaded_projector() -> None:
    model, opt = build(torch.float32)
    train(model, opt, 0, 9)
    other_model, other = build(torch.float32)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    for m in (model, other_model):
        m(torch.arange(8)).square().sum().backward()
    assert torch.equal(model[1].leaf.grad, other_model[1].leaf.grad)
    assert other_model[1].leaf.binding.codes is other.state[other_model[1].leaf]["proj_codes"]


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_model_and_optimizer_train_alike(order: str, way: str) -> None:
    model, opt = build(torch.float32)
    train(model, opt, 0, 9)
    pair: Any = (model, opt) if order == "model first" else (opt, model)
    if way == "deepcopy":
        pair = copy.deepcopy(pair)
    elif way == "pickle":
        pair = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        pair = torch.load(file, weights_only=False)
    copied_model, copied = pair if order == "model first" else pair[::-1]
    assert copied_model[1].leaf is copied.param_groups[1]["params"][0]
    assert copied_model[1].leaf is not model[1].leaf
    before = saved(model, opt)
    train(copied_model, copied, 9, 14)
    assert differences(before, saved(model, opt)) == []  # the original is untouched
    train(model, opt, 9, 14)
    assert differences(saved(model, opt), saved(copied_model, copied)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, k: s["param_groups"].pop(), "the saved groups have .* parameters, this optimizer's .*"),
        (lambda s, k: s["state"].pop(k), "the state dict has no state for .*"),
        (lambda s, k: s["state"][k].pop("gap"), "the saved state of .* has other entries than this optimizer's: gap"),
        (lambda s, k: s["state"][k].update(step="7"), "step of .* must be an integer, got '7'"),
        (lambda s, k: s["state"][k].update(exp_avg=torch.zeros(8, 80)), "exp_avg of .* must be a torch.uint8 tensor"),
        (lambda s, k: s["state"][k].update(proj_codes=torch.zeros(2, 2).byte()), "proj_codes of .* must have shape"),
        (lambda s, k: s["param_groups"][1].update(proj_format="int8"), "proj_codes of .* must have shape"),
        # Of a damaged or edited state dict; loaded, they did something else or failed in a later step.
        (
            lambda s, k: s["param_groups"][1].update(queue_size=0),
            "group 1 of the state dict: queue_size must be an int",
        ),
        (lambda s, k: s["param_groups"][1].update(max_proj_gap=1), "group 1 of .*: max_proj_gap must be at least"),
        (lambda s, k: s["param_groups"][1].update(lazy_rule="none"), "group 1 of .*: lazy_rule must be 'energy' or"),
        (lambda s, k: s["param_groups"][1].update(rank="many"), "group 1 of .*: rank must be an integer"),
        (lambda s, k: s["param_groups"][0].update(nonfinite="?"), "group 0 of .*: nonfinite must be 'raise' or 'skip'"),
        (lambda s, k: s["param_groups"][0].update(lr=-1.0), "group 0 of .*: lr must be a number >= 0, got -1.0"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change: Any, message: str) -> None:
    model, opt = build(torch.float32)
    train(model, opt, 0, 2)
    state = copy.deepcopy(opt.state_dict())
    change(state, next(key for key, entry in state["state"].items() if "gap" in entry))
    _, other = build(torch.float32)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"^{message}"):
        other.load_state_dict(state)
    assert differences(before, other.state_dict()) == []


def test_load_state_dict_hooks_run() -> None:
    _, opt = build(torch.float32)
    calls = []
    opt.register_load_state_dict_pre_hook(lambda o, s: calls.append("before"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("after"))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["before", "after"]


def test_add_param_group_continues_ids_and_trains() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    opt = qg.QGaLoreAdamW8bit([{"params": [model[0].weight], "rank": 2}])
    model(torch.randn(3, 12)).sum().backward()
    opt.step()
    opt.add_param_group({"params": model[1].weight, "rank": 3, "lr": 0.1})
    opt.add_param_group({"params": [("head.bias", model[1].bias)]})
    assert [s["id"] for s in opt.state.values()] == [0, 1, 2]
    before = model[1].weight.detach().clone()
    opt.step()
    assert not torch.equal(before, model[1].weight)
    assert [entry["step"] for entry in opt.telemetry()] == [2, 1, 1]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [model[0].weight]})


def test_names_are_kept_in_step_with_earlier_groups() -> None:
    a, b, c = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    opt = qg.QGaLoreAdamW8bit([("a", a)])
    opt.add_param_group({"params": [b]})
    opt.add_param_group({"params": [("c", c)]})
    assert [entry["name"] for entry in opt.telemetry()] == ["a", "group 1.0", "c"]


def test_closure_and_its_loss() -> None:
    weight = nn.Parameter(torch.ones(4))
    opt = qg.QGaLoreAdamW8bit([weight], lr=0.1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(5)]
    assert losses[0] == 4.0 and losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "CosineAnnealingLR", "ReduceLROnPlateau", "SequentialLR"])
def test_schedulers_drive_the_learning_rate(name: str) -> None:
    model, opt = build(torch.float32)
    sched = torch.optim.lr_scheduler
    made: dict[str, Any] = {
        "LambdaLR": lambda: sched.LambdaLR(opt, lambda t: 1 / (1 + t)),
        "OneCycleLR": lambda: sched.OneCycleLR(opt, max_lr=0.1, total_steps=10),
        "CosineAnnealingLR": lambda: sched.CosineAnnealingLR(opt, 10),
        "ReduceLROnPlateau": lambda: sched.ReduceLROnPlateau(opt, patience=0),
        "SequentialLR": lambda: sched.SequentialLR(
            opt, [sched.LinearLR(opt, total_iters=3), sched.ExponentialLR(opt, 0.5)], [3]
        ),
    }
    scheduler = made[name]()
    rates = set()
    for step in range(6):
        train(model, opt, step, step + 1)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        rates.add(opt.param_groups[1]["lr"])
    assert len(rates) > 2
    other_model, other = build(torch.float32)
    other.load_state_dict(saved(model, opt)["optimizer"])
    assert other.param_groups[1]["lr"] == opt.param_groups[1]["lr"]


def test_a_learning_rate_of_zero_moves_the_moments_but_no_weight() -> None:
    model, opt = build(torch.float32)
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, opt, 0, 2)
    assert differences(before, model.state_dict()) == []
    assert opt.telemetry()[0]["step"] == 2


def test_writes_are_seen_by_autograd() -> None:
    """The operators do not bump version counters themselves; the optimizer does, except for zero leaves."""
    model, opt = build(torch.float32)
    train(model, opt, 0, 1)
    watched = [model[0].weight, model[1].qweight, model[1].scales, model[1].zeros, model[5].bias]
    versions, leaf_version = [t._version for t in watched], model[1].leaf._version
    stale = (model[5].weight * torch.ones(50, 48, requires_grad=True)).sum()
    train(model, opt, 1, 2)
    assert all(t._version > v for t, v in zip(watched, versions, strict=True))
    assert model[1].leaf._version == leaf_version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_check_has_nothing_to_say_on_the_cpu() -> None:
    _, opt = build(torch.float32)
    assert opt.check() is None


def test_telemetry_counts_int8_groups() -> None:
    model, opt = build(torch.float32)
    for group in opt.param_groups:
        group["lr"] = 0.1
    train(model, opt, 0, 6)
    report = {entry["name"]: entry for entry in opt.telemetry()}
    assert set(report) == {name for name, _ in model.named_parameters()}
    assert report["1.coordinates"]["groups_shifted"] + report["1.coordinates"]["groups_reranged"] > 0
    assert report["5.weight"]["groups_reranged"] == 0
    assert report["1.coordinates"]["refreshes"] >= 1 and report["1.coordinates"]["gap"] == 7
    assert set(report["5.weight"]) == {"name", "id", "step", "groups_shifted", "groups_reranged"}


def leaf_model(rank: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = qg.prepare_model(nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 3)), rank, ["0"])
    return model, qg.param_groups(model)


def other_rank() -> dict[str, Any]:
    model, groups = leaf_model(8)
    state = qg.QGaLoreAdamW8bit(groups).state_dict()
    del model
    return state


def without_rank() -> dict[str, Any]:
    _, groups = leaf_model(4)
    shapes = [[p.shape for p in group["params"]] for group in groups]
    plain = [{"params": [nn.Parameter(torch.zeros(s)) for s in group]} for group in shapes]
    return qg.QGaLoreAdamW8bit(plain).state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_rank, "rank must be 4, with which 0.coordinates was"),
        (without_rank, "the rank of 0.coordinates must be 4, got None in the state dict"),
        (dict, "the state dict must hold a list 'param_groups', got NoneType"),
        (lambda: {"param_groups": [], "state": None}, "the state dict must hold a dict 'state', got NoneType"),
        (lambda: {"param_groups": [{}, {}], "state": {}}, "group 0 of the state dict must be a dict with 'params'"),
    ],
)
def test_a_state_of_another_rank_or_kind_is_refused_and_nothing_is_loaded(make: Any, message: str) -> None:
    model, groups = leaf_model(4)
    opt = qg.QGaLoreAdamW8bit(groups)
    before, binding = copy.deepcopy(opt.state_dict()), model[0].leaf.binding
    with pytest.raises(ValueError, match=f"^{message}"):
        opt.load_state_dict(make())
    assert differences(before, opt.state_dict()) == [] and model[0].leaf.binding is binding
    model(torch.randn(2, 24)).sum().backward()
    opt.step()


def test_a_low_rank_leaf_belongs_to_the_last_optimizer() -> None:
    """R is of the last one's projector: an earlier optimizer refuses to step on it, and writes nothing."""
    model, groups = leaf_model(4)
    old = qg.QGaLoreAdamW8bit(groups)
    new = qg.QGaLoreAdamW8bit(groups, seed=5)
    model(torch.randn(8, 24)).square().sum().backward()
    before, codes = copy.deepcopy(old.state_dict()), model[0].qweight.clone()
    with pytest.raises(RuntimeError, match="^0.coordinates was taken over by an optimizer made later"):
        old.step()
    assert torch.equal(model[0].qweight, codes) and differences(before, old.state_dict()) == []
    new.step()
    assert not torch.equal(model[0].qweight, codes)
    old.load_state_dict(new.state_dict())  # takes the layer back
    model(torch.randn(8, 24)).square().sum().backward()
    old.step()


def test_loading_replaces_states_one_by_one() -> None:
    """When a saved state is asked for to be copied, the old ones of all parameters before it are gone."""
    model, opt = build(torch.float32)
    train(model, opt, 0, 3)
    given = saved(model, opt)["optimizer"]
    old = [weakref.ref(state["exp_avg"]) for state in opt.state.values()]
    alive: list[int] = []

    class Watched(dict[int, Any]):
        def __getitem__(self, key: int) -> Any:
            alive.append(sum(tensor() is not None for tensor in old))
            return super().__getitem__(key)

    opt.load_state_dict({**given, "state": Watched(given["state"])})
    count = len(old)
    assert alive == [count] * count + list(range(count, 0, -1))  # all are checked first
    assert not differences(opt.state_dict(), given)

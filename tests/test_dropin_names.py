"""The public Q-GaLore's names for INT8 layers and their weights: what they make, keep, take and refuse."""

from __future__ import annotations

import copy
import io
import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from dropin_model import ARGS, PROJECTED, TARGETS, Model, batch, values
from q_galore_torch import q_galore_adamw8bit
from q_galore_torch.nn.old_names import HookedParameter
from q_galore_torch.utils.quantization import QGaLoreLinear, prepare_model_for_int8_training


def prepared(**changes: Any) -> nn.Module:
    return prepare_model_for_int8_training(Model(), Namespace(**{**vars(ARGS), **changes}), TARGETS)


def decoded(layer: QGaLoreLinear) -> Tensor:
    """w = s (q - z), written out in float64."""
    size, weight = layer.weight.group_size, layer.qweight.flatten().double()
    scales = layer.weight.scales.flatten().double().repeat_interleave(size)[: weight.numel()]
    zeros = layer.weight.zeros.flatten().double().repeat_interleave(size)[: weight.numel()]
    return (scales * (weight - zeros)).view(layer.qweight.shape)


# ---------------------------------------------------------------- names


def test_old_module_names_the_same_class() -> None:
    assert q_galore_adamw8bit.AdamW8bit is qg.QGaLoreAdamW8bit
    assert q_galore_adamw8bit.F is None


def test_the_migration_of_the_docs_runs() -> None:
    """Both halves train the model, and take the options that they show."""
    page = (Path(__file__).parents[1] / "docs" / "dropin.md").read_text()
    before, after = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    for half in (before, after):
        names: dict[str, Any] = {"model": Model(), "args": ARGS}
        exec(compile(half, "docs/dropin.md", "exec"), names)
        start = values(names["model"])
        names["model"](batch(0)).backward()
        names["opt"].step()
        assert names["opt"].param_groups[1]["rank"] >= 32 and names["opt"].param_groups[1]["scale"] == 0.25
        norm = names["model"].norm.weight
        assert not torch.equal(norm, start["norm.weight"])


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("shape", [(16, 32), (7, 13), (1, 300), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_holds_the_weight_to_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    layer = QGaLoreLinear(weight, None, group_size=64)
    half = layer.scales.double().repeat_interleave(64)[: weight.numel()].view(shape) / 2
    assert ((decoded(layer) - weight.double()).abs() <= half * 1.0001).all()
    assert layer.weight.dtype == dtype and layer.weight.shape == weight.shape
    assert torch.equal(layer.weight.detach(), decoded(layer).to(dtype))


def test_layer_computes_forward_and_gradients_of_the_decoded_weight() -> None:
    layer = QGaLoreLinear(torch.randn(24, 32), torch.randn(24))
    x = torch.randn(4, 5, 32, requires_grad=True)
    target = torch.randn(4, 5, 24)
    ((layer(x) - target) ** 2).sum().backward()
    weight = decoded(layer).requires_grad_()
    assert layer.bias is not None
    x2, bias = x.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()
    ((x2 @ weight.t() + bias - target) ** 2).sum().backward()
    assert layer.weight.grad is not None and x.grad is not None and layer.bias.grad is not None
    assert torch.allclose(layer.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-4)
    assert torch.allclose(x.grad.double(), x2.grad, rtol=1e-5, atol=1e-4)
    assert torch.allclose(layer.bias.grad.double(), bias.grad, rtol=1e-5, atol=1e-4)


def test_layer_takes_device_and_dtype() -> None:
    layer = QGaLoreLinear(torch.randn(4, 8), torch.randn(4), device="cpu", dtype=torch.bfloat16)
    assert layer.bias is not None
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16 and layer.scales.dtype == torch.float32
    assert layer(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


def test_layer_takes_the_positional_arguments_of_the_public_one() -> None:
    layer = QGaLoreLinear(torch.randn(4, 8), None, "cpu", torch.float32, 8, 16, False)
    assert (layer.weight.group_size, layer.weight.stochastic_round) == (16, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 4), None, None, None, 4), "num_bits must be 8, got 4"),
        ((torch.ones(4, 4), None, None, None, 8, 0), "group_size must be an integer >= 1, got 0"),
        ((torch.ones(4, 4), None, None, None, 8, -1), "group_size must be an integer >= 1, got -1"),
        ((torch.ones(4, 4), None, None, None, 8, 4, "no"), "stochastic_round of an INT8 weight must be True or False"),
        ((torch.ones(4), None), r"weight must be a float tensor \[m, n\], got torch.float32 \[4\]"),
        ((torch.ones(4, 4).int(), None), r"weight must be a float tensor \[m, n\], got torch.int32 \[4, 4\]"),
        ((torch.ones(4, 4), torch.ones(3)), r"bias must be \[4\] or None, got \[3\]"),
        ((torch.full((4, 4), float("nan")), None), "finite"),
    ],
)
def test_layer_refuses_in_one_sentence(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QGaLoreLinear(*arguments)


# ---------------------------------------------------------------- preparing a model


def test_prepare_converts_the_named_children_in_place() -> None:
    model = Model()
    before = values(model)
    same = prepare_model_for_int8_training(model, ARGS, ["q_proj", "down_proj"])
    assert same is model
    names = [name for name, module in model.named_modules() if isinstance(module, QGaLoreLinear)]
    assert names == [f"layers.{i}.{child}" for i in (0, 1) for child in ("self_attn.q_proj", "mlp.down_proj")]
    for name, value in values(model).items():
        tolerance = model.get_parameter(name).scales.max().item() if name.removesuffix(".weight") in names else 0
        assert torch.allclose(value, before[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("other", ["proj", "my_q_proj", "q_proj_", "self_attn.q_proj"])
def test_prepare_compares_whole_child_names(other: str) -> None:
    """Neither a part of a name nor a name with more around it, nor a path."""
    with pytest.raises(ValueError, match=rf"target_module=\['{other}'\] names no nn.Linear of the model"):
        prepare_model_for_int8_training(Model(), ARGS, [other])


def test_prepare_keeps_bias_hooks_mode_and_frozen_layers() -> None:
    """The public code makes a new bias, loses hooks and trains what was frozen."""
    model = Model().eval()
    up, calls = model.layers[0].mlp.up_proj, []
    bias = up.bias
    up.register_forward_hook(lambda *_: calls.append(1))
    up.weight.requires_grad_(False)
    prepare_model_for_int8_training(model, ARGS, TARGETS)
    layer = model.layers[0].mlp.up_proj
    model(batch(0)).backward()
    assert layer.bias is bias and bias.grad is not None and calls == [1] and not layer.training
    assert not layer.weight.requires_grad and layer.weight.grad is None


def test_prepare_reaches_a_module_that_is_shared_once() -> None:
    shared = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    model = nn.ModuleList([shared, shared])
    prepare_model_for_int8_training(model, ARGS, ["q_proj"])
    assert isinstance(model[0]["q_proj"], QGaLoreLinear) and model[0]["q_proj"] is model[1]["q_proj"]


def test_prepare_says_nothing_of_convolutions_and_embeddings(caplog: pytest.LogCaptureFixture) -> None:
    """A script for images printed a line for each of hundreds of layers that it left alone."""
    model = nn.ModuleDict({f"conv{i}": nn.Conv2d(2, 2, 3) for i in range(100)})
    model["q_proj"], model["embed"] = nn.Linear(8, 8), nn.Embedding(8, 8)
    with caplog.at_level(logging.DEBUG):
        prepare_model_for_int8_training(model, ARGS, ["q_proj"])
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        (dict(weight_bits=4), TARGETS, "weight_bits must be 8, got 4"),
        (dict(weight_group_size=0), TARGETS, "group_size must be an integer >= 1, got 0"),
        (dict(stochastic_round="yes"), TARGETS, "stochastic_round must be True or False, got 'yes'"),
        ({}, "q_proj", "target_module must be a list of child names, got 'q_proj'"),
        ({}, [], "target_module must be a list of child names"),
        ({}, ["self_attn"], "names no nn.Linear"),
    ],
)
def test_prepare_refuses_and_changes_nothing(changes: dict[str, Any], target: Any, message: str) -> None:
    model = Model()
    kinds = [type(m) for m in model.modules()], [type(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        prepare_model_for_int8_training(model, Namespace(**{**vars(ARGS), **changes}), target)
    assert kinds == ([type(m) for m in model.modules()], [type(p) for p in model.parameters()])


def test_param_groups_take_a_rank_for_layers_without_one() -> None:
    groups = qg.param_groups(prepared(), rank=8, update_proj_gap=5)
    assert [group.get("rank") for group in groups] == [None, 8] and len(groups[1]["params"]) == 14
    with pytest.raises(ValueError, match="q_proj was prepared without a rank: give one to param_groups"):
        qg.param_groups(prepared())


# ---------------------------------------------------------------- attributes of a weight


def test_attributes_describe_the_stored_weight() -> None:
    model = prepared()
    weight = model.layers[1].mlp.up_proj.weight
    assert weight.scales.shape == weight.zeros.shape == (8,) and weight.group_size == 256
    assert weight.scales.dtype == torch.float32 and weight.saved_data_dtype == torch.uint8
    assert weight.stochastic_round is True and weight.float_grad is None and weight.backward_hook is None


@pytest.mark.parametrize("column", [False, True])
def test_scales_and_zeros_can_be_assigned(column: bool) -> None:
    """As a vector, or as the column of floats that the public code has."""
    layer = prepared().layers[0].mlp.up_proj
    before, shift = decoded(layer), layer.weight.zeros.float() + 3
    doubled = layer.weight.scales * 2
    layer.weight.scales = doubled[:, None].clone() if column else doubled
    layer.weight.zeros = shift[:, None] if column else shift
    moved = layer.scales.double().repeat_interleave(256).view(before.shape) * 3
    assert torch.allclose(decoded(layer), 2 * before - moved, rtol=0, atol=1e-9)
    assert torch.equal(layer.dequantize(), decoded(layer).float()) and layer.zeros.dtype == torch.int16


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scales", torch.ones(7), r"scales of an INT8 weight must be a tensor \[8\] or \[8, 1\], got \[7\]"),
        ("scales", 1.0, r"scales of an INT8 weight must be a tensor \[8\] or \[8, 1\], got float"),
        ("scales", torch.zeros(8), "scales of an INT8 weight must be finite and > 0"),
        ("scales", torch.full((8,), float("inf")), "scales of an INT8 weight must be finite and > 0"),
        ("zeros", torch.full((8,), 0.5), "zeros of an INT8 weight must be integers that int16 holds"),
        ("zeros", torch.full((8,), 40000), "zeros of an INT8 weight must be integers that int16 holds"),
        ("zeros", torch.full((8,), float("nan")), "zeros of an INT8 weight must be integers that int16 holds"),
        ("group_size", 128, "group_size of this INT8 weight is 256 and cannot be changed, got 128"),
        ("saved_data_dtype", torch.int8, "saved_data_dtype of this INT8 weight is torch.uint8 and cannot be changed"),
        ("stochastic_round", 1, "stochastic_round of an INT8 weight must be True or False, got 1"),
    ],
)
def test_attributes_refuse_what_they_cannot_hold(name: str, value: Any, message: str) -> None:
    layer = prepared().layers[0].mlp.up_proj
    before = decoded(layer)
    with pytest.raises(ValueError, match=message):
        setattr(layer.weight, name, value)
    assert torch.equal(decoded(layer), before)


def test_attributes_take_back_what_they_gave() -> None:
    model = prepared()
    weight = model.layers[0].mlp.up_proj.weight
    for name in ("scales", "zeros", "group_size", "saved_data_dtype", "stochastic_round", "float_grad"):
        setattr(weight, name, getattr(weight, name))


def test_assigning_a_tensor_says_how_a_weight_is_set() -> None:
    """As the public code's own load_model_weight does."""
    layer = QGaLoreLinear(torch.randn(8, 8), None)
    with pytest.raises(RuntimeError, match=r"cannot be replaced by a Tensor; .* set by layer\.set_weight\(tensor\) or"):
        layer.weight = torch.zeros(8, 8, dtype=torch.uint8)


def test_float_grad_is_the_gradient() -> None:
    model = prepared()
    model(batch(0)).backward()
    weight = model.layers[0].mlp.up_proj.weight
    assert weight.float_grad is weight.grad and weight.float_grad.shape == weight.shape
    weight.float_grad = torch.ones_like(weight.grad)
    assert weight.grad.eq(1).all()
    weight.float_grad = None
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attributes_survive_casts_copies_and_state_dicts(dtype: torch.dtype) -> None:
    model = prepared(weight_group_size=64, stochastic_round=False)
    name = "layers.0.mlp.up_proj"
    kept = {key: getattr(model.get_submodule(name).weight, key) for key in ("scales", "zeros")}
    kept = {key: value.clone() for key, value in kept.items()}
    loaded = prepared(weight_group_size=64, stochastic_round=False).to(dtype)
    nn.init.ones_(loaded.norm.weight)
    loaded.get_submodule(name).set_weight(torch.zeros(64, 32))
    loaded.load_state_dict(model.state_dict())
    for other in (model.to(dtype), copy.deepcopy(model), loaded):
        weight = other.get_submodule(name).weight
        assert torch.equal(weight.scales, kept["scales"]) and torch.equal(weight.zeros, kept["zeros"])
        assert (weight.group_size, weight.saved_data_dtype, weight.stochastic_round) == (64, torch.uint8, False)
        assert weight.dtype == dtype


# ---------------------------------------------------------------- stochastic_round


def rounded(weight_says: bool, group_says: bool, seed: int) -> Tensor:
    """Codes after a few updates that are smaller than half a step."""
    layer = QGaLoreLinear(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)), None)
    layer.weight.stochastic_round = weight_says
    group = {"params": [layer.weight], **PROJECTED, "stochastic_round": group_says}
    opt = qg.QGaLoreAdamW8bit([group], lr=1e-4, weight_decay=0.0, seed=seed)
    for _ in range(3):
        layer.weight.float_grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
        opt.step()
    return layer.qweight.clone()


def test_weight_and_group_must_agree_to_round_stochastically() -> None:
    start = QGaLoreLinear(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)), None).qweight
    assert not torch.equal(rounded(True, True, 0), start)
    assert not torch.equal(rounded(True, True, 0), rounded(True, True, 1))
    for weight_says, group_says in ((False, True), (True, False), (False, False)):
        assert torch.equal(rounded(weight_says, group_says, 0), start)  # updates below half a step are lost


def test_weights_of_one_group_may_differ_in_rounding() -> None:
    model = prepared(stochastic_round=False)
    model.layers[0].self_attn.q_proj.weight.stochastic_round = True
    codes = {n: m.qweight.clone() for n, m in model.named_modules() if isinstance(m, QGaLoreLinear)}
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, **PROJECTED), lr=1e-5, weight_decay=0.0)
    model(batch(0)).backward()
    opt.step()
    changed = [n for n, m in model.named_modules() if n in codes and not torch.equal(m.qweight, codes[n])]
    assert changed == ["layers.0.self_attn.q_proj"]


# ---------------------------------------------------------------- backward_hook


def test_backward_hook_gets_the_weight_with_its_complete_gradient() -> None:
    """Once for a layer that is called twice, with the sum of both."""
    layer = prepare_model_for_int8_training(nn.ModuleDict({"q_proj": nn.Linear(8, 8, False)}), ARGS, ["q_proj"])[
        "q_proj"
    ]
    x, seen = torch.randn(3, 8), []

    def hook(weight: Any) -> str:
        seen.append((weight, weight.grad.clone()))
        return "torch refuses hooks that return something"

    layer.weight.backward_hook = hook
    assert layer.weight.backward_hook is hook
    (layer(x).sum() + 2 * layer(x).sum()).backward()
    ((weight, gradient),) = seen
    assert weight is layer.weight
    assert torch.allclose(gradient, 3 * torch.ones(3, 8).t() @ x, atol=1e-6)


def test_backward_hook_is_replaced_and_removed() -> None:
    model, calls = prepared(), []
    for p in (model.lm_head.weight, model.layers[0].mlp.up_proj.weight):
        p.backward_hook = lambda _: calls.append("first")
        p.backward_hook = lambda _: calls.append("second")
    model(batch(0)).backward()
    assert calls == ["second"] * 2
    for p in (model.lm_head.weight, model.layers[0].mlp.up_proj.weight):
        p.backward_hook = None
    model(batch(0)).backward()
    assert calls == ["second"] * 2


def test_backward_hook_stays_over_a_cast_and_is_not_copied() -> None:
    model, calls = prepared(), []
    for p in model.parameters():
        p.backward_hook = lambda p: calls.append(p.dtype)
    count = len(list(model.parameters()))
    copy.deepcopy(model)(batch(0)).backward()
    assert calls == []
    model.to(torch.bfloat16)(batch(0)).backward()
    assert calls == [torch.bfloat16] * count


def test_backward_hook_goes_to_the_leaf_that_replaces_a_meta_one() -> None:
    with torch.device("meta"):
        layer = QGaLoreLinear(torch.empty(8, 8), None)
    layer.weight.backward_hook = hook = calls_of([])
    layer.to_empty(device="cpu")
    assert layer.weight.backward_hook is hook and layer.weight.device.type == "cpu"


def calls_of(calls: list[Any]) -> Any:
    return calls.append


def test_backward_hook_of_a_frozen_parameter_waits_until_it_trains() -> None:
    model, calls = prepared(), []
    frozen = [model.lm_head.weight, model.layers[0].mlp.up_proj.weight]
    for p in frozen:
        p.requires_grad_(False)
        p.backward_hook = lambda p: calls.append(tuple(p.shape))
        assert not p.requires_grad
    model(batch(0)).backward()
    assert calls == [] and all(p.grad is None for p in frozen)
    for p in frozen:
        p.requires_grad_(True)
    model(batch(0)).backward()
    assert sorted(calls) == sorted(tuple(p.shape) for p in frozen)


def test_pickled_model_takes_hooks_and_has_none() -> None:
    model, calls = prepared(), []
    for p in model.parameters():
        p.backward_hook = lambda p: calls.append(p)  # which itself could not be pickled
    file = io.BytesIO()
    torch.save(model, file)
    twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    twin(batch(0)).backward()
    assert calls == []
    for p in twin.parameters():
        p.backward_hook = calls.append
    twin(batch(0)).backward()
    assert {id(p) for p in calls} == {id(p) for p in twin.parameters()}


def test_exported_model_has_ordinary_parameters() -> None:
    model = prepared()
    model.lm_head.weight.backward_hook = print
    assert {type(p) for p in qg.export_model(model).parameters()} == {nn.Parameter}


def test_pickled_parameters_are_read_with_weights_only() -> None:
    model, file = prepared(), io.BytesIO()
    torch.save({"bias": model.lm_head.weight}, file)
    found = torch.load(io.BytesIO(file.getvalue()), weights_only=True)["bias"]
    assert torch.equal(found, model.lm_head.weight) and found.requires_grad


def test_backward_hook_must_be_callable() -> None:
    weight = prepared().layers[0].mlp.up_proj.weight
    with pytest.raises(TypeError, match="backward_hook must be callable with the weight, or None, got 3"):
        weight.backward_hook = 3


def test_ordinary_parameters_stay_the_same_objects() -> None:
    """They only learn of backward_hook: values, checkpoints, copies and torch's optimizers treat them as before."""
    model = Model()
    kept = {name: (p, p.detach().clone()) for name, p in model.named_parameters() if "proj" not in name}
    prepare_model_for_int8_training(model, ARGS, TARGETS)
    for name, (parameter, value) in kept.items():
        assert model.get_parameter(name) is parameter and torch.equal(parameter, value)
        assert type(parameter) is HookedParameter and isinstance(parameter, nn.Parameter)
        assert not hasattr(parameter, "group_size") and type(parameter.detach()) is Tensor
        assert type(model.state_dict()[name]) is Tensor and type(parameter + 1) is Tensor

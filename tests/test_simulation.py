"""Simulated INT8 training: a float weight on an INT8 grid, trained like the codes that it stands for."""

from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import q_galore_torch as qg
from q_galore_torch import ops
from q_galore_torch.q_galore_adamw8bit_simulate import AdamW8bit
from q_galore_torch.utils.quantization import prepare_model_for_int8_training
from q_galore_torch.utils.simulate_quantization import QLinear, prepare_model_for_int8_training_simulation

ARGS = Namespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
PROJECTED: dict[str, Any] = {"rank": 8, "update_proj_gap": 7}


def network(dtype: torch.dtype = torch.float32, shift: float = 0.0) -> nn.Module:
    """Two layers to convert, the second with a ragged last group and weights about ``shift``, and one that stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.Tanh(), nn.Linear(160, 39, bias=False), nn.Tanh(), nn.Linear(39, 3))
    with torch.no_grad():
        model[2].weight.add_(shift)
    return model.to(dtype)


def simulated(model: nn.Module, **changes: Any) -> nn.Module:
    return prepare_model_for_int8_training_simulation(model, Namespace(**{**vars(ARGS), **changes}), ["0", "2"])


def groups_of(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """What the public script does: the weights of some layers in one group, everything else in another."""
    matrices = [module.weight for module in model if isinstance(module, QLinear)]
    chosen = {id(weight) for weight in matrices}
    regular = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": regular}, {"params": matrices, **options}]


def train(
    model: nn.Module, opt: torch.optim.Optimizer, steps: range, dtype: torch.dtype = torch.float32
) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
        loss = (model(x.to(dtype)).float() - x[:, :3]).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def both(
    dtype: torch.dtype, shift: float = 0.0, **options: Any
) -> tuple[nn.Module, nn.Module, list[float], list[float]]:
    """The real and the simulated model after 30 steps, and the losses."""
    real = qg.prepare_model(network(dtype, shift), rank=8, target_modules=["0", "2"], grad_mode="full")
    mine = simulated(network(dtype, shift))
    first = qg.QGaLoreAdamW8bit(qg.param_groups(real, update_proj_gap=7), lr=0.01, **options)
    second = qg.QGaLoreAdamW8bit_simulate(groups_of(mine, **PROJECTED), lr=0.01, **options)
    return real, mine, train(real, first, range(30), dtype), train(mine, second, range(30), dtype)


def codes_differ(real: nn.Module, mine: nn.Module) -> list[float]:
    """The share of codes, scales and zero points that differ in each layer."""
    shares = []
    for index in (0, 2):
        parts = zip(mine[index].read(), (real[index].qweight, real[index].scales, real[index].zeros), strict=True)
        shares.append(max((got != wanted).float().mean().item() for got, wanted in parts))
    return shares


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
    """The nearest point of each weight's group of 256 levels, in float64."""
    flat, result = weight.detach().double().reshape(-1), []
    for group, (scale, zero) in enumerate(zip(scales.double(), zeros.double(), strict=True)):
        part = flat[group * size : (group + 1) * size]
        levels = scale * (torch.arange(256, dtype=torch.float64) - zero)
        result.append(levels[(part[:, None] - levels).abs().argmin(1)])
    return torch.cat(result).view_as(weight)


# ------------------------------------------------------------ the layer


@pytest.mark.parametrize("size", [1, 7, 64, 5000])
def test_layer_rounds_to_the_nearest_point_of_each_group(size: int) -> None:
    layer = QLinear(24, 13, group_size=size)
    start = layer.weight.detach().clone()
    assert torch.equal(layer.dequantize(), start)  # what lies on the grid stays
    width = layer.scales.repeat_interleave(size)[: start.numel()].view_as(start)
    with torch.no_grad():
        layer.weight.add_(width * 1.3 * torch.randn_like(start).clamp_(-2, 2))
    expected = nearest(layer.weight, layer.scales, layer.zeros, size)
    assert not torch.equal(expected.float(), start) and torch.allclose(layer.dequantize().double(), expected, rtol=1e-6)
    x = torch.randn(5, 24)
    assert torch.allclose(layer(x), F.linear(x, expected.float(), layer.bias), atol=1e-5)


def test_layer_grid_is_that_of_int8_layers() -> None:
    linear = nn.Linear(96, 40)
    codes, scales, zeros = ops.int8_quantize(linear.weight.detach(), 256)
    layer = QLinear(96, 40, weight_data=linear.weight, bias_data=linear.bias)
    got = layer.read()
    assert all(torch.equal(a, b) for a, b in zip(got, (codes, scales, zeros), strict=True))
    assert torch.equal(layer.bias, linear.bias) and layer.bias is not linear.bias


def test_layer_gradient_passes_the_rounding() -> None:
    layer = QLinear(24, 13)
    with torch.no_grad():
        layer.weight.add_(1e-3 * torch.randn_like(layer.weight))
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach() @ layer.dequantize().t() + layer.bias.detach()
    assert torch.allclose(layer.weight.grad, 2 * y.t() @ x.detach(), atol=1e-5)
    assert torch.allclose(x.grad, 2 * y @ layer.dequantize(), atol=1e-5)


def test_layer_gives_a_group_that_left_its_range_a_new_one() -> None:
    layer = QLinear(16, 8, group_size=16)
    scales, zeros = layer.scales.clone(), layer.zeros.clone()
    with torch.no_grad():
        layer.weight[3] *= 5
        layer.weight[5] *= 0.5  # still inside
    rounded = layer.dequantize()
    others = [row for row in range(8) if row != 3]
    assert torch.equal(layer.scales[others], scales[others]) and torch.equal(layer.zeros[others], zeros[others])
    assert layer.scales[3] == pytest.approx(5 * scales[3].item(), rel=0.01)
    assert ((rounded - layer.weight).abs() <= 0.5001 * layer.scales[:, None]).all()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_layer_trains_with_any_optimizer(make: Any) -> None:
    model = simulated(network())
    losses = train(model, make(model.parameters(), lr=0.01 if make is torch.optim.AdamW else 0.2), range(60))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_layer_casts_move_and_copy_with_their_grid() -> None:
    layer = simulated(network())[0]
    scales, zeros = layer.scales.clone(), layer.zeros.clone()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(torch.bfloat16), layer.double()):
        assert other.scales.dtype == torch.float32 and other.zeros.dtype == torch.int32
        assert torch.equal(other.scales, scales) and torch.equal(other.zeros, zeros)
        assert torch.equal(other.dequantize(torch.float32), layer.dequantize(torch.float32))
    filled = QLinear(96, 160, device="meta").to_empty(device="cpu")
    filled.load_state_dict(layer.float().state_dict())
    assert torch.equal(filled.scales, scales) and torch.equal(filled.weight, layer.weight)


@pytest.mark.parametrize("change", ["deepcopy", "pickle", "to", "assign", "replaced"])
def test_copied_weights_are_still_updated_on_their_grid(change: str) -> None:
    """The optimizer finds the layer of a weight wherever the weight has come from."""
    model = simulated(network())
    if change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif change == "to":
        model = model.to("meta").to_empty(device="cpu")
        model.load_state_dict(simulated(network()).state_dict())
    elif change == "assign":
        model.load_state_dict(simulated(network()).state_dict(), assign=True)
    else:
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    opt = qg.QGaLoreAdamW8bit_simulate(groups_of(model, **PROJECTED), lr=0.01)
    before = model[0].read()[0]
    train(model, opt, range(1))
    layer = model[0]
    assert not torch.equal(layer.read()[0], before)
    assert torch.equal(layer.weight, nearest(layer.weight, layer.scales, layer.zeros, 256).float())


def test_layer_reset_parameters_makes_a_new_grid() -> None:
    layer = QLinear(64, 32, weight_data=torch.full((32, 64), 100.0))
    layer.reset_parameters()
    assert layer.scales.max() < 1e-2 and torch.equal(layer.weight, layer.dequantize())


def test_layer_that_is_gone_leaves_its_weight_alone() -> None:
    weight = QLinear(8, 8).weight
    opt = qg.QGaLoreAdamW8bit([weight], lr=1e-6, weight_decay=0.0)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    opt.step()
    assert torch.allclose(weight, before - 1e-6, atol=1e-8) and not torch.equal(weight, before)


def test_weight_that_was_replaced_is_an_ordinary_one() -> None:
    layer = QLinear(8, 8)
    old, layer.weight = layer.weight, nn.Parameter(torch.ones(8, 8))
    opt = qg.QGaLoreAdamW8bit([old], lr=1e-6, weight_decay=0.0)
    before, old.grad = old.detach().clone(), torch.ones_like(old)
    opt.step()
    assert torch.allclose(old, before - 1e-6, atol=1e-8) and torch.equal(layer.weight, torch.ones(8, 8))


def test_layer_says_what_it_is() -> None:
    expected = (
        "QLinear(in_features=8, out_features=4, bias=False, weight=float on an INT8 grid, group_size=32, round=nearest)"
    )
    assert repr(QLinear(8, 4, bias=False, group_size=32, stochastic_round=False)) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_bits": 4}, "num_bits must be 8, got 4"),
        ({"group_size": 0}, "group_size must be an integer >= 1, got 0"),
        ({"stochastic_round": 1}, "stochastic_round must be True or False, got 1"),
        ({"weight_data": torch.zeros(3, 4)}, r"weight_data must be \[4, 3\], got \[3, 4\]"),
        ({"bias_data": torch.zeros(3)}, r"bias_data must be \[4\], got \[3\]"),
        ({"bias": False, "bias_data": torch.zeros(4)}, r"bias_data must be None, got \[4\]"),
        ({"weight_data": torch.full((4, 3), float("nan"))}, "finite"),
    ],
)
def test_layer_refuses_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        QLinear(3, 4, **options)


# ------------------------------------------------------------ conversion


def test_prepare_takes_over_parameters_and_hooks() -> None:
    model = network()
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    weight, bias = model[0].weight, model[0].bias
    returned = prepare_model_for_int8_training_simulation(model, ARGS, ["0"])
    assert returned is model and [type(m).__name__ for m in model] == ["QLinear", "Tanh", "Linear", "Tanh", "Linear"]
    assert model[0].weight is weight and model[0].bias is bias
    model(torch.ones(1, 96))
    assert seen == [1]


def test_prepare_goes_by_the_childrens_own_names() -> None:
    model = nn.Module()
    model.up = nn.Sequential()
    model.up.add_module("up", nn.Linear(4, 4))
    model.up.add_module("upper", nn.Linear(4, 4))
    prepare_model_for_int8_training_simulation(model, ARGS, ["up"])
    assert type(model.up.up) is QLinear and type(model.up.upper) is nn.Linear


@pytest.mark.parametrize("change", ["", "cast", "deepcopy", "pickle", "assign"])
def test_weight_answers_the_public_attributes(change: str) -> None:
    model = simulated(network(), stochastic_round=False, weight_group_size=128)
    if change == "cast":
        model.to(torch.bfloat16)
    elif change == "assign":
        model.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)
    elif change:
        model = copy.deepcopy(model) if change == "deepcopy" else pickle.loads(pickle.dumps(model))
    marked = [name for name, p in model.named_parameters() if hasattr(p, "group_size")]
    assert marked == ["0.weight", "2.weight"]
    weight = model[0].weight
    assert (weight.group_size, weight.stochastic_round) == (128, False)
    weight.stochastic_round = True
    assert model[0].stochastic_round
    with pytest.raises(ValueError, match="stochastic_round of an INT8 weight must be True or False, got 1"):
        weight.stochastic_round = 1
    with pytest.raises(ValueError, match="is 128 and cannot be changed, got 64: make a new layer"):
        weight.group_size = 64


def test_public_per_layer_loop_trains_every_parameter() -> None:
    """One optimizer for each parameter, stepped by a hook."""
    model, opts = simulated(network()), {}
    for p in model.parameters():
        rank = PROJECTED if hasattr(p, "group_size") else {}
        opts[p] = AdamW8bit([{"params": [p], **rank}], lr=0.01)

    def hook(p: Tensor) -> None:
        opts[p].step()
        opts[p].zero_grad()

    for p in model.parameters():
        setattr(p, "backward_hook", hook)  # noqa: B010 (as the public script has it)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(16, 96)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is None and not torch.equal(p, start[name]), name


def test_public_per_layer_loop_is_that_of_int8_weights() -> None:
    """Every weight with noise of its own, and the same one."""
    real = prepare_model_for_int8_training(network(), ARGS, ["0", "2"])
    mine = simulated(network())
    for model in (real, mine):
        opts = {p: AdamW8bit([{"params": [p], **PROJECTED}], lr=0.01) for p in (model[0].weight, model[2].weight)}
        assert len({state["id"] for opt in opts.values() for state in opt.state.values()}) == 2
        for p, opt in opts.items():
            p.backward_hook = lambda p, opt=opt: (opt.step(), opt.zero_grad())
        for step in range(3):
            x = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
    assert codes_differ(real, mine) == [0, 0]


def test_prepare_keeps_tied_layers_one() -> None:
    model = network()
    model.append(nn.Linear(96, 160))
    model[5].weight, model[5].bias = model[0].weight, model[0].bias
    prepare_model_for_int8_training_simulation(model, ARGS, ["0", "5"])
    assert model[0] is model[5]


@pytest.mark.parametrize(
    ("changes", "names", "sentence"),
    [
        ({}, ["q_proj"], "names no nn.Linear"),
        ({}, "0", "target_module must be a list of child names"),
        ({}, [], "target_module must be a list of child names"),
        ({}, None, "target_module must be a list of child names, got None"),
        ({}, 3, "target_module must be a list of child names, got 3"),
        ({"weight_bits": 4}, ["0"], "num_bits must be 8, got 4"),
        ({"weight_group_size": -1}, ["0"], "group_size must be an integer >= 1, got -1"),
    ],
)
def test_prepare_refuses(changes: dict[str, Any], names: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        prepare_model_for_int8_training_simulation(network(), Namespace(**{**vars(ARGS), **changes}), names)


def test_prepare_takes_any_iterable_of_names() -> None:
    assert type(prepare_model_for_int8_training_simulation(network(), ARGS, iter(["0"]))[0]) is QLinear


def test_prepare_of_a_simulated_model_says_that_it_is_one() -> None:
    with pytest.raises(
        ValueError, match=r"^target_module=\['0', '2'\] names no nn.Linear .* but layers of type QLinear$"
    ):
        simulated(simulated(network()))


def test_prepared_meta_model_gets_its_grid_with_its_weights() -> None:
    with torch.device("meta"):
        model = network()
    simulated(model).to_empty(device="cpu").load_state_dict(network().state_dict())
    wanted = simulated(network())
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in model.state_dict().items())
    losses = [train(each, AdamW8bit(groups_of(each, **PROJECTED), lr=0.01), range(3)) for each in (model, wanted)]
    assert losses[0] == losses[1]


def test_prepare_that_fails_changes_nothing() -> None:
    model = network()
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="2 cannot be converted: its weight is not finite"):
        simulated(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, start["0.weight"])


def test_layer_whose_weight_is_not_finite_says_so() -> None:
    broken, model = network(), simulated(network())
    broken[2].weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"Sequential:\n\s*2\.weight must be finite to be quantised$"):
        model.load_state_dict(broken.state_dict())
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="^the weight of 2 is not finite and has no INT8 grid$"):
        model(torch.ones(1, 96))
    with pytest.raises(ValueError, match="^the weight of a QLinear is not finite"):
        QLinear(2, 2, weight_data=torch.full((2, 2), float("inf")))


# ------------------------------------------------------------ the optimizer


def test_public_names_are_one_optimizer() -> None:
    assert qg.QGaLoreAdamW8bit_simulate is AdamW8bit is qg.QGaLoreAdamW8bit


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0, -40.0])
@pytest.mark.parametrize("stochastic", [True, False])
def test_float32_simulation_is_the_int8_run_bit_for_bit(shift: float, stochastic: bool) -> None:
    """Also far from zero, where a code is found again by its rounded distance from a zero point of thousands."""
    real, mine, expected, got = both(torch.float32, shift, stochastic_round=stochastic)
    assert codes_differ(real, mine) == [0.0, 0.0] and got == pytest.approx(expected, rel=1e-6)
    assert min(got) < got[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weight_gives_its_code_back_within_the_digits_of_its_dtype(dtype: torch.dtype) -> None:
    """bfloat16 has 8, so that its error 128 steps from zero is below half a step; float32 has them for every int16."""
    layer = QLinear(256, 400, dtype=dtype)
    codes = torch.randint(0, 256, (400, 256), dtype=torch.uint8)
    zeros = torch.full((400,), 128) if dtype == torch.bfloat16 else torch.randint(-32767, 32768, (400,))
    scales = torch.rand(400) + 0.01
    with torch.no_grad():
        layer.write(codes, scales, zeros.to(torch.int16))
    got = layer.read()
    assert torch.equal(got[0], codes) and torch.equal(got[1], scales) and torch.equal(got[2], zeros.to(torch.int16))


def test_bfloat16_simulation_is_nearly_the_int8_run_about_zero() -> None:
    """A few weights lie more than 128 steps from zero, and one code in thousands comes back as its neighbour."""
    real, mine, expected, got = both(torch.bfloat16)
    assert max(codes_differ(real, mine)) < 1e-3 and got == pytest.approx(expected, rel=1e-3)


def test_bfloat16_simulation_deviates_far_from_zero_by_its_rounding() -> None:
    """Weights about 0.3 of a group 0.16 wide: bfloat16 knows steps of some 2 codes there."""
    real, mine = network(torch.bfloat16, 0.3), network(torch.bfloat16, 0.3)
    qg.prepare_model(real, rank=8, target_modules=["0", "2"], grad_mode="full")
    simulated(mine)
    first = qg.QGaLoreAdamW8bit(qg.param_groups(real), lr=0.01)
    second = qg.QGaLoreAdamW8bit(groups_of(mine, rank=8), lr=0.01)
    train(real, first, range(1), torch.bfloat16)
    train(mine, second, range(1), torch.bfloat16)
    difference = (mine[2].dequantize(torch.float32) - real[2].dequantize(torch.float32)).abs()
    assert 0 < difference.max()
    # The weight was rounded to 8 bits before and after the update, and once more to a code.
    allowed = 2 * 2.0**-8 * real[2].dequantize(torch.float32).abs() + real[2].scales.max()
    assert (difference <= allowed).all() and difference.mean() < 2 * real[2].scales.mean()


def test_layer_option_rounds_its_codes_to_nearest() -> None:
    mine, real = simulated(network(), stochastic_round=False), simulated(network())
    first = qg.QGaLoreAdamW8bit(groups_of(mine, **PROJECTED), lr=0.01)
    second = qg.QGaLoreAdamW8bit(groups_of(real, **PROJECTED), lr=0.01, stochastic_round=False)
    train(mine, first, range(5))
    train(real, second, range(5))
    assert torch.equal(mine[0].weight, real[0].weight)
    third = qg.QGaLoreAdamW8bit(groups_of(other := simulated(network()), **PROJECTED), lr=0.01)
    train(other, third, range(5))
    assert not torch.equal(mine[0].weight, other[0].weight)


def test_group_without_a_rank_updates_codes_too() -> None:
    real = qg.prepare_model(network(), rank=8, target_modules=["0", "2"], grad_mode="full")
    mine = simulated(network())
    leaves = [real[0].weight, real[2].weight]
    rest = [p for p in real.parameters() if all(p is not leaf for leaf in leaves)]
    train(real, qg.QGaLoreAdamW8bit([{"params": rest}, {"params": leaves}], lr=0.01), range(8))
    train(mine, qg.QGaLoreAdamW8bit(groups_of(mine), lr=0.01), range(8))
    assert codes_differ(real, mine) == [0.0, 0.0]


def test_one_group_may_hold_weights_of_every_kind() -> None:
    """Each is updated as it would be alone: on its grid, on its grid to nearest, or as a float."""

    def parts() -> list[nn.Module]:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), QLinear(64, 64), QLinear(64, 64, stochastic_round=False), QLinear(64, 64)]
        for layer in layers:
            layer.weight.grad = torch.randn(64, 64)
        return layers

    together, alone = parts(), parts()
    qg.QGaLoreAdamW8bit([layer.weight for layer in together], lr=1e-4).step()
    for number, layer in enumerate(alone):
        rest = [nn.Parameter(torch.zeros(4)) for _ in range(number)]  # so that the ids are the same
        qg.QGaLoreAdamW8bit([*rest, layer.weight], lr=1e-4).step()
        assert torch.equal(layer.weight, together[number].weight), number


def test_per_layer_simulation_is_the_ordinary_one() -> None:
    models = [simulated(network()) for _ in range(2)]
    opts = [qg.QGaLoreAdamW8bit(groups_of(model, **PROJECTED), lr=0.01) for model in models]
    qg.enable_per_layer(opts[1])
    assert train(models[0], opts[0], range(10)) == train(models[1], opts[1], range(10))
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_telemetry_counts_groups_of_a_simulated_weight() -> None:
    model = simulated(network())
    opt = qg.QGaLoreAdamW8bit(groups_of(model, **PROJECTED), lr=0.05)
    train(model, opt, range(10))
    entries = opt.telemetry()
    assert all(entry["groups_reranged"] > 0 for entry in entries[-2:]) and entries[0]["groups_reranged"] == 0


def test_resumed_simulation_goes_on_bit_for_bit() -> None:
    model = simulated(network())
    opt = qg.QGaLoreAdamW8bit(groups_of(model, **PROJECTED), lr=0.01)
    train(model, opt, range(6))
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    assert {"0.weight", "0.scales", "0.zeros", "0.bias"} <= saved[0].keys()
    expected = train(model, opt, range(6, 12))
    torch.manual_seed(5)
    again = simulated(network(shift=1.0))
    again.load_state_dict(saved[0])
    resumed = qg.QGaLoreAdamW8bit(groups_of(again, **PROJECTED), lr=0.01)
    resumed.load_state_dict(saved[1])
    assert train(again, resumed, range(6, 12)) == expected


def test_float_checkpoint_gets_a_grid() -> None:
    model = simulated(network(shift=1.0))
    model.load_state_dict(network().state_dict())
    expected = simulated(network())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_exported_simulation_is_an_ordinary_model() -> None:
    model = simulated(network())
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[2].weight.add_(1e-4)
    exported = qg.export_model(model)
    assert {type(p) for p in exported.parameters()} == {nn.Parameter}
    assert [type(m) for m in exported] == [type(m) for m in network()] and not exported[0].weight.requires_grad
    x = torch.randn(3, 96)
    assert torch.equal(exported(x), model(x)) and exported[2].weight.requires_grad


def test_simulation_under_ddp_needs_no_preparation(process_group: None) -> None:
    """gloo and NCCL refuse int16 buffers, which DDP would broadcast."""
    alone, mine = simulated(network()), simulated(network())
    losses = []
    for model, wrapped in ((alone, alone), (mine, DistributedDataParallel(mine))):
        opt = qg.QGaLoreAdamW8bit(groups_of(model, **PROJECTED), lr=0.01)
        losses.append(train(wrapped, opt, range(4)))
    assert losses[0] == losses[1]
    for buffer in mine.buffers():
        torch.distributed.broadcast(buffer, 0)


def test_autocast_uses_the_rounded_weight() -> None:
    model = simulated(network())
    x = torch.randn(4, 96)
    with torch.autocast("cpu", torch.bfloat16):
        got = model[0](x)
    assert torch.equal(got, F.linear(x.bfloat16(), model[0].weight.bfloat16(), model[0].bias.bfloat16()))

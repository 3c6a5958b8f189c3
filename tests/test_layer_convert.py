"""prepare_model, param_groups, export_model and num_parameters: what is converted, what is refused, what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import q_galore_torch as qg


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in ("q_proj", "o_proj")})
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Any) -> Any:
        x = x + self.attn["o_proj"](torch.tanh(self.attn["q_proj"](x)))
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, width: int = 16, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 20, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def converted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, qg.QGaLoreLinear)]


BODY = [f"layers.{i}.{n}" for i in (0, 1) for n in ("attn.q_proj", "attn.o_proj", "mlp.0", "mlp.2")]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["attn", "mlp"], BODY),
        (("attn", "mlp"), BODY),
        ("all-linear", BODY),
        (["q_proj"], ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]),
        (r"layers\.1\.mlp\.\d", ["layers.1.mlp.0", "layers.1.mlp.2"]),
        (".*", [*BODY, "lm_head"]),
    ],
)
def test_target_modules(target: Any, expected: list[str]) -> None:
    model = Model()
    assert qg.prepare_model(model, 4, target) is model
    assert converted(model) == expected
    assert [model.get_submodule(name).label for name in expected] == expected


def test_all_linear_asks_the_model_for_its_head() -> None:
    model = Model()
    model.get_output_embeddings = lambda: model.layers[1].mlp[2]  # type: ignore[assignment]
    qg.prepare_model(model, 4, "all-linear")
    assert "layers.1.mlp.2" not in converted(model) and "lm_head" in converted(model)


def test_all_linear_of_a_head_alone_says_that_it_is_left_out() -> None:
    with pytest.raises(ValueError, match="'all-linear' matches no nn.Linear of the model besides its output layer$"):
        qg.prepare_model(nn.Sequential(nn.Linear(8, 8)), 4, "all-linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank must be an integer >= 1, got 0"),
        (dict(rank="8"), "rank must be an integer >= 1, got '8'"),
        (dict(target_modules=["nothing"]), r"target_modules=\['nothing'\] matches no nn.Linear of the model"),
        (dict(target_modules=[]), r"target_modules must be a string or a list of strings, got \[\]"),
        (dict(target_modules=3), "target_modules must be a string or a list of strings, got 3"),
        (dict(target_modules="["), r"target_modules='\[' is not a regular expression: unterminated character set .*"),
        (dict(weight_bits=4), "weight_bits must be 8 or None, got 4"),
        (dict(group_size=2.0), "group_size must be an integer >= 1, got 2.0"),
        (dict(grad_mode="both"), "grad_mode must be 'low_rank' or 'full', got 'both'"),
        (dict(grad_dtype="float16"), "grad_dtype must be 'float32' or 'bfloat16', got 'float16'"),
        (dict(proj_type="up"), "proj_type must be one of std, reverse_std, right, left, full, got 'up'"),
        (dict(save_projected=1), "save_projected must be True or False, got 1"),
    ],
)
def test_prepare_model_refuses_and_converts_nothing(options: dict[str, Any], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=f"^{message}$"):
        qg.prepare_model(model, **{"rank": 4, **options})
    assert converted(model) == []


def test_a_model_that_is_a_linear_layer_is_refused() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="^the model is itself a linear layer: wrap it in a module$"):
        qg.prepare_model(model, 2, ".*", weight_bits=None)
    assert model.weight.requires_grad


def test_weights_that_are_not_finite_are_named() -> None:
    model = Model()
    model.layers[1].mlp[0].weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="^layers.1.mlp.0: .*finite"):
        qg.prepare_model(model, 4)


def test_a_float64_weight_is_named() -> None:
    with pytest.raises(ValueError, match="the weight of layers.0.attn.q_proj must be float32, .*got torch.float64"):
        qg.prepare_model(Model().double(), 4)


@pytest.mark.parametrize(
    ("module", "name", "reader"),
    [
        (nn.TransformerEncoderLayer(16, 2, 32), "linear1", "TransformerEncoderLayer"),
        (nn.MultiheadAttention(16, 2), "out_proj", "MultiheadAttention"),
    ],
)
def test_layers_whose_parent_reads_the_weight_are_refused(module: nn.Module, name: str, reader: str) -> None:
    model = nn.ModuleDict({"block": module, "fine": nn.Linear(16, 16)})
    with pytest.raises(
        ValueError, match=f"^block.{name} cannot be converted: its parent {reader} reads .weight itself"
    ):
        qg.prepare_model(model, 4, [name])
    qg.prepare_model(model, 4, ["fine"])


def test_only_nn_linear_itself_is_converted() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Special(16, 16), "b": nn.Linear(16, 16), "c": nn.LazyLinear(4)})
    qg.prepare_model(model, 4, ".*")
    assert converted(model) == ["b"] and type(model["a"]) is Special


def test_a_module_that_is_registered_twice_is_converted_once() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Tanh(), shared)})
    qg.prepare_model(model, 4, ".*")
    assert model["a"] is model["b"][1] and isinstance(model["a"], qg.QGaLoreLinear)
    groups = qg.param_groups(model)
    assert [len(g["params"]) for g in groups] == [1, 1]
    opt = qg.QGaLoreAdamW8bit(groups)
    x = torch.randn(5, 16)
    model["b"](model["a"](x)).sum().backward()
    opt.step()
    exported = qg.export_model(model)
    assert exported["a"] is exported["b"][1] and type(exported["a"]) is nn.Linear


def test_two_linear_layers_with_one_weight_become_one() -> None:
    model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in "ab"})
    model["b"].weight = model["a"].weight
    qg.prepare_model(model, 4, ".*")
    assert model["a"] is model["b"]


def test_a_weight_tied_to_something_else_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^lm_head cannot be converted: it shares its weight with embed \(Embedding\)$"
    ):
        qg.prepare_model(Model(tie=True), 4, ".*")
    qg.prepare_model(Model(tie=True), 4, "all-linear")
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in "ab"})
    model["b"].weight = model["a"].weight  # but each has its own bias
    with pytest.raises(ValueError, match=r"^a cannot be converted: it shares its weight with b \(Linear\)$"):
        qg.prepare_model(model, 4, ".*")


def test_preparing_twice_converts_what_is_left() -> None:
    model = Model()
    qg.prepare_model(model, 4, ["attn"])
    first = model.layers[0].attn["q_proj"]
    qg.prepare_model(model, 2, ["mlp"], weight_bits=None)
    assert model.layers[0].attn["q_proj"] is first and len(converted(model)) == 8
    with pytest.raises(ValueError, match="^rank must be 2, with which layers.0.mlp.0 was prepared, got 4$"):
        qg.param_groups(model, rank=4)
    groups = qg.param_groups(model, update_proj_gap=9)
    assert [g.get("rank") for g in groups] == [None, 4, 2] and groups[2]["update_proj_gap"] == 9
    qg.QGaLoreAdamW8bit(groups)


def test_train_mode_device_and_bias_are_taken_over() -> None:
    model = Model().eval()
    bias, weight = model.layers[0].mlp[0].bias, model.layers[0].mlp[0].weight
    qg.prepare_model(model, 4, weight_bits=None)
    layer = model.layers[0].mlp[0]
    assert layer.bias is bias and layer.weight is weight and not weight.requires_grad and not layer.training


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("mode", ["low_rank", "full"])
def test_param_groups_hold_every_trainable_parameter_once(bits: Any, mode: str) -> None:
    model = qg.prepare_model(Model(), 4, weight_bits=bits, grad_mode=mode)
    model.embed.weight.requires_grad_(False)
    regular, matrices = qg.param_groups(model, rank=4, update_proj_gap=50, scale=0.5, lr=0.1)
    assert matrices["rank"] == 4 and matrices["update_proj_gap"] == 50 and matrices["lr"] == 0.1
    assert set(regular) == {"params", "param_names"}
    assert len(matrices["params"]) == 8
    trainable = dict((n, p) for n, p in model.named_parameters() if p.requires_grad)
    for group in (regular, matrices):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert trainable.pop(name) is parameter
    assert not trainable
    opt = qg.QGaLoreAdamW8bit([regular, matrices], lr=0.01)
    start = {n: p.clone() for n, p in qg.export_model(model).named_parameters()}
    model(torch.randint(20, (3, 5))).square().sum().backward()
    opt.step()
    for name, parameter in qg.export_model(model).named_parameters():
        assert torch.equal(parameter, start[name]) == (name == "embed.weight"), name


def test_param_groups_refuses() -> None:
    with pytest.raises(ValueError, match="^the model has no trainable prepared layer: call prepare_model first$"):
        qg.param_groups(Model())
    model = qg.prepare_model(Model(), 4)
    with pytest.raises(ValueError, match="^rank must be 4, with which layers.0.attn.q_proj was prepared, got 8$"):
        qg.param_groups(model, rank=8)
    with pytest.raises(ValueError, match="^proj_type must be 'std', with which .* was prepared, got 'right'$"):
        qg.param_groups(model, proj_type="right")


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
@pytest.mark.parametrize("mode", ["low_rank", "full"])
def test_param_groups_carry_the_type_of_the_layers(proj_type: str, mode: str) -> None:
    model = qg.prepare_model(Model(), 4, proj_type=proj_type, grad_mode=mode, weight_bits=None)
    groups = qg.param_groups(model, update_proj_gap=9)
    assert [g.get("proj_type") for g in groups] == [None] + [proj_type] * (len(groups) - 1) and len(groups) > 1
    again = qg.param_groups(model, update_proj_gap=9, proj_type=proj_type)
    assert [g.get("proj_type") for g in again] == [g.get("proj_type") for g in groups]
    with pytest.raises(ValueError, match=f"^proj_type must be '{proj_type}', with which .* was prepared, got 'up'$"):
        qg.param_groups(model, proj_type="up")


def test_types_get_groups_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12))
    qg.prepare_model(model, 8, ["0"], proj_type="full")
    qg.prepare_model(model, 8, ["1"], proj_type="left")
    groups = qg.param_groups(model)
    kinds = [(g["rank"], g["proj_type"], g["param_names"]) for g in groups[1:]]
    assert kinds == [(8, "full", ["0.coordinates"]), (8, "left", ["1.coordinates"])]
    assert [tuple(g["params"][0].shape) for g in groups[1:]] == [(8, 8), (8, 16)]


def test_clipped_ranks_get_groups_of_their_own() -> None:
    model = qg.prepare_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(3, 16)), 8, ["0", "1", "2"])
    groups = qg.param_groups(model, rank=8)
    assert [g.get("rank") for g in groups] == [None, 8, 3]
    qg.QGaLoreAdamW8bit(groups)


def test_optimizer_refuses_a_rank_that_is_not_the_layer_s() -> None:
    model = qg.prepare_model(Model(), 4)
    with pytest.raises(ValueError, match="^rank must be 4, with which .*layers.0.attn.q_proj.* was prepared, got 6$"):
        qg.QGaLoreAdamW8bit([{"params": [model.layers[0].attn["q_proj"].leaf], "rank": 6}])
    with pytest.raises(ValueError, match="is the leaf of a low-rank layer: it needs a group with a rank"):
        qg.QGaLoreAdamW8bit(model.parameters())


# ---------------------------------------------------------------- export and counting


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("mode", ["low_rank", "full"])
def test_export_is_an_ordinary_model_with_the_same_outputs(bits: Any, mode: str) -> None:
    plain = Model(tie=True)
    model = qg.prepare_model(copy.deepcopy(plain), 4, weight_bits=bits, grad_mode=mode)
    exported = qg.export_model(model)
    assert not converted(exported) and len(converted(model)) in (0, 8)
    assert list(exported.state_dict()) == list(plain.state_dict())
    assert exported.lm_head.weight is exported.embed.weight is not model.embed.weight
    assert all(type(p) is nn.Parameter and p.requires_grad for p in exported.parameters())
    assert not any("_q_galore" in vars(m) for m in exported.modules())
    tokens = torch.randint(20, (3, 5))
    assert torch.equal(exported(tokens), model(tokens))
    if bits is None:
        assert torch.equal(exported(tokens), plain(tokens))
    half = qg.export_model(model, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert model.embed.weight.dtype == torch.float32


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("mode", ["low_rank", "full"])
def test_num_parameters_counts_what_the_leaves_stand_for(bits: Any, mode: str) -> None:
    plain = Model(tie=True)
    expected = sum(p.numel() for p in plain.parameters())
    assert qg.num_parameters(plain) == expected
    model = qg.prepare_model(plain, 4, weight_bits=bits, grad_mode=mode)
    assert qg.num_parameters(model) == qg.num_parameters(model, trainable_only=True) == expected
    model.embed.weight.requires_grad_(False)
    assert qg.num_parameters(model, trainable_only=True) == expected - 320
    assert qg.num_parameters(model) == expected


def test_a_whole_model_learns_in_every_mode() -> None:
    tokens = torch.randint(20, (8, 12), generator=torch.Generator().manual_seed(0))
    for options in (dict(), dict(weight_bits=None), dict(grad_mode="full"), dict(weight_bits=None, grad_mode="full")):
        torch.manual_seed(0)
        model = qg.prepare_model(Model(32), 8, **options)
        opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=10, scale=1.0), lr=0.01)
        losses = []
        for _ in range(30):
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], options


@pytest.mark.parametrize(("bits", "mode"), [(8, "low_rank"), (None, "low_rank"), (8, "full"), (None, "full")])
def test_frozen_layers_stay_frozen(bits: Any, mode: str) -> None:
    model = Model()
    model.layers[0].requires_grad_(False)
    qg.prepare_model(model, 4, weight_bits=bits, grad_mode=mode)
    frozen = model.layers[0].mlp[0]
    leaf = frozen.leaf if isinstance(frozen, qg.QGaLoreLinear) else frozen.weight
    assert not leaf.requires_grad and not frozen.bias.requires_grad
    groups = qg.param_groups(model)
    names = [name for group in groups for name in group["param_names"]]
    assert len(groups[1]["params"]) == 4 and not any(name.startswith("layers.0.") for name in names)
    x = torch.randn(3, 16, requires_grad=True)
    frozen(x).sum().backward()  # without an optimizer
    assert leaf.grad is None and x.grad is not None and x.grad.any()
    before = [p.clone() for p in qg.export_model(model).layers[0].parameters()]
    opt = qg.QGaLoreAdamW8bit(groups, lr=0.1)
    model(torch.randint(20, (3, 5))).square().sum().backward()
    opt.step()
    after = list(qg.export_model(model).layers[0].parameters())
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("bits", [8, None])
def test_a_layer_that_is_refused_leaves_the_whole_model_as_it_was(bits: Any) -> None:
    model = Model()
    model.layers[1].mlp[0].double()
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="^the weight of layers.1.mlp.0 must be float32"):
        qg.prepare_model(model, 4, weight_bits=bits)
    assert converted(model) == [] and {n: (p, p.requires_grad) for n, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: nn.utils.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ],
)
@pytest.mark.parametrize("target", ["all-linear", ["mlp"], r".*\.mlp\..*"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_computed_weights_are_refused(wrap: Any, target: Any) -> None:
    model = Model()
    wrap(model.layers[1].mlp[2])
    with pytest.raises(ValueError, match="^layers.1.mlp.2 cannot be converted: its weight or bias is computed from"):
        qg.prepare_model(model, 4, target)
    assert converted(model) == []
    qg.prepare_model(model, 4, ["attn"])


def test_hooks_are_carried_over_and_still_removable() -> None:
    model, calls = Model(), []
    linear = model.layers[0].mlp[0]
    handles = [
        linear.register_forward_pre_hook(lambda m, args: calls.append("pre")),
        linear.register_forward_hook(lambda m, args, kwargs, out: calls.append("forward"), with_kwargs=True),
        linear.register_full_backward_pre_hook(lambda m, grads: calls.append("backward pre")),
        linear.register_full_backward_hook(lambda m, a, b: calls.append("backward")),
    ]
    qg.prepare_model(model, 4, grad_mode="full")
    model(torch.randint(20, (3, 5))).sum().backward()
    assert calls == ["pre", "forward", "backward pre", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.randint(20, (3, 5))).sum().backward()
    assert len(calls) == 4
    other = Model()
    other.layers[0].mlp[0].register_state_dict_post_hook(lambda *args: None)
    with pytest.raises(ValueError, match="^layers.0.mlp.0 cannot be converted: it has a state dict hook"):
        qg.prepare_model(other, 4)


def test_the_decoded_weight_of_a_low_rank_layer_cannot_be_assigned() -> None:
    layer = qg.prepare_model(Model(), 4).layers[0].mlp[0]
    for value in (nn.Parameter(torch.zeros(32, 16)), torch.zeros(32, 16)):
        with pytest.raises(RuntimeError, match=r"^the INT8 weight of layers.0.mlp.0 cannot be .*set_weight\(tensor\)$"):
            layer.weight = value
    assert torch.equal(layer.weight, layer.dequantize())

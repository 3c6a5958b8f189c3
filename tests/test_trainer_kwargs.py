"""What trainer_kwargs makes of a model, of TrainingArguments and of options; nothing is trained here."""

from __future__ import annotations

import dataclasses
import doctest
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification, Trainer

import q_galore_torch as qg
from q_galore_torch.integrations import transformers as integration
from q_galore_torch.integrations.transformers import parse_optim_args, trainer_kwargs
from q_galore_torch.utils.quantization import prepare_model_for_int8_training
from trainer_support import RANK, SHAPE, arguments, bert, int8, llama, roberta


def made(model: Any, args: Any = None, **options: Any) -> dict[str, Any]:
    """The keyword arguments of the optimizer."""
    kind, keywords = trainer_kwargs(model, args, **options)["optimizer_cls_and_kwargs"]
    assert kind is qg.QGaLoreAdamW8bit
    return keywords


def names_of(groups: list[dict[str, Any]], decays: bool) -> set[str]:
    return {n for g in groups if (g.get("weight_decay") != 0.0) == decays for n in g["param_names"]}


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("network", [llama, bert])
def test_groups_decay_what_the_trainer_decays(network: Any, tmp_path: Path) -> None:
    """The reference are the Trainer's own two groups of the unprepared model."""
    model, args = network(), arguments(tmp_path, weight_decay=0.1)
    own = Trainer(model=model, args=args).create_optimizer().param_groups
    name_of = {id(p): name for name, p in model.named_parameters()}
    decays, others = ({name_of[id(p)] for p in group["params"]} for group in own)
    float_groups = made(model, args, rank=RANK, target_modules="all-linear")["params"]
    assert names_of(float_groups, True) == decays and names_of(float_groups, False) == others
    groups = made(int8(network()), args)["params"]
    leaves = {name.replace("coordinates", "weight") for name in names_of(groups, True)}
    assert leaves == decays and names_of(groups, False) == others


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    groups = made(model, lr=1e-3, rank=RANK, target_modules="all-linear")["params"]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_groups_of_float_model_project_what_target_modules_names() -> None:
    groups = made(llama(), lr=1e-3, rank=RANK, target_modules=["mlp"], update_proj_gap=50, scale=1)["params"]
    projected = [group for group in groups if "rank" in group]
    assert [len(group["params"]) for group in projected] == [6]
    assert all(".mlp." in name for name in projected[0]["param_names"])
    assert {key: projected[0][key] for key in ("rank", "update_proj_gap", "scale")} == {
        "rank": RANK,
        "update_proj_gap": 50,
        "scale": 1,
    }


def test_groups_of_float_model_default_to_attention_and_mlp() -> None:
    groups = made(llama(), lr=1e-3, rank=RANK)["params"]
    named = [name for group in groups if "rank" in group for name in group["param_names"]]
    assert len(named) == 14 and all("attn" in name or "mlp" in name for name in named)


def test_groups_of_tied_linear_layers_hold_their_weight_once() -> None:
    model = bert()
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    layers[1].intermediate.dense.bias = layers[0].intermediate.dense.bias
    keywords = made(model, lr=1e-3, rank=RANK, target_modules="all-linear")
    assert len(qg.QGaLoreAdamW8bit(**keywords).param_groups) == 3


@pytest.mark.parametrize(("rank", "held"), [(RANK, RANK), (1000, 64)])
def test_groups_of_layers_that_were_prepared_without_a_rank(rank: int, held: int) -> None:
    """By the public code's name, which has no rank; one beyond the shorter side is clipped."""
    model, settings = llama(), SimpleNamespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
    prepare_model_for_int8_training(model, settings, ["q_proj", "up_proj"])
    groups = made(model, lr=1e-3, rank=rank)["params"]
    assert [(len(group["params"]), group["rank"]) for group in groups if "rank" in group] == [(4, held)]


def test_model_is_left_as_it_is() -> None:
    """A float model may be given twice with different settings."""
    model = llama()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    made(model, lr=1e-3, rank=4)
    made(model, lr=1e-3, rank=RANK)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


# ---------------------------------------------------------------- where settings come from


def test_settings_come_from_args(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=3e-4, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    keywords = made(int8(llama()), args)
    del keywords["params"]
    assert keywords == {"lr": 3e-4, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-6}


def test_settings_without_args_are_those_of_default_args(tmp_path: Path) -> None:
    alone = made(int8(llama()), lr=1e-3)
    assert alone["lr"] == 1e-3 and alone["weight_decay"] == arguments(tmp_path).weight_decay


def test_settings_may_come_as_keywords_beside_default_args(tmp_path: Path) -> None:
    args = dataclasses.replace(arguments(tmp_path), learning_rate=5e-5)
    keywords = made(int8(llama()), args, lr=2e-3, weight_decay=0.3, seed=5)
    assert (keywords["lr"], keywords["weight_decay"], keywords["seed"]) == (2e-3, 0.3, 5)


def test_settings_of_galore_in_args_mean_what_they_meant(tmp_path: Path) -> None:
    """The arguments of the Trainer's own GaLore, unchanged."""
    args = arguments(
        tmp_path, optim="galore_adamw", optim_target_modules=["mlp"], optim_args="rank=4, update_proj_gap=100, scale=2"
    )
    optimizer = Trainer(model=(model := llama()), args=args, **trainer_kwargs(model, args)).create_optimizer()
    (group,) = [group for group in optimizer.param_groups if group["rank"] is not None]
    assert (group["rank"], group["update_proj_gap"], group["scale"], len(group["params"])) == (4, 100, 2.0, 6)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ([r".*.attn.*", r".*.mlp.*"], 14),
        ([r"model\.layers\.1\..*", "0.mlp"], 10),
        ("all_linear", 14),
        (r".*\.q_proj", 2),
    ],
    ids=str,
)
def test_target_modules_of_galore_in_args_mean_what_they_meant(targets: Any, count: int, tmp_path: Path) -> None:
    """The lists of expressions in the Trainer's own examples matched nothing here."""
    args = arguments(tmp_path, optim="galore_adamw", optim_target_modules=targets, optim_args="rank=4")
    groups = trainer_kwargs(llama(), args)["optimizer_cls_and_kwargs"][1]["params"]
    assert sum(len(group["params"]) for group in groups if group.get("rank")) == count


def test_optim_args_reach_constructor_and_groups_as_numbers() -> None:
    model = int8(llama())
    text = "update_proj_gap=20, quant_n_bit=8, betas=(0.9, 0.95), weight_decay=0.1, rank=8, norm_growth_limit=None"
    optimizer = qg.QGaLoreAdamW8bit(**made(model, lr=1e-3, optim_args=text))
    group = optimizer.param_groups[-1]
    assert (group["update_proj_gap"], group["proj_format"], group["betas"]) == (20, "int8", (0.9, 0.95))
    assert group["weight_decay"] == 0.1 and optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("", {}),
        ("rank=128, update_proj_gap=200, scale=0.25", {"rank": "128", "update_proj_gap": "200", "scale": "0.25"}),
        ("a=(1, 2),b=None,c=True,d=False", {"a": ("1", "2"), "b": None, "c": True, "d": False}),
        (" proj_type = std ", {"proj_type": "std"}),
    ],
)
def test_optim_args_are_parsed(text: str, parsed: dict[str, Any]) -> None:
    assert parse_optim_args(text) == parsed


def classifier(kind: Any) -> Any:
    return kind(LlamaConfig(vocab_size=96, pad_token_id=0, **SHAPE))


@pytest.mark.parametrize(
    ("network", "steps", "accepts", "warned"),
    [
        (bert, 4, None, True),
        (roberta, 4, None, True),
        (llama, 4, None, False),
        (lambda: classifier(LlamaForSequenceClassification), 4, None, True),
        (lambda: classifier(LlamaForTokenClassification), 4, None, True),
        (bert, 1, None, False),
        (bert, 4, False, False),
        (bert, 4, True, False),
    ],
)
def test_loss_that_ignores_its_keywords_is_warned_of(
    network: Any, steps: int, accepts: bool | None, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That the losses are what is said here is in test_trainer.py."""
    model = int8(network())
    if accepts is not None:
        model.accepts_loss_kwargs = accepts
    trainer_kwargs(model, arguments(tmp_path, gradient_accumulation_steps=steps))
    assert (
        "seems to ignore num_items_in_batch: its loss and gradients would be 4 times too large" in caplog.text
    ) == warned


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank", "must be 'key=value, key=value, ...', got 'rank' in 'rank'"),
        ("rank=8,,scale=1", "got '' in"),
        ("rank=", "got 'rank='"),
        ("rank=8,rank=9", "has rank twice"),
    ],
)
def test_optim_args_that_cannot_be_read_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_optim_args(text)


def test_optim_args_that_are_no_string_are_refused() -> None:
    with pytest.raises(TypeError, match="optim_args must be a string, got dict"):
        trainer_kwargs(int8(llama()), lr=1e-3, optim_args={"scale": 1})  # type: ignore[arg-type]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # model, arguments, keywords
    ({"optim": "adafactor"}, {}, "args.optim='adafactor' asks for another optimizer: leave it out"),
    ({"optim": "galore_adamw_layerwise"}, {}, "args.optim='galore_adamw_layerwise' updates in the backward pass"),
    ({"learning_rate": 1e-2}, {"lr": 1e-3}, "lr=0.001 and args.learning_rate=0.01 differ: give one of them"),
    ({"adam_beta2": 0.95}, {"betas": (0.9, 0.9)}, "betas=(0.9, 0.9) and args.adam_beta1 and args.adam_beta2="),
    ({"weight_decay": 0.1}, {"optim_args": "weight_decay=0.2"}, "weight_decay='0.2' and args.weight_decay=0.1 differ"),
    ({"optim_args": "scale=1"}, {"optim_args": "scale=2"}, "optim_args='scale=2' and args.optim_args='scale=1' differ"),
    ({}, {"scale": 1, "optim_args": "scale=1"}, "scale is given twice: 1, and '1' in optim_args"),
    ({}, {"optim_args": "galore_scale=1"}, "unknown group option galore_scale='1'; allowed: "),
    ({}, {"optim_args": "update_proj_gap=often"}, "update_proj_gap must be an integer in [1, 2**31), got 'often'"),
    ({}, {"amsgrad": True}, "amsgrad=True is not supported"),
    ({}, {"rank": 4}, "rank must be 8, with which model.layers.0.self_attn.q_proj was prepared, got 4"),
    ({}, {"target_modules": ["mlp"]}, "target_modules=['mlp'] comes too late: the model is prepared already"),
    ({"optim_target_modules": ["mlp"]}, {}, "target_modules=['mlp'] comes too late"),
]


@pytest.mark.parametrize(("in_args", "options", "message"), REFUSED)
def test_settings_that_would_be_ignored_are_refused(
    in_args: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    args = arguments(tmp_path, **{"learning_rate": 5e-5, **in_args})
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_kwargs(int8(llama()), args, **options)


def test_float_model_without_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be given for a model that is not prepared, got None"):
        trainer_kwargs(llama(), lr=1e-3)


def test_missing_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="lr must be given where args is not"):
        trainer_kwargs(int8(llama()))


def test_frozen_targets_are_refused() -> None:
    model = llama()
    model.model.requires_grad_(False)
    with pytest.raises(ValueError, match="matches no layer whose weight requires a gradient"):
        trainer_kwargs(model, lr=1e-3, rank=RANK)


@pytest.mark.parametrize(("name", "value"), [("fsdp", ["full_shard"]), ("deepspeed", "zero.json")])
def test_sharding_engines_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"args.{name} is not supported: start the same script with torchrun"):
        trainer_kwargs(int8(llama()), args)


def test_data_parallel_of_int8_layers_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="would copy the model to 2 GPUs"):
        trainer_kwargs(int8(llama()), args)


def test_arguments_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="args must be the Trainer's TrainingArguments, got dict"):
        trainer_kwargs(int8(llama()), {"learning_rate": 1e-3})


def test_model_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        trainer_kwargs(llama, lr=1e-3)  # type: ignore[arg-type]


def test_refusal_changes_nothing() -> None:
    model = int8(llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="unknown group option"):
        trainer_kwargs(model, lr=1e-3, no_such_option=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


# ---------------------------------------------------------------- an extra


def test_transformers_is_imported_only_when_called() -> None:
    code = "import sys, q_galore_torch.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_examples_of_the_module_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(integration)
    assert failed == 0 and tried > 5

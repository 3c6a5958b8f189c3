"""examples/run_glue.py: what the flags of a method become."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from glue.flags import parse_flags  # noqa: E402
from glue.methods import build_optimizer, method_name, target_modules  # noqa: E402
from pretrain.errors import UsageError  # noqa: E402
from q_galore_torch import QGaLoreAdamW8bit, QGaLoreLinear  # noqa: E402

BASE = ["--model_name_or_path", "roberta-base", "--task_name", "mrpc"]
GALORE = [*BASE, "--enable_galore", "--lora_all_modules"]


class Layer(nn.Module):
    """The linear layers of a BERT layer, under their names."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Linear(16, 16))
        self.attention = nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(16, 16)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(16, 32)})
        self.output = nn.ModuleDict({"dense": nn.Linear(32, 16)})
        self.norm = nn.LayerNorm(16)


def small_model() -> nn.Module:
    return nn.ModuleDict({"embedding": nn.Embedding(10, 16), "layer": Layer(), "classifier": nn.Linear(16, 2)})


@pytest.mark.parametrize(
    ("flags", "name", "proj_format", "block"),
    [
        ([], "GaLore, rank 4, float32", "float32", 256),
        (["--proj_format", "int4"], "GaLore, rank 4, int4 (block 256)", "int4", 256),
        (["--proj_format", "nf4", "--proj_block", "128"], "GaLore, rank 4, nf4 (block 128)", "nf4", 128),
        (["--proj_quantize_type", "none"], "GaLore, rank 4, float32", "float32", 256),
        (["--proj_quantize_type", "4bit"], "GaLore, rank 4, fp4 (block 64)", "fp4", 64),
        (["--quantize_type", "8bit"], "GaLore, rank 4, fp8 (whole tensor)", "fp8", 0),
        (["--quantize_type", "8bit_blockwise"], "GaLore, rank 4, fp8 (block 4096)", "fp8", 4096),
        (
            ["--proj_quantize_type", "8bit_blockwise", "--proj_quantize_blocksz", "512"],
            "GaLore, rank 4, fp8 (block 512)", "fp8", 512,
        ),
        (
            ["--weight_quant", "--proj_format", "int4"], "Q-GaLore, INT8 weights, rank 4, int4 (block 256)", "int4", 256
        ),
    ],
)  # fmt: skip
def test_method_has_the_projector_that_the_flags_name(
    flags: list[str], name: str, proj_format: str, block: int
) -> None:
    args = parse_flags([*GALORE, "--lora_r", "4", *flags])
    optimizer = build_optimizer(small_model(), args, seed=0)
    groups = [group for group in optimizer.param_groups if group["rank"] is not None]
    assert [(group["proj_format"], group["proj_block"], group["rank"]) for group in groups] == [(proj_format, block, 4)]
    assert method_name(args, optimizer) == name and len(groups[0]["params"]) == 6


def test_method_without_galore_is_torchs_adamw() -> None:
    args = parse_flags([*BASE, "--weight_decay", "0.1"])
    optimizer = build_optimizer(small_model(), args, seed=0)
    assert type(optimizer) is torch.optim.AdamW and method_name(args, optimizer) == "AdamW"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])


def test_method_galore_is_as_published() -> None:
    args = parse_flags([*GALORE, "--galore_scale", "2", "--update_proj_gap", "9", "--weight_decay", "0.1"])
    optimizer = build_optimizer(small_model(), args, seed=0)
    *regular, group = optimizer.param_groups
    assert (group["subspace"], group["lazy_rule"], group["moments_dtype"]) == ("svd", "fixed", "float32")
    assert (group["scale"], group["update_proj_gap"], group["weight_decay"]) == (2.0, 9, 0.1)
    assert [other["weight_decay"] for other in regular] == [0.1, 0.0]


@pytest.mark.parametrize("flags", [[], ["--weight_quant"]])
def test_method_has_every_parameter_once(flags: list[str]) -> None:
    model = small_model()
    optimizer = build_optimizer(model, parse_flags([*GALORE, *flags]), seed=0)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_method_has_a_shared_weight_once() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key")})
    model["key"].weight = model["query"].weight
    optimizer = build_optimizer(model, parse_flags(GALORE), seed=0)
    sizes = [len(group["params"]) for group in optimizer.param_groups if group["rank"] is not None]
    assert sizes == [1] and sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_method_with_int8_weights_converts_the_matrices_alone() -> None:
    model = small_model()
    optimizer = build_optimizer(model, parse_flags([*GALORE, "--weight_quant"]), seed=0)
    assert isinstance(optimizer, QGaLoreAdamW8bit)
    converted = [name for name, module in model.named_modules() if isinstance(module, QGaLoreLinear)]
    assert len(converted) == 6 and all("layer" in name for name in converted)
    assert optimizer.param_groups[-1]["moments_dtype"] == "dynamic8"


@pytest.mark.parametrize(
    ("names", "flags", "expected"),
    [
        (["query", "key", "value"], [], ["query"]),
        (["q_proj", "mlp"], ["--lora_all_modules"], None),
        (["q_lin", "ffn"], [], ["q_lin", "v_lin"]),
        (["anything"], ["--target_modules", "any"], ["any"]),
    ],
)
def test_method_targets_are_those_of_the_models_family(
    names: list[str], flags: list[str], expected: list[str] | None
) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    found = target_modules(model, parse_flags([*BASE, "--enable_galore", *flags]))
    llama = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert found == (llama if expected is None else expected)


@pytest.mark.parametrize(
    ("kind", "sizes", "count"),
    [
        ("Albert", {"embedding_size": 8}, 6),
        ("Bart", {"encoder_layers": 1, "decoder_layers": 1}, 16),
        ("Bert", {}, 12),
        ("DistilBert", {}, 12),
        ("Llama", {}, 14),
        ("MPNet", {}, 12),
        ("OPT", {"word_embed_proj_dim": 16}, 12),
        ("Roberta", {}, 12),
    ],
)
def test_method_projects_all_matrices_of_attention_and_mlp(kind: str, sizes: dict[str, int], count: int) -> None:
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9, "pad_token_id": 0}
    if kind == "Bart":  # which takes one number of layers only
        common = {name: value for name, value in common.items() if name != "num_hidden_layers"}
    config = getattr(transformers, f"{kind}Config")(**common, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    targets = target_modules(model, parse_flags([*BASE, "--enable_galore", "--lora_all_modules"]))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sum(any(part in name for part in targets) for name in names) == count
    assert not any(part in name for part in targets for name in names if "classif" in name or "pooler" in name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--proj_format", "int4", "--quantize_type", "8bit"], "proj_format and quantize_type describe"),
        (["--quantize_blocksz", "64"], "quantize_blocksz=64 needs quantize_type"),
        (["--proj_type", "sideways"], "proj_type must be"),
        (["--weight_quant", "--proj_type", "sideways"], "proj_type"),
    ],
)
def test_method_that_the_package_refuses_is_one_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_optimizer(small_model(), parse_flags([*GALORE, *flags]), seed=0)


def test_method_without_a_layer_to_project_is_refused() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    with pytest.raises(UsageError, match="no linear layer of the model matches the known names; there are first"):
        build_optimizer(model, parse_flags(GALORE), seed=0)


def test_method_target_that_names_no_layer_is_refused() -> None:
    model = nn.ModuleDict({"query": nn.Linear(2, 2)})
    with pytest.raises(UsageError, match="matches --target_modules kee vlue; there are query"):
        target_modules(model, parse_flags([*BASE, "--enable_galore", "--target_modules", "query", "kee", "vlue"]))

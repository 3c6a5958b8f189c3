"""The planner: its parts against what real training allocates, the published figures, what it reads and refuses."""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch import __main__ as command_line
from q_galore_torch import memory
from q_galore_torch.memory import MemoryPlan, plan_memory, what_fits
from q_galore_torch.nn.leaf import ZeroLeaf
from q_galore_torch.shapes import read_shape

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
from live_memory import trained  # noqa: E402

TINY = dict(vocab_size=320, hidden_size=96, intermediate_size=260, num_hidden_layers=2, num_attention_heads=4)
FEW = 0.005  # what a prediction may be off by


class Block(nn.Module):
    """A decoder layer by its matrices; what it computes does not matter here."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.self_attn, name, nn.Linear(hidden, hidden, bias=False))
        for name in ("gate_proj", "up_proj"):
            setattr(self.mlp, name, nn.Linear(hidden, inner, bias=False))
        self.mlp.down_proj = nn.Linear(inner, hidden, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        h, a, m = self.input_layernorm(x), self.self_attn, self.mlp
        x = x + a.o_proj(torch.sigmoid(a.q_proj(h)) * a.k_proj(h) + a.v_proj(h))
        h = self.post_attention_layernorm(x)
        return x + m.down_proj(F.silu(m.gate_proj(h)) * m.up_proj(h))


class Model(nn.Module):
    """Parameters of a LLaMA, some kilobytes of them."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        blocks = (Block(hidden, config["intermediate_size"]) for _ in range(config["num_hidden_layers"]))
        self.model.layers = nn.ModuleList(blocks)
        self.model.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


# ---------------------------------------------------------------- measuring


def taken_by(
    model: nn.Module, optimizer: qg.QGaLoreAdamW8bit, passes: int = 1, per_layer: dict[str, Any] | None = None
) -> int:
    """Peak bytes of ``UPDATES`` updates."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randint(0, TINY["vocab_size"], (8, 12), generator=generator)

    return trained(model, optimizer, draw, UPDATES, passes, per_layer)


GROUP = dict(update_proj_gap=4)
UPDATES = 18  # first bases come in the first 8, and then everything there is within two gaps
PREPARE = ("weight_bits", "grad_mode", "grad_dtype", "proj_type", "group_size")
CONSTRUCTOR = ("moments_dtype", "min_8bit_size")


def built(dtype: str, **options: Any) -> tuple[nn.Module, qg.QGaLoreAdamW8bit]:
    """A prepared model and its optimizer."""
    gc.collect()  # the shared zeros are as long as the longest leaf of any model that still lives
    model = Model(TINY).to(getattr(torch, dtype))
    prepare = {key: options.pop(key) for key in PREPARE if key in options}
    constructor = {key: options.pop(key) for key in CONSTRUCTOR if key in options}
    qg.prepare_model(model, 16, **prepare)
    groups = qg.param_groups(model, **{**GROUP, **options})
    return model, qg.QGaLoreAdamW8bit(groups, lr=1e-3, **constructor)


MODES: dict[str, dict[str, Any]] = {
    "INT8 weights": {},
    "bfloat16 R": {"grad_dtype": "bfloat16"},
    "float weights": {"weight_bits": None},
    "float32 beside INT8": {"dtype": "float32"},
    "float32 moments": {"moments_dtype": "float32"},
    "small moments in 8 bits": {"min_8bit_size": 0},
    "nf4": {"proj_format": "nf4"},
    "float32 bases": {"proj_format": "float32"},
    "one scale a basis": {"proj_format": "int8", "proj_block": 0},
    "small groups": {"group_size": 64},
    "both sides": {"proj_type": "full"},
    "right": {"proj_type": "right"},
    "random bases": {"subspace": "random"},
    "fixed gap": {"lazy_rule": "fixed"},
    "norm limit": {"norm_growth_limit": 1.1},
    "full gradients, INT8": {"grad_mode": "full"},
    "full gradients, floats": {"grad_mode": "full", "weight_bits": None},
    "upstream": {"grad_mode": "full", "lazy_rule": "upstream", "dtype": "float32"},
}


@pytest.mark.parametrize("mode", MODES)
def test_ordinary_updates_take_what_was_planned(mode: str) -> None:
    options = dict(MODES[mode])
    dtype = options.pop("dtype", "bfloat16")
    planned = plan_memory(TINY, 16, dtype=dtype, **GROUP, **options)
    model, optimizer = built(dtype, **options)
    assert taken_by(model, optimizer) == pytest.approx(planned.tracked, rel=FEW)


def test_accumulation_takes_no_more_than_one_micro_batch() -> None:
    planned = plan_memory(TINY, 16, accumulation=3, **GROUP)
    assert planned == plan_memory(TINY, 16, **GROUP) == plan_memory(TINY, 16, clipping="global", **GROUP)
    assert taken_by(*built("bfloat16"), passes=3) == pytest.approx(planned.tracked, rel=FEW)


PER_LAYER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one micro-batch": ({}, {}),
    "full gradients": ({"grad_mode": "full"}, {}),
    "plain floats": ({"grad_mode": "full", "weight_bits": None}, {}),
    "last norm": ({}, {"clipping": "last_norm"}),
    "global norm": ({}, {"clipping": "global"}),
    "accumulation": ({"grad_dtype": "bfloat16"}, {"accumulation": 2}),
    "accumulation, full gradients": ({"grad_mode": "full"}, {"accumulation": 2}),
}


@pytest.mark.parametrize("mode", PER_LAYER)
def test_per_layer_updates_take_what_was_planned(mode: str) -> None:
    options, updates = PER_LAYER[mode]
    planned = plan_memory(TINY, 16, per_layer=True, **updates, **GROUP, **options)
    clipping = {"max_grad_norm": 1.0, "clip": updates["clipping"]} if "clipping" in updates else {}
    taken = taken_by(*built("bfloat16", **options), updates.get("accumulation", 1), clipping)
    assert taken == pytest.approx(planned.tracked, rel=FEW)


def test_parts_sum_to_the_peak_and_steady_is_without_refreshes() -> None:
    planned = plan_memory(TINY, 16, **GROUP)
    constant = planned.weights + planned.scales + planned.zero_leaf + planned.projectors
    constant += planned.moments + planned.schedule
    varying = planned.old_bases + planned.low_rank_gradients + planned.gradients + planned.stashes
    assert planned.tracked == constant + varying
    assert planned.total == planned.tracked + planned.activations
    assert planned.steady == planned.tracked - planned.old_bases - planned.stashes


# ---------------------------------------------------------------- published figures


def as_published(plan: MemoryPlan, scales: float) -> float:
    """GB of weights, state and gradients without what the paper does not have, at a share of our scales' bytes."""
    parts = plan.weights + plan.projectors + plan.moments + plan.low_rank_gradients + plan.gradients
    return (parts + scales * plan.scales) / 1e9


FOUR_BYTES = 4 / 6  # a group's scale and zero point there, of ours


@pytest.mark.parametrize(
    ("options", "scales", "figure"),
    [
        ({"per_layer": True, "proj_format": "int8"}, FOUR_BYTES, 12.14),  # INT4 kept as one byte a value
        ({"per_layer": True}, FOUR_BYTES, 11.67),
        ({"per_layer": True}, 1, 11.72),
        ({"grad_dtype": "bfloat16"}, FOUR_BYTES, 15.2),
        ({"grad_dtype": "bfloat16"}, 1, 15.2),
        ({"grad_dtype": "float32"}, FOUR_BYTES, 18.4),
    ],
)
def test_figures_of_7b_at_rank_1024(options: dict[str, Any], scales: float, figure: float) -> None:
    assert as_published(plan_memory("llama_7b", 1024, **options), scales) == pytest.approx(figure, abs=0.05)


def test_parts_of_7b_by_hand() -> None:
    """Every part of one plan from the formats: 32 layers of 4 (4096 x 4096) and 3 (11008 x 4096) matrices."""
    plan = plan_memory("7b", 1024, grad_dtype="bfloat16")
    matrices, other = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096
    norms, low_rank = 65 * 4096, 32 * 1024 * (4 * 4096 + 3 * 11008)
    assert plan.weights == matrices + 2 * (other + norms)
    assert plan.scales == matrices // 256 * 6
    assert plan.projectors == 224 * 1024 * (4096 // 2 + 16 * 3)
    # Norms have 4096 elements, no fewer than min_8bit_size.
    assert plan.moments == 2 * (low_rank + other + norms) * (1 + 4 / 256)
    assert plan.zero_leaf == 2 * 1024 * 11008
    assert (plan.low_rank_gradients, plan.gradients) == (2 * low_rank, 2 * (other + norms))
    assert plan.steady == sum(
        (plan.weights, plan.scales, plan.projectors, plan.moments, plan.zero_leaf, plan.schedule)
    ) + (plan.low_rank_gradients + plan.gradients)


# ---------------------------------------------------------------- models


def test_module_counts_as_its_config_and_is_left_alone() -> None:
    config = plan_memory(TINY, 16, dtype="float32")
    model = Model(TINY)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    found = plan_memory(model, 16)
    assert found.activations is None and found.total == found.tracked == config.tracked
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is old and torch.equal(old, copy) for name, (old, copy) in before.items())
    on_meta = Model(TINY).to("meta")
    assert plan_memory(on_meta, 16) == found
    qg.prepare_model(model, 16)
    optimizer = qg.QGaLoreAdamW8bit(qg.param_groups(model))
    leaves = [p for p in model.parameters() if isinstance(p, ZeroLeaf)]
    bindings = [leaf.binding for leaf in leaves]
    assert plan_memory(model) == plan_memory(model, 16) == found
    assert [leaf.binding for leaf in leaves] == bindings  # the layers still are lent this optimizer's projectors
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("mode", ["float weights", "full gradients, INT8", "full gradients, floats", "both sides"])
def test_prepared_module_counts_as_its_config(mode: str) -> None:
    options = MODES[mode]
    model = qg.prepare_model(Model(TINY).to(torch.bfloat16), 16, **options)
    leaves = {name: (p, type(p)) for name, p in model.named_parameters()}
    assert plan_memory(model).tracked == plan_memory(TINY, 16, **options).tracked
    assert {name: (p, type(p)) for name, p in model.named_parameters()} == leaves


def test_frozen_and_shared_weights_count_once() -> None:
    model = Model(TINY)
    model.lm_head.weight = model.model.embed_tokens.weight
    tied, apart = plan_memory(model, 16), plan_memory(Model(TINY), 16)
    numbers = TINY["vocab_size"] * TINY["hidden_size"]
    assert apart.weights - tied.weights == apart.gradients - tied.gradients == 4 * numbers
    assert tied.tracked == plan_memory({**TINY, "tie_word_embeddings": True}, 16, dtype="float32").tracked
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = plan_memory(model, 16)
    assert frozen.weights == tied.weights and tied.gradients - frozen.gradients == 4 * numbers
    assert tied.moments - frozen.moments == 2 * (numbers + 4 * numbers // 256)


def kept_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Distinct memory, weights and buffers aside, that the forward of an example's body keeps for its backward."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # a graph that held its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model(tokens)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("proj_type", ["std", "right", None])
def test_activations_of_the_examples_model(dtype: str, proj_type: str | None) -> None:
    """The estimate against saved-tensor hooks, logits and one weight aside; without a type nothing is projected."""
    from pretrain.model import LlamaConfig, LlamaForCausalLM

    shape, tokens = (320, 128, 344, 2, 4), torch.arange(128).view(2, 64)
    model = LlamaForCausalLM(LlamaConfig(*shape)).to(getattr(torch, dtype))
    options: dict[str, Any] = {"proj_type": proj_type} if proj_type else {"weight_bits": None, "grad_mode": "full"}
    qg.prepare_model(model, 16, **options)
    if proj_type:
        optimizer = qg.QGaLoreAdamW8bit(qg.param_groups(model))
        for _ in range(10):  # past the first bases, for which inputs are kept
            model(tokens).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    config = dict(zip(TINY, shape, strict=True))
    one, two = (plan_memory(config, 16, batch=b, tokens=64, dtype=dtype, **options).activations or 0 for b in (2, 4))
    logits = tokens.numel() * 320 * ((4 if dtype == "float32" else 2) + 8)
    assert two - one - logits == pytest.approx(kept_bytes(model, tokens), rel=0.05)


def test_activations_shrink_with_low_rank_products_and_checkpointing() -> None:
    tokens = 1024
    right = plan_memory("60m", 64, tokens=tokens, proj_type="right", activation_checkpointing=False)
    left = plan_memory("60m", 64, tokens=tokens, proj_type="left")
    assert left.activations and right.activations
    # q, k, v: 512 against 3 x 64; o: 0 (the attention keeps it) against 64; gate, up: 512 against 128; down: 1376.
    assert left.activations - right.activations == 8 * tokens * 2 * (512 - 192 - 64 + 512 - 128 + 1376 - 64)
    few = plan_memory("60m", 64, tokens=tokens, proj_type="left", activation_checkpointing=True)
    block = 16 * 512 + 2 * (4 * 512 + 3 * 1376 + 2 * 512 + 1376) + 4 * 10
    assert left.activations - (few.activations or 0) == tokens * (7 * block - 8 * 2 * 512)


# ---------------------------------------------------------------- configs


def test_names_files_and_dicts_say_the_same(tmp_path: Path) -> None:
    values = dict(zip(TINY, (32000, 512, 1376, 8, 8), strict=True), model_type="llama", rope_theta=1e4)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    plans = [plan_memory(config, 128) for config in ("60m", "llama_60m", "LLaMA-60M", values, str(file), file)]
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("name", ["60m", "130m", "350m", "1b", "7b"])
def test_known_sizes_are_those_of_the_examples(name: str) -> None:
    file = ROOT / "examples" / "configs" / f"llama_{name}.json"
    assert read_shape(file) == read_shape(name)


def test_fewer_heads_of_keys_and_values_make_smaller_matrices() -> None:
    shape = {**TINY, "num_key_value_heads": 1}
    less = plan_memory(TINY, 16).weights - plan_memory(shape, 16).weights
    assert less == 2 * 2 * (96 - 24) * 96  # k and v of two layers, one byte a weight


# ---------------------------------------------------------------- what fits


def test_what_fits_finds_the_largest_rank() -> None:
    config = dict(zip(TINY, (1000, 512, 1376, 2, 8), strict=True))
    for fit, (_, way) in zip(what_fits(config, 256, 0.03, tokens=16), memory._WAYS, strict=True):
        way = {"tokens": 16, **way}
        assert fit.plan == plan_memory(config, 256, **way) and fit.fits is (fit.plan.total <= 3e7)
        assert 0 < fit.largest_rank < 448 and fit.largest_rank % 64 == 0
        assert plan_memory(config, fit.largest_rank, **way).total <= 3e7
        assert plan_memory(config, fit.largest_rank + 64, **way).total > 3e7
    nothing, everything = (what_fits(config, 64, room) for room in (0.001, 100))
    assert {(fit.fits, fit.largest_rank) for fit in nothing} == {(False, 0)}
    assert {(fit.fits, fit.largest_rank) for fit in everything} == {(True, 512)}


def test_command_prints_the_plan_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["plan", "60m", "--rank", "128"]) == 0
    plain = capsys.readouterr().out
    assert plain == f"{plan_memory('60m', 128)}\n"
    words = "--batch 2 --tokens 512 --per-layer --activation-checkpointing --weight-bits none --proj-format nf4"
    assert command_line.main(["plan", "60m", "--rank", "128", *words.split(), "--gpu-memory", "0.35"]) == 0
    given: dict[str, Any] = dict(
        batch=2, tokens=512, activation_checkpointing=True, weight_bits=None, proj_format="nf4"
    )
    table, fits = capsys.readouterr().out.split("\n\n")
    assert table == str(plan_memory("60m", 128, per_layer=True, **given))
    header, *rows = fits.splitlines()
    assert header.split() == ["in", "0.35", "GB", "tracked", "total", "fits", "largest", "rank"]
    for row, fit in zip(rows, what_fits("60m", 128, 0.35, **given), strict=True):
        name, *figures = re.split(r" {2,}", row)
        assert name == fit.name
        assert [float(figure) for figure in figures[:2]] == pytest.approx(
            [fit.plan.tracked / 1e9, fit.plan.total / 1e9], abs=0.006
        )
        assert figures[2:] == ["yes" if fit.fits else "no", str(fit.largest_rank or "none")]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "8b"}, r"config must be one of '60m', '130m', .* or a JSON file, got '8b'"),
        (
            {"model": {**TINY, "model_type": "gpt2"}},
            r"model_type in the config must be one of 'llama', 'mistral', got 'gpt2'",
        ),
        ({"model": {**TINY, "attention_bias": True}}, r"attention_bias in the config must be False, got True"),
        ({"model": {**TINY, "head_dim": 32}}, r"head_dim in the config must be 24, got 32: give the model itself"),
        ({"model": {"vocab_size": 8, "hidden_size": 8}}, r"the config lacks intermediate_size, num_hidden_layers"),
        ({"model": {**TINY, "hidden_size": 9.5}}, r"hidden_size in the config must be an integer >= 1, got 9.5"),
        ({"model": {**TINY, "num_attention_heads": 7}}, r"must be a multiple of num_attention_heads=7, got 96"),
        ({"model": 7}, r"model must be a name, a path, a dict or an nn.Module, got int"),
        ({"rank": None}, r"rank must be given for a model that is not prepared, got None"),
        ({"rank": 0}, r"rank must be an integer >= 1, got 0"),
        ({"batch": 0}, r"batch must be an integer >= 1, got 0"),
        ({"tokens": 1.5}, r"tokens must be an integer >= 1, got 1.5"),
        ({"accumulation": True}, r"accumulation must be an integer >= 1, got True"),
        ({"clipping": "last_norm"}, r"clipping must be one of None, 'global' with per_layer=False, got 'last_norm'"),
        ({"clipping": "norm", "per_layer": True}, r"clipping must be one of None, 'global', .*, got 'norm'"),
        (
            {"clipping": "global", "per_layer": True, "grad_mode": "full"},
            r"clipping='global' refuses projected parameters",
        ),
        ({"dtype": "int8"}, r"dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        ({"weight_bits": 4}, r"weight_bits must be 8 or None, got 4"),
        ({"proj_format": "int3"}, r"proj_format must be .*, got 'int3'"),
        ({"ranks": 3}, r"unknown group option ranks=3"),
        ({"moments_dtype": "int8"}, r"moments_dtype must be .*, got 'int8'"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_memory(**{"model": TINY, "rank": 16, **arguments})


def test_what_a_module_has_cannot_be_given_again() -> None:
    model = Model(TINY)
    with pytest.raises(ValueError, match=r"dtype='float32' has no meaning for a module"):
        plan_memory(model, 16, dtype="float32")
    qg.prepare_model(model, 16)
    with pytest.raises(ValueError, match=r"weight_bits=8 has no meaning for a model that is prepared already"):
        plan_memory(model, weight_bits=8)
    with pytest.raises(ValueError, match=r"rank must be 16, with which .* was prepared, got 32"):
        plan_memory(model, 32)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_bad_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json (is not JSON|must hold one JSON object, got list)"):
        plan_memory(tmp_path / "config.json", 16)


@pytest.mark.parametrize("room", [0, -1.0, float("nan"), True, "16"])
def test_memory_is_a_positive_number(room: Any) -> None:
    with pytest.raises(ValueError, match=r"gpu_memory must be a number of GB > 0, got"):
        what_fits("60m", 64, room)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["60m"], f"the following arguments are required: --rank; {command_line._USAGE}"),
        (["60m", "--rank", "x"], f"argument --rank: invalid int value: 'x'; {command_line._USAGE}"),
        (
            ["60m", "--rank", "64", "--weight-bits", "x"],
            f"argument --weight-bits: invalid number of bits: 'x'; {command_line._USAGE}",
        ),
        (["60m", "--rank", "0"], "rank must be an integer >= 1, got 0"),
        (["60m", "--rank", "64", "--gpu-memory", "0"], "gpu_memory must be a number of GB > 0, got 0.0"),
    ],
)
def test_bad_command_line_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["plan", *words]) == 2
    assert capsys.readouterr().err == f"q_galore_torch: {sentence}\n"

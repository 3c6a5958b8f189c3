"""examples/run_glue.py: what parses, what the methods become, what is refused and how."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from glue.flags import REFUSED, build_parser, parse_flags  # noqa: E402
from glue.methods import build_optimizer, method_name, target_modules  # noqa: E402
from glue.results import append_run, markdown, read_runs, summarize, write_tables  # noqa: E402
from glue_support import EXAMPLES  # noqa: E402
from pretrain.errors import UsageError  # noqa: E402
from q_galore_torch import QGaLoreAdamW8bit, QGaLoreLinear  # noqa: E402

BASE = ["--model_name_or_path", "roberta-base", "--task_name", "mrpc"]
GALORE = [*BASE, "--enable_galore", "--lora_all_modules"]
# The example of GaLore's readme, and the defaults of its script.
README = """--model_name_or_path roberta-base --task_name mrpc --enable_galore --lora_all_modules --max_length 512
--seed=1234 --lora_r 4 --galore_scale 4 --per_device_train_batch_size 16 --update_proj_gap 500 --learning_rate 3e-5
--num_train_epochs 30 --output_dir results/ft/roberta_base/mrpc"""
DEFAULTS: dict[str, Any] = {
    "max_length": 128, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "learning_rate": 5e-5,
    "weight_decay": 0.0, "num_train_epochs": 3, "max_train_steps": None, "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear", "num_warmup_steps": 0, "lora_r": 8, "update_proj_gap": 50, "galore_scale": 1.0,
    "proj_type": "std", "enable_galore": False, "lora_all_modules": False, "pad_to_max_length": False,
}  # fmt: skip


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


# ---------------------------------------------------------------- flags


def test_flags_of_galores_readme_parse() -> None:
    args = parse_flags(README.split())
    assert (args.max_length, args.lora_r, args.galore_scale, args.update_proj_gap) == (512, 4, 4.0, 500)
    assert (args.all_seeds, args.learning_rate, args.num_train_epochs) == ([1234], 3e-5, 30)


def test_flags_have_the_original_defaults() -> None:
    args = parse_flags(BASE)
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS and args.all_seeds == [0]


def test_flags_of_several_seeds_are_kept_once_each() -> None:
    assert parse_flags([*BASE, "--seeds", "3", "1", "3"]).all_seeds == [3, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_name", "mrpc"], "required: --model_name_or_path"),
        (BASE[:2], "--task_name is missing, or --train_file and --validation_file"),
        ([*BASE, "--task_name", "squad"], "invalid choice: 'squad'"),
        ([*BASE, "--train_file", "a.csv"], "--train_file and --validation_file go together"),
        (
            [*BASE, "--train_file", "a.csv", "--validation_file", "b.csv", "--data_dir", "c"],
            "give --data_dir or --train",
        ),
        ([*BASE, "--train_file", "a.txt", "--validation_file", "b.csv"], "a.txt must end in .tsv, .csv, .json, .jsonl"),
        ([*BASE, "--seed", "1", "--seeds", "2"], "give --seed or --seeds, not both"),
        ([*BASE, "--seeds", "-1"], "--seeds must be at least 0, got -1"),
        ([*BASE, "--learning_rate", "0"], "--learning_rate must be above 0, got 0.0"),
        ([*BASE, "--learning_rate", "nan"], "--learning_rate must be above 0, got nan"),
        ([*BASE, "--max_length", "2"], "--max_length must be at least 3, got 2"),
        ([*BASE, "--num_train_epochs", "some"], "invalid int value: 'some'"),
        ([*BASE, "--galore_scale", "inf"], "--galore_scale must be finite"),
        ([*BASE, "--weight_quant"], "--weight_quant needs --enable_galore"),
        ([*BASE, "--proj_format", "int4"], "--proj_format needs --enable_galore"),
        ([*GALORE, "--proj_format", "int3"], "invalid choice: 'int3'"),
        ([*GALORE, "--target_modules", "dense"], "give --lora_all_modules or --target_modules, not both"),
        ([*BASE, "--no_save_model"], "need --output_dir"),
        ([*BASE, "--device", "tpu"], "is no device|must be cpu or cuda"),
        ([*BASE, "--lorar", "3"], "unrecognized arguments: --lorar 3"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_flags(flags)


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_flags_of_the_original_that_are_not_supported_say_what_to_do(flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag} is not supported: {REFUSED[flag]}"):
        parse_flags([*BASE, f"--{flag}", "x"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_flags_refuse_a_gpu_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="--device cuda: PyTorch finds no usable GPU"):
        parse_flags([*BASE, "--device", "cuda"])


def test_flags_refuse_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="works in one process"):
        parse_flags(BASE)


# ---------------------------------------------------------------- methods


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


# ---------------------------------------------------------------- results


def record(method: str, seed: int, accuracy: float, data: str = "spam") -> dict[str, Any]:
    sizes = {"optimizer_state_bytes": 2**21, "projector_bytes": 2**10, "weight_bytes": 2**22}
    return {"method": method, "seed": seed, "data": data, "metrics": {"accuracy": accuracy}, "updates": 5,
            "seconds": 2.0 * seed, "setting": {"method": method, "data": data}, **sizes}  # fmt: skip


def test_results_have_mean_and_sample_deviation() -> None:
    rows = summarize([record("A", 2, 0.8), record("B", 1, 0.5), record("A", 1, 0.6)])
    assert [row["method"] for row in rows] == ["A", "B"] and rows[0]["seeds"] == [1, 2]
    assert rows[0]["metrics"]["accuracy"]["values"] == [0.6, 0.8]
    assert rows[0]["metrics"]["accuracy"]["mean"] == pytest.approx(0.7)
    assert rows[0]["metrics"]["accuracy"]["std"] == pytest.approx(0.02**0.5)  # of two values: their difference / sqrt 2
    assert rows[1]["metrics"]["accuracy"]["std"] is None and rows[0]["seconds"] == 3.0


def test_results_count_a_repeated_run_once() -> None:
    (row,) = summarize([record("A", 1, 0.1), record("A", 1, 0.9)])
    assert row["metrics"]["accuracy"]["values"] == [0.9]


def test_results_table_is_markdown() -> None:
    text = markdown(summarize([record("A", 1, 0.6), record("A", 2, 0.8), record("B", 1, 0.5)]))
    assert text.splitlines()[0] == (
        "| spam | accuracy | accuracy, each seed | optimizer state, MiB | of it projectors, KiB | weights, MiB "
        "| seconds |"
    )
    assert text.splitlines()[2] == "| A | 0.7000 ± 0.1414 | 0.6000, 0.8000 | 2.0 | 1.0 | 4.0 | 3 |"
    assert text.splitlines()[3] == "| B | 0.5000 | 0.5000 | 2.0 | 1.0 | 4.0 | 2 |"


def test_results_of_two_data_sets_are_two_tables(tmp_path: Path) -> None:
    for data in ("spam", "cola"):
        append_run(tmp_path, record("A", 1, 0.5, data))
    write_tables(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.count("| --- |") == 2 and len(json.loads((tmp_path / "results.json").read_text())) == 2


def test_results_pass_over_a_torn_line(tmp_path: Path) -> None:
    append_run(tmp_path, record("A", 1, 0.5))
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"half')
    append_run(tmp_path, record("A", 2, 0.5))
    assert [run["seed"] for run in read_runs(tmp_path)] == [1, 2]


# ---------------------------------------------------------------- the command and the scripts


def test_command_help_and_a_bad_flag() -> None:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    for flags, code in ((["--help"], 0), (["--task_name", "nothing"], 2)):
        command = [sys.executable, str(EXAMPLES / "run_glue.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == code
        assert done.stdout.startswith("usage: run_glue.py") if code == 0 else done.stderr.count("\n") == 1


def test_help_names_every_flag_that_is_supported() -> None:
    text = build_parser().format_help()
    derived = ("all_seeds", "rows_per_update", "torch_device")
    missing = [name for name in vars(parse_flags(BASE)) if name not in derived and not re.search(rf"--{name}\b", text)]
    assert not missing and "--push_to_hub" not in text


def test_script_sweeps_both_tasks_over_four_projectors(tmp_path: Path) -> None:
    script = EXAMPLES / "scripts" / "proj_quantize_glue" / "sweep.sh"
    environment = {**os.environ, "PYTHON": "echo", "OUTPUT": str(tmp_path), "GLUE": "a folder", "SEEDS": "5 6"}
    done = subprocess.run(["sh", str(script), "--no_save_model"], capture_output=True, text=True, env=environment)
    lines = [line.replace("a folder", "folder").split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and all(line[0] == "run_glue.py" for line in lines)
    parsed = [parse_flags(line[1:]) for line in lines]
    types = ["none", "8bit", "8bit_blockwise", "4bit"]
    assert [(args.task_name, args.proj_quantize_type) for args in parsed] == [
        (task, kind) for task in ("mrpc", "cola") for kind in types
    ]
    assert {(args.data_dir, tuple(args.all_seeds)) for args in parsed} == {("folder", (5, 6))}

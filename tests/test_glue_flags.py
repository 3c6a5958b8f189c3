"""examples/run_glue.py: what parses, what is refused and how, and the script that calls it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from glue.flags import REFUSED, build_parser, parse_flags  # noqa: E402
from glue_support import EXAMPLES  # noqa: E402
from pretrain.errors import UsageError  # noqa: E402

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
        ([*BASE, "--seed", str(2**32)], "--seed must be below 4294967296, got 4294967296"),
        ([*BASE, "--seeds", "1", str(2**64)], "--seeds must be below 4294967296, got 18446744073709551616"),
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


def test_command_help_and_a_bad_flag() -> None:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    for flags, code in ((["--help"], 0), (["--task_name", "nothing"], 2)):
        command = [sys.executable, str(EXAMPLES / "run_glue.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == code
        assert done.stdout.startswith("usage: run_glue.py") if code == 0 else done.stderr.count("\n") == 1


def test_command_without_the_extra_says_what_to_install() -> None:
    hidden = "import sys; sys.modules.update(dict.fromkeys(['tqdm', 'transformers'])); import run_glue; "
    for flags, code, words in ((["--help"], 0, "Exit codes"), (BASE, 2, "pip install 'q-galore-torch[hf]'")):
        command = [sys.executable, "-c", f"{hidden}sys.exit(run_glue.main({flags!r}))"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=EXAMPLES)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stderr
        assert "Traceback" not in done.stderr


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

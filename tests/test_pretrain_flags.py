"""The command line of examples/run_pretrain.py: what parses, what is derived, what is refused and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from q_galore_torch import ops

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from pretrain.errors import UsageError  # noqa: E402
from pretrain.flags import build_parser, parse_flags  # noqa: E402
from pretrain.model import LlamaConfig  # noqa: E402
from pretrain_support import EXAMPLES, tiny_flags, write_config  # noqa: E402
from run_pretrain import main  # noqa: E402

PUBLIC_FLAGS = """
--model_config --use_hf_model --continue_from --batch_size --gradient_accumulation --total_batch_size --max_length
--optimizer --lr --scheduler --min_lr_ratio --activation_checkpointing --weight_decay --warmup_steps --eval_every
--num_training_steps --max_train_tokens --save_every --save_dir --name --dtype --workers --seed --project --unset_wandb
--grad_clipping --beta1 --beta2 --rank --update_proj_gap --galore_scale --proj_type --proj_quant --proj_bits
--proj_group_size --weight_quant --weight_bits --weight_group_size --stochastic_round --simulation --cos_threshold
--gamma_proj --queue_size --single_gpu
""".split()
PUBLIC_OPTIMIZERS = """
adam adamw sgd adafactor adam8bit galore_adamw galore_adamw8bit galore_adamw8bit_per_layer q_galore_adamw8bit
q_galore_adamw8bit_per_layer
""".split()
PUBLIC_SHAPES = {
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "7b": (4096, 11008, 32, 32),
}
OTHER_SIZES = {"9m": 9, "20m": 20, "35m": 35, "40m": 40, "71m": 71, "100m": 100, "250m": 250, "3b": 3000}


@pytest.fixture
def config(tmp_path: Path) -> str:
    return write_config(tmp_path)


def flags(config: str, *more: str) -> list[str]:
    return ["--model_config", config, "--batch_size", "4", "--max_length", "64", *more]


def test_every_public_flag_parses(config: str) -> None:
    values = {
        "--model_config": config, "--continue_from": "x", "--optimizer": "q_galore_adamw8bit", "--scheduler": "linear",
        "--save_dir": "x", "--name": "x", "--dtype": "bfloat16", "--project": "x", "--proj_type": "std",
        "--max_train_tokens": "1M",
    }  # fmt: skip
    actions = {action.option_strings[0]: action for action in build_parser()._actions}
    arguments = []
    for flag in PUBLIC_FLAGS:
        takes_value = actions[flag].nargs is None
        arguments += [flag, values.get(flag, "1")] if takes_value else [flag]
    args = build_parser().parse_args(arguments)
    assert args.weight_quant and args.single_gpu and args.queue_size == 1 and args.cos_threshold == 1.0


@pytest.mark.parametrize("name", PUBLIC_OPTIMIZERS)
def test_every_public_optimizer_name_is_known(config: str, name: str) -> None:
    assert build_parser().parse_args(flags(config, "--optimizer", name.upper())).optimizer == name


@pytest.mark.parametrize("size", [*PUBLIC_SHAPES, *OTHER_SIZES])
def test_config_has_the_size_of_its_name(size: str) -> None:
    path = str(EXAMPLES / "configs" / f"llama_{size}.json")
    shape = LlamaConfig.from_json(path)
    assert shape.vocab_size == 32000 and shape.max_sequence_length >= 1024
    if size in PUBLIC_SHAPES:
        hidden, inner, layers, heads = PUBLIC_SHAPES[size]
        assert (shape.hidden_size, shape.intermediate_size) == (hidden, inner)
        assert (shape.num_hidden_layers, shape.num_attention_heads) == (layers, heads)
    else:
        assert shape.num_parameters == pytest.approx(OTHER_SIZES[size] * 1e6, rel=0.03)
    assert json.loads(Path(path).read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--batch_size", "4"], (4, 1, 4)),
        (["--batch_size", "4", "--total_batch_size", "12"], (4, 3, 12)),
        (["--batch_size", "4", "--gradient_accumulation", "2"], (4, 2, 8)),
        (["--total_batch_size", "12", "--gradient_accumulation", "2"], (6, 2, 12)),
        (["--batch_size", "4", "--gradient_accumulation", "3", "--total_batch_size", "12"], (4, 3, 12)),
    ],
)
def test_accumulation_is_derived(config: str, given: list[str], expected: tuple[int, int, int]) -> None:
    args = parse_flags(["--model_config", config, *given])
    assert (args.batch_size, args.gradient_accumulation, args.total_batch_size) == expected


@pytest.mark.parametrize(
    ("tokens", "steps"), [("1_000", 8), ("1K", 8), ("0.5M", 3907), ("128", 1), ("129", 2), ("1B", 7812500)]
)
def test_max_train_tokens_sets_the_number_of_updates(config: str, tokens: str, steps: int) -> None:
    args = parse_flags(flags(config, "--max_length", "32", "--max_train_tokens", tokens))
    assert args.num_training_steps == steps


SCRIPTS = sorted(path for part in ("pretrain_c4", "single_gpu") for path in (EXAMPLES / "scripts" / part).rglob("*.sh"))
PUBLIC_SCRIPTS = {
    *(f"pretrain_c4/{mode}llama_{size}.sh" for mode in ("", "simulation/") for size in PUBLIC_SHAPES),
    *(f"single_gpu/llama_7b{kind}.sh" for kind in ("", "_checkpointing", "_galore", "_galore_checkpointing")),
}


def test_scripts_are_named_as_the_public_ones() -> None:
    assert {path.relative_to(EXAMPLES / "scripts").as_posix() for path in SCRIPTS} == PUBLIC_SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_scripts_give_flags_that_are_accepted(tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchrun that prints its arguments stands in for the real one."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TOKENIZER": "folder"}
    done = subprocess.run(["sh", str(script), "--seed", "5"], env=environment, capture_output=True, text=True)
    printed = done.stdout.splitlines()
    assert printed[:4] == ["--standalone", "--nproc_per_node", "1", "run_pretrain.py"], done.stderr
    monkeypatch.chdir(EXAMPLES)
    args = parse_flags(printed[4:])
    assert (args.data_kind, args.tokenizer, args.seed, args.total_batch_size) == ("c4", "folder", 5, 512)
    single, galore, checkpointing = (word in str(script) for word in ("single_gpu", "galore", "checkpointing"))
    assert script.stem.startswith(Path(args.model_config).stem) and args.dtype == "bfloat16"
    assert (args.single_gpu, args.weight_quant, args.activation_checkpointing) == (single, not galore, checkpointing)
    assert args.simulation == ("simulation" in str(script))
    assert args.optimizer == ("galore" if galore else "q_galore") + "_adamw8bit" + ("_per_layer" if single else "")


def test_demo_is_a_preset_that_flags_override() -> None:
    demo = parse_flags(["--demo"])
    assert demo.weight_quant and demo.proj_quant and demo.optimizer == "q_galore_adamw8bit" and demo.dtype == "float32"
    changed = parse_flags(["--rank", "32", "--demo", "--num_training_steps", "7"])
    assert (changed.rank, changed.num_training_steps, changed.lr) == (32, 7, demo.lr)
    other = parse_flags(["--demo", "--optimizer", "adamw"])
    assert not other.weight_quant and not other.proj_quant


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["--simulation"],
            "--simulation goes with --optimizer q_galore_adamw8bit or q_galore_adamw8bit_per_layer, not",
        ),
        (
            ["--simulation", "--optimizer", "q_galore_adamw8bit", "--weight_quant", "--weight_bits", "4"],
            "num_bits must be",
        ),
        (["--weight_quant"], "q_galore_adamw8bit or q_galore_adamw8bit_per_layer, not with adam"),
        (["--proj_quant", "--optimizer", "galore_adamw"], "galore_adamw keeps float32"),
        (["--total_batch_size", "6"], "--total_batch_size 6 is not a multiple of --batch_size 4"),
        (["--total_batch_size", "8", "--gradient_accumulation", "3"], "--batch_size 4 times --gradient_accumulation 3"),
        (["--lr", "0"], "--lr must be above 0, got 0"),
        (["--lr", "nan"], "--lr must be above 0, got nan"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--beta2", "1"], "--beta2 must be below 1, got 1"),
        (["--min_lr_ratio", "1.5"], "--min_lr_ratio must be at most 1, got 1.5"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--num_training_steps", "0"], "--num_training_steps must be at least 1"),
        (["--max_train_tokens", "many"], "--max_train_tokens takes a number such as"),
        (["--scheduler", "step"], "invalid choice: 'step'"),
        (["--optimizer", "lion"], "invalid choice: 'lion'"),
        (["--dtype", "float16"], "--dtype must be float32 or bfloat16, got float16"),
        (["--device", "tpu"], "--device tpu is no device"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["--data", "web"], "--data takes python, text or c4, got web"),
        (["--data", "text"], "--data text needs a file or folder"),
        (["--data", "c4", "x"], "--data c4 takes no path"),
        (["--data", "text", "x", "--data_path", "y"], "--data takes one file or folder"),
        (["--data", "text", "/no/such/text"], "there is no file or folder /no/such/text"),
        (["--tokenizer", "/no/such/folder"], "--tokenizer takes byte, bpe, bpe:SIZE or a folder"),
        (["--tokenizer", "bpe:12"], "--tokenizer bpe:SIZE takes a size from 300 to 65536, got '12'"),
        (["--continue_from", "/no/such/checkpoint"], "there is no checkpoint /no/such/checkpoint"),
        (["--max_length", "4096"], "--max_length 4096 is more than the model's 128"),
        (["--batch", "4"], "unrecognized arguments: --batch"),
        (["--scheduler", "cosine_restarts", "--cycle_length", "10"], "leaves nothing of a cycle of 10"),
        (["--model_config", "/no/such/config.json"], "there is no model config /no/such/config.json"),
    ],
)
def test_refusals_are_one_sentence_and_exit_code_2(
    config: str, given: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(flags(config, "--save_dir", str(tmp_path / "run"), "--unset_wandb", *given)) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 64.5}, "hidden_size in .* must be a whole number, got 64.5"),
        ({"vocab_size": -1}, "vocab_size in .* must be a positive number, got -1"),
        ({"num_attention_heads": 3}, "must be an even multiple of num_attention_heads"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 in .* needs --use_hf_model"),
        ({"head_dim": 8}, "head_dim=8 in .* needs --use_hf_model"),
        ({"attention_bias": True}, "attention_bias=True in .* needs --use_hf_model"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    path = Path(write_config(tmp_path, **changes))
    values = {name: value for name, value in json.loads(path.read_text()).items() if value is not None}
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=sentence):
        LlamaConfig.from_json(str(path))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not JSON|must hold one JSON object"):
        LlamaConfig.from_json(str(path))


def test_missing_batch_size_and_config_are_named(config: str) -> None:
    with pytest.raises(UsageError, match="--batch_size is missing"):
        parse_flags(["--model_config", config])
    with pytest.raises(UsageError, match="--model_config is missing"):
        parse_flags(["--batch_size", "4"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--batch_size", "4"], (4, 1, 12)),
        (["--batch_size", "4", "--total_batch_size", "24"], (4, 2, 24)),
        (["--batch_size", "4", "--gradient_accumulation", "3"], (4, 3, 36)),
        (["--total_batch_size", "12", "--gradient_accumulation", "2"], (2, 2, 12)),
    ],
)
def test_batches_of_three_processes(
    config: str, given: list[str], expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch size is a process's, as in the public script; the total is that of all."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = parse_flags(["--model_config", config, *given])
    assert (args.batch_size, args.gradient_accumulation, args.total_batch_size) == expected


@pytest.mark.parametrize(
    ("changes", "given", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, ["--single_gpu"], "--single_gpu goes with one process, got 2; use --nproc_per_node 1"),
        ({"WORLD_SIZE": "2"}, ["--total_batch_size", "4"], "4 is not a multiple of --batch_size 4 times 2 processes"),
        ({"WORLD_SIZE": "two"}, [], "the environment variable WORLD_SIZE must be a whole number, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, [], "RANK must be below WORLD_SIZE, got 2 and 2"),
    ],
)
def test_refusals_of_processes(
    config: str, changes: dict[str, str], given: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=sentence):
        parse_flags(flags(config, *given))


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(tiny_flags(tmp_path, save_dir=tmp_path / "file" / "run")) == 2
    assert "cannot write into --save_dir" in capsys.readouterr().err


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny_flags(tmp_path)
    write_config(tmp_path, vocab_size=200)
    assert main(arguments) == 2
    assert "the byte tokenizer has 257 entries, more than the model's vocab_size of 200" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["transformers", "datasets", "q_galore_torch", "tokenizers"])
def test_missing_package_is_named_in_one_sentence(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = {
        "transformers": {"use_hf_model": True},
        "datasets": {"data": ["c4"]},
        "q_galore_torch": {"optimizer": "adam8bit"},
        "tokenizers": {"tokenizer": "bpe:300"},
    }
    monkeypatch.setitem(sys.modules, module, None)
    assert main(tiny_flags(tmp_path, **needs[module])) == 2
    error = capsys.readouterr().err
    assert f"needs the package {module}: pip install" in error and error.count("\n") == 1


def test_defaults_need_no_wandb_and_choose_a_device(config: str) -> None:
    args = parse_flags(flags(config))
    assert args.torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert args.save_dir.startswith("checkpoints") and args.name == "tiny"


def test_our_optimizers_need_their_kernels_on_a_gpu(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("q_galore: no kernels here\nwhere it was thrown")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    ours = ["--optimizer", "q_galore_adamw8bit"]
    monkeypatch.setattr(ops, "cuda_version", lambda: "2.0")
    assert parse_flags(flags(config, *ours)).torch_device.type == "cuda"
    monkeypatch.setattr(ops, "cuda_version", missing)
    assert parse_flags(flags(config, *ours)).torch_device.type == "cpu"
    plain = parse_flags(flags(config, "--optimizer", "adamw"))
    assert plain.torch_device.type == "cuda" and plain.dtype == "bfloat16"
    with pytest.raises(UsageError, match="q_galore_adamw8bit on a GPU: q_galore: no kernels here$"):
        parse_flags(flags(config, *ours, "--device", "cuda"))

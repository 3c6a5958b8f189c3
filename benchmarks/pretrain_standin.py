"""The published pretraining comparison on a model that two CPU cores can train: the demo's LLaMA of 3.3M weights.

    python benchmarks/pretrain_standin.py [--seeds N] [--steps N] [--dry-run]
    python benchmarks/pretrain_standin.py --tables [--write]

Each run is one of examples/run_pretrain.py on Python's own sources, 300 updates of 6 sequences of 128 bytes unless told
otherwise. A finished run appends a line to ``results/pretrain_standin.jsonl``; one that is there already is not
repeated. ``--tables`` prints the table, ``--write`` puts it into ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tables
import timing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import run_pretrain  # noqa: E402

LOG = timing.RESULTS / "pretrain_standin.jsonl"
PAGE = tables.PAGE.with_name("results.md")
COMMON = ["--demo", "--max_length", "128", "--batch_size", "6", "--eval_every", "100000", "--log_every", "100"]
Q_GALORE = ["--weight_quant", "--stochastic_round", "--proj_quant"]
# Name of a row: flags. AdamW with three rates, as none is published for it at this size.
ROWS: dict[str, list[str]] = {
    "AdamW, rate 0.0005": ["--optimizer", "adamw", "--lr", "0.0005"],
    "AdamW, rate 0.001": ["--optimizer", "adamw", "--lr", "0.001"],
    "AdamW, rate 0.003": ["--optimizer", "adamw", "--lr", "0.003"],
    "GaLore": ["--optimizer", "galore_adamw"],
    "GaLore with 8-bit moments": ["--optimizer", "galore_adamw8bit"],
    "Q-GaLore": ["--optimizer", "q_galore_adamw8bit", *Q_GALORE],
}
FULL = ["--optimizer", "q_galore_adamw8bit", *Q_GALORE, "--lazy_rule", "upstream"]
BFLOAT16 = {"Q-GaLore, full gradients": FULL, "the same simulated": [*FULL, "--simulation"]}


def settings(steps: int, seeds: int) -> list[tuple[str, list[str]]]:
    """Row and flags of every run, the first seed of all rows first."""
    rows = [(name, [*flags, "--dtype", "float32"]) for name, flags in ROWS.items()]
    rows += [(f"{name}, bfloat16", [*flags, "--dtype", "bfloat16"]) for name, flags in BFLOAT16.items()]
    ends = [["--num_training_steps", str(steps), "--seed", str(seed)] for seed in range(seeds)]
    return [(name, [*COMMON, *flags, *end]) for end in ends for name, flags in rows]


def recorded(log: Path = LOG) -> dict[str, dict[str, Any]]:
    """The finished runs by their flags."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {" ".join(row["flags"]): row for row in map(json.loads, lines)}


def measure(name: str, flags: list[str]) -> dict[str, Any]:
    """One run from beginning to end."""
    with tempfile.TemporaryDirectory() as folder:
        code = run_pretrain.main([*flags, "--save_dir", folder + "/run"])
        if code:
            raise SystemExit(f"exit code {code} of run_pretrain.py {' '.join(flags)}")
        rows = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    held_out = next(row["loss"] for row in reversed(rows) if row["kind"] == "eval")
    summary = next(row for row in rows if row["kind"] == "summary")
    sizes = {key: summary[key] for key in ("weights", "gradients", "optimizer_state")}
    machine = {key: value for key, value in timing.machine().items() if key != "command"}
    return {"name": name, "flags": flags, "held_out": held_out, **sizes, "losses": losses, "machine": machine}


def table(rows: list[dict[str, Any]]) -> str:
    """Held-out loss and bytes of each row, mean over the seeds."""
    lines = []
    for name, _ in settings(steps=0, seeds=1):
        runs = [row for row in rows if row["name"] == name]
        if not runs:
            continue
        losses = tables.mean_and_error([run["held_out"] for run in runs], 3)
        sizes = [f"{runs[0][key] / 2**20:.1f}" for key in ("weights", "gradients", "optimizer_state")]
        lines.append([name, str(len(runs)), losses, *sizes])
    return tables.markdown(["", "seeds", "held-out loss", "weights, MiB", "gradients", "optimizer state"], lines)


def main() -> None:
    """The runs that are missing, or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--write", action="store_true", help="with --tables: into docs/results.md")
    args = parser.parse_args()
    if args.tables:
        text = table(list(recorded().values()))
        if args.write:
            tables.rewrite(PAGE, "pretraining stand-in", text)
        print(text)
        return
    for name, flags in settings(args.steps, args.seeds):
        if " ".join(flags) in recorded():
            continue
        print(f"run_pretrain.py {' '.join(flags)}", flush=True)
        if not args.dry_run:
            row = measure(name, flags)
            with open(LOG, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

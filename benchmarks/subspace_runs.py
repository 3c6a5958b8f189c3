"""Training runs that compare how the subspaces are found, when, and what happens to the moments.

    python benchmarks/subspace_runs.py moments|lazy|bases|sides|all [--seeds N] [--steps N] [--dry-run]
    python benchmarks/subspace_runs.py --tables [--write]

A run trains a small model (see small_models.py) on Python's own sources with INT8 weights, low-rank leaves, an INT4
projector and 8-bit moments, unless its row says otherwise. Every finished run appends a line to
``results/subspace_runs.jsonl``; a run that is there already is not repeated, so an interrupted list goes on where it
stopped, and lists share their runs. ``--tables`` prints what is there, ``--write`` puts it into ``docs/subspace.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import small_models
import tables
import timing
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from pretrain.data import held_out_batches
from pretrain.losses import evaluate, summed_loss
from pretrain.schedules import make_scheduler

LOG = timing.RESULTS / "subspace_runs.jsonl"
LENGTH = 128  # bytes of a sequence
SEQUENCES = 6  # of an update: 600 updates of the LLaMA take some three minutes on one busy thread
WARMUP_STEPS = 50
SCALE = 0.25
Gradients = Callable[[int, dict[str, Tensor]], None]


@dataclass(frozen=True)
class Setting:
    """All that decides the outcome of a run.

    Attributes:
        model: a name of ``small_models.MODELS``.
        group: options of the projected group, besides rank and scale; what is absent is left to the package.
        layers: options of ``prepare_model``, besides the rank.
        seed: of the initial weights, the order of the text and the rounding noise.
        steps: updates.
        sequences, length: of an update, and bytes of each.
    """

    model: str
    group: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 600
    sequences: int = SEQUENCES
    length: int = LENGTH

    @property
    def key(self) -> str:
        """One string for one setting."""
        return json.dumps(asdict(self), sort_keys=True)

    def title(self) -> str:
        """What is printed while it runs."""
        options = {**self.layers, **self.group}
        return " ".join([self.model, *(f"{key}={value}" for key, value in options.items()), f"seed={self.seed}"])


def train(setting: Setting, on_gradients: Gradients | None = None, quiet: bool = False) -> dict[str, Any]:
    """Train once.

    Args:
        setting: of the run.
        on_gradients: called before each update with its number, counted from 0, and the full gradients [m, n] of the
            projected matrices by name; needs ``layers={"grad_mode": "full"}``. It has to copy what it keeps.
        quiet: print no progress.

    Returns:
        The record of the run: held-out loss in nats a byte at three points, refreshes, the last telemetry, seconds.

    Raises:
        ValueError: the package refuses an option.
    """
    model, optimizer = _prepared(setting)
    corpus = small_models.text(setting.length, setting.seed)
    scheduler = make_scheduler(optimizer, "cosine", WARMUP_STEPS, setting.steps, 0.1, setting.steps)
    points = sorted({setting.steps // 3, setting.steps * 2 // 3, setting.steps})
    held_out: dict[str, float] = {}
    start, training = time.perf_counter(), 0.0
    for step in range(setting.steps):
        began = time.perf_counter()
        inputs, targets = corpus.train.next_batch(setting.sequences)
        loss = summed_loss(model, inputs, targets) / targets.numel()
        loss.backward()
        if on_gradients is not None:
            on_gradients(step, projected_gradients(optimizer))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        training += time.perf_counter() - began
        if step + 1 in points:
            held_out[str(step + 1)] = round(_held_out_loss(model, corpus.held_out, setting), 5)
        if not quiet and (step + 1) % 100 == 0:
            print(f"  update {step + 1:4d}  loss {loss.item():.3f}  {training / (step + 1):.3f} s each", flush=True)
    return {
        "key": setting.key,
        "setting": asdict(setting),
        "tokens_per_update": setting.sequences * setting.length,
        "held_out": held_out,
        **_summary(optimizer),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": {**timing.machine(), "threads": torch.get_num_threads()},
    }


def _prepared(setting: Setting) -> tuple[nn.Module, qg.QGaLoreAdamW8bit]:
    shape = small_models.MODELS[setting.model]
    model = small_models.seeded_model(setting.model, setting.seed)
    qg.prepare_model(model, rank=shape.rank, **setting.layers)
    group = {"scale": SCALE, **setting.group}
    if "proj_type" in setting.layers:
        group["proj_type"] = setting.layers["proj_type"]
    groups = qg.param_groups(model, rank=shape.rank, **group)
    return model, qg.QGaLoreAdamW8bit(groups, lr=shape.lr, weight_decay=0.0, seed=setting.seed)


def projected_gradients(optimizer: qg.QGaLoreAdamW8bit) -> dict[str, Tensor]:
    """The full gradients [m, n] of the projected matrices, by name."""
    groups = [group for group in optimizer.param_groups if group["rank"] is not None]
    pairs = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    return {name: parameter.grad for name, parameter in pairs}


def _held_out_loss(model: nn.Module, tokens: Tensor, setting: Setting) -> float:
    limit = small_models.HELD_OUT_TOKENS if setting.steps > 50 else 2048
    result = evaluate(model, held_out_batches(tokens, setting.length, 32, limit), torch.device("cpu"))
    assert result is not None
    return result[0]


def _summary(optimizer: qg.QGaLoreAdamW8bit) -> dict[str, Any]:
    """Refreshes in total and what the telemetry says of each projected matrix at the end."""
    rows = [row for row in optimizer.telemetry() if "refreshes" in row]
    wanted = ("name", "refreshes", "gap", "similarity", "captured_energy", "held_out_energy", "qr_fallbacks")
    short = [{key: _rounded(row[key]) for key in wanted if key in row} for row in rows]
    return {
        "refreshes": sum(row["refreshes"] for row in rows),
        "qr_fallbacks": sum(row["qr_fallbacks"] for row in rows),
        "refresh_seconds": round(sum(row.get("seconds", 0.0) for row in rows), 2),
        "matrices": short,
    }


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


# ---------------------------------------------------------------- the lists

FIXED = {"lazy_rule": "fixed"}
THRESHOLDS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
# Enough refreshes in a run for a queue of 5 to fill several times: 60 dates, as 12,000 updates at a gap of 200 have.
SHORT_GAP = 10


def moments_list(seeds: int, steps: int) -> list[Setting]:
    """Three treatments of the moments under two kinds of refresh, and the norm limiter with the first."""
    base = {"update_proj_gap": 50, **FIXED}
    groups = [
        {**base, "subspace": subspace, "moments": moments}
        for subspace in ("warm", "svd")
        for moments in ("keep", "rotate", "reset")
    ]
    groups.append({**base, "subspace": "warm", "moments": "keep", "norm_growth_limit": 1.01})
    return [Setting("llama", group, seed=seed, steps=steps) for seed in range(seeds) for group in groups]


def lazy_list(seeds: int, steps: int) -> list[Setting]:
    """The fixed gap and the energy rule at several thresholds, on two models."""
    fixed = {"update_proj_gap": SHORT_GAP, "subspace": "warm", "moments": "keep", **FIXED}
    energy = [{**fixed, "lazy_rule": "energy", "energy_threshold": threshold} for threshold in THRESHOLDS]
    return [
        Setting(model, group, seed=seed, steps=steps)
        for seed in range(seeds)
        for model in ("llama", "window")
        for group in (fixed, *energy)
    ]


def bases_list(seeds: int, steps: int) -> list[Setting]:
    """Kinds of bases, each with the moments kept."""
    base = {"update_proj_gap": 50, **FIXED, "moments": "keep"}
    groups = [{**base, "subspace": kind} for kind in ("random", "warm", "svd")]
    return [Setting("llama", group, seed=seed, steps=steps) for seed in range(seeds) for group in groups]


def sides_list(seeds: int, steps: int) -> list[Setting]:
    """Projected sides of low-rank leaves."""
    group = {"update_proj_gap": 50, **FIXED, "moments": "keep", "subspace": "warm"}
    layers: list[dict[str, Any]] = [{}, {"proj_type": "right"}, {"proj_type": "full"}]  # without: std
    return [Setting("llama", group, layer, seed, steps) for seed in range(seeds) for layer in layers]


LISTS = {"moments": (moments_list, 3), "lazy": (lazy_list, 3), "bases": (bases_list, 3), "sides": (sides_list, 3)}


def tiny(setting: Setting) -> Setting:
    """The same setting on a model, a text and a number of updates that take a moment."""
    group = {**setting.group, "update_proj_gap": 3}
    return Setting("tiny", group, setting.layers, setting.seed, steps=12, sequences=4, length=32)


# ---------------------------------------------------------------- running and reading


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by key; half a line that an interrupted run left behind is passed over."""
    if not path.exists():
        return {}
    records = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["key"]] = record
    return records


def run_all(settings: list[Setting], log: Path, dry_run: bool = False) -> list[str]:
    """Run what the log does not hold yet.

    Returns:
        A sentence for each setting that the package refuses, or whose gradients became infinite.
    """
    settings = list({setting.key: setting for setting in settings}.values())
    done = read_log(log)
    missing = [setting for setting in settings if setting.key not in done]
    print(f"{len(settings) - len(missing)} of {len(settings)} runs are in {log.name}", flush=True)
    refused = []
    for number, setting in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {setting.title()}", flush=True)
        if dry_run:
            continue
        try:
            record = train(setting)
        except (ValueError, qg.NonFiniteGradientError) as error:
            refused.append(f"{setting.title()}: {error}")
            print(f"  not run to the end: {error}", flush=True)
            continue
        append_record(log, record)
        final = record["held_out"][str(setting.steps)]
        print(f"  held-out {final:.4f}, {record['refreshes']} refreshes, {record['seconds']} s", flush=True)
    return refused


def append_record(log: Path, record: dict[str, Any]) -> None:
    """Append one line; a torn last line of an interrupted run is closed first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    torn = log.exists() and not log.read_text().endswith("\n")
    with log.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(record) + "\n")


def compared(
    records: dict[str, dict[str, Any]], rows: list[tuple[str, list[Setting]]], base: list[Setting]
) -> list[list[str]]:
    """Rows of a table: name, runs, held-out loss, its paired difference to the base, refreshes and their share.

    Args:
        records: finished runs by key.
        rows: name and settings of each row, one setting a seed.
        base: the settings that are compared with, one a seed.
    """
    against = {setting.seed: records[setting.key] for setting in base if setting.key in records}
    table = []
    for name, settings in rows:
        found = {setting.seed: records[setting.key] for setting in settings if setting.key in records}
        if not found:
            continue
        shared = sorted(set(found) & set(against))
        loss = {seed: record["held_out"][str(record["setting"]["steps"])] for seed, record in found.items()}
        other = {seed: against[seed]["held_out"][str(against[seed]["setting"]["steps"])] for seed in shared}
        shares = [100 * found[seed]["refreshes"] / against[seed]["refreshes"] for seed in shared]
        table.append(
            [
                name,
                str(len(found)),
                tables.mean_and_error(list(loss.values()), 4),
                tables.mean_and_error([loss[seed] - other[seed] for seed in shared], 4, signed=True),
                tables.mean_and_error([record["refreshes"] for record in found.values()], 0),
                tables.mean_and_error(shares, 1) + (" %" if shares else ""),
            ]
        )
    return table


HEADER = ["", "seeds", "held-out loss", "difference", "refreshes", "share"]
Row = tuple[str, Callable[[Setting], bool]]


def _rows(settings: list[Setting], name: Callable[[Setting], str]) -> list[tuple[str, list[Setting]]]:
    rows: dict[str, list[Setting]] = {}
    for setting in settings:
        rows.setdefault(name(setting), []).append(setting)
    return list(rows.items())


def all_tables(records: dict[str, dict[str, Any]], steps: int) -> dict[str, str]:
    """Markdown tables by the name of their place in the page; what has no finished run is left out."""
    found = {}
    settings = moments_list(9, steps)
    rows = _rows(settings, lambda s: _moments_name(s.group))
    found["moments"] = compared(records, rows, rows[0][1])
    lazy = lazy_list(9, steps)
    for model in ("llama", "window"):
        rows = _rows([s for s in lazy if s.model == model], lambda s: _lazy_name(s.group))
        found[f"lazy-{model}"] = compared(records, rows, rows[0][1])
    rows = _rows(bases_list(9, steps), lambda s: str(s.group["subspace"]))
    found["bases"] = compared(records, rows, dict(rows)["warm"])
    rows = _rows(sides_list(9, steps), lambda s: str(s.layers.get("proj_type", "std")))
    found["sides"] = compared(records, rows, dict(rows)["std"])
    return {name: tables.markdown(HEADER, table) for name, table in found.items() if table}


def _moments_name(group: dict[str, Any]) -> str:
    limit = group.get("norm_growth_limit")
    return f"{group['subspace']}, {group['moments']}" + (f", growth at most {limit}" if limit else "")


def _lazy_name(group: dict[str, Any]) -> str:
    return f"threshold {group['energy_threshold']}" if group["lazy_rule"] == "energy" else "fixed gap"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("list", nargs="?", choices=[*LISTS, "all"])
    parser.add_argument("--seeds", type=int, help="runs of a row; default 3")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--quick", action="store_true", help="a tiny model and 12 updates, to see that it runs")
    parser.add_argument("--dry-run", action="store_true", help="only list what would run")
    parser.add_argument("--tables", action="store_true", help="print the tables of what has run")
    parser.add_argument("--write", action="store_true", help="with --tables: write them into docs/subspace.md")
    arguments = parser.parse_args()
    if arguments.list is None and not arguments.tables:
        parser.error("give a list of runs, or --tables")
    if arguments.quick and arguments.log == LOG:
        parser.error("--quick needs a --log of its own")
    torch.set_num_threads(arguments.threads)
    settings = []
    for name in LISTS if arguments.list == "all" else [arguments.list] if arguments.list else []:
        make, seeds = LISTS[name]
        settings += make(arguments.seeds or seeds, arguments.steps)
    if arguments.quick:
        settings = [tiny(setting) for setting in settings]
    refused = run_all(settings, arguments.log, arguments.dry_run) if settings else []
    for sentence in refused:
        print(f"not run: {sentence}")
    if arguments.tables:
        for name, table in all_tables(read_log(arguments.log), arguments.steps).items():
            print(f"\n{name}\n\n{table}")
            if arguments.write:
                tables.rewrite(tables.PAGE, name, table)


if __name__ == "__main__":
    main()

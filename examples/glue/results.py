"""Finished runs of a folder, and the table over them.

``runs.jsonl`` has one object for every finished run and is appended to; ``results.json`` and ``results.md`` are made
out of it after each run; ``all_results.json`` has the last command's metrics under the names of the original script.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KIB, MIB = 2**10, 2**20


def read_runs(folder: Path) -> list[Record]:
    """The finished runs; half a line that an interrupted run left behind is passed over."""
    path = folder / "runs.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def append_run(folder: Path, record: Record) -> None:
    """Append one line; a torn last line of an interrupted run is closed first."""
    path = folder / "runs.jsonl"
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(record) + "\n")


def write_tables(folder: Path) -> None:
    """``results.json`` and ``results.md`` over all runs of the folder."""
    rows = summarize(read_runs(folder))
    _replace(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    _replace(folder / "results.md", "\n\n".join(markdown(part) for part in _by_data(rows)) + "\n")


def write_metrics(folder: Path, records: Sequence[Record]) -> None:
    """``all_results.json``: the mean of each metric over these runs, as ``eval_`` and its name."""
    names = records[0]["metrics"]
    means = {f"eval_{name}": statistics.fmean(r["metrics"][name] for r in records) for name in names}
    _replace(folder / "all_results.json", json.dumps(means) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def summarize(records: Sequence[Record]) -> list[Record]:
    """One row for each setting: its seeds, and of each metric the values, their mean and their standard deviation.

    Args:
        records: finished runs; of two with the same setting and seed the later one counts.

    Returns:
        Rows in the order in which settings first came. ``std`` is that of a sample, None where there is one seed.
    """
    settings: dict[str, dict[int, Record]] = {}
    for record in records:
        settings.setdefault(json.dumps(record["setting"], sort_keys=True), {})[record["seed"]] = record
    return [_row([runs[seed] for seed in sorted(runs)]) for runs in settings.values()]


def _row(runs: list[Record]) -> Record:
    values = {name: [run["metrics"][name] for run in runs] for name in runs[0]["metrics"]}
    kept = ("method", "data", "optimizer_state_bytes", "projector_bytes", "weight_bytes", "updates")
    return {
        **{key: runs[0][key] for key in kept},
        "seeds": [run["seed"] for run in runs],
        "metrics": {name: _spread(found) for name, found in values.items()},
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "setting": runs[0]["setting"],
    }


def _spread(values: list[float]) -> Record:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.fmean(values), "std": deviation}


def _by_data(rows: list[Record]) -> list[list[Record]]:
    """Rows of one table each: what was trained and judged on the same texts."""
    tables: dict[tuple[str, ...], list[Record]] = {}
    for row in rows:
        tables.setdefault((row["data"], row["setting"]["texts"], *row["metrics"]), []).append(row)
    return list(tables.values())


def markdown(rows: Sequence[Record]) -> str:
    """A Markdown table of rows that have the same metrics."""
    names = list(rows[0]["metrics"])
    seeds = "each seed" if any(len(row["seeds"]) > 1 for row in rows) else ""
    header = [rows[0]["data"], *names, *([f"{names[0]}, {seeds}"] if seeds else [])]
    header += ["optimizer state, MiB", "of it projectors, KiB", "weights, MiB", "seconds"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        found = row["metrics"]
        cells = [row["method"], *(_mean_and_spread(found[name]) for name in names)]
        if seeds:
            cells.append(", ".join(f"{value:.4f}" for value in found[names[0]]["values"]))
        cells += [f"{row['optimizer_state_bytes'] / MIB:.1f}", f"{row['projector_bytes'] / KIB:.1f}"]
        lines.append([*cells, f"{row['weight_bytes'] / MIB:.1f}", f"{row['seconds']:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean_and_spread(values: Record) -> str:
    spread = "" if values["std"] is None else f" ± {values['std']:.4f}"
    return f"{values['mean']:.4f}{spread}"

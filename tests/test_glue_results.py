"""examples/run_glue.py: finished runs of a folder and the table over them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from glue.results import append_run, markdown, read_runs, summarize, write_tables  # noqa: E402


def record(method: str, seed: int, accuracy: float, data: str = "spam", texts: str = "0") -> dict[str, Any]:
    sizes = {"optimizer_state_bytes": 2**21, "projector_bytes": 2**10, "weight_bytes": 2**22}
    return {"method": method, "seed": seed, "data": data, "metrics": {"accuracy": accuracy}, "updates": 5,
            "seconds": 2.0 * seed, "setting": {"method": method, "data": data, "texts": texts}, **sizes}  # fmt: skip


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


def test_results_of_files_of_one_name_are_two_tables(tmp_path: Path) -> None:
    append_run(tmp_path, record("A", 1, 0.5))
    append_run(tmp_path, record("B", 1, 0.5, texts="1") | {"metrics": {"pearson": 0.25}})
    write_tables(tmp_path)
    tables = (tmp_path / "results.md").read_text().split("\n\n")
    assert [("| A |" in table, "| B | 0.2500 |" in table) for table in tables] == [(True, False), (False, True)]


def test_results_pass_over_a_torn_line(tmp_path: Path) -> None:
    append_run(tmp_path, record("A", 1, 0.5))
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"half')
    append_run(tmp_path, record("A", 2, 0.5))
    assert [run["seed"] for run in read_runs(tmp_path)] == [1, 2]

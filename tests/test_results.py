"""docs/results.md and docs/simulation.md: a row for every published result, and the figures of the raw results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
import glue_runs  # noqa: E402
import pretrain_standin  # noqa: E402

PAGES = [ROOT / "docs" / name for name in ("results.md", "simulation.md")]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows() -> list[list[str]]:
    """The cells of every table line of results.md."""
    lines = [line for line in page("results.md").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_results_have_a_row_for_every_published_result() -> None:
    first = [row[0] for row in rows()]
    assert {"60M", "130M", "350M", "1B", "7B"} <= set(first)
    assert any("16 GB" in cell for cell in first) and any("15.26 GB" in cell for cell in first)
    glue = [(row[0], row[1]) for row in rows() if row[0] in ("MRPC", "CoLA")]
    assert len(glue) == len(set(glue)) == 8
    for script_format in ("8bit", "8bit_blockwise", "4bit"):
        assert sum(f"`{script_format}`" in kind for _, kind in glue) == 2


def test_results_say_of_every_row_what_is_known_here() -> None:
    known = re.compile(r"^(measured here|planned|smaller stand-in|not run: |not comparable|the same$)")
    published = [row for row in rows() if row[0] in ("60M", "130M", "350M", "1B", "7B", "MRPC", "CoLA")]
    assert len(published) == 13 and all(known.match(row[-1]) for row in published)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_of_the_page_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    assert links and not [link for link in links if not (path.parent / link).exists()]


def test_tables_are_those_of_the_raw_results() -> None:
    table = pretrain_standin.table(list(pretrain_standin.recorded().values()))
    assert table in page("results.md")
    peak = json.loads((ROOT / "benchmarks" / "results" / "pretrain_7b.json").read_text())["peak_GB"]
    assert f"**{peak:.1f} GB** resident" in page("results.md")
    simulated = json.loads((ROOT / "benchmarks" / "results" / "simulation.json").read_text())["rows"]
    for row in simulated:
        cells = f"| {row['dtype']} | {row['offset']:g} | {row['farthest']} | {row['differ_after_1']:.2%} |"
        assert cells in page("simulation.md")


def test_tables_of_fine_tuning_are_those_of_the_raw_results() -> None:
    records = list(glue_runs.read_log(glue_runs.LOG).values())
    short = {
        row[0].removesuffix(", INT8 weights") + row[1]: row for row in rows() if row[0].startswith(("GaLore", "Q-"))
    }
    for column, data in enumerate(glue_runs.READERS, start=2):
        table = glue_runs.table(records, data)
        assert table in page("glue.md")
        for line in table.splitlines()[3:]:  # below AdamW's
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            method, projector = cells[0].split(", ")[0], cells[0].split(", ")[-1].removesuffix(" projector")
            row = short[method + projector]
            assert (row[column], row[4]) == (cells[3], cells[4]), cells[0]


def test_standin_repeats_no_run_and_lists_every_method(tmp_path: Path) -> None:
    plan = pretrain_standin.settings(steps=300, seeds=2)
    flags = [" ".join(flags) for _, flags in plan]
    assert len(flags) == len(set(flags)) == 16 and set(pretrain_standin.recorded()) <= set(flags)
    assert pretrain_standin.recorded(tmp_path / "none.jsonl") == {}


def test_python_of_the_simulation_page_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", page("simulation.md"), re.M | re.S)
    model = nn.Sequential()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "other"):
        model.add_module(name, nn.Linear(32, 32))
    names = {"model": model}
    exec(compile(block, "docs/simulation.md", "exec"), names)
    x, losses = torch.randn(16, 32), []
    for _ in range(10):
        loss = (names["model"](x) - x).square().mean()
        names["opt"].zero_grad()  # type: ignore[attr-defined]
        loss.backward()
        names["opt"].step()  # type: ignore[attr-defined]
        losses.append(loss.item())
    assert losses[-1] < losses[0] and [type(m).__name__ for m in model] == ["QLinear"] * 4 + ["Linear"]

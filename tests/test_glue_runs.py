"""benchmarks/glue_runs.py: its readers and its table, and the whole of it once on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT / "examples")]
import glue_runs  # noqa: E402

from glue_support import BAD, GOOD, write_model  # noqa: E402
from pretrain_support import one_thread  # noqa: E402, F401 - a fixture

pytest.importorskip("transformers")
pytest.importorskip("sklearn")


def record(method: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "setting": {"data": "spam", "method": method, "seed": seed}, "metrics": {"accuracy": accuracy}, "updates": 10,
        "optimizer_state_bytes": 2**21, "projector_bytes": 2**10, "weight_bytes": 2**22, "seconds": 5.0,
    }  # fmt: skip


def test_readers_find_text_and_label(tmp_path: Path) -> None:
    (tmp_path / "spam.csv").write_text('ham\tsay "no,\tthen\nspam\tWIN\u2028now\n', encoding="utf-8")
    (tmp_path / "polarity.csv").write_text('\ufeff"1","a ""rare"" film \n"\n"-1","dull"\n', encoding="utf-8")
    assert glue_runs.read_spam(tmp_path / "spam.csv") == [('say "no,\tthen', "ham"), ("WIN\u2028now", "spam")]
    assert glue_runs.read_polarity(tmp_path / "polarity.csv") == [('a "rare" film', "1"), ("dull", "-1")]


def test_split_has_no_copies_and_does_not_move() -> None:
    rows = [(f"text {i % 40}", "a") for i in range(50)]
    train, held_out = glue_runs.split(rows, 10)
    assert (train, held_out) == glue_runs.split(rows, 10)
    assert len(train) == 30 and len(held_out) == 10 and len({*train, *held_out}) == 40
    assert held_out != rows[:10]


def test_settings_differ_in_data_method_and_seed_alone() -> None:
    found = glue_runs.settings(["spam", "polarity"], [1, 2, 3])
    assert len({setting.key for setting in found}) == len(found) == 2 * 3 * len(glue_runs.METHODS)
    assert {setting.seed for setting in found[: 2 * len(glue_runs.METHODS)]} == {1}


def test_table_pairs_the_seeds() -> None:
    values = [("AdamW", 1, 0.90), ("AdamW", 2, 0.92), ("GaLore, int4", 2, 0.91), ("GaLore, int4", 3, 1.0)]
    runs = [record(*each) for each in values]
    lines = glue_runs.table(runs, "spam").splitlines()
    assert lines[2] == "| AdamW | 91.0 ± 1.4 | 90.0, 92.0 |  | 2.0 | 1 | 4.0 | 0.50 |"
    assert lines[3] == "| GaLore, int4 | 95.5 ± 6.4 | 91.0, 100.0 | -1.0 | 2.0 | 1 | 4.0 | 0.50 |"


def test_program_runs_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [(good, bad, other) for good, bad in zip(GOOD, BAD, strict=True) for other in GOOD]
    lines = [f"ham\t{good} film {other}\nspam\t{bad} film {other}" for good, bad, other in pairs]
    (tmp_path / "spam.csv").write_text("\n".join(lines) + "\n")
    flags = ["--model", write_model(tmp_path / "model"), "--spam", str(tmp_path / "spam.csv")]
    monkeypatch.setattr(glue_runs, "UPDATES", {"spam": 2, "polarity": 2})
    log = ["--log", str(tmp_path / "log.jsonl")]
    for seeds in (["1"], ["1", "2"]):
        monkeypatch.setattr(sys, "argv", ["glue_runs.py", "run", *flags, *log, "--seeds", *seeds])
        glue_runs.main()
    assert "7 of 14 runs are in log.jsonl" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len({entry["key"] for entry in records}) == len(records) == 14
    assert str(tmp_path) not in (tmp_path / "log.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", ["glue_runs.py", "table", *log])
    glue_runs.main()
    shown = capsys.readouterr().out
    assert all(f"| {method} |" in shown for method in glue_runs.METHODS)

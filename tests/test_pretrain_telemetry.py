"""The records about subspaces in the log of examples/run_pretrain.py."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
import run_pretrain  # noqa: E402
from pretrain.report import RunLog  # noqa: E402
from pretrain.telemetry import SubspaceLog, count_refreshes  # noqa: E402
from pretrain_support import (  # noqa: E402
    Q_GALORE,
    one_thread,  # noqa: F401 - a fixture
    run,
)

Entries = list[dict[str, Any]]


class Scripted(Optimizer):
    """Tells whatever a test writes into ``entries``."""

    def __init__(self, entries: Entries) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {})
        self.entries = entries

    def telemetry(self) -> Entries:
        return self.entries


def matrix(name: str = "a", **changes: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "id": 3, "step": 7, "groups_shifted": 4, "groups_reranged": 2}
    known = {"refreshes": 1, "gap": 50, "similarity": None, "captured_energy": 0.5, "held_out_energy": None}
    return {**entry, **known, "seconds": 0.25, "qr_fallbacks": 0, **changes}


def telemetry(rows: list[dict[str, Any]]) -> list[tuple[int, Entries]]:
    return [(row["step"], row["parameters"]) for row in rows if row["kind"] == "telemetry"]


def test_only_what_changed_is_logged() -> None:
    optimizer = Scripted([{"name": "norm", "id": 0, "step": 7}, matrix("a", refreshes=0), matrix("b")])
    log = SubspaceLog(optimizer)
    (first,) = log.changed(log.entries())
    assert first == {
        "name": "b", "id": 3, "refreshes": 1, "gap": 50, "similarity": None, "captured_energy": 0.5,
        "held_out_energy": None, "seconds": 0.25,
    }  # fmt: skip
    assert log.changed(log.entries()) == []
    optimizer.entries[2].update(step=8, groups_shifted=900, groups_reranged=3)
    assert log.changed(log.entries()) == []
    for change in ({"held_out_energy": 0.4}, {"gap": 100}, {"similarity": 0.9}, {"refreshes": 2}):
        optimizer.entries[2].update(change)
        assert log.changed(log.entries()) == [{**first, **change}]
        first.update(change)
    assert count_refreshes(log.entries()) == 2


def test_numbers_are_plain_and_short() -> None:
    """A NaN differs from itself and would be news at every update."""
    log = SubspaceLog(Scripted([matrix(similarity=float("nan"), captured_energy=1 / 3)]))
    (entry,) = log.changed(log.entries())
    assert entry["similarity"] is None and entry["captured_energy"] == 0.333333
    assert log.changed(log.entries()) == []
    json.dumps(log.entries(), allow_nan=False)


def test_telemetry_of_an_earlier_version_is_enough() -> None:
    """No energies, no seconds."""
    old = {"name": "a", "id": 1, "step": 7, "refreshes": 3, "gap": 20, "similarity": 0.5, "qr_fallbacks": 0}
    log = SubspaceLog(Scripted([old]))
    assert log.entries() == [old]
    assert log.changed(log.entries()) == [{"name": "a", "id": 1, "refreshes": 3, "gap": 20, "similarity": 0.5}]


def test_optimizers_without_subspaces_log_none(tmp_path: Path) -> None:
    assert SubspaceLog(SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)).entries() == []
    assert telemetry(run(tmp_path, num_training_steps=2)) == []


def test_seconds_go_on_from_the_log() -> None:
    """An optimizer counts those of its process; nothing is new until something happens in it."""
    earlier = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "telemetry", "step": 1, "parameters": [{"name": "norm", "id": 0}, matrix(seconds=1.5)]},
        {"kind": "telemetry", "step": 9, "parameters": [matrix(seconds=2.0)]},
    ]
    optimizer = Scripted([{"name": "norm", "id": 0}, matrix(seconds=0.0), matrix("new", seconds=0.125)])
    log = SubspaceLog(optimizer, earlier)
    assert [entry["name"] for entry in log.changed(log.entries())] == ["new"]
    optimizer.entries[1].update(refreshes=2, seconds=0.5)
    assert [(entry["name"], entry["seconds"]) for entry in log.changed(log.entries())] == [("a", 2.5)]


@pytest.mark.parametrize(
    "flags", [Q_GALORE, {"optimizer": "galore_adamw8bit", "rank": 16, "update_proj_gap": 3}], ids=["int8", "float"]
)
def test_log_tells_every_refresh(tmp_path: Path, flags: dict[str, Any]) -> None:
    """Replayed, the records give the number of refreshes that each update's own record has."""
    rows = run(tmp_path, **flags)
    newest: dict[str, int] = {}
    for row in rows:
        if row["kind"] == "telemetry":
            newest.update((entry["name"], entry["refreshes"]) for entry in row["parameters"] if "refreshes" in entry)
        elif row["kind"] == "train":
            assert sum(newest.values()) == row["refreshes"]
    assert len(newest) == 14 and all("layers." in name for name in newest) and sum(newest.values()) > 40
    short, last = telemetry(rows)[:-1], telemetry(rows)[-1]
    assert all({"name", "id", "refreshes", "gap"} <= entry.keys() for _, entries in short for entry in entries)
    assert any(len(entries) < 14 for _, entries in short)
    assert last[0] == 12 and len({entry["id"] for entry in last[1]}) == len(last[1]) == 14 + 7
    assert all({"step", "groups_shifted", "groups_reranged"} <= entry.keys() for entry in last[1])


def test_run_record_holds_the_flags(tmp_path: Path) -> None:
    (about,) = [row for row in run(tmp_path, num_training_steps=2, name="second <try>") if row["kind"] == "run"]
    assert about["step"] == 0 and about["name"] == "second <try>"
    assert about["flags"]["num_training_steps"] == 2 and about["flags"]["optimizer"] == "adamw"


def _without_seconds(records: list[tuple[int, Entries]]) -> list[tuple[int, Entries]]:
    return [(step, [{k: v for k, v in e.items() if k != "seconds"} for e in entries]) for step, entries in records]


@pytest.mark.parametrize("where", ["its own folder", "another folder"])
def test_continued_run_goes_on_with_its_records(tmp_path: Path, where: str) -> None:
    whole = _without_seconds(telemetry(run(tmp_path, **Q_GALORE, save_every=5)))
    checkpoint, flags = tmp_path / "run" / "model_5", {**Q_GALORE, "save_every": 5}
    if where == "its own folder":
        shutil.rmtree(tmp_path / "run" / "model_10")
        shutil.rmtree(tmp_path / "run" / "model_12")
        assert _without_seconds(telemetry(run(tmp_path, **flags, continue_from=tmp_path / "run"))) == whole
        return
    shutil.move(checkpoint, tmp_path / "model_5")
    (first, *rest) = telemetry(run(tmp_path, **flags, continue_from=tmp_path / "model_5", save_dir=tmp_path / "b"))
    assert _without_seconds(rest) == [(step, entries) for step, entries in whole if step > 5]
    before = {e["name"]: e["refreshes"] for step, entries in whole if step <= 5 for e in entries}
    assert first[0] == 5 and {e["name"]: e["refreshes"] for e in first[1]} == before


def test_telemetry_is_asked_once_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    made = run_pretrain.build_optimizer

    def watched(*arguments: Any) -> Optimizer:
        optimizer = made(*arguments)
        tell: Callable[[], Entries] = optimizer.telemetry
        optimizer.telemetry = lambda: asked.append(1) or tell()  # type: ignore[func-returns-value]
        return optimizer

    monkeypatch.setattr(run_pretrain, "build_optimizer", watched)
    run(tmp_path, **Q_GALORE, num_training_steps=6)
    assert len(asked) == 6 + 2  # and once at either end


def test_wandb_gets_numbers_alone(tmp_path: Path) -> None:
    class Wandb:
        rows: list[dict[str, Any]] = []

        def log(self, values: dict[str, Any], step: int) -> None:
            self.rows.append(values)

        def finish(self) -> None:
            pass

    log = RunLog(tmp_path, 1, wandb=Wandb())
    log.record("telemetry", 1, parameters=[matrix()])
    log.record("train", 1, loss=2.0)
    log.close()
    assert Wandb.rows == [{"train/loss": 2.0}]

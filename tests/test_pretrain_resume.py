"""Stopping examples/run_pretrain.py and going on: checkpoints, signals, the same losses bit for bit."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
import run_pretrain  # noqa: E402
from pretrain import checkpoint  # noqa: E402
from pretrain.errors import UsageError  # noqa: E402
from pretrain_support import (  # noqa: E402
    EXAMPLES,
    Q_GALORE,
    ROOT,
    environment,
    losses,
    one_thread,  # noqa: F401 - a fixture
    records,
    run,
    tiny_flags,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "gradient_accumulation": 2, "grad_clipping": 0.5, "scheduler": "cosine_restarts"},
        Q_GALORE,
        {**Q_GALORE, "dtype": "bfloat16", "gradient_accumulation": 2, "grad_clipping": 0.5},
        {"optimizer": "galore_adamw8bit", "rank": 16, "update_proj_gap": 3},
    ],
    ids=["adamw", "adamw-accumulated", "q_galore", "q_galore-bf16-accumulated", "galore"],
)
def test_interrupted_run_gives_the_same_losses(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Bit for bit with the same number of threads: every later loss, rate, norm and held-out loss, and the weights."""
    torch.set_num_threads(2)
    whole = run(tmp_path, **changes, save_every=5)
    shutil.copytree(tmp_path / "run" / "model_5", tmp_path / "model_5")
    continued = run(tmp_path, **changes, save_every=5, continue_from=tmp_path / "model_5", save_dir=tmp_path / "second")

    def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        names = ("kind", "step", "loss", "lr", "grad_norm", "tokens", "refreshes")
        return [tuple(row.get(name) for name in names) for row in rows if row["step"] > 5]

    assert len(numbers(continued)) >= 9 and numbers(continued) == numbers(whole)
    weights = [torch.load(tmp_path / r / "model_12" / "model.pt", weights_only=True) for r in ("run", "second")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_continued_run_keeps_one_log(tmp_path: Path) -> None:
    """Records behind the checkpoint are written again, not twice."""
    run(tmp_path, save_every=5)
    shutil.rmtree(tmp_path / "run" / "model_12")
    shutil.rmtree(tmp_path / "run" / "model_10")
    rows = run(tmp_path, save_every=5, continue_from=tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [6, 12]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_at_the_next_update_and_exits(tmp_path: Path, number: signal.Signals) -> None:
    arguments = tiny_flags(tmp_path, num_training_steps=100_000, eval_every=100_000)
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "run_pretrain.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err and "go on with --continue_from" in out
    last = max(losses(records(tmp_path / "run")))
    assert [folder.name for folder in (tmp_path / "run").glob("model_*")] == [f"model_{last}"]
    assert not list((tmp_path / "run").glob(".model_*"))


def test_stopped_run_continues_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses(run(tmp_path))
    update = run_pretrain.Trainer.update

    def update_and_stop(trainer: run_pretrain.Trainer) -> tuple[float, float]:
        result = update(trainer)
        if trainer.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(run_pretrain.Trainer, "update", update_and_stop)
    assert run_pretrain.main(tiny_flags(tmp_path, save_dir=tmp_path / "stopped")) == 143
    assert max(losses(records(tmp_path / "stopped"))) == 7
    continued = run(tmp_path, save_dir=tmp_path / "stopped", continue_from=tmp_path / "stopped")
    assert losses(continued) == whole


def test_random_numbers_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop draws none today; a model with dropout would."""
    update = run_pretrain.Trainer.update

    def noisy_update(trainer: run_pretrain.Trainer) -> tuple[float, float]:
        loss, norm = update(trainer)
        return loss + torch.rand(()).item(), norm + random.random()

    monkeypatch.setattr(run_pretrain.Trainer, "update", noisy_update)
    random.seed(7)
    whole = run(tmp_path, num_training_steps=6, save_every=3)
    random.seed(8)
    third = tmp_path / "run" / "model_3"
    continued = run(tmp_path, num_training_steps=6, continue_from=third, save_dir=tmp_path / "second")
    noisy = [[(r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "train"] for rows in (whole, continued)]
    assert noisy[1] == noisy[0][3:]


def test_failed_save_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk in the second file: the checkpoint before stays the last one."""
    run(tmp_path, num_training_steps=3)
    write, calls = checkpoint._write, []

    def failing_write(content: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(content, path)

    monkeypatch.setattr(checkpoint, "_write", failing_write)
    capsys.readouterr()
    assert run_pretrain.main(tiny_flags(tmp_path, num_training_steps=6, continue_from=tmp_path / "run")) == 1
    assert "cannot save a checkpoint in" in capsys.readouterr().err and len(calls) == 2
    assert checkpoint.find_checkpoint(str(tmp_path / "run")).name == "model_3"


def test_full_disk_is_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch.save itself fails, in the middle of a file; it raises RuntimeError then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = tiny_flags(tmp_path, num_training_steps=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        assert run_pretrain.main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot save a checkpoint in" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.jsonl"}


def test_longer_run_goes_on_at_the_rate_of_its_own_schedule(tmp_path: Path) -> None:
    """Not with one update at the rate that the shorter run would have gone on with, its last."""
    run(tmp_path, num_training_steps=4)
    rows = run(tmp_path, num_training_steps=12, continue_from=tmp_path / "run", save_dir=tmp_path / "run")
    whole = run(tmp_path, num_training_steps=12, save_dir=tmp_path / "whole")
    continued, expected = ({row["step"]: row["lr"] for row in r if row["kind"] == "train"} for r in (rows, whole))
    assert all(continued[step] == expected[step] for step in range(5, 13))


def test_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    run(tmp_path, num_training_steps=3)
    for steps, path in ((5, tmp_path / "run"), (7, tmp_path / "run" / "model_5")):
        arguments = tiny_flags(tmp_path, num_training_steps=steps, continue_from=path, save_dir=None)
        assert run_pretrain.main(arguments) == 0
    assert list(losses(records(tmp_path / "run"))) == list(range(1, 8))


def test_last_checkpoint_of_a_run_is_found(tmp_path: Path) -> None:
    run(tmp_path, save_every=3)
    (tmp_path / "run" / "model_99").mkdir()  # no checkpoint in it
    assert checkpoint.find_checkpoint(str(tmp_path / "run")).name == "model_12"
    assert checkpoint.find_checkpoint(str(tmp_path / "run" / "model_3")).name == "model_3"
    with pytest.raises(UsageError, match="there is no checkpoint in"):
        checkpoint.find_checkpoint(str(tmp_path))


def test_checkpoint_is_plain_and_complete(tmp_path: Path) -> None:
    run(tmp_path, **Q_GALORE)
    folder = tmp_path / "run" / "model_12"
    assert {file.name for file in folder.iterdir()} == {"model.pt", "training_state.pt"}
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert state["step"] == 12 and state["data"] == {"drawn": 48}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "was made with another seed: 0 there, 1 here"),
        ({"optimizer": "sgd"}, "was made with another optimizer: 'adamw' there, 'sgd' here"),
        ({"max_length": 16}, "was made with another max_length: 32 there, 16 here"),
        ({"lr": 0.5}, "was made with another lr: "),
        ({"weight_group_size": 200}, "was made with another weight_group_size: 256 there, 200 here"),
        ({"num_training_steps": 3}, "has all 3 updates of --num_training_steps already"),
        ({"data": ["text", str(ROOT / "examples")]}, "was made with another data"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, num_training_steps=3)
    capsys.readouterr()
    flags = {"num_training_steps": 6, "continue_from": tmp_path / "run", "save_dir": tmp_path / "second", **changes}
    assert run_pretrain.main(tiny_flags(tmp_path, **flags)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "second").exists()


def test_the_folder_of_an_earlier_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, num_training_steps=3)
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert run_pretrain.main(tiny_flags(tmp_path, num_training_steps=2)) == 2
    assert "holds an earlier run: give --continue_from or another folder" in capsys.readouterr().err
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("file", ["model.pt", "training_state.pt"])
def test_damaged_checkpoint_is_refused(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, num_training_steps=3)
    capsys.readouterr()
    path = tmp_path / "run" / "model_3" / file
    path.write_bytes(path.read_bytes()[:1000])
    assert run_pretrain.main(tiny_flags(tmp_path, num_training_steps=6, continue_from=tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert f"{file} is damaged" in error and error.count("\n") == 1

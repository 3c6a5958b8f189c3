"""examples/run_pretrain.py in two processes under torchrun, and the parts that make processes agree."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from pretrain.data import PackedBlocks, Source, StreamedBlocks  # noqa: E402
from pretrain.optimizers import OPTIMIZERS  # noqa: E402
from pretrain.processes import Processes  # noqa: E402
from pretrain.tokenizer import make_tokenizer  # noqa: E402
from pretrain_support import (  # noqa: E402
    EXAMPLES,
    Q_GALORE,
    environment,
    losses,
    make_documents,
    one_thread,  # noqa: F401 - a fixture
    records,
    run,
    tiny_flags,
)

PROGRAM = Path(__file__).with_name("pretrain_program.py")
QUANTISED = {key: Q_GALORE[key] for key in ("weight_quant", "proj_quant", "stochastic_round")}


def launcher(count: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]


def run_together(folder: Path, count: int, jobs: list[list[str]]) -> str:
    """All jobs in the same processes, one after the other; returns what was printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [*launcher(count), str(PROGRAM), str(folder / "jobs.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in range(count):
        assert done.stdout.count(f"process {rank} ends with 0") == len(jobs)
    return done.stdout


def changes_for(optimizer: str) -> dict[str, Any]:
    """Four sequences an update, in two micro-batches of each of two processes; a refresh falls due every other step."""
    rate = {"sgd": 0.3, "adafactor": 0.05}.get(optimizer, 0.01)
    flags: dict[str, Any] = {"optimizer": optimizer, "lr": rate, "num_training_steps": 5, "total_batch_size": 4}
    flags.update(rank=16, update_proj_gap=2, galore_scale=0.25, grad_clipping=1.0, eval_every=3)
    return {**flags, **QUANTISED} if optimizer.startswith("q_") else flags


def test_two_processes_train_like_one_with_every_optimizer(tmp_path: Path) -> None:
    """The joint batch is the same, so losses, norms and held-out losses agree to rounding; process 0 logs and saves."""
    jobs, expected = [], {}
    for optimizer in OPTIMIZERS:
        changes = changes_for(optimizer)
        expected[optimizer] = run(tmp_path, **changes, save_dir=tmp_path / f"{optimizer}-alone")
        jobs.append(tiny_flags(tmp_path, **changes, batch_size=1, save_dir=tmp_path / optimizer))
    printed = run_together(tmp_path, 2, jobs)
    for optimizer, alone in expected.items():
        rows = records(tmp_path / optimizer)
        assert len(losses(rows)) == 5 and len(losses(rows, "eval")) == 2
        for kind in ("train", "eval"):
            assert losses(rows, kind) == pytest.approx(losses(alone, kind), rel=2e-3), optimizer
        for name, tolerance in (("grad_norm", 2e-2), ("tokens", 0), ("lr", 1e-12)):
            got, wanted = ([row[name] for row in each if row["kind"] == "train"] for each in (rows, alone))
            assert got == pytest.approx(wanted, rel=tolerance), (optimizer, name)
        assert [folder.name for folder in (tmp_path / optimizer).glob("*model*")] == ["model_5"]
        assert printed.count(f", {optimizer}, float32 on cpu, 2 processes") == 1


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(tmp_path: Path, first: int, second: int) -> None:
    """The position in the data counts sequences of all processes, so the next batch is the one of an unbroken run."""
    changes = {**changes_for("q_galore_adamw8bit_per_layer"), "num_training_steps": 8, "scheduler": "constant"}
    whole = run(tmp_path, **changes, save_dir=tmp_path / "whole")
    before, after = {"num_training_steps": 4}, {"continue_from": tmp_path / "run"}
    for count, flags in ((first, {**changes, **before}), (second, {**changes, **after})):
        if count == 1:
            run(tmp_path, **flags)
        else:
            run_together(tmp_path, 2, [tiny_flags(tmp_path, **flags, batch_size=2)])
    got = losses(records(tmp_path / "run"))
    assert sorted(got) == list(range(1, 9)) and got == pytest.approx(losses(whole), rel=2e-3)
    state = torch.load(tmp_path / "run" / "model_8" / "training_state.pt", weights_only=True)
    assert state["data"] == {"drawn": 32}


def test_a_signal_to_one_process_stops_all_after_the_same_update(tmp_path: Path) -> None:
    changes = {**changes_for("adamw"), "batch_size": 2, "num_training_steps": 100_000, "eval_every": 100_000}
    flags = tiny_flags(tmp_path, **changes)
    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / "run_pretrain.py"), *flags],
            env={**environment(), **ports, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    while all(process.poll() is None for process in processes) and not (
        log.exists() and log.read_text().count("\n") >= 3
    ):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    ends = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, code in ends] == [143, 143], ends
    last = max(losses(records(tmp_path / "run")))
    assert [folder.name for folder in (tmp_path / "run").glob("*model_*")] == [f"model_{last}"]
    assert "go on with --continue_from" in ends[0][0][0] and ends[1][0][0] == ""


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_checkpoint_that_cannot_be_written_ends_every_process(tmp_path: Path) -> None:
    """Not only the one that writes: the others would wait for it forever."""
    flags = tiny_flags(tmp_path, num_training_steps=2, batch_size=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".model_2.unfinished").write_text("a file where a folder is to be made")
    command = [*launcher(2), str(EXAMPLES / "run_pretrain.py"), *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "run_pretrain.py: cannot save a checkpoint in" in done.stderr


def test_a_folder_that_cannot_be_written_ends_every_process_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where a folder is to be made")
    command = [*launcher(2), str(EXAMPLES / "run_pretrain.py"), *tiny_flags(tmp_path, batch_size=2)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "run_pretrain.py: cannot write into --save_dir" in done.stderr and "[rank1]" not in done.stderr


# ------------------------------------------------------------ the parts


def packed(processes: Processes) -> Source:
    return PackedBlocks(torch.arange(60), 4, seed=3, processes=processes)


def streamed(processes: Processes) -> Source:
    def documents(skip: int) -> Iterator[str]:
        return iter(make_documents(9, words=6)[skip:])

    return StreamedBlocks(documents, make_tokenizer("byte", (), "x"), 8, processes)


def drawn(source: Source, size: int) -> list[list[int]]:
    inputs, targets = source.next_batch(size)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return torch.cat([inputs, targets[:, -1:]], dim=1).tolist()


@pytest.mark.parametrize("make", [packed, streamed])
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_batch_of_one(make: Any, count: int) -> None:
    """Together they draw what one process draws, nothing twice, over the end of the data and the start of an epoch."""
    alone, parts = make(Processes(0, 1)), [make(Processes(rank, count)) for rank in range(count)]
    for _ in range(12):
        together = [row for part in parts for row in drawn(part, 2)]
        assert together == drawn(alone, 2 * count)
        for part in parts:
            assert str(part.state_dict()) == str(alone.state_dict())


@pytest.mark.parametrize("make", [packed, streamed])
def test_position_is_common_to_any_number_of_processes(make: Any) -> None:
    three = [make(Processes(rank, 3)) for rank in range(3)]
    for part in three:
        part.next_batch(2)
    alone = make(Processes(0, 1))
    alone.next_batch(6)
    expected = drawn(alone, 4)
    two = [make(Processes(rank, 2)) for rank in range(2)]
    for part in two:
        part.load_state_dict(three[1].state_dict())
    assert [row for part in two for row in drawn(part, 2)] == expected

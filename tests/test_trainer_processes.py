"""The Trainer in two processes, started by torchrun: accelerate wraps the model in DDP, trainer_kwargs prepares it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_support import arguments, differing, int8, llama, logged, texts, trained

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trainer")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(TESTS / "trainer_program.py"), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_replicas_are_bit_identical(ranks: list[dict[str, Any]]) -> None:
    """Low-rank (though the second process began with other codes), full gradients in bf16, plain floats."""
    for name in ("whole", "resumed", "full", "float"):
        assert ranks[0][name]["wrapper"] == "DistributedDataParallel"
        assert differing(ranks[0][name]["state"], ranks[1][name]["state"]) == []


def test_resume_is_bit_equal(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert differing(rank["whole"]["state"], rank["resumed"]["state"]) == []
        assert rank["whole"]["losses"] == rank["resumed"]["losses"] and len(rank["whole"]["losses"]) == 6


def test_two_processes_are_one_with_twice_the_batch(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    alone = trained(int8(llama()), args, texts(), update_proj_gap=2)
    assert ranks[0]["whole"]["losses"] == pytest.approx(logged(alone, "loss"), rel=1e-5)
    assert ranks[0]["whole"]["norms"] == pytest.approx(logged(alone, "grad_norm"), rel=1e-5)


def test_optimizer_made_by_hand_is_told_to_prepare(ranks: list[dict[str, Any]]) -> None:
    assert all("call q_galore_torch.integrations.distributed.prepare(model) first" in rank["by hand"] for rank in ranks)

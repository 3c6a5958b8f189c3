"""Whole runs of examples/run_pretrain.py: the published command line, what is learnt, what is logged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from q_galore_torch.nn.leaf import ZeroBuffer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
import run_pretrain  # noqa: E402
from pretrain import losses as pretrain_losses  # noqa: E402
from pretrain.data import load_corpus  # noqa: E402
from pretrain.model import LlamaConfig  # noqa: E402
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
    write_corpus,
)

# The first command line of the README this project continues, as it is typed in the folder of the script.
PUBLISHED = """run_pretrain.py --model_config configs/llama_130m.json --lr 0.015 --galore_scale 0.25 --rank 256
    --update_proj_gap 200 --batch_size 256 --total_batch_size 512 --num_training_steps 20000 --warmup_steps 2000
    --weight_decay 0 --dtype bfloat16 --eval_every 1000 --optimizer q_galore_adamw8bit --project g-galore-c4
    --weight_quant --stochastic_round --proj_quant --name Q-Galore-Adam8bit-LLaMA-130M""".split()


def run_published(folder: Path, launcher: list[str], more: str) -> tuple[list[dict[str, Any]], str]:
    """The published command line as typed in the examples' folder; the flags added behind it make it short."""
    added = ["--data", "text", write_corpus(folder, 60), "--save_dir", str(folder / "run"), *more.split()]
    command = [sys.executable, *launcher, *PUBLISHED, *added]
    done = subprocess.run(command, cwd=EXAMPLES, env=environment(threads=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return records(folder / "run"), done.stdout


def test_published_command_line_runs_under_torchrun(tmp_path: Path) -> None:
    short = "--num_training_steps 1 --batch_size 1 --total_batch_size 2 --max_length 16 --eval_tokens 32"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    rows, printed = run_published(tmp_path, launcher, short)
    assert losses(rows).keys() == losses(rows, "eval").keys() == {1}
    assert all(9 < loss < 12 for kind in ("train", "eval") for loss in losses(rows, kind).values())
    assert "134,105,856 weights, q_galore_adamw8bit, bfloat16" in printed
    weights = torch.load(tmp_path / "run" / "model_1" / "model.pt", weights_only=True)
    assert sum(t.numel() for t in weights.values() if t.dtype == torch.uint8) == 84_934_656


def test_published_command_line_runs_without_torchrun(tmp_path: Path) -> None:
    short = "--num_training_steps 4 --batch_size 2 --total_batch_size 4 --max_length 32 --eval_tokens 64"
    rows, printed = run_published(tmp_path, [], f"--model_config configs/llama_9m.json --rank 32 {short}")
    assert sorted(losses(rows)) == [1, 2, 3, 4] and losses(rows, "eval").keys() == {4}
    assert "8,995,968 weights" in printed


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam"},
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "lr": 0.3, "beta1": 0.9},
        {"optimizer": "adafactor", "lr": 0.05},
        {"optimizer": "adam8bit"},
        {"optimizer": "galore_adamw", "rank": 16, "lr": 0.02},
        {"optimizer": "galore_adamw8bit", "rank": 16, "lr": 0.02},
        {**Q_GALORE, "weight_quant": None, "stochastic_round": None, "update_proj_gap": 10, "lr": 0.02},
        {**Q_GALORE, "update_proj_gap": 10, "lr": 0.02},
        {**Q_GALORE, "proj_quant": None, "update_proj_gap": 10, "dtype": "bfloat16", "lr": 0.02},
    ],
    ids=lambda changes: "-".join(str(v) for k, v in changes.items() if k in ("optimizer", "dtype", "weight_quant")),
)
def test_loss_falls_in_thirty_updates(tmp_path: Path, changes: dict[str, Any]) -> None:
    """From log 264 = 5.58 to well below 3.5, the entropy of the text's letters being 2.8; both parts alike."""
    rows = run(tmp_path, num_training_steps=30, batch_size=8, eval_at_start=True, **changes)
    train, held_out = losses(rows), losses(rows, "eval")
    assert train[1] > 5.2 and held_out[0] > 5.2
    assert sum(train[step] for step in (28, 29, 30)) / 3 < 3.4 and held_out[30] < 3.4
    assert rows[-1]["kind"] == "summary"


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    one = losses(run(tmp_path, batch_size=8, num_training_steps=6))
    four = losses(run(tmp_path, batch_size=2, total_batch_size=8, num_training_steps=6, save_dir=tmp_path / "four"))
    assert four == pytest.approx(one, rel=1e-4)


def test_a_cpu_takes_few_tokens_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses(run(tmp_path, device="cpu", batch_size=8, num_training_steps=6))
    shapes, summed_loss = [], pretrain_losses.summed_loss

    def watched(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            shapes.append(tuple(inputs.shape))
        return summed_loss(model, inputs, targets)

    monkeypatch.setattr(pretrain_losses, "summed_loss", watched)
    monkeypatch.setattr(run_pretrain, "CPU_TOKENS_AT_ONCE", 100)
    parts = run(tmp_path, device="cpu", batch_size=8, num_training_steps=6, save_dir=tmp_path / "parts")
    assert losses(parts) == pytest.approx(whole, rel=1e-4)
    assert shapes == 6 * [(3, 32), (3, 32), (2, 32)]


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    """The norm is logged as it was; with plain SGD a clipped step is as long as lr times the bound."""
    changes = {"optimizer": "sgd", "lr": 1.0, "warmup_steps": 0, "num_training_steps": 1, "scheduler": "constant"}
    free = run(tmp_path, **changes)
    clipped = run(tmp_path, **changes, grad_clipping=0.01, save_dir=tmp_path / "clipped")
    norms = [[row["grad_norm"] for row in rows if row["kind"] == "train"] for rows in (free, clipped)]
    assert norms[0] == norms[1] and norms[0][0] > 0.1
    torch.manual_seed(0)
    start = run_pretrain.build_model(str(tmp_path / "tiny.json"), False, torch.float32).state_dict()
    end = torch.load(tmp_path / "clipped" / "model_1" / "model.pt", weights_only=True)
    length = math.sqrt(sum(float((end[name] - start[name]).double().square().sum()) for name in start))
    assert length == pytest.approx(0.01, rel=1e-3)


def test_log_has_what_people_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, log_every=4, plot=True, **Q_GALORE)
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 13))
    expected = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory", "refreshes"}
    assert all(expected <= row.keys() for row in train)
    assert [row["tokens"] for row in train] == [128 * step for step in range(1, 13)]
    assert train[-1]["refreshes"] >= 14 and train[0]["lr"] == 0.005 and train[1]["lr"] == 0.01
    for row in rows:
        if row["kind"] == "eval":
            assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    printed = capsys.readouterr().out
    assert printed.count("\nstep ") == 3 and "step 12/12 loss" in printed and "held-out loss" in printed
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    picture = tmp_path / "run" / "loss.png"
    assert f"loss curve: {picture}" in printed and picture.read_bytes().startswith(b"\x89PNG")


def test_evaluation_takes_all_held_out_tokens_unless_told(tmp_path: Path) -> None:
    tokens = [row["tokens"] for row in run(tmp_path) if row["kind"] == "eval"]
    held_out = len(load_corpus("text", str(tmp_path / "corpus"), "byte", 32, 0, 0, 264).held_out)
    assert tokens == 2 * [held_out - 1]
    short = [
        row["tokens"] for row in run(tmp_path, eval_tokens=100, save_dir=tmp_path / "short") if row["kind"] == "eval"
    ]
    assert len(set(short)) == 1 and 0 < short[0] <= 100


def test_lazy_rule_flags_save_refreshes(tmp_path: Path) -> None:
    """Every cosine reaches -1 and nearly every similarity 0.01, so a queue of one doubles the gap each time."""
    flags = {**Q_GALORE, "num_training_steps": 30, "gamma_proj": 2, "queue_size": 1}
    rules: dict[str, dict[str, Any]] = {
        "fixed": {},
        "upstream": {"cos_threshold": -1},
        "energy": {"energy_threshold": 0.01},
    }
    counts = {}
    for rule, options in rules.items():
        rows = run(tmp_path, **flags, **options, lazy_rule=rule, save_dir=tmp_path / rule)
        counts[rule] = max(row.get("refreshes", 0) for row in rows)
    assert 0 < counts["upstream"] < 0.6 * counts["fixed"]
    assert 0 < counts["energy"] < 0.7 * counts["fixed"]


def test_memory_line_counts_real_bytes(tmp_path: Path) -> None:
    summary = run(tmp_path, optimizer="adamw", num_training_steps=3)[-1]
    weights = 4 * LlamaConfig.from_json(str(tmp_path / "tiny.json")).num_parameters
    assert summary["weights"] == summary["gradients"] == weights
    assert 2 * weights <= summary["optimizer_state"] < 2 * weights + 1000
    quantised = run(tmp_path, **Q_GALORE, num_training_steps=3, save_dir=tmp_path / "quantised")[-1]
    regular = 4 * (2 * 264 * 64 + 5 * 64)  # embeddings, head and norms
    elements, coordinates = 2 * (4 * 64 * 64 + 3 * 64 * 128), 2 * 16 * (4 * 64 + 3 * 128)
    assert quantised["gradients"] == regular + 4 * coordinates
    stored = regular + elements + 6 * elements // 256
    zeros = ZeroBuffer.of(torch.device("cpu"), torch.float32).base.nbytes  # as long as any test's model needs them
    assert stored <= quantised["weights"] <= stored + max(zeros, 4 * coordinates // 2)
    assert quantised["optimizer_state"] < 0.9 * weights


def test_runs_without_tqdm_matplotlib_and_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("tqdm", "matplotlib", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    run(tmp_path, num_training_steps=3, plot=True, unset_wandb=None)
    printed = capsys.readouterr().out
    for module in ("tqdm", "matplotlib", "wandb"):
        assert printed.count(f"{module} is not installed") == 1


def test_loss_that_is_no_number_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = tiny_flags(tmp_path, optimizer="sgd", lr=1e30, warmup_steps=0)
    assert run_pretrain.main(flags) == 1
    error = capsys.readouterr().err
    assert "a smaller --lr may help" in error and "Traceback" not in error
    assert not list((tmp_path / "run").glob("model_*"))


def test_demo_runs_when_shortened(tmp_path: Path) -> None:
    short = ["--num_training_steps", "3", "--max_length", "64", "--batch_size", "2", "--eval_tokens", "256"]
    command = [sys.executable, "examples/run_pretrain.py", "--demo", *short, "--save_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "before training" in done.stdout and "memory in MiB: weights" in done.stdout
    assert "q_galore_adamw8bit" in done.stdout
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["step"] == 0

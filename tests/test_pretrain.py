"""Whole runs of examples/run_pretrain.py: resume, signals, the published command line, logs."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
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
import run_pretrain  # noqa: E402
from pretrain import checkpoint  # noqa: E402
from pretrain.data import load_corpus  # noqa: E402
from pretrain.errors import UsageError  # noqa: E402
from pretrain.losses import summed_loss  # noqa: E402
from pretrain.model import LlamaConfig  # noqa: E402
from pretrain_support import EXAMPLES, ROOT, losses, records, run, tiny_flags, write_corpus  # noqa: E402

Q_GALORE: dict[str, Any] = {
    "optimizer": "q_galore_adamw8bit",
    "weight_quant": True,
    "proj_quant": True,
    "stochastic_round": True,
    "rank": 16,
    "update_proj_gap": 3,
    "galore_scale": 0.25,
}
# The first command line of the README this project continues, as it is typed in the folder of the script.
PUBLISHED = """run_pretrain.py --model_config configs/llama_130m.json --lr 0.015 --galore_scale 0.25 --rank 256
    --update_proj_gap 200 --batch_size 256 --total_batch_size 512 --num_training_steps 20000 --warmup_steps 2000
    --weight_decay 0 --dtype bfloat16 --eval_every 1000 --optimizer q_galore_adamw8bit --project g-galore-c4
    --weight_quant --stochastic_round --proj_quant --name Q-Galore-Adam8bit-LLaMA-130M""".split()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of 64 x 128 gain nothing from a second thread, and wait for it where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def environment(threads: int = 1) -> dict[str, str]:
    """The package of this checkout, whether it is installed or only built in place; wandb kept offline."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **fixed}


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
    assert all(9 < row["loss"] < 12 for row in rows)
    assert "134,105,856 weights, q_galore_adamw8bit, bfloat16" in printed
    weights = torch.load(tmp_path / "run" / "model_1" / "model.pt", weights_only=True)
    assert sum(t.numel() for t in weights.values() if t.dtype == torch.uint8) == 84_934_656


def test_published_command_line_runs_without_torchrun(tmp_path: Path) -> None:
    short = "--num_training_steps 4 --batch_size 2 --total_batch_size 4 --max_length 32 --eval_tokens 64"
    rows, printed = run_published(tmp_path, [], f"--model_config configs/llama_9m.json --rank 32 {short}")
    assert sorted(losses(rows)) == [1, 2, 3, 4] and losses(rows, "eval").keys() == {4}
    assert "8,995,968 weights" in printed


def test_two_processes_are_refused_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "run_pretrain.py"), *tiny_flags(tmp_path)]
    done = subprocess.run(command, env={**environment(), "WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("run_pretrain.py: training with 2 processes is not supported yet; use --nproc_per_node 1\n")


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
    four = losses(run(tmp_path, batch_size=2, total_batch_size=8, num_training_steps=6))
    assert four == pytest.approx(one, rel=1e-4)


def test_a_cpu_takes_few_tokens_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses(run(tmp_path, device="cpu", batch_size=8, num_training_steps=6))
    shapes = []

    def watched(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(inputs.shape))
        return summed_loss(model, inputs, targets)

    monkeypatch.setattr(run_pretrain, "summed_loss", watched)
    monkeypatch.setattr(run_pretrain, "CPU_TOKENS_AT_ONCE", 100)
    assert losses(run(tmp_path, device="cpu", batch_size=8, num_training_steps=6)) == pytest.approx(whole, rel=1e-4)
    assert shapes == 6 * [(3, 32), (3, 32), (2, 32)]


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    """The norm is logged as it was; with plain SGD a clipped step is as long as lr times the bound."""
    changes = {"optimizer": "sgd", "lr": 1.0, "warmup_steps": 0, "num_training_steps": 1, "scheduler": "constant"}
    free = run(tmp_path, **changes)
    clipped = run(tmp_path, **changes, grad_clipping=0.01, save_dir=tmp_path / "clipped")
    assert free[0]["grad_norm"] == clipped[0]["grad_norm"] > 0.1
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
    short = [row["tokens"] for row in run(tmp_path, eval_tokens=100) if row["kind"] == "eval"]
    assert len(set(short)) == 1 and 0 < short[0] <= 100


def test_lazy_rule_flags_save_refreshes(tmp_path: Path) -> None:
    """Every cosine reaches -1, so the gap doubles as soon as the queue of one is full."""
    flags = {**Q_GALORE, "num_training_steps": 30}
    steady = run(tmp_path, **flags)
    lazy = {"cos_threshold": -1, "gamma_proj": 2, "queue_size": 1}
    stretched = run(tmp_path, **flags, **lazy, save_dir=tmp_path / "lazy")
    counts = [max(row.get("refreshes", 0) for row in rows) for rows in (steady, stretched)]
    assert 0 < counts[1] < 0.6 * counts[0]


def test_memory_line_counts_real_bytes(tmp_path: Path) -> None:
    summary = run(tmp_path, optimizer="adamw", num_training_steps=3)[-1]
    weights = 4 * LlamaConfig.from_json(str(tmp_path / "tiny.json")).num_parameters
    assert summary["weights"] == summary["gradients"] == weights
    assert 2 * weights <= summary["optimizer_state"] < 2 * weights + 1000
    quantised = run(tmp_path, **Q_GALORE, num_training_steps=3)[-1]
    regular = 4 * (2 * 264 * 64 + 5 * 64)  # embeddings, head and norms
    elements, coordinates = 2 * (4 * 64 * 64 + 3 * 64 * 128), 2 * 16 * (4 * 64 + 3 * 128)
    assert quantised["gradients"] == regular + 4 * coordinates
    stored = regular + elements + 6 * elements // 256
    assert stored <= quantised["weights"] <= stored + 4 * coordinates // 2  # and one zero buffer
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

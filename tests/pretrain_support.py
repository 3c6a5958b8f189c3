"""Shared by the tests of examples/run_pretrain.py: a tiny model, a small text, and runs inside this process."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

TINY = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_sequence_length": 128,
}
Q_GALORE: dict[str, Any] = {
    "optimizer": "q_galore_adamw8bit",
    "weight_quant": True,
    "proj_quant": True,
    "stochastic_round": True,
    "rank": 16,
    "update_proj_gap": 3,
    "galore_scale": 0.25,
}
WORDS = "the a rank weight step moves learns small large matrix gradient slowly quickly and then into over".split()


def write_config(folder: Path, **changes: Any) -> str:
    """A model config of 100,000 weights."""
    path = folder / "tiny.json"
    path.write_text(json.dumps({**TINY, **changes}))
    return str(path)


def make_documents(count: int, words: int = 120) -> list[str]:
    """Different texts over a few words, each beginning with its own number."""
    draw = random.Random(0)
    return [f"document {i}: " + " ".join(draw.choices(WORDS, k=words)) + "\n" for i in range(count)]


def write_corpus(folder: Path, count: int = 40) -> str:
    """A folder of small text files."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, text in enumerate(make_documents(count)):
        (corpus / f"{i:03}.txt").write_text(text)
    return str(corpus)


def tiny_flags(folder: Path, **changes: Any) -> list[str]:
    """Flags of a run that takes seconds; True gives a bare flag, None leaves one out."""
    flags: dict[str, Any] = {
        "model_config": write_config(folder),
        "data": ["text", str(folder / "corpus") if (folder / "corpus").exists() else write_corpus(folder)],
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 4,
        "max_length": 32,
        "num_training_steps": 12,
        "warmup_steps": 2,
        "lr": 0.01,
        "optimizer": "adamw",
        "eval_every": 6,
        "save_dir": str(folder / "run"),
        "unset_wandb": True,
    }
    flags.update(changes)
    arguments = []
    for name, value in flags.items():
        if value is None:
            continue
        arguments.append(f"--{name}")
        if value is not True:
            arguments += [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return arguments


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run to the end in this process and return the records of its log."""
    from run_pretrain import main  # each test file puts examples/ on the path

    arguments = tiny_flags(folder, **changes)
    code = main(arguments)
    assert code == 0, f"exit code {code} of {arguments}"
    return records(Path(arguments[arguments.index("--save_dir") + 1]))


def records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run's log, of one kind if given."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


def losses(rows: list[dict[str, Any]], kind: str = "train") -> dict[int, float]:
    """Step -> loss of the records of one kind."""
    return {row["step"]: row["loss"] for row in rows if row["kind"] == kind}


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

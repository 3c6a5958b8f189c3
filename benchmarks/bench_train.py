"""Training updates (forward, backward, step) and their memory against torch's fused AdamW.

    python benchmarks/bench_train.py [--models 60m block] [--dtypes float32 bfloat16] [--rounds N] [--threads N]
                                     [--tokens N] [--no-memory] [--no-save] [--quick]

60m is the LLaMA of 60M weights with its loss over the vocabulary, block one decoder layer of the 1B shape. The
contestants take turns in one process. Memory is measured in a fresh process for each: the tensors alive at the peak of
an update without and with new bases, and the largest resident set. --quick: tiny models, to see that everything runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from live_memory import Peak
from torch import Tensor, nn

import q_galore_torch as qg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from pretrain.losses import summed_loss  # noqa: E402
from pretrain.model import DecoderLayer, LlamaConfig, LlamaForCausalLM  # noqa: E402

BASE = "AdamW(fused)"
GAP = 200
WARMUP = 10  # past the first bases from data, which come in the first 8 updates
LENGTH = 256
# How each contestant is prepared and updated; None is AdamW.
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    BASE: None,
    "full gradients, float weights": {"weight_bits": None, "grad_mode": "full"},
    "low-rank, float weights": {"weight_bits": None},
    "low-rank, float weights, per layer": {"weight_bits": None, "per_layer": True},
    "low-rank, INT8 weights": {},
    "low-rank, INT8 weights, per layer": {"per_layer": True},
}


class Case(NamedTuple):
    """A model of this benchmark: its shape, the projection's rank and whether it is one decoder layer alone."""

    config: LlamaConfig
    rank: int
    alone: bool


CASES = {
    "60m": Case(LlamaConfig(32000, 512, 1376, 8, 8), 128, False),
    "block": Case(LlamaConfig(32000, 2048, 5461, 1, 32), 512, True),
}
QUICK = {
    "60m": Case(LlamaConfig(264, 32, 48, 2, 2), 8, False),
    "block": Case(LlamaConfig(264, 32, 48, 1, 2), 8, True),
}


class Block(nn.Module):
    """A decoder layer on fixed positions; its loss is the mean square of what comes out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.layer = DecoderLayer(config)
        head = config.hidden_size // config.num_attention_heads
        angles = torch.outer(torch.arange(LENGTH), 10000 ** (-torch.arange(0, head, 2) / head)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.cos[: x.shape[1]], self.sin[: x.shape[1]]).float().square().mean()


class Training(NamedTuple):
    """A contestant: one update, what is updated and, for a peak, the hooks that were there first."""

    update: Callable[[], None]
    optimizer: torch.optim.Optimizer
    peak: Peak | None


def training(case: Case, name: str, dtype: torch.dtype, tokens: int, watched: bool = False) -> Training:
    """A contestant on its own copy of the model.

    Args:
        case: the model.
        name: of the contestant.
        dtype: of weights that are not INT8, and of activations.
        tokens: of an update.
        watched: with a Peak.
    """
    torch.manual_seed(0)
    length = min(LENGTH, tokens)
    batch = tokens // length
    model: nn.Module = (Block(case.config) if case.alone else LlamaForCausalLM(case.config)).to(dtype)
    if case.alone:
        x = torch.randn(batch, length, case.config.hidden_size, dtype=dtype, requires_grad=True)
    else:
        text = torch.randint(0, case.config.vocab_size, (batch, length + 1))
    options = CONTESTANTS[name]
    if options is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        peak = Peak(model, optimizer) if watched else None
    else:
        options = dict(options)
        per_layer = options.pop("per_layer", False)
        qg.prepare_model(model, case.rank, **options)
        compute = str(dtype).removeprefix("torch.")
        ours = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=GAP), lr=1e-4, compute_dtype=compute)
        optimizer, peak = ours, Peak(model, ours) if watched else None
        if per_layer:
            qg.enable_per_layer(ours)

    def update() -> None:
        if case.alone:
            x.grad = None  # the layers before would read it
            model(x).backward()
        else:
            (summed_loss(model, text[:, :-1], text[:, 1:]) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(update, optimizer, peak)


def refresh_ms(optimizer: torch.optim.Optimizer) -> float:
    """What new bases cost an update on the average at a fixed gap, from those that were made."""
    if not isinstance(optimizer, qg.QGaLoreAdamW8bit):
        return 0.0
    matrices = [entry for entry in optimizer.telemetry() if entry.get("refreshes")]
    made = sum(entry["refreshes"] for entry in matrices)
    return 1e3 * sum(entry["seconds"] for entry in matrices) / made * len(matrices) / GAP if made else 0.0


def timed(case: Case, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Ratios of time and tokens a second of every contestant, in turns."""
    contestants = {name: training(case, name, dtype, tokens) for name in CONTESTANTS}
    table = timing.ratios(timing.contest({n: c.update for n, c in contestants.items()}, rounds, WARMUP), BASE)
    for name, row in table.items():
        row["tokens_per_second"] = round(1e3 * tokens / row["ms"], 1)
        row["refresh_ms"] = round(refresh_ms(contestants[name].optimizer), 3)
        row["ratio_with_refreshes"] = round(row["ratio"] + row["refresh_ms"] / table[BASE]["ms"], 4)
    return table


def remembered(case: Case, name: str, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Bytes of weights, gradients and state at the peak of an update, and the resident set of this process."""
    watched = training(case, name, dtype, tokens, watched=True)
    assert watched.peak is not None
    peaks = []
    for _ in range(WARMUP + 2):
        watched.peak.bytes = 0
        watched.update()
        peaks.append(watched.peak.bytes)
    # Not getrusage(): its figure is at least what the parent had when it started this process.
    rss = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    # AdamW makes its moments in the first update, ours are there before.
    return {"steady": min(peaks[1:]), "largest": max(peaks), "rss": rss}


def remembered_alone(arguments: argparse.Namespace, model: str, name: str, dtype: str) -> dict[str, int]:
    """The same in a fresh process."""
    words = ["--alone", name, "--models", model, "--dtypes", dtype, "--tokens", str(arguments.tokens)]
    words += ["--threads", str(arguments.threads), *(["--quick"] if arguments.quick else [])]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def show_memory(table: dict[str, dict[str, Any]]) -> None:
    print(
        f"  {'MB of weights, gradients and state':38s} {'steady':>10s} {'of AdamW':>9s} {'largest':>10s} {'RSS':>10s}"
    )
    for name, row in table.items():
        share = row["steady"] / table[BASE]["steady"]
        steady, largest, rss = (row[key] / 1e6 for key in ("steady", "largest", "rss"))
        print(f"  {name:38s} {steady:10.1f} {share:9.2f} {largest:10.1f} {rss:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--alone", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = QUICK if arguments.quick else CASES
    if arguments.alone:
        dtype = getattr(torch, arguments.dtypes[0])
        print(json.dumps(remembered(cases[arguments.models[0]], arguments.alone, dtype, arguments.tokens)))
        return
    record: dict[str, Any] = {"machine": timing.machine(), "threads": arguments.threads, "tokens": arguments.tokens}
    for model in arguments.models:
        for dtype in arguments.dtypes:
            table = timed(cases[model], getattr(torch, dtype), arguments.tokens, arguments.rounds)
            title = f"An update of {model}, rank {cases[model].rank}, {arguments.tokens} tokens, {dtype}"
            timing.show(title, table, BASE)
            record[f"{model}, {dtype}"] = table
            if not arguments.no_memory:
                for name, row in table.items():
                    row.update(remembered_alone(arguments, model, name, dtype))
                show_memory(table)
    if not (arguments.no_save or arguments.quick):
        timing.save("train", record)


if __name__ == "__main__":
    main()

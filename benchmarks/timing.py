"""Interleaved timing of contestants in one process, reported as ratios, and the record that is committed."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import q_galore_torch as qg
from q_galore_torch import ops

RESULTS = Path(__file__).parent / "results"


def contest(contestants: dict[str, Callable[[], object]], rounds: int = 11, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; the contestants take turns, so drift of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of each contestant's time over the base's, round by round, and its median time."""
    table = {}
    for name, times in seconds.items():
        shares = [t / b for t, b in zip(times, seconds[base], strict=True)]
        table[name] = {
            "ratio": round(statistics.median(shares), 4),
            "ratio_min": round(min(shares), 4),
            "ratio_max": round(max(shares), 4),
            "ms": round(1e3 * statistics.median(times), 4),
        }
    return table


def show(title: str, table: dict[str, dict[str, float]], base: str) -> None:
    print(f"\n{title} (ratio of time to {base})")
    for name, row in table.items():
        spread = f"{row['ratio_min']:.2f} - {row['ratio_max']:.2f}"
        print(f"  {name:34s} {row['ratio']:8.2f}   ({spread:>14s})   {row['ms']:9.3f} ms")


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    flags = Path("/proc/cpuinfo").read_text()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "cpu": model,
        "simd": ops.simd_level(),
        "amx_bf16": "amx_bf16" in flags,
        "torch": torch.__version__,
        "package": qg.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(["python", *sys.argv]),
    }


def save(name: str, record: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to benchmarks/results/{path.name}")

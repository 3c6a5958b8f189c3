"""What the planner predicts against what real training allocates: LLaMAs of 60M and 350M weights in every mode.

    python benchmarks/bench_memory.py [--models 60m 350m] [--modes NAME ...] [--threads N] [--gap N] [--no-save]

Few tokens and a short gap, so that first bases, later ones and comparisons all come within some updates.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import timing
import torch
from live_memory import trained

import q_galore_torch as qg

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from pretrain.model import LlamaConfig, LlamaForCausalLM  # noqa: E402

RANKS = {"60m": 128, "350m": 256}
TOKENS = 32
# Options of the model and, beside them, how it is updated, as the planner is told.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ordinary, INT8 weights, R in float32": ({}, {}),
    "ordinary, INT8 weights, R in bfloat16": ({"grad_dtype": "bfloat16"}, {}),
    "ordinary, bfloat16 weights": ({"weight_bits": None}, {}),
    "ordinary, INT8 weights, full gradients": ({"grad_mode": "full"}, {}),
    "per layer, one micro-batch": ({}, {"per_layer": True}),
    "per layer, full gradients": ({"grad_mode": "full"}, {"per_layer": True}),
    "per layer, two micro-batches": ({}, {"per_layer": True, "accumulation": 2}),
    "per layer, clipped by the global norm": ({}, {"per_layer": True, "clipping": "global"}),
}


def measured(config: LlamaConfig, rank: int, options: dict[str, Any], updates: dict[str, Any], gap: int) -> int:
    """Peak bytes of a training that is long enough to show every refresh."""
    gc.collect()
    torch.manual_seed(0)
    model = qg.prepare_model(LlamaForCausalLM(config).to(torch.bfloat16), rank, **options)
    optimizer = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=gap), lr=1e-3)
    per_layer: dict[str, Any] | None = None
    if updates:
        clipping = updates.get("clipping")
        per_layer = {} if clipping is None else {"max_grad_norm": 1.0, "clip": clipping}
    matrices = len(optimizer.param_groups[-1]["params"])
    count = max(8, -(-matrices // 8)) + gap + 1
    passes = updates.get("accumulation", 1)
    return trained(
        model, optimizer, lambda: torch.randint(0, config.vocab_size, (1, TOKENS + 1)), count, passes, per_layer
    )


def compared(file: str, rank: int, gap: int, modes: list[str]) -> dict[str, dict[str, float]]:
    """Predicted and measured bytes of each mode, and the difference."""
    config = LlamaConfig.from_json(file)
    table = {}
    for mode in modes:
        options, updates = MODES[mode]
        predicted = qg.plan_memory(file, rank, update_proj_gap=gap, **options, **updates).tracked
        taken = measured(config, rank, options, updates, gap)
        table[mode] = {"predicted": predicted, "measured": taken, "difference": round(predicted / taken - 1, 6)}
        print(
            f"  {mode:42s} {predicted / 1e6:9.2f} MB {taken / 1e6:9.2f} MB {table[mode]['difference']:+9.3%}",
            flush=True,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gap", type=int, default=8)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"machine": timing.machine(), "threads": arguments.threads, "gap": arguments.gap}
    for name in arguments.models:
        rank = RANKS[name]
        print(f"\n{name}, rank {rank}: predicted, measured, difference")
        record[name] = {
            "rank": rank,
            "modes": compared(str(EXAMPLES / "configs" / f"llama_{name}.json"), rank, arguments.gap, arguments.modes),
        }
    if not arguments.no_save:
        timing.save("memory", record)


if __name__ == "__main__":
    main()

"""Learning-rate schedules as a factor of ``--lr``.

Every schedule begins with ``warmup_steps`` updates rising linearly: update 0 already has 1 / warmup_steps of the rate,
so that no update is wasted on a rate of zero. What follows is a function of the update's number alone.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULERS = ("linear", "cosine", "cosine_restarts", "constant")


def rate_factor(
    step: int, scheduler: str, warmup_steps: int, total_steps: int, min_lr_ratio: float, cycle_length: int
) -> float:
    """The factor of update ``step``, counted from 0.

    Args:
        step: Number of the update.
        scheduler: One of SCHEDULERS.
        warmup_steps: Updates of warm-up.
        total_steps: Updates of the whole run; the schedule ends there.
        min_lr_ratio: Factor at the end of ``linear``, ``cosine`` and of every cycle of ``cosine_restarts``.
        cycle_length: Updates of one cycle of ``cosine_restarts``, the first one including the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if scheduler == "constant":
        return 1.0
    if scheduler == "cosine_restarts" and step >= cycle_length:
        start, end = step - step % cycle_length, step - step % cycle_length + cycle_length
    elif scheduler == "cosine_restarts":
        start, end = warmup_steps, cycle_length
    else:
        start, end = warmup_steps, total_steps
    progress = min(1.0, (step - start) / max(1, end - start))
    share = 1.0 - progress if scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr_ratio + (1.0 - min_lr_ratio) * share


def make_scheduler(
    optimizer: Optimizer,
    scheduler: str,
    warmup_steps: int,
    total_steps: int,
    min_lr_ratio: float,
    cycle_length: int,
) -> LambdaLR:
    """A torch scheduler over ``rate_factor``; its ``state_dict`` holds numbers only."""
    return LambdaLR(
        optimizer,
        lambda step: rate_factor(step, scheduler, warmup_steps, total_steps, min_lr_ratio, cycle_length),
    )

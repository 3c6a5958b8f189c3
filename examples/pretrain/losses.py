"""Next-token loss and its mean over held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .model import hidden_states
from .processes import ALONE, Processes

# The logits of 65,536 tokens over 32,000 entries are 8.4 GB in float32, twice that with their gradient. They are
# therefore made for so many numbers at a time, and made again in the backward pass: one more product with lm_head.
LOGITS_AT_ONCE = 2**25


def summed_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over all targets, as a float32 scalar.

    Args:
        model: Ours or transformers' ``LlamaForCausalLM``.
        inputs: int64 [batch, length].
        targets: int64 [batch, length], the token that follows each input.
    """
    hidden = hidden_states(model, inputs).flatten(0, 1)
    targets = targets.flatten()
    vocabulary = model.lm_head.weight.shape[0]
    rows = max(1, LOGITS_AT_ONCE // vocabulary)

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(states).float(), wanted, reduction="sum")

    if len(targets) <= rows or not torch.is_grad_enabled():
        run: Callable[..., Tensor] = part
    else:

        def run(states: Tensor, wanted: Tensor) -> Tensor:
            return checkpoint(part, states, wanted, use_reentrant=False)

    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.stack([run(states, wanted) for states, wanted in pieces]).sum()


class SummedLoss(nn.Module):
    """``summed_loss`` as the forward of a module, since DistributedDataParallel wraps nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return summed_loss(self.model, inputs, targets)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> tuple[float, int] | None:
    """Mean loss in nats per token over all targets of all batches, whatever their sizes.

    Several processes take the batches in turn and all return the same.

    Returns:
        The mean and the number of targets, or None when ``stop`` asked a process to leave before the end.
    """
    was_training = model.training
    model.eval()
    total, count, stopped = 0.0, 0, False
    try:
        for inputs, targets in islice(batches, processes.rank, None, processes.count):
            stopped = stop()
            if stopped:
                break
            total += summed_loss(model, inputs.to(device), targets.to(device)).item()
            count += targets.numel()
    finally:
        model.train(was_training)
    total, tokens, stops = processes.sum(total, count, stopped)
    return None if stops else (total / tokens, int(tokens))

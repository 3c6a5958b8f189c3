"""Gradients that are not finite, or whose square overflows, enter no moments, bases or weights.

On the CPU they are looked for before anything is written. A device that works asynchronously is not waited for: its
kernels look at one number for each gradient there and leave that parameter as it is, and the host hears of it later.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from q_galore_torch import ops

if TYPE_CHECKING:
    from q_galore_torch.optim.update import Work

_log = logging.getLogger(__name__)

LARGEST_GRADIENT = 1e18  # its square still is a float32


class NonFiniteGradientError(RuntimeError):
    """A gradient holds a NaN, an infinity or a value whose square overflows; it was not used."""


def asynchronous(device: torch.device) -> bool:
    """Whether the host has to wait for earlier work where it reads a number of this device."""
    return device.type != "cpu"


def keep_finite(work: list[Work], outcome: str) -> tuple[list[Work], list[float]]:
    """The parameters whose gradients are finite and small enough to square, and the largest entry of each.

    Waits for the device.

    Args:
        work: what is to be updated.
        outcome: what an error means for the update as a whole.

    Raises:
        NonFiniteGradientError: under ``nonfinite="raise"``, naming the parameter.
    """
    kept, sizes = [], []
    sentence, skipped = "", []
    for item, size in zip(work, _absmax([item.gradient for item in work]), strict=True):
        excess = _excess(size, _limit(item))
        if not excess:
            kept.append(item)
            sizes.append(size)
            continue
        if item.low_rank and item.parameter.binding is not None:
            item.parameter.binding.drop()
        if item.group["nonfinite"] == "raise":
            raise NonFiniteGradientError(f"the gradient of {item.name} {excess}; {outcome}")
        sentence = sentence or f"the gradient of {item.name} {excess}: left alone in this step"
        skipped.append(item.name)
    if skipped:
        _log.warning("%s%s", sentence, _also(skipped[1:]))
    return kept, sizes


def _limit(item: Work) -> float:
    if item.shapes is None or item.low_rank:
        return LARGEST_GRADIENT
    # so that no entry of R = P G^T is larger
    return LARGEST_GRADIENT / math.sqrt(math.prod(dim for _, _, dim in item.shapes.sides))


def _excess(size: float, limit: float) -> str:
    """What is wrong with a gradient, "" for nothing."""
    if size <= limit:
        return ""
    return "is not finite" if size == math.inf else f"has an entry of size {size:g}, over {limit:g}"


def _absmax(gradients: list[Tensor]) -> list[float]:
    sizes = [0.0] * len(gradients)
    for indices in _by_device(gradients):
        for index, size in zip(indices, ops.absmax([gradients[i] for i in indices]).tolist(), strict=True):
            sizes[index] = size
    return sizes


def _by_device(tensors: list[Tensor]) -> list[list[int]]:
    places: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(index)
    return list(places.values())


# ---------------------------------------------------------------- without waiting


class _Asked(NamedTuple):
    """Whose largest entry is asked."""

    name: str
    step: int  # of the parameter, counted from 0
    nonfinite: str
    limit: float


class Unread:
    """What has been asked about gradients on asynchronous devices, and is not known on the host yet."""

    def __init__(self) -> None:
        self._asked: list[tuple[list[_Asked], Tensor]] = []
        self._coming: deque[tuple[list[_Asked], Tensor, torch.cuda.Event | None]] = deque()

    def flagged(self, work: list[Work]) -> list[Work]:
        """The same work with a flag for the kernels in each: above ``LARGEST_GRADIENT`` they leave it alone."""
        flags: list[Tensor | None] = [None] * len(work)
        for indices in _by_device([item.gradient for item in work]):
            items = [work[i] for i in indices]
            largest = ops.absmax([item.gradient for item in items])
            limits = [_limit(item) for item in items]
            asked = [
                _Asked(item.name, item.state["step"], item.group["nonfinite"], limit)
                for item, limit in zip(items, limits, strict=True)
            ]
            self._asked.append((asked, largest))
            # Numbers of the host come as arguments of the multiplication: no copy, and so no wait.
            factors = [LARGEST_GRADIENT / limit for limit in limits]
            scaled = torch._foreach_mul(list(largest.split(1)), factors) if max(factors) > 1 else largest.split(1)
            for index, flag in zip(indices, scaled, strict=True):
                flags[index] = flag
        return [item._replace(flag=flag) for item, flag in zip(work, flags, strict=True)]

    def send(self) -> None:
        """Start to copy what was asked since the last call to the host."""
        for asked, largest in self._asked:
            self._coming.append((asked, *_copied(largest)))
        self._asked.clear()

    def read(self, wait: bool = False) -> None:
        """Tell of gradients that were left alone, as far as that is known by now.

        Args:
            wait: for all of them. Default False.

        Raises:
            NonFiniteGradientError: under ``nonfinite="raise"``, naming the parameters; each is told of once.
        """
        if wait:
            self.send()
        sentences, names = [], []
        logged, skipped = [], []
        while self._coming and (wait or arrived(self._coming[0][2])):
            asked, largest, event = self._coming.popleft()
            if event is not None:
                event.synchronize()
            for one, size in zip(asked, largest.tolist(), strict=True):
                excess = _excess(size, one.limit)
                if excess and one.nonfinite == "raise":
                    sentences.append(f"the gradient of {one.name} {excess}; its step {one.step} left it alone")
                    names.append(one.name)
                elif excess:
                    logged.append(f"the gradient of {one.name} {excess}: left alone in its step {one.step}")
                    skipped.append(one.name)
        if logged:
            _log.warning("%s%s", logged[0], _also(skipped[1:]))
        if sentences:
            raise NonFiniteGradientError(f"{sentences[0]} and updated the others{_also(names[1:])}")

    def forget(self) -> None:
        """The state that was updated is gone."""
        self._asked.clear()
        self._coming.clear()


def _also(names: list[str]) -> str:
    """What an error or warning says of the parameters that it does not describe."""
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"; left alone as well: {', '.join(names[:3])}{more}"


def _copied(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The numbers on the host, and when they are there; None: now."""
    if numbers.device.type != "cuda":
        return numbers.cpu(), None
    stream = torch.cuda.current_stream(numbers.device)
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    numbers.record_stream(stream)  # a hook of a backward pass may have made them on another
    event = torch.cuda.Event()
    event.record(stream)
    return host, event


def arrived(event: torch.cuda.Event | None) -> bool:
    """Whether a copy is complete."""
    return event is None or event.query()

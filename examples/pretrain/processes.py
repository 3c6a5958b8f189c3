"""The processes of one run: which of them this is, and the few things they have to agree on."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.distributed as dist

from .errors import UsageError


class Processes:
    """The processes that a launcher such as torchrun has started, told by RANK and WORLD_SIZE; else this one alone.

    Every process calls the same methods in the same order. The numbers agreed on travel on the CPU; gradients go where
    the model is.

    Example:
        >>> with Processes(0, 1) as alone:
        ...     alone.sum(2.0, 3.0)
        [2.0, 3.0]
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._own = False  # a process group that is there already is used, and left alone

    def __enter__(self) -> Processes:
        self._own = self.count > 1 and not dist.is_initialized()
        if self._own:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own:
            # DDP's reducer, freed after its group, would hold the GIL and wait for a thread that wants it (torch 2.13).
            traceback.clear_frames(trace)
            gc.collect()
            dist.destroy_process_group()

    def sum(self, *numbers: float) -> list[float]:
        """The sums over all processes, in double precision."""
        return self._reduced(numbers, dist.ReduceOp.SUM) if self.count > 1 else [float(number) for number in numbers]

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return int(self._reduced((number,), dist.ReduceOp.MAX)[0]) if self.count > 1 else number

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Process 0 goes through the block before the others do, so that they find what it has cached."""
        if self.rank:
            self.largest(0)
        try:
            yield
        finally:
            if not self.rank:
                self.largest(0)

    @staticmethod
    def _reduced(numbers: tuple[float, ...], operation: dist.ReduceOp.RedOpType) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, operation)
        reduced: list[float] = values.tolist()
        return reduced


ALONE = Processes(0, 1)


def read_environment() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as a launcher has set them.

    Raises:
        UsageError: the variables contradict each other.
    """
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise UsageError(f"the environment variable {name} must be a whole number, got {text!r}")
        values.append(int(text))
    rank, count, local = values
    if rank >= max(count, 1) or count < 1:
        raise UsageError(f"RANK must be below WORLD_SIZE, got {rank} and {count}")
    return rank, count, local

"""What a run says about itself: a progress bar, a line now and then, a JSONL file, wandb, memory, a plot."""

from __future__ import annotations

import ctypes
import json
import math
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MIB = 2**20


class RunLog:
    """Writes records to ``log.jsonl`` and lines to the terminal.

    Every record has ``kind`` ("run", "train", "telemetry", "eval" or "summary") and ``step``. A continued run keeps the
    records up to the step it continues from (``kept``) and appends to them.

    Args:
        folder: Folder of the run, made if needed.
        total_steps: Updates of the run.
        done: Updates done before.
        wandb: A started wandb run, or None.
    """

    def __init__(self, folder: Path, total_steps: int, done: int = 0, wandb: Any = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self.kept = [record for record in read_records(self.path) if done and record["step"] <= done]
        self._file = open(self.path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed in close()
        for record in self.kept:
            self._file.write(json.dumps(record) + "\n")
        self.total_steps, self._wandb = total_steps, wandb
        self._bar = self._make_bar(done)

    def _make_bar(self, done: int) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            print("tqdm is not installed: no progress bar", flush=True)
            return None
        # Into a file a bar is noise: one update a minute there.
        interval = 0.2 if sys.stderr.isatty() else 60.0
        return tqdm(total=self.total_steps, initial=done, unit="step", mininterval=interval, dynamic_ncols=True)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One line of JSONL; numbers JSON has no word for become null."""
        clean = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **clean}) + "\n")
        if self._wandb is not None:
            numbers = {name: value for name, value in clean.items() if not isinstance(value, (dict, list))}
            if numbers:
                self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    def line(self, text: str) -> None:
        """One line on the terminal, above the progress bar."""
        if self._bar is not None and sys.stderr.isatty():
            self._bar.write(text)
        else:
            print(text, flush=True)

    def advance(self, loss: float) -> None:
        """One more update is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoLog:
    """What stands for the log in every process but the first."""

    kept: tuple[dict[str, Any], ...] = ()

    def record(self, kind: str, step: int, **values: Any) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def advance(self, loss: float) -> None:
        pass

    def close(self) -> None:
        pass


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none if there is no file, and a last line cut short is left out."""
    records = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(text))
            except ValueError:
                break
    return records


def start_wandb(unset: bool, project: str, name: str, flags: dict[str, Any]) -> Any:
    """A wandb run, or None after saying once why there is none."""
    if unset:
        return None
    try:
        import wandb
    except ImportError:
        print("wandb is not installed: the log goes to JSONL only", flush=True)
        return None
    try:
        return wandb.init(project=project, name=name, config=flags)
    except Exception as error:  # not logged in, no network, no disk
        print(f"wandb could not start ({str(error).splitlines()[0]}): the log goes to JSONL only", flush=True)
        return None


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(storages.values())


def tensors_in(value: Any) -> Iterable[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from tensors_in(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from tensors_in(child)


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


def gradient_bytes(optimizer: Optimizer) -> int:
    """The gradients that exist now."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return tensor_bytes(p.grad for p in parameters if p.grad is not None)


def state_bytes(optimizer: Optimizer) -> int:
    """The optimizer's state."""
    return tensor_bytes(tensors_in(dict(optimizer.state)))


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the GPU where there is one, else of the process (resident set)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def peak_resident() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_freed_memory() -> None:
    """Have tensors of a MiB and more returned to the system when they are freed, where the C library is glibc.

    It would keep those of up to 32 MiB as holes between what lives. Layer by layer, where tensors of all sizes come and
    go between states that stay, the holes were a tenth of the peak; mapping anew costs some 5 % of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, MIB)


def plot_loss(log: Path, picture: Path, title: str) -> str:
    """Draw training and held-out loss of a JSONL log; returns the sentence that says where, or why not."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return 'matplotlib is not installed: no plot (pip install "q-galore-torch[plot]")'
    records = read_records(log)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"] is not None]
    held_out = [(r["step"], r["loss"]) for r in records if r["kind"] == "eval" and r["loss"] is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.6, label="training (smoothed)")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=4, label="held out")
    axes.set_xlabel("update")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
    return f"loss curve: {picture}"


def smoothed(values: Iterable[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, divided by the weight collected so far so that it does not start at 0."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result

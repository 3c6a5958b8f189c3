"""Checkpoints: a folder ``model_STEP`` that is complete or not there at all.

    model.pt             the model's state dict
    training_state.pt    step, optimizer, schedule, data position, random numbers, and what the run is

Both hold tensors, numbers, strings, lists and dicts only, so ``torch.load(weights_only=True)`` reads them. They are
mapped into memory and read piece by piece, so that resuming never holds a second copy of a model or an optimizer.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError
from .report import tensor_bytes, tensors_in

FORMAT = 1
# Pages of a mapped file that were read count as the process's memory until the mapping is gone.
READ_AT_ONCE = 2**27


def save_checkpoint(run: Path, step: int, model: nn.Module, state: dict[str, Any]) -> Path:
    """Write ``run/model_STEP``: into a hidden folder first, which is renamed once everything is on disk.

    Args:
        run: Folder of the run.
        step: Updates done.
        model: Its state dict is written.
        state: What else is to be restored; random numbers and format are added here.
    """
    folder = run / f"model_{step}"
    unfinished = run / f".model_{step}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write(model.state_dict(), unfinished / "model.pt")
        _write({**state, "format": FORMAT, "step": step, "random": random_state()}, unfinished / "training_state.pt")
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # the disk may be full
        raise
    if folder.exists():
        replaced = run / f".model_{step}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        unfinished.rename(folder)
        shutil.rmtree(replaced)
    else:
        unfinished.rename(folder)
    return folder


def _write(content: Any, path: Path) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # raised while torch closes the file that it could not write
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())


def find_checkpoint(path: str) -> Path:
    """The checkpoint folder that is meant: the path itself, or the last checkpoint of a run's folder."""
    folder = Path(path)
    if (folder / "training_state.pt").is_file():
        return folder
    steps = [
        int(child.name.removeprefix("model_"))
        for child in folder.glob("model_*")
        if child.name.removeprefix("model_").isdecimal() and (child / "training_state.pt").is_file()
    ]
    if not steps:
        raise UsageError(f"there is no checkpoint in {path}")
    return folder / f"model_{max(steps)}"


def load_training_state(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``training_state.pt`` and make sure that it continues the same run.

    The states of the optimizer's parameters are read as they are asked for.

    Args:
        folder: A checkpoint.
        identity: What must not change between the parts of a run: model, data, optimizer, seed.
    """
    file = _MappedFile(folder / "training_state.pt")
    state = file.get()
    if not isinstance(state, dict) or state.get("format") != FORMAT or "identity" not in state:
        raise UsageError(f"{folder} is no checkpoint of this script")
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            saved = state["identity"].get(name)
            raise UsageError(f"{folder} was made with another {name}: {saved!r} there, {value!r} here")
    optimizer = {**state["optimizer"], "state": _ReadOnDemand(file, ("optimizer", "state"))}
    return {**_copied({**state, "optimizer": None}), "optimizer": optimizer}


def load_model(folder: Path, model: nn.Module) -> None:
    """Copy ``model.pt`` into the model, which has the same layers, tensor by tensor.

    Raises:
        UsageError: the file is damaged, or is of other layers; the model is as it was then.
    """
    file, own = _MappedFile(folder / "model.pt"), model.state_dict()
    if difference := _difference(file.get(), own):
        raise UsageError(f"{folder} does not fit the model: {difference}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(file.get(name))


def _difference(saved: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """The first difference between two state dicts, or nothing."""
    for name in (*own, *saved):
        if name not in own or name not in saved:
            return f"{name} is only in the {'checkpoint' if name in saved else 'model'}"
        kinds = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (saved[name], own[name])]
        if kinds[0] != kinds[1]:
            return f"{name} is {kinds[0]} in the checkpoint, {kinds[1]} in the model"
        if name.endswith(".group_size") and saved[name] != own[name]:
            return f"{name} is {int(saved[name])} in the checkpoint, {int(own[name])} in the model"
    return ""


class _MappedFile:
    """A file of ``torch.save``, mapped into memory anew whenever READ_AT_ONCE bytes have been read from it."""

    def __init__(self, path: Path) -> None:
        self._path, self._content, self._read = path, _read(path), 0

    def get(self, *keys: Any) -> Any:
        """What stands behind the keys; whoever keeps its tensors keeps the mapping."""
        if self._read >= READ_AT_ONCE:
            self._content, self._read = None, 0
            self._content = _read(self._path)
        value = _lookup(self._content, keys)
        if keys:
            self._read += tensor_bytes(tensors_in(value))
        return value


class _ReadOnDemand(dict[Any, Any]):
    """A dict in a mapped file, whose values are not kept.

    By key one gets what is in the mapping, for our optimizers, which copy it; in a loop copies, since torch's own
    optimizers keep what they get.
    """

    def __init__(self, file: _MappedFile, keys: tuple[Any, ...]) -> None:
        super().__init__(dict.fromkeys(_lookup(file.get(), keys)))
        self._file, self._keys = file, keys

    def __getitem__(self, key: Any) -> Any:
        return self._file.get(*self._keys, key)

    def items(self) -> Iterator[tuple[Any, Any]]:  # type: ignore[override]
        return ((key, _copied(self[key])) for key in self)

    def values(self) -> Iterator[Any]:  # type: ignore[override]
        return (value for _, value in self.items())


def _lookup(value: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        value = value[key]
    return value


def _copied(value: Any) -> Any:
    """Nested dicts, lists and tuples with copies of their tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(child) for child in value)
    return value


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch raises many types for a damaged file
        raise UsageError(f"{path} is damaged ({type(error).__name__})") from None


def random_state() -> dict[str, Any]:
    """The state of every generator a training step may draw from."""
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since ``random_state``."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

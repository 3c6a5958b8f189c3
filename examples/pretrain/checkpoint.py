"""Checkpoints: a folder ``model_STEP`` that is complete or not there at all.

    model.pt             the model's state dict
    training_state.pt    step, optimizer, schedule, data position, random numbers, and what the run is

Both hold tensors, numbers, strings, lists and dicts only, so ``torch.load(weights_only=True)`` reads them.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UsageError

FORMAT = 1


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
    _write(model.state_dict(), unfinished / "model.pt")
    _write({**state, "format": FORMAT, "step": step, "random": random_state()}, unfinished / "training_state.pt")
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
        torch.save(content, file)
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

    Args:
        folder: A checkpoint.
        identity: What must not change between the parts of a run: model, data, optimizer, seed.
    """
    state = _read(folder / "training_state.pt")
    if not isinstance(state, dict) or state.get("format") != FORMAT or "identity" not in state:
        raise UsageError(f"{folder} is no checkpoint of this script")
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            saved = state["identity"].get(name)
            raise UsageError(f"{folder} was made with another {name}: {saved!r} there, {value!r} here")
    return state


def load_model(folder: Path, model: nn.Module) -> None:
    """Load ``model.pt`` into the model, which has the same layers."""
    try:
        model.load_state_dict(_read(folder / "model.pt"))
    except RuntimeError as error:
        raise UsageError(f"{folder} does not fit the model: {' '.join(str(error).split())}") from None


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
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

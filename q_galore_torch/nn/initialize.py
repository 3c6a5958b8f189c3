"""Giving memory and values to a model that was built on the meta device, one module after the other.

Whoever converts modules as they come by (:func:`q_galore_torch.prepare_model`) never holds more floats than one module
has and what stays float anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def initialized_modules(
    model: nn.Module, initialize: Callable[[nn.Module], None], device: torch.device | str | None
) -> Iterator[nn.Module]:
    """Every module of a model in the order of ``model.modules()``, each with memory and values of its own.

    A module that the caller replaces is no longer held here, so its tensors are freed.

    Args:
        model: its meta tensors are replaced by real ones, tied ones by one and the same.
        initialize: called with every module, after those before it were yielded.
        device: of the new tensors, default torch's.

    Yields:
        Each module once, after it was initialised.

    Raises:
        ValueError: a meta tensor is neither parameter nor buffer (before anything is done), or ``initialize`` left a
            tensor without values.
    """
    memory = _Memory(model, device)
    pending = list(model.named_modules())[::-1]
    while pending:
        name, module = pending.pop()
        _initialize(name, module, initialize, memory)
        yield module
        del module


def _initialize(name: str, module: nn.Module, initialize: Callable[[nn.Module], None], memory: _Memory) -> None:
    unset = memory.give(module)
    with torch.no_grad():
        initialize(module)
    for key, was_set in unset.items():
        if not was_set():
            what = f"{f'{name}.{key}'.lstrip('.')} of a {type(module).__name__}"
            raise ValueError(f"initialize must give values to {what}, which has none (build the model anew)")


class _Memory:
    """Real tensors in place of a model's meta tensors; what is not set afterwards can be told from what is."""

    def __init__(self, model: nn.Module, device: torch.device | str | None) -> None:
        self._device = torch.get_default_device() if device is None else torch.device(device)
        if self._device.type == "meta":
            raise ValueError("initialize needs a device with memory, got meta")
        self._places: Counter[int] = Counter()
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}  # holds the old one, so that its id stays its own
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_meta:
                    raise ValueError(
                        f"{f'{name}.{key}'.lstrip('.')} is a tensor on the meta device, but neither parameter nor "
                        "buffer: it cannot be initialised"
                    )
            self._places.update(id(tensor) for _, tensor in _own_meta_tensors(module))

    def give(self, module: nn.Module) -> dict[str, Callable[[], bool]]:
        """Memory for a module's own meta tensors; returns for each new one how to ask whether it has values."""
        unset = {}
        for key, old in list(_own_meta_tensors(module)):
            _, new = self._shared.get(id(old), (old, None))
            if new is None:
                new = self._poisoned(old)
                unset[key] = _question(module, key, new)
            self._places[id(old)] -= 1
            if self._places[id(old)]:
                self._shared[id(old)] = old, new
            else:
                self._shared.pop(id(old), None)
            setattr(module, key, new)
        return unset

    def _poisoned(self, old: Tensor) -> Tensor:
        new = torch.empty_like(old, device=self._device, requires_grad=False)
        new.fill_(torch.nan if new.is_floating_point() or new.is_complex() else 0)
        return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _own_meta_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (module._parameters, module._buffers):
        for key, tensor in tensors.items():
            if tensor is not None and tensor.is_meta:
                yield key, tensor


def _question(module: nn.Module, key: str, given: Tensor) -> Callable[[], bool]:
    """Whether a tensor has been set: floats are no longer NaN, of others the version counter tells."""
    version = given._version

    def was_set() -> bool:
        now = getattr(module, key, None)
        if now is not given:
            return now is None or not now.is_meta
        if not (now.is_floating_point() or now.is_complex()):
            return now._version > version
        return not (bool(now.sum().isnan()) and bool(now.isnan().any()))  # the sum needs no memory

    return was_set

"""The bytes that training really has allocated: distinct memory of weights, buffers, gradients, stashes and state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from q_galore_torch import QGaLoreAdamW8bit, enable_per_layer
from q_galore_torch.nn.leaf import ZeroLeaf


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct memory that tensors lie in; of the shared zeros those that the longest of the leaves needs."""
    found: dict[int, int] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # Another model in this process may have made the zeros longer.
            size = tensor.nbytes if isinstance(tensor, ZeroLeaf) else storage.nbytes()
            found[storage.data_ptr()] = max(size, found.get(storage.data_ptr(), 0))
    return sum(found.values())


def alive(model: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    """Every tensor that belongs to the training."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        binding = parameter.binding if isinstance(parameter, ZeroLeaf) else None
        if binding is not None and binding.stash is not None:
            yield binding.stash
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def arriving(model: nn.Module) -> int:
    """Bytes of the stashes that full gradients of the running backward are about to become."""
    bindings = [leaf.binding for leaf in model.parameters() if isinstance(leaf, ZeroLeaf)]
    return sum(4 * g.numel() for b in bindings if b and b.stash is None for g in b._pending.values())


class Peak:
    """The most bytes alive when any gradient arrives, and before and after any update; ``bytes`` holds them.

    Make it before per-layer updates are switched on, whose own hooks free the gradients, and ``remove()`` it at the
    end: a parameter and a hook that holds it would never be collected.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer, self.bytes = model, optimizer, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(lambda _: self._look()) for p in trained]
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._look()))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._look()))

    def _look(self) -> None:
        self.bytes = max(self.bytes, storages(alive(self.model, self.optimizer)) + arriving(self.model))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def trained(
    model: nn.Module,
    optimizer: QGaLoreAdamW8bit,
    draw: Callable[[], Tensor],
    updates: int,
    passes: int = 1,
    per_layer: dict[str, Any] | None = None,
) -> int:
    """Peak bytes of some updates of a language model.

    Args:
        model: gives logits of tokens.
        optimizer: of the model.
        draw: gives the tokens of a backward pass, [batch, length].
        updates: how many.
        passes: backward passes of one.
        per_layer: how per-layer updates clip, None (default) for ordinary ones.
    """
    peak = Peak(model, optimizer)
    if per_layer is not None:
        enable_per_layer(optimizer, accumulation_steps=passes, **per_layer)
    for _ in range(updates):
        for _ in range(passes):
            tokens = draw()
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    peak.remove()
    return peak.bytes

"""Training with many processes under DistributedDataParallel (DDP).

DDP's own reducer averages R, the gradient of a low-rank layer's leaf, like any other gradient. Two things it cannot do
are here: :func:`prepare` makes the INT8 codes agree once, so that DDP need not send them before every forward, and
:func:`reduce_stashes` sums the full gradients of the layers whose basis is due, once per update.
"""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from q_galore_torch.nn.leaf import ZeroLeaf, layer_of
from q_galore_torch.nn.linear import QGaLoreLinear

_log = logging.getLogger(__name__)

# Beside the layers and not in them, since a process group can neither be copied nor pickled; and by a weak reference,
# since one that outlives destroy_process_group() ends the process with an abort.
_groups: weakref.WeakKeyDictionary[nn.Module, weakref.ref[dist.ProcessGroup]] = weakref.WeakKeyDictionary()


def prepare(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make a prepared model ready for DDP, in place; every process of the group calls it.

    The layers' codes, scales and zero points are broadcast from the group's first process and marked as ignored for
    DDP, which would send them before every forward. Everything else (float weights, biases, norms, embeddings) DDP
    broadcasts itself when it wraps the model.

    Args:
        model: from :func:`q_galore_torch.prepare_model`, on its final device; the module that DDP will wrap.
        process_group: the one that is given to DDP, default all processes.

    Returns:
        ``model``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the model has no QGaLoreLinear, or the layers' formats differ between processes; every process
            raises then.

    Example:
        >>> import q_galore_torch as qg
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = qg.prepare_model(nn.Sequential(nn.Linear(64, 64)), rank=8, target_modules=["0"])
        >>> type(prepare(model)).__name__  # and then DistributedDataParallel(model)
        'Sequential'
        >>> dist.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("prepare needs torch.distributed: call torch.distributed.init_process_group before it")
    group = dist.group.WORLD if process_group is None else process_group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"process_group must be one that this process belongs to, got {process_group!r}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QGaLoreLinear)}
    formats = [f"{name} is {_format_of(layer)}" for name, layer in layers.items()]
    difference = _first_difference(formats, group)
    if difference is not None:
        raise ValueError(f"prepare: the prepared layers must be the same in every process, but {difference}")
    if not layers:
        raise ValueError("prepare: the model has no QGaLoreLinear: call prepare_model first")
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer in layers.items():
        for part, buffer in layer.named_buffers(recurse=False):
            _broadcast(buffer, group)
            ignored.add(f"{name}.{part}" if name else part)
        _groups[layer] = weakref.ref(group)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return model


def _format_of(layer: QGaLoreLinear) -> str:
    parts = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    tensors = ", ".join(
        f"{name} {str(part.dtype).removeprefix('torch.')} {list(part.shape)} on {part.device.type}"
        + (", trained" if part.requires_grad else "")
        for name, part in parts.items()
    )
    return f"{layer.extra_repr()}, proj_type={layer.proj_type}, {tensors}"


def _first_difference(lines: list[str], group: dist.ProcessGroup) -> str | None:
    """What the first process that differs has other than the first process of the group; the same text everywhere."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, lines, group)
    for rank, given in enumerate(gathered):
        for expected, got in itertools.zip_longest(gathered[0], given, fillvalue="nothing"):
            if got != expected:
                return f"process 0 has: {expected}; process {rank} has: {got}"
    return None


def _broadcast(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """From the group's first process, as bytes: neither gloo nor NCCL sends int16."""
    sent = tensor.contiguous()
    dist.broadcast(sent.view(torch.uint8), group=group, group_src=0)
    if sent is not tensor:
        tensor.copy_(sent)


# ---------------------------------------------------------------- what the optimizer calls


def group_of(parameter: Any) -> dist.ProcessGroup | None:
    """The group whose replicas share a layer's leaf; None where :func:`prepare` has not seen its layer."""
    layer = layer_of(parameter) if isinstance(parameter, ZeroLeaf) else None
    recorded = None if layer is None else _groups.get(layer)
    return None if recorded is None else recorded()


def check_replicas(parameters: list[tuple[Any, str, dict[str, Any]]], states: Mapping[Any, dict[str, Any]]) -> None:
    """Raise in every process if the processes' optimizers do not hold the same things.

    Every process of the groups that :func:`prepare` recorded calls this before its first step.

    Args:
        parameters: parameter, name and group of each.
        states: of each parameter.

    Raises:
        RuntimeError: id, shape, step or an option of a parameter differs, or a layer is in a DistributedDataParallel
            that :func:`prepare` has not seen.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    _refuse_unprepared([(p, name) for p, name, _ in parameters if isinstance(p, ZeroLeaf) and group_of(p) is None])
    groups = {group for parameter, _, _ in parameters if (group := group_of(parameter)) is not None}
    lines = [_line(parameter, name, group, states[parameter]) for parameter, name, group in parameters]
    for group in sorted(groups, key=lambda group: group.group_name):
        difference = _first_difference(lines, group)
        if difference is not None:
            raise RuntimeError(f"the optimizers must be the same in every process, but {difference}")


def _line(parameter: Tensor, name: str, group: dict[str, Any], state: dict[str, Any]) -> str:
    options = {key: _number(value) for key, value in group.items() if key not in ("params", "param_names")}
    return f"{name} with id {state['id']}, shape {list(parameter.shape)}, step {state['step']}, {options}"


def _number(value: Any) -> Any:
    """A rate or norm that is a tensor, as a number: the text of a tensor names its device."""
    return value.item() if isinstance(value, Tensor) else value


def _refuse_unprepared(leaves: list[tuple[Any, str]]) -> None:
    """Without prepare() every replica would find bases from its own full gradients."""
    if not leaves or dist.get_world_size() == 1:
        return
    name = leaves[0][1]
    if wrapper_of([leaf for leaf, _ in leaves]) is not None:
        raise RuntimeError(
            f"{name} is in a DistributedDataParallel: call q_galore_torch.integrations.distributed.prepare(model) first"
        )
    _log.warning(
        "%s is in one of %d processes: if these train replicas of one model, call "
        "q_galore_torch.integrations.distributed.prepare(model), or their subspaces drift apart",
        name,
        dist.get_world_size(),
    )


def wrapper_of(parameters: list[Any]) -> DistributedDataParallel | None:
    """The DistributedDataParallel that holds one of the parameters. Looks through all of Python's objects."""
    own = {id(parameter) for parameter in parameters}
    # By type(): isinstance() would ask each object for its __class__, which some compute.
    for wrapper in [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]:
        if any(id(parameter) in own for parameter in wrapper.parameters()):
            return wrapper
    return None


def reduce_stashes(leaves: list[Any]) -> None:
    """Sum the full gradients of due low-rank leaves over the replicas, in place.

    A process without one sends zeros. It is the sum and not the mean that comes back: a basis has no scale. What is
    not finite in one process is so in all of them afterwards.

    Args:
        leaves: due in this step, the same ones in the same order in every process, as they follow from replicated
            state.
    """
    for leaf in leaves:
        group, layer = group_of(leaf), layer_of(leaf)
        if group is None or layer is None:
            continue
        binding = leaf.binding
        if binding.stash is None:
            binding.stash = torch.zeros(layer.out_features, layer.in_features, device=leaf.device)
        dist.all_reduce(binding.stash, group=group)

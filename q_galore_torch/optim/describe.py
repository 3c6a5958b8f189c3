"""What ``repr`` says of an optimizer: one line a group, not all of its keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from q_galore_torch.nn.leaf import ZeroLeaf, layer_of
from q_galore_torch.nn.simulate import simulated
from q_galore_torch.optim.options import longest_gap


def describe(name: str, groups: list[dict[str, Any]], states: Mapping[Any, dict[str, Any]]) -> str:
    """Name, steps done and bytes of the state, then a line for every group.

    Args:
        name: of the optimizer.
        groups: its parameter groups.
        states: of its parameters.
    """
    known = [states[p] for group in groups for p in group["params"] if p in states]
    steps = max((state["step"] for state in known), default=0)
    lines = [f"{name}({steps} steps done, state {_size(known)}"]
    lines += [f"  ({index}): {_line(group, states)}" for index, group in enumerate(groups)]
    return "\n".join([*lines, ")"])


def _line(group: dict[str, Any], states: Mapping[Any, dict[str, Any]]) -> str:
    parameters = group["params"]
    known = [states[p] for p in parameters if p in states]
    kinds: dict[str, list[int]] = {}
    for parameter in parameters:
        kind, count = _weights(parameter)
        kinds.setdefault(kind, []).append(count)
    parts = [
        " + ".join(_count(kind, counts) for kind, counts in kinds.items()) or "no tensors",
        f"lr {float(group['lr']):g}",
    ]
    if group["weight_decay"]:
        parts.append(f"weight_decay {group['weight_decay']:g}")
    if group["rank"] is not None:
        parts += _projection(group, [state["gap"] for state in known if "gap" in state])
    parts.append(f"{group['moments_dtype']} moments")
    return f"{', '.join(parts)}, state {_size(known)}"


def _count(kind: str, counts: list[int]) -> str:
    return f"{len(counts)} tensor{'s' * (len(counts) > 1)} of {sum(counts):,} weights in {kind}"


def _projection(group: dict[str, Any], gaps: list[int]) -> list[str]:
    stored = f"{group['proj_format']} projector"
    if group["proj_format"] not in ("float32", "bfloat16"):
        stored += f" in blocks of {group['proj_block']}" if group["proj_block"] else " with one scale"
    every = f"{group['subspace']} subspaces every {group['update_proj_gap']} steps"
    if group["lazy_rule"] != "fixed":
        every += f" ({group['lazy_rule']} rule, now {_span(gaps)}, at most {longest_gap(group)})"
    return [f"rank {group['rank']} {group['proj_type']}", stored, every, f"scale {group['scale']:g}"]


def _span(values: list[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _weights(parameter: Tensor) -> tuple[str, int]:
    """How the weights that a parameter stands for are stored, and how many there are."""
    if isinstance(parameter, ZeroLeaf):
        layer = layer_of(parameter)
        if layer is None:
            return "a layer that is gone", 0
        dtype = str(layer.compute_dtype).removeprefix("torch.") if layer.weight_bits is None else "INT8"
        return dtype, layer.in_features * layer.out_features
    dtype = str(parameter.dtype).removeprefix("torch.")
    return dtype if simulated(parameter) is None else f"{dtype} on an INT8 grid", parameter.numel()


def _size(states: Iterable[dict[str, Any]]) -> str:
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    count = sum(t.numel() * t.element_size() for t in tensors)
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"

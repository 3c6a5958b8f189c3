"""The writing half of a step: each collection of like parameters is one operator call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from q_galore_torch import ops
from q_galore_torch.nn.leaf import ZeroLeaf, ZeroWeight
from q_galore_torch.optim.moments import BLOCK
from q_galore_torch.optim.state import PARTS, Projection, Target
from q_galore_torch.subspace import FULL

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Work(NamedTuple):
    """One parameter of a step.

    ``shapes`` is None where it is not projected. ``flag``, float32 [1], is on the gradient's device and above
    ``finite.LARGEST_GRADIENT`` where the parameter is to be left alone; None: the gradient is known to be finite.
    """

    parameter: Any
    name: str
    group: dict[str, Any]
    state: dict[str, Any]
    target: Target
    gradient: Tensor
    shapes: Projection | None
    flag: Tensor | None = None

    @property
    def low_rank(self) -> bool:
        """The gradient is R."""
        return self.target.low_rank


def is_low_rank(parameter: Any) -> bool:
    """Whether a parameter is the leaf of a low-rank layer."""
    return isinstance(parameter, ZeroLeaf) and not isinstance(parameter, ZeroWeight)


def checked_gradient(parameter: Tensor, name: str, shapes: Projection | None, low_rank: bool) -> Tensor:
    """The parameter's gradient, contiguous; as the matrix [m, n] that is projected where it is."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise RuntimeError(f"the gradient of {name} must be dense, got {gradient.layout}")
    if gradient.dtype not in _FLOATS:
        raise RuntimeError(f"the gradient of {name} must be float32, bfloat16 or float16, got {gradient.dtype}")
    gradient = gradient.contiguous()
    return gradient if shapes is None or low_rank else gradient.view(shapes.rows, shapes.cols)


def update(work: list[Work]) -> None:
    """One operator call for each collection of parameters that agree in group, device, formats and dtypes."""
    collections: dict[tuple[Any, ...], list[Work]] = {}
    for item in work:
        target, state = item.target, item.state
        key = (id(item.group), target.weight.device, target.weight.dtype, item.gradient.dtype, state["exp_avg"].dtype)
        two_sided = item.shapes is not None and item.shapes.side == FULL
        formats = (target.int8, target.group_size, target.stochastic_round)
        collections.setdefault((*key, *formats, item.low_rank, two_sided), []).append(item)
    for items in collections.values():
        _update_alike(items)


def _update_alike(items: list[Work]) -> None:
    first = items[0]
    group, target = first.group, first.target
    opened = [item.target.opened() for item in items]
    weights = [_as_matrix(o.weight.detach().contiguous(), i.shapes) for o, i in zip(opened, items, strict=True)]
    device = weights[0].device
    none = torch.empty(0, device=device)
    no_zeros = torch.empty(0, dtype=torch.int16, device=device)
    states = [item.state for item in items]
    stats = torch.zeros(len(items), 2, dtype=torch.int64, device=device)
    lists: list[Any] = [
        weights,
        [none if o.scales is None else o.scales for o in opened],
        [no_zeros if o.zeros is None else o.zeros for o in opened],
        [item.gradient for item in items],
        *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")),
    ]
    counts: list[Any] = [
        [s["bias_step"] + 1 for s in states],
        [s["step"] + 1 for s in states],
        [s["id"] for s in states],
        stats,
    ]
    flags = [item.flag for item in items if item.flag is not None]
    beta1, beta2 = group["betas"]
    common: dict[str, Any] = {
        "lr": float(group["lr"]),
        "beta1": beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "seed": group["seed"],
        "stochastic_round": group["stochastic_round"] and target.stochastic_round,
        "group_size": target.group_size,
        "block": BLOCK,
        "absmax": torch.cat(flags) if flags else None,
    }
    if first.shapes is None:
        ops.adam8_step_(*lists, *counts, **common)
    else:
        projectors = [[s[f"proj_{part}"] for s in states] for part in PARTS]
        arguments: list[Any] = [*lists, *projectors, [s["side"] for s in states], *counts]
        common.update({key: group[key] for key in ("proj_format", "proj_block", "scale", "compute_dtype")})
        if first.shapes.side == FULL:
            common.update({f"right_{part}": [s[f"right_{part}"] for s in states] for part in PARTS})
        if group["norm_growth_limit"] is not None:
            common.update(norm_growth_limit=group["norm_growth_limit"], norms=torch.cat([s["norm"] for s in states]))
        ops.galore_step_(*arguments, low_rank=first.low_rank, **common)
        if group["norm_growth_limit"] is not None:
            torch._foreach_copy_([s["norm"] for s in states], list(common["norms"].split(1)))
    _finish(items, opened, weights, stats)


def _as_matrix(weight: Tensor, shapes: Projection | None) -> Tensor:
    return weight if shapes is None else weight.view(shapes.rows, shapes.cols)


def _finish(items: list[Work], opened: list[Target], weights: list[Tensor], stats: Tensor) -> None:
    written: list[Tensor] = []
    for item, target, weight in zip(items, opened, weights, strict=True):
        item.state["step"] += 1
        item.state["bias_step"] += 1
        if target.simulated is not None:
            assert target.scales is not None and target.zeros is not None
            target.simulated.write(target.weight, target.scales, target.zeros)
            continue
        if weight.data_ptr() != target.weight.data_ptr():
            # A parameter that is not contiguous; copy_ counts as a write by itself.
            target.weight.copy_(weight.view(target.weight.shape))
            continue
        # The operators do not count their writes; a zero leaf must not be counted.
        written += [t for t in (target.weight, target.scales, target.zeros) if t is not None]
    torch.autograd.graph.increment_version(written)
    if items[0].target.int8:
        torch._foreach_add_([item.state["range_stats"] for item in items], list(stats.unbind()))

"""The optimizer's state of one parameter: what it holds, how it is made and checked.

Every parameter: ``id`` and ``step`` (both drive the rounding noise), ``bias_step`` (bias correction), ``exp_avg``,
``exp_avg_sq`` (float32, or uint8 codes with ``exp_avg_absmax`` and ``exp_avg_sq_absmax``), ``range_stats`` (int64 [2]:
INT8 groups shifted and re-ranged). A projected one also:

- ``number`` (of projected parameters), ``side``, ``dim`` and the projector ``proj_codes, proj_scales, proj_zeros``;
  where both sides are projected this is the left one, and ``right_dim, right_codes, right_scales, right_zeros`` are
  the other's;
- the schedule: ``gap``, ``phase``, ``last_due``, ``last_refresh``, ``refreshes``, ``qr_fallbacks``;
- ``queue`` (float64, the last similarities), ``past_...`` (the projector before the newest one, while the two wait to
  be compared, else empty), ``past_vector`` (float32, for ``lazy_rule="upstream"``, else empty);
- ``measured`` (float64 [3]: the last similarity, captured and held-out energy; ``UNMEASURED`` before there is one), and
  ``norm`` (float64 [1]: of the last N, 0 before there is one; empty without ``norm_growth_limit``).

Tensors and integers only; the same keys before and after the first step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q_galore_torch import ops
from q_galore_torch.nn.leaf import ZeroLeaf, layer_of
from q_galore_torch.nn.simulate import QLinear, simulated
from q_galore_torch.optim.moments import BLOCK, ZERO_CODE
from q_galore_torch.subspace import (
    FULL,
    LEFT,
    RIGHT,
    matrix_shape,
    next_phase_step,
    random_basis,
    side_of,
    stagger_phase,
)

UNMEASURED = -2.0  # nothing measured is below -1
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ON_CPU = ("queue", "measured")
_FREE_SHAPE = ("queue", "past_vector")
PARTS = ("codes", "scales", "zeros")  # of a projector


class Target(NamedTuple):
    """What an update of a parameter writes to.

    Attributes:
        weight: the float weight or uint8 codes.
        scales: INT8 scales, else None.
        zeros: INT8 zero points, else None.
        group_size: elements of an INT8 group.
        low_rank: the gradient is R.
        stochastic_round: whether the layer of an INT8 weight leaves the rounding to its group; else it is to nearest.
        simulated: the layer whose float weight stands on an INT8 grid, else None; its codes are made for each update.
    """

    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    group_size: int
    low_rank: bool
    stochastic_round: bool = True
    simulated: QLinear | None = None

    @property
    def int8(self) -> bool:
        """Whether the weight is updated as INT8."""
        return self.scales is not None or self.simulated is not None

    def opened(self) -> Target:
        """The target whose memory the operators write: this one, or the codes of a simulated weight."""
        if self.simulated is None:
            return self
        codes, scales, zeros = self.simulated.read()
        return self._replace(weight=codes, scales=scales, zeros=zeros)


def target_of(parameter: Tensor, name: str) -> Target:
    """What stands behind a parameter: itself, or the layer of a zero leaf.

    Raises:
        RuntimeError: the leaf's layer is gone.
    """
    if not isinstance(parameter, ZeroLeaf):
        simulation = simulated(parameter)
        if simulation is not None:
            size, rounding = simulation.group_size, simulation.stochastic_round
            return Target(parameter, None, None, size, False, rounding, simulation)
        return Target(parameter, None, None, BLOCK, False)
    layer = layer_of(parameter)
    if layer is None:
        raise RuntimeError(
            f"{name} is the leaf of a layer that is gone: make the optimizer from the model's own leaves"
        )
    low_rank = layer.grad_mode == "low_rank"
    if layer.weight_bits is None:
        return Target(layer.weight, None, None, BLOCK, low_rank)
    return Target(layer.qweight, layer.scales, layer.zeros, layer.group_size, low_rank, layer.stochastic_round)


class Projection(NamedTuple):
    """The shapes of a projected matrix: side, rank r (clipped), vector length d, the other dimension k.

    Where both sides are projected d is the left one's (rows) and k the right one's (columns).
    """

    side: int
    rank: int
    dim: int
    other: int

    @property
    def rows(self) -> int:
        """Of the weight matrix."""
        return self.other if self.side == RIGHT else self.dim

    @property
    def cols(self) -> int:
        """Of the weight matrix."""
        return self.dim if self.side == RIGHT else self.other

    @property
    def moments(self) -> tuple[int, int]:
        """The shape of R."""
        return self.rank, self.rank if self.side == FULL else self.other

    @property
    def sides(self) -> tuple[tuple[str, int, int], ...]:
        """Name, side and vector length of each basis."""
        if self.side == FULL:
            return ("proj", LEFT, self.dim), ("right", RIGHT, self.other)
        return (("proj", self.side, self.dim),)

    @property
    def whole(self) -> bool:
        """The basis spans the whole space."""
        return all(self.rank == dim for _, _, dim in self.sides)

    @property
    def chance(self) -> float:
        """The share of a random gradient's energy that a basis captures."""
        return math.prod(self.rank / dim for _, _, dim in self.sides)


def _plan(target: Target, group: dict[str, Any]) -> Projection:
    rows, cols = matrix_shape(target.weight.shape)
    side = side_of(group["proj_type"], rows, cols)
    dim, other = (cols, rows) if side == RIGHT else (rows, cols)
    return Projection(side, min(group["rank"], rows, cols), dim, other)


def projection_of(state: dict[str, Any]) -> Projection:
    """How a parameter is projected, from its state alone."""
    rank, other = state["exp_avg"].shape
    return Projection(state["side"], rank, state["dim"], state["right_dim"] if state["side"] == FULL else other)


def new_state(
    target: Target,
    group: dict[str, Any],
    *,
    id: int,
    number: int,
    min_8bit_size: int,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The state of a parameter before its first step.

    Args:
        target: what it updates.
        group: its group, with canonical options.
        id: its id.
        number: its number among the projected parameters.
        min_8bit_size: moments with fewer elements stay float32.
        device: of the state, default the weight's; ``meta`` makes a template of shapes.
    """
    device = target.weight.device if device is None else device
    state: dict[str, Any] = {"id": id, "step": 0, "bias_step": 0}
    projected = group["rank"] is not None
    if projected:
        shapes = _plan(target, group)
        rows, cols = shapes.moments
        shape: tuple[int, ...] = (rows, cols)
    else:
        shape = tuple(target.weight.shape)
        rows, cols = 1, target.weight.numel()
    if group["moments_dtype"] == "float32" or rows * cols < min_8bit_size:
        state["exp_avg"] = torch.zeros(shape, dtype=torch.float32, device=device)
        state["exp_avg_sq"] = torch.zeros(shape, dtype=torch.float32, device=device)
        blocks: tuple[int, ...] = (0,)
    else:
        state["exp_avg"] = torch.full(shape, ZERO_CODE, dtype=torch.uint8, device=device)
        state["exp_avg_sq"] = torch.zeros(shape, dtype=torch.uint8, device=device)
        per_row = (cols + BLOCK - 1) // BLOCK
        blocks = (rows, per_row) if projected else (per_row,)
    state["exp_avg_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=device)
    state["exp_avg_sq_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=device)
    state["range_stats"] = torch.zeros(2, dtype=torch.int64, device=device)
    if projected:
        state.update(_new_subspace(target, group, id, number, device))
    return state


def _new_subspace(target: Target, group: dict[str, Any], id: int, number: int, device: torch.device) -> dict[str, Any]:
    shapes = _plan(target, group)
    gap = group["update_proj_gap"]
    upstream = group["lazy_rule"] == "upstream"
    phase = 0 if upstream else stagger_phase(number, gap)
    state: dict[str, Any] = {"number": number, "side": shapes.side, "dim": shapes.dim}
    if shapes.side == FULL:
        state["right_dim"] = shapes.other
    for index, (name, _, dim) in enumerate(shapes.sides):
        if device.type != "meta" and target.low_rank:
            start = random_basis(shapes.rank, dim, group["seed"], id, index, device)
            parts = ops.projector_quantize(start.vectors, group["proj_format"], group["proj_block"])
        else:
            parts = empty_projector(shapes.rank, dim, group)
        for part, value in zip(PARTS, parts, strict=True):
            state[f"{name}_{part}"] = value.to(device)
            state[f"past_{name}_{part}"] = value.new_empty(0, device=device)
    return {
        **state,
        "gap": gap,
        "phase": phase,
        # A basis is due when `gap` steps have passed since `last_due`; under "upstream" at each new multiple of `gap`.
        "last_due": -1 if upstream else next_phase_step(0, phase, gap) - gap,
        "last_refresh": -1,
        "refreshes": 0,
        "qr_fallbacks": 0,
        "queue": torch.zeros(0, dtype=torch.float64, device="cpu"),
        "past_vector": torch.zeros(0, dtype=torch.float32, device=device),
        "measured": torch.full((3,), UNMEASURED, dtype=torch.float64, device="cpu"),
        "norm": torch.zeros(0 if group["norm_growth_limit"] is None else 1, dtype=torch.float64, device=device),
    }


def empty_projector(rank: int, dim: int, group: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The storage of a projector that decodes to zeros."""
    unread = torch.empty(rank, dim, device="meta")
    parts = ops.projector_quantize(unread, group["proj_format"], group["proj_block"])
    codes, scales, zeros = (torch.zeros_like(part, device="cpu") for part in parts)
    return codes, scales, zeros


def checked_groups(state_dict: Any) -> list[dict[str, Any]]:
    """The groups of a state dict; ValueError where it is not one of an optimizer."""
    parts = [state_dict.get(key) for key in ("param_groups", "state")] if isinstance(state_dict, dict) else [None, None]
    for key, part, kind in zip(("param_groups", "state"), parts, (list, dict), strict=True):
        if not isinstance(part, kind):
            raise ValueError(f"the state dict must hold a {kind.__name__} {key!r}, got {type(part).__name__}")
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    for index, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)) or "rank" not in group:
            raise ValueError(
                f"group {index} of the state dict must be a dict with 'params' and 'rank', got {group!r:.80}"
            )
    return groups


def checked_lengths(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Raise ValueError where saved groups do not have as many parameters as the optimizer's."""
    have, got = ([len(g["params"]) for g in groups] for groups in (own, saved))
    if have != got:
        raise ValueError(f"the saved groups have {got} parameters, this optimizer's {have}")


def checked_state(saved: dict[str, Any], template: dict[str, Any], name: str) -> None:
    """Raise ValueError where a saved state does not fit the parameter it is loaded for.

    Args:
        saved: from a state dict.
        template: a new state of that parameter under the saved group's options.
        name: the parameter's, for the message.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"the saved state of {name} must be a dict, got {type(saved).__name__}")
    if saved.keys() != template.keys():
        odd = sorted(saved.keys() ^ template.keys())
        raise ValueError(f"the saved state of {name} has other entries than this optimizer's: {', '.join(odd)}")
    for key, expected in template.items():
        value = saved[key]
        if not isinstance(expected, Tensor):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{key} of {name} must be an integer, got {value!r}")
            if key in ("side", "dim") and value != expected:
                raise ValueError(f"{key} of {name} must be {expected}, got {value}")
            continue
        if not isinstance(value, Tensor) or value.dtype != expected.dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} of {name} must be a {expected.dtype} tensor, got {got}")
        shapes = [expected.shape]
        if key.startswith("past_") and key != "past_vector":  # empty, or the projector before
            shapes.append(template[key.removeprefix("past_")].shape)
        if key not in _FREE_SHAPE and value.shape not in shapes:
            raise ValueError(f"{key} of {name} must have shape {list(expected.shape)}, got {list(value.shape)}")


def placed(saved: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of a saved state on a device, every tensor in its own dtype; what the host reads stays on the CPU."""
    return {
        key: value.to("cpu" if key in _ON_CPU else device, copy=True) if isinstance(value, Tensor) else value
        for key, value in saved.items()
    }


def refuse_parameter(parameter: Tensor, target: Target, group: dict[str, Any], name: str) -> None:
    """Raise ValueError naming a parameter that cannot be optimised as its group asks."""
    weight = target.weight
    if type(parameter).__name__ == "DTensor":
        raise ValueError(f"{name} is a DTensor: sharded parameters are not supported, use DistributedDataParallel")
    if not target.int8 and weight.dtype not in _FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {weight.layout}")
    if group["rank"] is None:
        if target.low_rank:
            raise ValueError(f"{name} is the leaf of a low-rank layer: it needs a group with a rank, use param_groups")
        return
    if weight.dim() < 2:
        raise ValueError(f"{name} has shape {list(weight.shape)}; a group with a rank takes two or more dimensions")
    if weight.numel() == 0:
        raise ValueError(f"{name} is empty and cannot be projected")
    if not target.low_rank:
        return
    if group["lazy_rule"] == "upstream":
        raise ValueError(f"lazy_rule='upstream' needs full gradients, but {name} is low-rank: use grad_mode='full'")
    shapes = _plan(target, group)
    if parameter.shape[0] != shapes.rank:
        raise ValueError(f"rank must be {parameter.shape[0]}, with which {name} was prepared, got {group['rank']}")
    if tuple(parameter.shape) != shapes.moments:
        kind = group["proj_type"]
        raise ValueError(
            f"proj_type must be the one with which {name} was prepared (R {list(parameter.shape)}), got {kind!r}"
        )

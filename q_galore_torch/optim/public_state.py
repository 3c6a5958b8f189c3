"""Optimizer states of other projects, read as this package's: bitsandbytes' layout, and ``torch.optim.AdamW``'s.

bitsandbytes (and with it the public Q-GaLore and GaLore code) stores for each parameter ``step`` and the moments
``state1`` and ``state2``: float32, or uint8 codes into the maps ``qmap1`` and ``qmap2``, times ``absmax1`` and
``absmax2`` of each block of 256 or (in older versions) 2048 values, or times ``max1`` and ``max2`` of the whole.
Newer versions put all of these into a dict of their own.

The moments of a projected parameter hold in the basis of its projector, which those projects store as a pickled object.
It is not loaded, and neither are these moments.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from q_galore_torch import ops
from q_galore_torch.optim.moments import BLOCK, ZERO_CODE
from q_galore_torch.optim.state import checked_groups, checked_lengths

if TYPE_CHECKING:
    from q_galore_torch.optim.galore_adamw import QGaLoreAdamW8bit

_log = logging.getLogger(__name__)

PROJECTORS = (
    "q_galore_torch.q_galore_projector.GaLoreProjector",
    "galore_torch.galore_projector.GaLoreProjector",
    "galore_torch.galore_projector_tensor.GaLoreProjectorTensor",
)
_WRAPPED = "__bnb_optimizer_quant_state__"
_FLOAT = {"step", "exp_avg", "exp_avg_sq"}
_QUANTISED = {f"{name}{index}" for name in ("state", "qmap", "absmax", "max", "new_max") for index in (1, 2)}
_TAKEN = ("lr", "betas", "eps", "weight_decay", "initial_lr")
_BLOCKS = (256, 2048)


class LeftOut:
    """What is made of a pickled projector: nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keeps nothing."""


def is_public(state_dict: Any) -> bool:
    """Whether a state dict is another project's."""
    states = state_dict.get("state") if isinstance(state_dict, dict) else None
    if not isinstance(states, dict):
        return False
    entries = [entry for entry in states.values() if isinstance(entry, dict)]
    return any(
        entry.keys() & {"state1", _WRAPPED, "projector"} or (entry.keys() >= _FLOAT and "id" not in entry)
        for entry in entries
    )


def converted(
    optimizer: QGaLoreAdamW8bit, state_dict: dict[str, Any], leave_out_projected: bool = False
) -> dict[str, Any]:
    """This package's state dict from another project's.

    Moments and steps are the file's, ``lr``, ``betas``, ``eps`` and ``weight_decay`` too; all other options are the
    optimizer's own, and so is the state of a parameter without one in the file.

    Args:
        optimizer: that it is for.
        state_dict: for which :func:`is_public` holds.
        leave_out_projected: projected parameters keep the optimizer's own state, default False.

    Raises:
        ValueError: it does not fit, or holds the state of a projected parameter.
    """
    groups = [{"rank": None, **g} if isinstance(g, dict) else g for g in state_dict.get("param_groups", ())]
    saved_groups = checked_groups({"param_groups": groups, "state": state_dict["state"]})
    checked_lengths(optimizer.param_groups, saved_groups)
    new_groups: list[dict[str, Any]] = []
    states: dict[Any, dict[str, Any]] = {}
    for own, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        if saved.get("maximize"):
            raise ValueError("the saved optimizer has maximize=True, and its moments are of the other sign")
        kept = {key: value for key, value in own.items() if key not in ("params", "param_names")}
        taken = {key: saved[key] for key in _TAKEN if key in saved}
        new_groups.append({**kept, **taken, "params": list(saved["params"])})
    keys = [key for group in saved_groups for key in group["params"]]
    left_out = 0
    for key, (parameter, name, group) in zip(keys, optimizer._parameters(), strict=True):
        states[key] = optimizer.state[parameter]
        entry = state_dict["state"].get(key)
        if not entry:
            continue
        if group["rank"] is None:
            states[key] = _state(entry, states[key], name)
        elif leave_out_projected:
            left_out += 1
        else:
            raise ValueError(
                f"{name} is projected, and its saved moments hold in the basis of another optimizer, which is not "
                "loaded; to go on with fresh subspaces, and with the states of all other parameters, load the file "
                "with q_galore_torch.utils.setup.load_optimizer_state(optimizer, path)"
            )
    if left_out:
        _log.info("%d projected parameters start with fresh subspaces and moments", left_out)
    return {"state": states, "param_groups": new_groups}


def _state(entry: dict[str, Any], own: dict[str, Any], name: str) -> dict[str, Any]:
    """The state of one unprojected parameter."""
    if not isinstance(entry, dict):
        raise ValueError(f"the saved state of {name} must be a dict, got {type(entry).__name__}")
    entry = {key: value for key, value in entry.items() if key != _WRAPPED} | entry.get(_WRAPPED, {})
    entry = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in entry.items()}
    if "projector" in entry:
        raise ValueError(f"{name} is projected in the saved state, and its group here has no rank")
    if entry.keys() == _FLOAT:
        entry = {"step": entry["step"], "state1": entry["exp_avg"], "state2": entry["exp_avg_sq"]}
    odd = entry.keys() - _QUANTISED - {"step"}
    if odd or not {"step", "state1", "state2"} <= entry.keys():
        raise ValueError(
            f"the saved state of {name} must be of an Adam in bitsandbytes' layout (step, state1, state2 and what "
            f"decodes them) or torch's (step, exp_avg, exp_avg_sq), got {', '.join(sorted(entry))}"
        )
    step = entry["step"].item() if isinstance(entry["step"], Tensor) and entry["step"].numel() == 1 else entry["step"]
    if not isinstance(step, (int, float)) or not 0 <= step < 2**63 or step != int(step):
        raise ValueError(f"step of {name} must be an integer >= 0, got {entry['step']!r}")
    step = int(step)
    state = {**own, "step": step, "bias_step": step}
    for index, moment in ((1, "exp_avg"), (2, "exp_avg_sq")):
        state[moment], state[f"{moment}_absmax"] = _moment(entry, index, own[moment], name)
    if state["exp_avg"].dtype == torch.uint8:
        # A second moment below its map's smallest entry: the first one over the root of nothing is a step of any size.
        vanished = (state["exp_avg_sq"] == 0) & (state["exp_avg"] != ZERO_CODE)
        state["exp_avg_sq"] = state["exp_avg_sq"] + vanished.to(torch.uint8)
    return state


def _moment(entry: dict[str, Any], index: int, own: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """One moment as this optimizer stores it, and its absmax."""
    stored, signed = entry[f"state{index}"], index == 1
    if not isinstance(stored, Tensor) or stored.shape != own.shape:
        got = list(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise ValueError(f"state{index} of {name} must have shape {list(own.shape)}, got {got}")
    wanted = torch.uint8 if own.dtype == torch.uint8 else torch.float32
    if stored.dtype == torch.uint8:
        qmap, sizes, block = _scales(entry, index, stored.numel(), name)
        if wanted == torch.uint8 and block == BLOCK and torch.allclose(qmap, _map(signed), rtol=1e-5, atol=0):
            return stored.clone(), sizes  # the maps differ in the last bit, their entries by a hundredth
        value = qmap[stored.flatten().long()] * sizes.repeat_interleave(block)[: stored.numel()]
    elif stored.is_floating_point():
        value = stored.float().flatten()
    else:
        raise ValueError(f"state{index} of {name} must be uint8 or float, got {stored.dtype}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"state{index} of {name} holds values that are not finite")
    if not signed and bool((value < 0).any()):
        raise ValueError(f"state{index} of {name} is a second moment and holds values below zero")
    if wanted == torch.float32:
        return value.view(own.shape), value.new_empty(0)
    codes, absmax = ops.dynamic8_quantize(value.view(1, -1), signed, BLOCK)
    return codes.view(own.shape), absmax.flatten()


def _scales(entry: dict[str, Any], index: int, count: int, name: str) -> tuple[Tensor, Tensor, int]:
    """The map of a moment, and the sizes of its blocks of how many values."""
    qmap = entry.get(f"qmap{index}")
    blockwise = f"absmax{index}" in entry
    sizes = entry.get(f"absmax{index}" if blockwise else f"max{index}")
    if not isinstance(qmap, Tensor) or qmap.numel() != 256 or not isinstance(sizes, Tensor):
        raise ValueError(
            f"state{index} of {name} holds codes, which need qmap{index} with 256 values, and absmax{index} or "
            f"max{index}"
        )
    blocks = _BLOCKS if blockwise else (count,)
    fitting = [block for block in blocks if -(-count // block) == sizes.numel()]
    if not fitting:
        raise ValueError(
            f"absmax{index} of {name} must have a value for each block of 256 or 2048 of {count} values, "
            f"got {sizes.numel()}"
        )
    if not bool(sizes.isfinite().all()):
        raise ValueError(f"the scales of state{index} of {name} are not finite")
    return qmap.float().flatten(), sizes.float().flatten(), fitting[0]


def _map(signed: bool) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8, device="cpu").view(1, -1)
    return ops.dynamic8_dequantize(codes, torch.ones(1, 1, device="cpu"), signed)[0]

"""What happens to Adam's moments when their basis changes: kept, rotated into the new basis, or reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from q_galore_torch import ops

BLOCK = 256  # elements of a moment that share an absmax
ZERO_CODE = 127  # of the signed map


def carry_over(
    state: dict[str, Any], group: dict[str, Any], old: list[Tensor], new: Callable[[], list[Tensor]]
) -> None:
    """Apply the group's ``moments`` option at a refresh.

    Args:
        state: of the parameter, with R's moments.
        group: its group.
        old: the decoded bases before, one for each projected side (left before right).
        new: gives the decoded bases after; called only where they are needed.
    """
    if state["bias_step"] == 0 or group["moments"] == "keep":
        return
    if group["moments"] == "reset":
        _reset(state)
        return
    first, second = _decoded(state)
    with torch.autocast(first.device.type, enabled=False):  # step() may have been called inside its block
        turns = [after @ before.t() for before, after in zip(old, new(), strict=True)]
        first, second = rotated(first, second, turns, group["betas"], state["bias_step"])
    _store(state, first, second)


def rotated(
    first: Tensor, second: Tensor, turns: list[Tensor], betas: tuple[float, float], updates: int
) -> tuple[Tensor, Tensor]:
    """Both moments in a new basis.

    With C = P_new P_old^T the first moment is ``C m``. The second one is an expectation of squares, of which only the
    diagonal is known: its variance part turns with the squares of C and its mean with C, as in LDAdam (arXiv
    2410.16103), ``v <- (1 - beta2^t) |(C o C) (v^ - m^ o m^) + (C m^) o (C m^)|`` with the bias-corrected m^ and v^.

    Args:
        first: m, float32 [r, k].
        second: v, float32 [r, k].
        turns: C [r, r] for the rows, and one for the columns where both sides are projected.
        betas: Adam's.
        updates: t, how many updates the moments have seen, at least 1.

    Returns:
        The new m and v; v is never negative.
    """
    bias1, bias2 = 1 - betas[0] ** updates, 1 - betas[1] ** updates
    mean, variance = first / bias1, second / bias2
    variance = variance - mean.square()
    turned = _turn(mean, turns)
    variance = _turn(variance, [turn.square() for turn in turns])
    return turned * bias1, (variance + turned.square()).abs_() * bias2


def _turn(matrix: Tensor, turns: list[Tensor]) -> Tensor:
    matrix = turns[0] @ matrix
    return matrix if len(turns) == 1 else matrix @ turns[1].t()


def _reset(state: dict[str, Any]) -> None:
    state["exp_avg"].fill_(ZERO_CODE if state["exp_avg"].dtype == torch.uint8 else 0)
    for key in ("exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"):
        state[key].zero_()
    state["bias_step"] = 0


def _decoded(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if state["exp_avg"].dtype != torch.uint8:
        return state["exp_avg"], state["exp_avg_sq"]
    first = ops.dynamic8_dequantize(state["exp_avg"], state["exp_avg_absmax"], True, BLOCK)
    return first, ops.dynamic8_dequantize(state["exp_avg_sq"], state["exp_avg_sq_absmax"], False, BLOCK)


def _store(state: dict[str, Any], first: Tensor, second: Tensor) -> None:
    """As Adam itself stores them: no sign of a first moment and no second moment is lost to the code of zero."""
    if state["exp_avg"].dtype != torch.uint8:
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        return
    codes, absmax = ops.dynamic8_quantize(first.contiguous(), True, BLOCK)
    lost = (codes == ZERO_CODE) & (first != 0)
    state["exp_avg"].copy_(torch.where(lost, codes + first.sign().to(torch.int16), codes.to(torch.int16)))
    state["exp_avg_absmax"].copy_(absmax)
    codes, absmax = ops.dynamic8_quantize(second.contiguous(), False, BLOCK)
    state["exp_avg_sq"].copy_(codes + ((codes == 0) & (second > 0)))
    state["exp_avg_sq_absmax"].copy_(absmax)

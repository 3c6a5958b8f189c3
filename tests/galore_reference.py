"""GaLore-AdamW in plain float64, written from the formulas, for comparison with the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_galore_torch import QGaLoreAdamW8bit, ops


def low_rank_stream(rows: int, cols: int, steps: int, seed: int = 0) -> list[Tensor]:
    """Float32 gradients: a drifting signal with decaying singular values, and noise."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, 24, generator=generator), torch.randn(24, cols, generator=generator)
    gradients = []
    for _ in range(steps):
        left = left + 0.1 * torch.randn(rows, 24, generator=generator)
        signal = left * torch.arange(1.0, 25) ** -1.0 @ right
        gradients.append(1e-3 * (signal + 0.3 * torch.randn(rows, cols, generator=generator)))
    return gradients


class Reference:
    """One weight: W, m and v in float64, the bases are handed in. Dimensions before ``cut`` are rows."""

    def __init__(self, weight: Tensor, group: dict[str, Any], cut: int = 1) -> None:
        self.matrix = weight.shape[:cut].numel(), weight.shape[cut:].numel()
        self.weight, self.group = weight.detach().double().clone(), group
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.t, self.norm = 0, 0.0

    def step(self, gradient: Tensor, bases: dict[str, Tensor]) -> Tensor:
        """Adam on R, R = P_L G P_R^T with those of the two bases that there are, decay before the update; returns N.

        R has one row per basis vector: it is transposed where only the right side is projected.
        """
        g, o = gradient.double().reshape(self.matrix), self.group
        left, right = (bases[side].double() if side in bases else None for side in ("left", "right"))
        beta1, beta2 = o["betas"]
        self.t += 1
        r = g if right is None else g @ right.t()
        r = r.t() if left is None else left @ r
        self.m = beta1 * self.m + (1 - beta1) * r
        self.v = beta2 * self.v + (1 - beta2) * r * r
        m, v = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
        n = m / (v.sqrt() + o["eps"])
        if o["norm_growth_limit"] is not None and self.norm > 0:
            n = n * min(1.0, o["norm_growth_limit"] * self.norm / n.norm().item())
        self.norm = n.norm().item()
        update = n.t() if left is None else left.t() @ n
        update = update if right is None else update @ right
        update = update.reshape(self.weight.shape)
        self.weight = self.weight * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * o["scale"] * update
        return n


def decoded_bases(opt: QGaLoreAdamW8bit, parameter: Tensor) -> dict[str, Tensor]:
    """The bases "right" and "left" that the last step used (plain parameters) or the next one will use."""
    state, group = opt.state[parameter], opt.param_groups[0]
    stored = {"proj": ("right" if state["side"] == 0 else "left", state["dim"])}
    if state["side"] == 2:
        stored["right"] = ("right", state["right_dim"])
    return {
        side: ops.projector_dequantize(
            *(state[f"{name}_{part}"] for part in ("codes", "scales", "zeros")),
            group["proj_format"],
            group["proj_block"],
            dim,
        )
        for name, (side, dim) in stored.items()
    }


def decoded_basis(opt: QGaLoreAdamW8bit, parameter: Tensor) -> Tensor:
    """The same where one side is projected."""
    (basis,) = decoded_bases(opt, parameter).values()
    return basis


def decoded_moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both moments of a state as float64."""
    if state["exp_avg"].dtype == torch.float32:
        return state["exp_avg"].double(), state["exp_avg_sq"].double()
    m = ops.dynamic8_dequantize(state["exp_avg"], state["exp_avg_absmax"], True)
    v = ops.dynamic8_dequantize(state["exp_avg_sq"], state["exp_avg_sq_absmax"], False)
    return m.double(), v.double()

"""GaLoreAdamW and GaLoreAdamW8bit: GaLore under the names of the galore_torch package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from q_galore_torch.optim.galore_adamw import QGaLoreAdamW8bit

# GaLore's own choices for a group with a rank; each group may say otherwise.
_GALORE: dict[str, Any] = {"proj_format": "float32", "subspace": "svd", "lazy_rule": "fixed"}


class GaLoreAdamW8bit(QGaLoreAdamW8bit):
    """GaLore with 8-bit moments: :class:`QGaLoreAdamW8bit` with other defaults for groups with a rank.

    They are ``proj_format="float32"``, ``subspace="svd"`` (an exact SVD) and ``lazy_rule="fixed"`` (a new basis each
    ``update_proj_gap`` steps). The constructor and all other options are :class:`QGaLoreAdamW8bit`'s; a group may name
    another format, also with ``quantize_type`` or ``quant``.

    Note:
        Deviations from galore_torch: decay comes before the update, refreshes are staggered over the parameters, and a
        new basis keeps the signs of the old one, whose moments go on in it. ``eps`` is added after the bias correction,
        as in ``torch.optim.AdamW``.

    Source: GaLore (arXiv 2403.03507).

    Example:
        >>> layer = torch.nn.Linear(64, 128)
        >>> groups = [{"params": [layer.bias]}, {"params": [layer.weight], "rank": 16, "update_proj_gap": 50}]
        >>> opt = GaLoreAdamW8bit(groups, lr=0.01)
    """

    _projected_defaults: ClassVar[dict[str, Any]] = _GALORE


class GaLoreAdamW(QGaLoreAdamW8bit):
    """GaLore with float32 moments and galore_torch's constructor.

    Groups with a rank have the defaults of :class:`GaLoreAdamW8bit`, from which it differs in the moments and in the
    constructor's defaults.

    Args:
        params: as for :class:`QGaLoreAdamW8bit`.
        lr: learning rate, default 1e-3.
        betas: decay rates of the moments, default (0.9, 0.999).
        eps: added to the root of the second moment, default 1e-6.
        weight_decay: decoupled, default 0.
        correct_bias: only True.
        no_deprecation_warning: accepted, as there is no such warning.
        options: ``seed``, ``stochastic_round``, ``nonfinite`` or ``compute_dtype`` of :class:`QGaLoreAdamW8bit`.

    Raises:
        ValueError: an option is unknown or out of range.

    Example:
        >>> layer = torch.nn.Linear(64, 128)
        >>> opt = GaLoreAdamW([{"params": [layer.weight], "rank": 16}], lr=0.01)
    """

    _projected_defaults: ClassVar[dict[str, Any]] = _GALORE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        **options: Any,
    ) -> None:
        if correct_bias is not True:
            raise ValueError(f"correct_bias={correct_bias!r} is not supported (moments start at zero); allowed: True")
        super().__init__(params, lr, betas, eps, weight_decay, moments_dtype="float32", **options)

"""INT8 layers under the public Q-GaLore's names and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from q_galore_torch import nn as layers
from q_galore_torch.nn.convert import convert_named
from q_galore_torch.nn.old_names import hook_parameters


class QGaLoreLinear(layers.QGaLoreLinear):
    """``y = x W^T + b`` with W stored as INT8, made from a float weight; its gradient is the ordinary one.

    Args:
        weight: float32, bfloat16 or float16 [m, n]; quantised, rounding to nearest.
        bias: [m] or None; becomes a parameter that shares its memory where device and dtype allow it.
        device: default the weight's.
        dtype: of the bias and of decoded weights, default the weight's.
        num_bits: only 8.
        group_size: consecutive elements of the row-major weight that share a scale, default 256. It need not divide
            the weight's size.
        stochastic_round: default True; False rounds the updates of this weight to nearest.

    Raises:
        ValueError: an argument is out of range, or the weight is not finite.

    Note:
        ``weight`` is a float parameter that takes no memory and stands for the INT8 weight: an optimizer, a norm, a
        clip and a gradient hook treat it like any other, and only QGaLoreAdamW8bit can update it. It has the attributes
        of :class:`q_galore_torch.nn.old_names.OldNames`; codes, scales and zero points are buffers of the layer.

    Example:
        >>> layer = QGaLoreLinear(torch.randn(64, 128), None)
        >>> layer.weight.shape, layer.weight.group_size, layer.qweight.dtype
        (torch.Size([64, 128]), 256, torch.uint8)
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_bits: int = 8,
        group_size: int = 256,
        stochastic_round: bool = True,
    ) -> None:
        _check_bits("num_bits", num_bits)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"weight must be a float tensor [m, n], got {weight.dtype} {list(weight.shape)}")
        rows, cols = weight.shape
        if bias is not None and tuple(bias.shape) != (rows,):
            raise ValueError(f"bias must be [{rows}] or None, got {list(bias.shape)}")
        device = weight.device if device is None else torch.device(device)
        dtype = weight.dtype if dtype is None else dtype
        super().__init__(cols, rows, False, group_size=group_size, grad_mode="full", device=device, dtype=dtype)
        self.leaf.stochastic_round = stochastic_round  # type: ignore[attr-defined]
        self.set_weight(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(device, dtype))


def prepare_model_for_int8_training(model: nn.Module, args: Any, target_module: Sequence[str]) -> nn.Module:
    """Replace linear layers by INT8 ones whose gradient is the ordinary one, in place.

    Args:
        model: any module. Only children whose type is exactly ``nn.Linear`` are converted.
        args: carries ``weight_bits`` (only 8), ``weight_group_size`` and ``stochastic_round``, for instance from
            argparse.
        target_module: child names, compared as a whole: ``["q_proj", "up_proj"]``.

    Returns:
        ``model``.

    Raises:
        ValueError: an option is out of range, nothing matches, or a matching layer cannot be converted (see
            :func:`q_galore_torch.prepare_model`); no layer is converted then.

    Note:
        ``setattr(p, "backward_hook", f)`` works for every parameter of the model afterwards, embeddings, norms and head
        included: f(p) is called when a backward pass has completed p's gradient. For that they become
        :class:`q_galore_torch.nn.old_names.HookedParameter`, the same objects with the same values.

        New code calls :func:`q_galore_torch.prepare_model`, whose layers never form the full gradient.

    Example:
        >>> from argparse import Namespace
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "norm": nn.LayerNorm(64)})
        >>> args = Namespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
        >>> type(prepare_model_for_int8_training(model, args, ["q_proj"])["q_proj"]).__name__
        'QGaLoreLinear'
    """
    _check_bits("weight_bits", args.weight_bits)
    if not isinstance(args.stochastic_round, bool):
        raise ValueError(f"stochastic_round must be True or False, got {args.stochastic_round!r}")

    def convert(name: str, linear: nn.Linear) -> nn.Module:
        layer = QGaLoreLinear.from_linear(linear, name, group_size=args.weight_group_size, grad_mode="full")
        layer.stochastic_round = args.stochastic_round
        return layer

    convert_named(model, target_module, convert)
    hook_parameters(model)
    return model


def _check_bits(name: str, bits: Any) -> None:
    if bits != 8 or isinstance(bits, bool):
        raise ValueError(f"{name} must be 8, got {bits!r}")

"""The public Q-GaLore code's entries of an INT8 layer in a state dict, read as this package's.

It stores ``weight`` (uint8 [m, n]), ``scales`` and ``zeros`` (float [groups, 1], at times bfloat16), ``group_size``,
``saved_data_dtype`` and ``stochastic_round``; a weight is ``scales * (weight - zeros)``, which is what
:class:`q_galore_torch.QGaLoreLinear` stores too, so that no code changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_galore_torch import ops

_NEEDED = ("scales", "zeros", "group_size")
_ATTRIBUTES = ("saved_data_dtype", "stochastic_round")  # the former is always uint8
_LARGEST_ZERO = 32767


def is_public(state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether a state dict holds a layer of the public code at ``prefix`` (with its dot)."""
    weight = state_dict.get(prefix + "weight")
    return isinstance(weight, Tensor) and weight.dtype == torch.uint8


def convert(state_dict: dict[str, Any], prefix: str) -> bool:
    """Replace the entries of one layer of the public code by this package's, in place.

    Args:
        state_dict: holds the layer.
        prefix: of its entries, with its dot.

    Returns:
        The layer's ``stochastic_round``.

    Raises:
        ValueError: an entry is missing or makes no sense; ``state_dict`` is unchanged then.
    """
    name = prefix.removesuffix(".") or "the layer"
    missing = [key for key in _NEEDED if prefix + key not in state_dict]
    if missing:
        raise ValueError(
            f"{prefix}weight holds uint8 codes, which cannot be decoded without {', '.join(missing)}: the public code "
            "writes these with saving_model_weight, and its model.state_dict() loses them"
        )
    weight, group_size = state_dict[prefix + "weight"], int(state_dict[prefix + "group_size"])
    if group_size < 1:
        raise ValueError(f"group_size of {name} must be an integer >= 1, got {group_size}")
    groups = (weight.numel() + group_size - 1) // group_size
    scales, zeros = (_flat(state_dict[prefix + key], f"{prefix}{key}", groups) for key in ("scales", "zeros"))
    if not are_scales(scales):
        raise ValueError(f"{prefix}scales must be finite and > 0")
    if not are_zeros(zeros):
        raise ValueError(f"{prefix}zeros must be integers of at most {_LARGEST_ZERO} in magnitude")
    stochastic_round = state_dict.get(prefix + "stochastic_round", True)
    for key in ("weight", *_NEEDED, *_ATTRIBUTES):
        state_dict.pop(prefix + key, None)
    state_dict[prefix + "qweight"] = weight.detach()
    state_dict[prefix + "scales"], state_dict[prefix + "zeros"] = scales, zeros.to(torch.int16)
    state_dict[prefix + "group_size"] = torch.tensor(group_size, device="cpu")
    return bool(stochastic_round)


def are_scales(values: Tensor) -> bool:
    """Whether numbers can be the scales of an INT8 weight."""
    return bool(((values > 0) & values.isfinite()).all())


def are_zeros(values: Tensor) -> bool:
    """Whether numbers can be the zero points of an INT8 weight."""
    return bool(((values == values.round()) & (values.abs() <= _LARGEST_ZERO)).all())


def decoded(state_dict: dict[str, Any], prefix: str) -> Tensor:
    """Take the codes of one layer out of a state dict, in this package's entries, and decode them to float32 [m, n]."""
    codes, scales, zeros, group_size = (state_dict.pop(prefix + key) for key in ("qweight", *_NEEDED))
    return ops.int8_dequantize(codes.contiguous(), scales, zeros, int(group_size), torch.float32)


def _flat(value: Any, name: str, groups: int) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != groups:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a float tensor with a value for each of {groups} groups, got {got}")
    return value.detach().float().flatten()

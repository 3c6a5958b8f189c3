"""What the public Q-GaLore code writes, built by its formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def public_codes(weight: Tensor, group_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The entries of one INT8 layer: affine with the zero point inside [0, 255], all arithmetic in ``dtype``."""
    groups = weight.detach().to(dtype).reshape(-1, group_size)
    high, low = groups.amax(dim=1, keepdim=True), groups.amin(dim=1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / 255
    zeros = (-torch.round(low / scales)).clamp(0, 255)
    codes = torch.clamp(torch.round(groups / scales) + zeros, 0, 255).to(torch.uint8).reshape(weight.shape)
    # The public code saves its Parameter with the attributes that it hung on it.
    parameter = nn.Parameter(codes, requires_grad=False)
    for key, value in (("scales", scales), ("zeros", zeros), ("group_size", group_size)):
        setattr(parameter, key, value)
    return {
        "weight": parameter,
        "scales": scales,
        "zeros": zeros,
        "group_size": group_size,
        "saved_data_dtype": torch.uint8,
        "stochastic_round": True,
    }


def public_model(
    model: nn.Module, names: list[str], group_size: int = 256, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The state dict that ``saving_model_weight`` of the public code writes, with the named layers in INT8."""
    entries: dict[str, Any] = dict(model.state_dict())
    for name in names:
        codes = public_codes(entries.pop(f"{name}.weight"), group_size, dtype)
        entries.update({f"{name}.{key}": value for key, value in codes.items()})
    return entries


def public_decoded(entries: dict[str, Any], name: str) -> Tensor:
    """s (q - z) of one layer in float64."""
    codes, scales, zeros = (entries[f"{name}.{key}"].detach().double() for key in ("weight", "scales", "zeros"))
    return (scales * (codes.reshape(len(scales), -1) - zeros)).reshape(codes.shape)

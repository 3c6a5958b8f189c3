"""What the public Q-GaLore code writes, built by its formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from q_galore_torch import q_galore_projector


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


def dynamic_map(signed: bool) -> Tensor:
    """bitsandbytes' 8-bit map: decades of the means of evenly spaced bounds, zero and one."""
    entries = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        means = 10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2
        entries += [*means.tolist(), *((-means).tolist() if signed else [])]
    return torch.tensor(sorted(entries))


def bitsandbytes_moment(value: Tensor, index: int, block: int) -> dict[str, Tensor]:
    """One moment in bitsandbytes' layout; block 0 is its layout with one scale for all."""
    flat, qmap = value.detach().float().flatten(), dynamic_map(index == 1)
    size = block or flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded / absmax.clamp_min(1e-30)[:, None]).flatten()[: flat.numel()]
    codes = (scaled[:, None] - qmap).abs().argmin(dim=1).to(torch.uint8)
    state = {f"state{index}": codes.view(value.shape), f"qmap{index}": qmap}
    if block:
        return {**state, f"absmax{index}": absmax}
    return {**state, f"max{index}": absmax, f"new_max{index}": torch.zeros(1)}


def bitsandbytes_decoded(state: dict[str, Any], index: int, block: int) -> Tensor:
    """The moment in float64."""
    codes, qmap = state[f"state{index}"], state[f"qmap{index}"].double()
    scales = state[f"absmax{index}"] if block else state[f"max{index}"].expand(1)
    sizes = scales.double().repeat_interleave(block or codes.numel())[: codes.numel()]
    return (qmap[codes.long()].flatten() * sizes).view(codes.shape)


class PublicProjector:
    """Pickles as the public code's GaLoreProjector does."""

    def __init__(self) -> None:
        self.rank, self.ortho_matrix, self.ortho_matrix_shape = 4, torch.ones(4, 8), torch.Size([4, 8])
        self.queue, self.proj_type = [0.5], "std"


PublicProjector.__module__ = "q_galore_torch.q_galore_projector"
PublicProjector.__qualname__ = PublicProjector.__name__ = "GaLoreProjector"


def save_as_public(value: Any, file: Any) -> None:
    """torch.save, with PublicProjector under the public class's name."""
    real = q_galore_projector.GaLoreProjector
    q_galore_projector.GaLoreProjector = PublicProjector  # type: ignore[assignment, misc]
    try:
        torch.save(value, file)
    finally:
        q_galore_projector.GaLoreProjector = real  # type: ignore[misc]

"""Gradient clipping over everything an optimizer holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from q_galore_torch.optim.finite import LARGEST_GRADIENT


def clip_grad_norm_(optimizer: Optimizer, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
    """Scale all gradients of an optimizer so that their joint 2-norm is at most ``max_norm``.

    If that norm is not finite, no gradient is changed, so that ``step()`` names or skips the parameter that is to blame
    (``torch.nn.utils.clip_grad_norm_`` then makes every gradient NaN or zero).

    Args:
        optimizer: whose ``.grad`` count: R for low-rank layers, the full gradient elsewhere.
        max_norm: the largest norm allowed, > 0; infinity only measures.
        error_if_nonfinite: raise if the norm is not finite, default False.

    Returns:
        The norm before clipping, a scalar tensor.

    Raises:
        ValueError: ``max_norm`` is not a number > 0.
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``; or the optimizer updates per layer, where the
            gradients are gone by now.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.tensor([3.0, 0.0, 4.0])
        >>> clip_grad_norm_(torch.optim.SGD([weight], lr=0.1), 1.0)
        tensor(5.)
    """
    check_largest("max_norm", max_norm, "a number > 0")
    if getattr(optimizer, "_per_layer", None) is not None:
        raise RuntimeError("per-layer updates clip by themselves: give max_grad_norm to enable_per_layer")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients, error_if_nonfinite)
    scale(gradients, norm, max_norm)
    return norm


def check_largest(name: str, value: Any, allowed: str) -> None:
    """Raise ValueError, saying what is allowed, where a largest norm is not a number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def total_norm(gradients: list[Tensor], error_if_nonfinite: bool = False) -> Tensor:
    """As ``torch.nn.utils.get_total_norm``, but of float16 gradients in float32: their norm often is over 65504."""
    wide = [torch.linalg.vector_norm(g, dtype=torch.float32) if g.dtype == torch.float16 else g for g in gradients]
    return torch.nn.utils.get_total_norm(wide, error_if_nonfinite=error_if_nonfinite)


def usable_norm(gradients: list[Tensor], flags: list[Tensor]) -> Tensor:
    """The norm of the gradients that are used, those whose flags (float32 [1]) are no larger than they may be."""
    norms = torch._foreach_norm([g.float() if g.dtype == torch.float16 else g for g in gradients])
    device = norms[0].device
    joint = torch.stack([norm.to(device, torch.float32) for norm in norms])
    usable = torch.cat([flag.to(device) for flag in flags]) <= LARGEST_GRADIENT
    return torch.linalg.vector_norm(torch.where(usable, joint, 0.0))


def scale(gradients: list[Tensor], norm: Tensor, largest: float) -> None:
    """Scale gradients in place as ``torch.nn.utils.clip_grad_norm_`` does; where the norm is zero or not finite, not at
    all."""
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    factor = torch.where(norm.isfinite() & (norm > 0), factor, 1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))

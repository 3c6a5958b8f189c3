"""The forward and backward of :class:`~q_galore_torch.nn.linear.QGaLoreLinear`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from q_galore_torch.nn.activations import cheaper_full
from q_galore_torch.subspace import FULL, LEFT, RIGHT

if TYPE_CHECKING:
    from q_galore_torch.nn.binding import Binding
    from q_galore_torch.nn.linear import QGaLoreLinear


class LinearFunction(torch.autograd.Function):
    """``y = x W^T + b``; the leaf's gradient is R in low-rank mode, G in full mode.

    W is decoded in the forward and again in the backward, so only its storage is kept in between; with ``project``
    ``X P^T`` is kept in place of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,
        bias: Tensor | None,
        stored: Tensor,
        scales: Tensor | None,
        zeros: Tensor | None,
        layer: QGaLoreLinear,
        project: bool,
    ) -> Tensor:
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.edition = None
        kept = x if ctx.needs_input_grad[1] else None
        if project:
            binding = lent(layer)
            kept, ctx.edition = projected_input(x.reshape(-1, layer.in_features), binding), binding.edition
        ctx.save_for_backward(kept, stored, scales, zeros)
        weight = layer.decoded(stored, scales, zeros, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, stored, scales, zeros = ctx.saved_tensors
        layer: QGaLoreLinear = ctx.layer
        kind = grad.device.type
        # Autocast would round float32 products if backward() is called inside its block.
        plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        grad_x = grad_leaf = grad_bias = None
        with plain:
            dy = grad.reshape(-1, layer.out_features)  # of x's dtype, as the output was
            if ctx.needs_input_grad[1]:
                grad_leaf = leaf_gradient(kept, dy, layer, ctx.edition)
            if ctx.needs_input_grad[0]:
                weight = layer.decoded(stored, scales, zeros, dy.dtype)
                grad_x = (dy @ weight).view(*grad.shape[:-1], layer.in_features)
            if ctx.needs_input_grad[2]:
                grad_bias = dy.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_leaf, grad_bias, None, None, None, None, None


def leaf_gradient(kept: Tensor, dy: Tensor, layer: QGaLoreLinear, edition: tuple[Tensor, int] | None) -> Tensor:
    """The leaf's gradient of one micro-batch, in the leaf's dtype; in a due step G is added to the stash as well.

    Args:
        kept: x [..., n], or ``X P^T`` [T, r] under the basis of ``edition``.
        dy: [T, m], same dtype.
        layer: whose leaf it is.
        edition: None where x was kept.

    Raises:
        RuntimeError: no optimizer has been made for a low-rank layer, or its basis has changed since the forward.
    """
    if layer.grad_mode == "full":
        gradient = dy.t() @ kept.reshape(-1, layer.in_features)
    elif edition is None:
        gradient = low_rank(kept.reshape(-1, layer.in_features), dy, layer)
    else:
        gradient = low_rank_kept(kept, dy, layer, edition)
    return gradient.to(layer.leaf.dtype)


def lent(layer: QGaLoreLinear) -> Binding:
    """What the optimizer has lent to a low-rank layer."""
    if layer.leaf.binding is None:
        raise RuntimeError(
            f"the low-rank backward of {layer.label or 'a QGaLoreLinear'} needs the optimizer's projector; "
            "create QGaLoreAdamW8bit(param_groups(model, ...)) before the first backward"
        )
    return layer.leaf.binding


def low_rank(x: Tensor, dy: Tensor, layer: QGaLoreLinear) -> Tensor:
    """R of one micro-batch x [T, n], dy [T, m]; in a due step G is added to the stash as well.

    Returns:
        ``(X P^T)^T dY`` [r, m] (right) or ``(P dY^T) X`` [r, n] (left): 2 T r (m + n) flops instead of 2 T m n; or
        ``(P_L dY^T) (X P_R^T)`` [r, r] (full): 2 T r (m + n + r).
    """
    binding = lent(layer)
    formed = cheaper_full(layer)
    full = dy.t() @ x if binding.due or formed else None
    if formed:
        assert full is not None
        projected = _projection_of(full, binding)
    elif binding.side == LEFT:
        projected = (dy @ binding.basis(x.dtype).t()).t() @ x
    else:
        projected = _from_projected(projected_input(x, binding), dy, binding)
    if binding.due:
        assert full is not None
        binding.add(full, layer.leaf)
    return projected


def low_rank_kept(kept: Tensor, dy: Tensor, layer: QGaLoreLinear, edition: tuple[Tensor, int]) -> Tensor:
    """R of one micro-batch of which the forward kept ``X P^T`` [T, r]; G cannot be formed from it."""
    binding = lent(layer)
    codes, version = binding.edition
    if codes is not edition[0] or version != edition[1]:
        raise RuntimeError(
            f"the basis of {layer.label or 'a QGaLoreLinear'} changed between this forward and its backward: call "
            "backward() before opt.step() or load_state_dict(), or prepare the model with save_projected=False"
        )
    if binding.due:
        binding.miss(layer.leaf)
    return _from_projected(kept, dy, binding)


def projected_input(x: Tensor, binding: Binding) -> Tensor:
    """``X P^T`` [T, r] of x [T, n], with the right basis of a layer that has two."""
    basis = binding.right_basis(x.dtype) if binding.side == FULL else binding.basis(x.dtype)
    return x @ basis.t()


def _from_projected(projected: Tensor, dy: Tensor, binding: Binding) -> Tensor:
    """R of X P^T [T, r] and dy [T, m]."""
    if binding.side == RIGHT:
        return projected.t() @ dy
    return (dy @ binding.basis(dy.dtype).t()).t() @ projected


def _projection_of(gradient: Tensor, binding: Binding) -> Tensor:
    """R of a full gradient [m, n]."""
    projected = binding.basis(gradient.dtype) @ (gradient.t() if binding.side == RIGHT else gradient)
    return projected @ binding.right_basis(gradient.dtype).t() if binding.side == FULL else projected

"""The forward and backward of :class:`~q_galore_torch.nn.linear.QGaLoreLinear`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from q_galore_torch.subspace import FULL, RIGHT

if TYPE_CHECKING:
    from q_galore_torch.nn.binding import Binding
    from q_galore_torch.nn.linear import QGaLoreLinear


class LinearFunction(torch.autograd.Function):
    """``y = x W^T + b``; the leaf's gradient is R in low-rank mode, G in full mode.

    W is decoded in the forward and again in the backward, so only its storage is kept in between.
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
    ) -> Tensor:
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, stored, scales, zeros)
        weight = layer.decoded(stored, scales, zeros, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, scales, zeros = ctx.saved_tensors
        layer: QGaLoreLinear = ctx.layer
        kind = grad.device.type
        # Autocast would round float32 products if backward() is called inside its block.
        plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        grad_x = grad_leaf = grad_bias = None
        with plain:
            dy = grad.reshape(-1, layer.out_features)  # of x's dtype, as the output was
            if ctx.needs_input_grad[1]:
                rows = x.reshape(-1, layer.in_features)
                grad_leaf = full_gradient(rows, dy, layer) if layer.grad_mode == "full" else low_rank(rows, dy, layer)
            if ctx.needs_input_grad[0]:
                weight = layer.decoded(stored, scales, zeros, dy.dtype)
                grad_x = (dy @ weight).view(*grad.shape[:-1], layer.in_features)
            if ctx.needs_input_grad[2]:
                grad_bias = dy.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_leaf, grad_bias, None, None, None, None


def full_gradient(x: Tensor, dy: Tensor, layer: QGaLoreLinear) -> Tensor:
    """``G = dY^T X`` in the leaf's dtype."""
    return (dy.t() @ x).to(layer.leaf.dtype)


def low_rank(x: Tensor, dy: Tensor, layer: QGaLoreLinear) -> Tensor:
    """R of one micro-batch in the leaf's dtype; in a due step G is added to the stash as well.

    Args:
        x: [T, n].
        dy: [T, m], same dtype.
        layer: whose projector is used.

    Returns:
        ``(X P^T)^T dY`` [r, m] (right) or ``(P dY^T) X`` [r, n] (left): 2 T r (m + n) flops instead of 2 T m n; or
        ``(P_L dY^T) (X P_R^T)`` [r, r] (full): 2 T r (m + n + r).

    Raises:
        RuntimeError: no optimizer has been made for the layer.
    """
    binding: Binding | None = layer.leaf.binding
    if binding is None:
        raise RuntimeError(
            f"the low-rank backward of {layer.label or 'a QGaLoreLinear'} needs the optimizer's projector; "
            "create QGaLoreAdamW8bit(param_groups(model, ...)) before the first backward"
        )
    cheaper_full = _cheaper_full(layer)
    full = None
    if binding.due and dy.dtype == torch.float16:  # whose range may be too small for G where R fits well
        full = dy.float().t() @ x.float()
    elif binding.due or cheaper_full:
        full = dy.t() @ x
    if cheaper_full:
        assert full is not None
        projected = _projection_of(full, binding)
    else:
        projected = _direct(x, dy, binding)
    if binding.due:
        assert full is not None
        binding.add(full, layer.leaf)
    return projected.to(layer.leaf.dtype)


def _cheaper_full(layer: QGaLoreLinear) -> bool:
    """Whether forming G takes fewer flops a token than forming R without it."""
    m, n, r = layer.out_features, layer.in_features, layer.leaf.shape[0]
    return r * (m + n + (r if layer.side == FULL else 0)) > m * n


def _projection_of(gradient: Tensor, binding: Binding) -> Tensor:
    """R of a full gradient [m, n]."""
    projected = binding.basis(gradient.dtype) @ (gradient.t() if binding.side == RIGHT else gradient)
    return projected @ binding.right_basis(gradient.dtype).t() if binding.side == FULL else projected


def _direct(x: Tensor, dy: Tensor, binding: Binding) -> Tensor:
    """R of x [T, n] and dy [T, m] without the full gradient."""
    basis = binding.basis(x.dtype)
    if binding.side == RIGHT:
        return (x @ basis.t()).t() @ dy
    left = (dy @ basis.t()).t()
    return left @ (x @ binding.right_basis(x.dtype).t()) if binding.side == FULL else left @ x

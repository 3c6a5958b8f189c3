"""The forward and backward of :class:`~q_galore_torch.nn.linear.QGaLoreLinear`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from q_galore_torch.nn.activations import cheaper_full
from q_galore_torch.nn.leaf import numbered, refuse_elsewhere
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
        wants_x, wants_leaf, wants_bias = ctx.needs_input_grad[:3]
        weight = (stored, scales, zeros)
        if torch.compiler.is_compiling():
            leaf = layer.leaf
            grad_x, grad_leaf = _traced(grad, kept, *weight, layer._number, leaf.shape, leaf.dtype, wants_x)
        else:
            grad_x, grad_leaf = gradients(grad, kept, *weight, layer, wants_x, ctx.edition)
        grad_bias = grad.reshape(-1, layer.out_features).sum(0, dtype=ctx.bias_dtype) if wants_bias else None
        wanted = (grad_x if wants_x else None, grad_leaf if wants_leaf else None, grad_bias)
        return *wanted, None, None, None, None, None


def gradients(
    grad: Tensor,
    kept: Tensor | None,
    stored: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    layer: QGaLoreLinear,
    wants_x: bool,
    edition: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x [..., n] and of the leaf, each empty where it is not wanted.

    Args:
        grad: of the output, [..., m].
        kept: as for :func:`leaf_gradient`; None where the leaf's gradient is not wanted.
        stored, scales, zeros: the weight.
        layer: the layer.
        wants_x: whether x needs one.
        edition: of the basis under which ``kept`` was projected.
    """
    kind = grad.device.type
    # Autocast would round float32 products if backward() is called inside its block.
    plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with plain:
        dy = grad.reshape(-1, layer.out_features)  # of x's dtype, as the output was
        grad_leaf = dy.new_empty(0) if kept is None else leaf_gradient(kept, dy, layer, edition)
        if not wants_x:
            return dy.new_empty(0), grad_leaf
        weight = layer.decoded(stored, scales, zeros, dy.dtype)
        return (dy @ weight).view(*grad.shape[:-1], layer.in_features), grad_leaf


# Due-ness must be asked in every step, so no CUDA graph may replay it.
@torch.library.custom_op("q_galore::linear_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _traced(
    grad: Tensor,
    kept: Tensor | None,
    stored: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    number: Tensor,
    leaf_shape: Sequence[int],
    leaf_dtype: torch.dtype,
    wants_x: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`gradients` for a compiled graph, which finds the layer by its number when it runs.

    Opaque to the compiler: a due step stashes its full gradient, and a compiler that saw the weight decoded here and in
    the forward would decode it once and keep it in between.
    """
    return gradients(grad, kept, stored, scales, zeros, numbered(int(number)), wants_x)


@_traced.register_fake
def _(
    grad: Tensor,
    kept: Tensor | None,
    stored: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    number: Tensor,
    leaf_shape: Sequence[int],
    leaf_dtype: torch.dtype,
    wants_x: bool,
) -> tuple[Tensor, Tensor]:
    none = grad.new_empty(0)
    grad_x = grad.new_empty(*grad.shape[:-1], stored.shape[1]) if wants_x else none
    return grad_x, torch.empty_like(none) if kept is None else grad.new_empty(leaf_shape, dtype=leaf_dtype)


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
    refuse_elsewhere(layer.label or "a QGaLoreLinear", layer.leaf.device, layer.leaf.binding.codes.device)
    return layer.leaf.binding


def low_rank(x: Tensor, dy: Tensor, layer: QGaLoreLinear) -> Tensor:
    """R of one micro-batch x [T, n], dy [T, m]; in a due step G is added to the stash as well.

    Returns:
        ``(X P^T)^T dY`` [r, m] (right) or ``(P dY^T) X`` [r, n] (left): 2 T r (m + n) flops instead of 2 T m n; or
        ``(P_L dY^T) (X P_R^T)`` [r, r] (full): 2 T r (m + n + r).
    """
    binding = lent(layer)
    formed = cheaper_full(layer)
    full = None
    if binding.due and dy.dtype == torch.float16:  # whose range may be too small for G where R fits well
        full = dy.float().t() @ x.float()
    elif binding.due or formed:
        full = dy.t() @ x
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

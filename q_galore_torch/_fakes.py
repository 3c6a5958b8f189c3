"""What tracing sees of the ops: the shapes, dtypes and devices of their results, with the checks of the real ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import FLOAT_FORMATS, FULL, PROJ_FORMATS, RIGHT


def _blocks(count: int, block: int) -> int:
    return (count + block - 1) // block


def _check(tensor: Tensor, name: str, like: Tensor, dtypes: tuple[torch.dtype, ...], shape: Sequence[int]) -> None:
    torch._check(tensor.device == like.device, lambda: f"{name}: expected {like.device}, got {tensor.device}")
    torch._check(tensor.dtype in dtypes, lambda: f"{name}: expected {dtypes}, got {tensor.dtype}")
    torch._check(
        tuple(tensor.shape) == tuple(shape), lambda: f"{name}: expected {list(shape)}, got {list(tensor.shape)}"
    )


def _float_of(code: int) -> torch.dtype:
    return {number: dtype for dtype, number in FLOAT_FORMATS.items()}[code]


@torch.library.register_fake("q_galore::noise")
def _(like: Tensor, seed: int, id: int, step: int, start: int, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.int32)


@torch.library.register_fake("q_galore::absmax")
def _(tensors: list[Tensor]) -> Tensor:
    for i, x in enumerate(tensors):
        _check(x, f"tensors[{i}]", tensors[0], tuple(FLOAT_FORMATS), x.shape)
    return tensors[0].new_empty(len(tensors), dtype=torch.float32)


@torch.library.register_fake("q_galore::int8_quantize")
def _(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(weight, "weight", weight, tuple(FLOAT_FORMATS), weight.shape)
    groups = _blocks(weight.numel(), group_size)
    return (
        weight.new_empty(weight.shape, dtype=torch.uint8),
        weight.new_empty(groups, dtype=torch.float32),
        weight.new_empty(groups, dtype=torch.int16),
    )


@torch.library.register_fake("q_galore::int8_dequantize")
def _(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, format: int) -> Tensor:
    groups = _blocks(codes.numel(), group_size)
    _check(codes, "codes", codes, (torch.uint8,), codes.shape)
    _check(scales, "scales", codes, (torch.float32,), [groups])
    _check(zeros, "zeros", codes, (torch.int16,), [groups])
    return codes.new_empty(codes.shape, dtype=_float_of(format))


_FLOAT_PROJECTORS = {PROJ_FORMATS["float32"]: torch.float32, PROJ_FORMATS["bfloat16"]: torch.bfloat16}
_AFFINE_PROJECTORS = (PROJ_FORMATS["int8"], PROJ_FORMATS["int4"])
_PACKED_PROJECTORS = (PROJ_FORMATS["int4"], PROJ_FORMATS["fp4"], PROJ_FORMATS["nf4"])


def _projector_layout(format: int, block: int, rank: int, dim: int) -> list[tuple[torch.dtype, list[int]]]:
    """Dtype and shape of a projector's codes, scales and zero points; [0] where the format has none."""
    if format in _FLOAT_PROJECTORS:
        return [(_FLOAT_PROJECTORS[format], [rank, dim]), (torch.bfloat16, [0]), (torch.uint8, [0])]
    width = (dim + 1) // 2 if format in _PACKED_PROJECTORS else dim
    scales = [rank, _blocks(dim, block)] if block else [1, 1]
    zeros = scales if format in _AFFINE_PROJECTORS else [0]
    return [(torch.uint8, [rank, width]), (torch.bfloat16, scales), (torch.uint8, zeros)]


def _check_projector(codes: Tensor, scales: Tensor, zeros: Tensor, format: int, block: int, dim: int) -> None:
    layout = _projector_layout(format, block, codes.shape[0], dim)
    for name, part, (dtype, shape) in zip(("codes", "scales", "zeros"), (codes, scales, zeros), layout, strict=True):
        _check(part, f"projector {name}", codes, (dtype,), shape)


@torch.library.register_fake("q_galore::projector_quantize")
def _(basis: Tensor, format: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(basis, "basis", basis, (torch.float32,), basis.shape)
    rank, dim = basis.shape
    codes, scales, zeros = (
        basis.new_empty(shape, dtype=dtype) for dtype, shape in _projector_layout(format, block, rank, dim)
    )
    return codes, scales, zeros


@torch.library.register_fake("q_galore::projector_dequantize")
def _(codes: Tensor, scales: Tensor, zeros: Tensor, format: int, block: int, dim: int, target_format: int) -> Tensor:
    _check_projector(codes, scales, zeros, format, block, dim)
    return codes.new_empty((codes.shape[0], dim), dtype=_float_of(target_format))


@torch.library.register_fake("q_galore::dynamic8_quantize")
def _(x: Tensor, is_signed: bool, block: int) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    _check(x, "x", x, (torch.float32,), [rows, cols])
    return x.new_empty((rows, cols), dtype=torch.uint8), x.new_empty((rows, _blocks(cols, block)))


@torch.library.register_fake("q_galore::dynamic8_dequantize")
def _(codes: Tensor, absmax: Tensor, is_signed: bool, block: int) -> Tensor:
    rows, cols = codes.shape
    _check(codes, "codes", codes, (torch.uint8,), [rows, cols])
    _check(absmax, "absmax", codes, (torch.float32,), [rows, _blocks(cols, block)])
    return codes.new_empty((rows, cols), dtype=torch.float32)


_WEIGHTS = (*FLOAT_FORMATS, torch.uint8)


def _check_task(
    i: int,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    grad: Tensor,
    grad_shape: Sequence[int],
    moments: tuple[Tensor, Tensor],
    absmaxes: tuple[Tensor, Tensor],
    moment_shape: Sequence[int],
    absmax_shape: Sequence[int],
    group_size: int,
) -> None:
    _check(weight, f"weights[{i}]", weight, _WEIGHTS, weight.shape)
    if weight.dtype == torch.uint8:
        groups = [_blocks(weight.numel(), group_size)]
        _check(scales, f"scales[{i}]", weight, (torch.float32,), groups)
        _check(zeros, f"zeros[{i}]", weight, (torch.int16,), groups)
    _check(grad, f"grads[{i}]", weight, tuple(FLOAT_FORMATS), grad_shape)
    for moment, maxima in zip(moments, absmaxes, strict=True):
        _check(moment, f"moments[{i}]", weight, (torch.float32, torch.uint8), moment_shape)
        if moment.dtype == torch.uint8:
            _check(maxima, f"absmax[{i}]", weight, (torch.float32,), absmax_shape)


def _check_lengths(count: int, *lists: Sequence[object]) -> None:
    lengths = [len(one) for one in lists]
    torch._check(all(length == count for length in lengths), lambda: f"expected lists of {count}, got {lengths}")


def _check_numbers(count: int, stats: Tensor, absmax: Tensor) -> None:
    _check(stats, "stats", stats, (torch.int64,), [count, 2])
    if absmax.numel() > 0:
        _check(absmax, "absmax", stats, (torch.float32,), [count])


@torch.library.register_fake("q_galore::adam8_step_")
def _(
    weights: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    bias_steps: list[int],
    noise_steps: list[int],
    ids: list[int],
    stats: Tensor,
    absmax: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
    stochastic_round: bool,
    group_size: int,
    block: int,
) -> None:
    lists = (scales, zeros, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, bias_steps, noise_steps, ids)
    _check_lengths(len(weights), *lists)
    _check_numbers(len(weights), stats, absmax)
    for i, weight in enumerate(weights):
        moments, maxima = (exp_avg[i], exp_avg_sq[i]), (exp_avg_absmax[i], exp_avg_sq_absmax[i])
        flat = [_blocks(weight.numel(), block)]
        shape = weight.shape
        _check_task(i, weight, scales[i], zeros[i], grads[i], shape, moments, maxima, shape, flat, group_size)


@torch.library.register_fake("q_galore::galore_step_")
def _(
    weights: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    proj_codes: list[Tensor],
    proj_scales: list[Tensor],
    proj_zeros: list[Tensor],
    right_codes: list[Tensor],
    right_scales: list[Tensor],
    right_zeros: list[Tensor],
    sides: list[int],
    bias_steps: list[int],
    noise_steps: list[int],
    ids: list[int],
    stats: Tensor,
    norms: Tensor,
    absmax: Tensor,
    proj_format: int,
    proj_block: int,
    low_rank: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    seed: int,
    stochastic_round: bool,
    group_size: int,
    block: int,
    compute_format: int,
    norm_growth_limit: float,
) -> None:
    lists = (scales, zeros, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, bias_steps, noise_steps, ids)
    _check_lengths(len(weights), *lists, proj_codes, proj_scales, proj_zeros, sides)
    _check_lengths(len(weights) if FULL in sides or right_codes else 0, right_codes, right_scales, right_zeros)
    _check_numbers(len(weights), stats, absmax)
    if norm_growth_limit:
        _check(norms, "norms", stats, (torch.float64,), [len(weights)])
    for i, weight in enumerate(weights):
        rows, cols = weight.shape
        dim, other = (cols, rows) if sides[i] == RIGHT else (rows, cols)
        _check_projector(proj_codes[i], proj_scales[i], proj_zeros[i], proj_format, proj_block, dim)
        torch._check(proj_codes[i].device == weight.device, lambda: "projector: expected the weight's device")
        rank = proj_codes[i].shape[0]
        if sides[i] == FULL:
            _check_projector(right_codes[i], right_scales[i], right_zeros[i], proj_format, proj_block, cols)
            _check(right_codes[i], f"right_codes[{i}]", weight, (proj_codes[i].dtype,), (rank, right_codes[i].shape[1]))
            other = rank
        moments, maxima = (exp_avg[i], exp_avg_sq[i]), (exp_avg_absmax[i], exp_avg_sq_absmax[i])
        projected = [rank, other]
        grad_shape = projected if low_rank else weight.shape
        per_block = [rank, _blocks(other, block)]
        _check_task(
            i, weight, scales[i], zeros[i], grads[i], grad_shape, moments, maxima, projected, per_block, group_size
        )


@torch.library.register_fake("q_galore::subspace_refresh")
def _(gradient: Tensor, basis: Tensor, side: int, steps: int, compute_format: int) -> tuple[Tensor, Tensor]:
    _check(gradient, "gradient", gradient, tuple(FLOAT_FORMATS), gradient.shape)
    dim = gradient.shape[1] if side == RIGHT else gradient.shape[0]
    _check(basis, "basis", gradient, (torch.float32,), [basis.shape[0], dim])
    return torch.empty_like(basis), torch.empty(5, dtype=torch.float64, device="cpu")


@torch.library.register_fake("q_galore::subspace_random")
def _(like: Tensor, rank: int, dim: int, seed: int, id: int, draw: int) -> Tensor:
    return like.new_empty((rank, dim), dtype=torch.float32)


@torch.library.register_fake("q_galore::captured_energy")
def _(gradient: Tensor, right: Tensor, left: Tensor, compute_format: int) -> Tensor:
    _check(gradient, "gradient", gradient, tuple(FLOAT_FORMATS), gradient.shape)
    for name, basis, dim in (("right", right, gradient.shape[1]), ("left", left, gradient.shape[0])):
        if basis.numel() > 0:
            _check(basis, name, gradient, (torch.float32,), [basis.shape[0], dim])
    return torch.empty((), dtype=torch.float64, device="cpu")

"""One optimizer step: Adam, projection, and the update of every weight format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q_galore_torch.reference.formats import (
    FLOAT_MAX,
    constant_range,
    dynamic8_dequantize,
    dynamic8_quantize,
    grouped,
    noise,
    projector_dequantize,
    round_even,
    to_float32,
    weight_range,
)

RIGHT, LEFT, FULL = 0, 1, 2


def _adam(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_absmax: Tensor,
    t: int,
    beta1: float,
    beta2: float,
    eps: float,
    block: int,
) -> Tensor:
    """Adam's direction N of a float32 matrix whose moment blocks run along its rows; the moments are updated."""
    quantised = exp_avg.dtype == torch.uint8
    if quantised:
        m = dynamic8_dequantize(exp_avg, exp_avg_absmax, True, block)
        v = dynamic8_dequantize(exp_avg_sq, exp_avg_sq_absmax, False, block)
    else:
        m, v = exp_avg, exp_avg_sq
    m = m * to_float32(beta1) + gradient * to_float32(1 - beta1)
    v = v * to_float32(beta2) + (gradient * gradient) * to_float32(1 - beta2)
    bias1, bias2 = to_float32(1 / (1 - beta1**t)), to_float32(1 / (1 - beta2**t) ** 0.5)
    root = v.double().sqrt().float()  # correctly rounded; torch's float32 sqrt may be off by one unit
    normalised = (m * bias1) / (root * bias2 + to_float32(eps))
    if quantised:
        codes, absmax1 = dynamic8_quantize(m, True, block)
        lost = (codes == 127) & (m != 0)  # a first moment that lost its sign moves one code towards it
        exp_avg.copy_(torch.where(lost, torch.where(m > 0, 128, 126), codes.int()).to(torch.uint8))
        exp_avg_absmax.copy_(absmax1)
        codes, absmax2 = dynamic8_quantize(v, False, block)
        lost = (codes == 0) & (v > 0)  # nor is a second moment lost: m over the root of nothing is a step of any size
        exp_avg_sq.copy_(codes + lost)
        exp_avg_sq_absmax.copy_(absmax2)
    else:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    return normalised


def _update(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    update: Tensor,
    lr: float,
    weight_decay: float,
    scale: float,
    stochastic_round: bool,
    group_size: int,
    draws: Tensor,
    stats: Tensor,
) -> None:
    """W <- W (1 - lr wd) - lr scale U in the weight's own storage."""
    rate = to_float32(lr * scale)
    if weight.dtype == torch.uint8:
        decay = to_float32(lr * weight_decay)
        _update_int8(weight, scales, zeros, update, decay, rate, stochastic_round, group_size, draws, stats)
        return
    keep = to_float32(1 - lr * weight_decay)
    exact = weight.float() * keep - update.view_as(weight) * rate
    if weight.dtype == torch.bfloat16 and stochastic_round:
        bits = exact.view(torch.int32)
        carried = (bits + (draws.view_as(bits) >> 8)) & ~0xFFFF
        overflowed = torch.isfinite(exact) & ~torch.isfinite(carried.view(torch.float32))
        exact = torch.where(overflowed, bits & ~0xFFFF, carried).view(torch.float32)
    weight.copy_(exact)


def _update_int8(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    update: Tensor,
    decay: float,
    rate: float,
    stochastic_round: bool,
    group_size: int,
    draws: Tensor,
    stats: Tensor,
) -> None:
    """The update in steps from the code; scale and zero point change only when they must."""
    flat = codes.view(-1)
    for g, (q8, u, j) in enumerate(
        zip(grouped(flat, group_size), grouped(update, group_size), grouped(draws, group_size), strict=True)
    ):
        s, z, q = scales[g], int(zeros[g]), q8.int()
        d = -((q - z).float() * decay) - u * (torch.tensor(rate) / s)
        d = d.clamp(-FLOAT_MAX, FLOAT_MAX)
        if not (d != 0).any():
            continue
        x = q.float() + d
        low, high = _scaled(s, x.min(), z), _scaled(s, x.max(), z)
        fits = not weight_range(low, high)[0] < to_float32(s.item() * 0.5)
        moved = q + _round(d.clamp(-(2.0**20), 2.0**20), stochastic_round, j)
        least, most = int(moved.min()), int(moved.max())
        if fits and least >= 0 and most <= 255:
            q8.copy_(moved)
            continue
        shift = round_even(127.5 - (most + least) / 2)
        if fits and most - least <= 255 and abs(z + shift) <= 32767:
            q8.copy_(moved + shift)
            zeros[g] = z + shift
            stats[0] += 1
            continue
        offset = (q.double() + d.double()) - z
        low, high = _scaled(s, offset.min(), 0), _scaled(s, offset.max(), 0)
        constant = constant_range(low) if low == high else None
        new_scale, new_zero = constant or weight_range(low, high)
        target = offset * (s.double() / new_scale) + new_zero
        q8.copy_(_round(target, stochastic_round, j).clamp(0, 255))
        scales[g], zeros[g] = new_scale, new_zero
        stats[1] += 1


def _scaled(scale: Tensor, x: Tensor, zero: int) -> float:
    return (scale.double() * (x.double() - zero)).item()


def _round(x: Tensor, stochastic: bool, draws: Tensor) -> Tensor:
    """floor(x) plus one with probability x - floor(x), decided by a 24-bit draw; or to nearest even."""
    if not stochastic:
        return torch.round(x).int()
    floor = torch.floor(x)
    return floor.int() + (draws < torch.round((x - floor) * 2.0**24)).int()


def _flagged(absmax: Tensor | None, index: int) -> bool:
    """Whether a gradient is too large for its square, or not finite."""
    return absmax is not None and not absmax[index] <= 1e18


def adam8_step_(
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
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
    stochastic_round: bool = True,
    group_size: int = 256,
    block: int = 256,
    absmax: Tensor | None = None,
) -> None:
    """AdamW on each weight; the moment blocks run along the flat weight. See :func:`q_galore_torch.ops.adam8_step_`."""
    for i, weight in enumerate(weights):
        if weight.numel() == 0 or _flagged(absmax, i):
            continue
        normalised = _adam(
            grads[i].float().reshape(1, -1),
            exp_avg[i].view(1, -1),
            exp_avg_sq[i].view(1, -1),
            exp_avg_absmax[i].view(1, -1),
            exp_avg_sq_absmax[i].view(1, -1),
            bias_steps[i],
            beta1,
            beta2,
            eps,
            block,
        )
        draws = noise(seed, ids[i], noise_steps[i], 0, weight.numel())
        _update(
            weight,
            scales[i],
            zeros[i],
            normalised,
            lr,
            weight_decay,
            1.0,
            stochastic_round,
            group_size,
            draws,
            stats[i],
        )


def _limit_growth(normalised: Tensor, limit: float, norm: Tensor) -> float:
    """The factor by which N is shrunk so that its norm is at most ``limit`` times the last one; the norm is updated."""
    now, most = torch.linalg.vector_norm(normalised.double()).item(), limit * norm.item()
    rate = most / now if norm > 0 and now > most else 1.0
    norm.fill_(most if rate < 1 else now)
    return rate


def galore_step_(
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
    sides: list[int],
    bias_steps: list[int],
    noise_steps: list[int],
    ids: list[int],
    stats: Tensor,
    *,
    proj_format: str,
    proj_block: int,
    low_rank: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    seed: int,
    stochastic_round: bool = True,
    group_size: int = 256,
    block: int = 256,
    compute_dtype: str = "float32",
    right_codes: Sequence[Tensor] = (),
    right_scales: Sequence[Tensor] = (),
    right_zeros: Sequence[Tensor] = (),
    norm_growth_limit: float = 0.0,
    norms: Tensor | None = None,
    absmax: Tensor | None = None,
) -> None:
    """Projected AdamW on each weight matrix. See :func:`q_galore_torch.ops.galore_step_`."""
    dtype = getattr(torch, compute_dtype)
    for i, weight in enumerate(weights):
        if weight.numel() == 0 or exp_avg[i].numel() == 0 or _flagged(absmax, i):
            continue
        right, full = sides[i] == RIGHT, sides[i] == FULL
        dim = weight.shape[1] if right else weight.shape[0]
        basis = projector_dequantize(
            proj_codes[i], proj_scales[i], proj_zeros[i], proj_format, proj_block, dim, dtype=dtype
        )
        other_basis = basis.new_empty(0)
        if full:
            codes, dim = right_codes[i], weight.shape[1]
            other_basis = projector_dequantize(
                codes, right_scales[i], right_zeros[i], proj_format, proj_block, dim, dtype=dtype
            )
        if low_rank:
            projected = grads[i].float()
        else:
            gradient = grads[i].to(dtype)
            inner = basis @ (gradient.t() if right else gradient)
            projected = (inner @ other_basis.t() if full else inner).float()
        normalised = _adam(
            projected,
            exp_avg[i],
            exp_avg_sq[i],
            exp_avg_absmax[i],
            exp_avg_sq_absmax[i],
            bias_steps[i],
            beta1,
            beta2,
            eps,
            block,
        )
        rate = 1.0
        if norm_growth_limit and norms is not None:
            rate = _limit_growth(normalised, norm_growth_limit, norms[i])
        direction = normalised.to(dtype)
        if full:
            direction = direction @ other_basis
        update = (direction.t() @ basis if right else basis.t() @ direction).float()
        draws = noise(seed, ids[i], noise_steps[i], 0, weight.numel())
        _update(
            weight,
            scales[i],
            zeros[i],
            update.contiguous(),
            lr,
            weight_decay,
            scale * rate,
            stochastic_round,
            group_size,
            draws,
            stats[i],
        )

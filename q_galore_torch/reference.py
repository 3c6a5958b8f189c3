"""The definition of every operator of :mod:`q_galore_torch.ops` in plain PyTorch.

Slow and obvious on purpose: each function states one formula, and the compiled kernels are tested against it. Names,
arguments and results are those of ``ops``. Arithmetic is float32 in the order written, as in the kernels, so codes are
equal bit for bit; the GEMMs of :func:`galore_step_` are only close.

Sources: Q-GaLore (arXiv 2407.08296), GaLore (arXiv 2403.03507), 8-bit optimizers (arXiv 2110.02861).
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

_FLOAT_MAX = torch.finfo(torch.float32).max
_MASK32 = 0xFFFFFFFF
RIGHT, LEFT = 0, 1


# ---------------------------------------------------------------- noise


def _philox_4x32_10(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & _MASK32, (p0 >> 32) ^ c[3] ^ k[1], p0 & _MASK32]
        k = [(k[0] + 0x9E3779B9) & _MASK32, (k[1] + 0xBB67AE85) & _MASK32]
    return c


def noise(seed: int, id: int, step: int, start: int, count: int) -> Tensor:
    """The 24-bit uniform integers of elements ``start .. start + count`` of parameter ``id`` in its step ``step``.

    A key for each 2**32 elements comes from Philox-4x32-10 with key ``seed`` and counter (id, step, element >> 32); the
    element's low half passes through a keyed 32-bit mixer.

    Returns:
        int32 tensor [count], each in [0, 2**24).
    """
    element = torch.arange(start, start + count, dtype=torch.int64)
    out = torch.empty(count, dtype=torch.int32)
    for high in torch.unique(element >> 32).tolist():
        counter = [id & _MASK32, step & _MASK32, (step >> 32) & _MASK32, high]
        k0, k1, k2, _ = _philox_4x32_10(counter, [seed & _MASK32, (seed >> 32) & _MASK32])
        here = (element >> 32) == high
        x = (element[here] & _MASK32) ^ k0
        x = x ^ (x >> 16)
        x = (_multiply32(x, 0x7FEB352D) + k1) & _MASK32
        x = x ^ (x >> 15)
        x = _multiply32(x, 0x846CA68B)
        x = (x ^ (x >> 16)) ^ k2
        out[here] = (x >> 8).to(torch.int32)
    return out


def _multiply32(x: Tensor, factor: int) -> Tensor:
    """x * factor mod 2**32 in int64 without overflow."""
    low, high = factor & 0xFFFF, factor >> 16
    return (x * low + (((x * high) & 0xFFFF) << 16)) & _MASK32


# ---------------------------------------------------------------- INT8 weights


def _grouped(x: Tensor, group: int) -> list[Tensor]:
    """The consecutive groups of a flat tensor (the last may be short)."""
    return list(torch.split(x.reshape(-1), group)) if x.numel() else []


def _weight_range(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of a group whose values lie in [low, high]: four codes of head-room on each side."""
    widest = max((high - low) / 247.0, max(abs(low), abs(high)) / 32512.0, 2.0**-100)
    scale = _float32(min(widest, _FLOAT_MAX))
    zero = _round_even(127.5 - (high + low) / (2.0 * scale))
    return scale, max(-32767, min(32767, zero))


def _constant_range(value: float) -> tuple[float, int] | None:
    """Scale and zero point that make code 128 decode to ``value`` exactly, or None where that scale is too small."""
    if value == 0.0 or abs(value) * 2.0**-14 < 2.0**-100:
        return None
    return _float32(abs(value) * 2.0**-14), 128 - (16384 if value > 0 else -16384)


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()


def _round_even(x: float) -> int:
    return round(x)


def int8_quantize(weight: Tensor, group_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Encode a float tensor to INT8 in groups of consecutive elements, rounding to nearest.

    Args:
        weight: float32, bfloat16 or float16, any shape, finite.
        group_size: elements in a group; the last group may be short.

    Returns:
        codes uint8 [weight.shape], scales float32 [groups], zero points int16 [groups];
        ``weight = scales * (codes - zeros)``.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("int8_quantize: weight must be finite, got a NaN or an infinity")
    codes, scales, zeros = [], [], []
    for group in _grouped(weight.detach().float(), group_size):
        low, high = group.min().item(), group.max().item()
        constant = _constant_range(low) if low == high else None
        scale, zero = constant or _weight_range(low, high)
        if constant:
            code = torch.full_like(group, 128.0)
        else:
            code = (torch.round(group / scale) + zero).clamp(0, 255)
        codes.append(code.to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    flat = torch.cat(codes) if codes else torch.empty(0, dtype=torch.uint8)
    return (
        flat.view(weight.shape),
        torch.tensor(scales, dtype=torch.float32),
        torch.tensor(zeros, dtype=torch.int16),
    )


def int8_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Decode INT8 weights: ``scales * (codes - zeros)`` in float32, rounded to ``dtype``, shape of ``codes``."""
    index = torch.arange(codes.numel()) // group_size
    offset = codes.reshape(-1).int() - zeros.int()[index]
    return (scales[index] * offset.float()).to(dtype).view(codes.shape)


# ---------------------------------------------------------------- projector


def projector_quantize(basis: Tensor, proj_format: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode basis vectors, one a row.

    Args:
        basis: float32 [r, d], finite.
        proj_format: ``"float32"``, ``"int8"`` or ``"int4"``.
        block: elements of a row that share a scale; the last block of a row may be short.

    Returns:
        codes (float32 [r, d]; uint8 [r, d]; uint8 [r, ceil(d / 2)], even columns in the low nibble),
        scales bfloat16 [r, ceil(d / block)], zero points uint8 [r, ceil(d / block)] (both empty for float32).
    """
    if proj_format == "float32":
        return basis.clone(), torch.empty(0, dtype=torch.bfloat16), torch.empty(0, dtype=torch.uint8)
    if not torch.isfinite(basis).all():
        raise ValueError("projector_quantize: basis must be finite, got a NaN or an infinity")
    top = _top_code(proj_format)
    rows, dim = basis.shape
    codes = torch.empty(rows, dim, dtype=torch.uint8)
    blocks = (dim + block - 1) // block
    scales = torch.empty(rows, blocks, dtype=torch.bfloat16)
    zeros = torch.empty(rows, blocks, dtype=torch.uint8)
    for b in range(blocks):
        part = basis[:, b * block : (b + 1) * block]
        low, high = part.amin(1).clamp(max=0.0), part.amax(1).clamp(min=0.0)
        scale = _round_up_bfloat16(((high - low) / top).clamp(min=2.0**-100))
        zero = torch.round(-low / scale.float())
        code = torch.round(part / scale.float()[:, None]) + zero[:, None]
        codes[:, b * block : (b + 1) * block] = code.clamp(0, top).to(torch.uint8)
        scales[:, b], zeros[:, b] = scale, zero.to(torch.uint8)
    return (_pack4(codes) if proj_format == "int4" else codes), scales, zeros


def projector_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    proj_format: str,
    block: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode basis vectors [r, dim]: ``scale * (code - zero point)`` in float32, rounded to ``dtype``."""
    if proj_format == "float32":
        return codes.to(dtype)
    _top_code(proj_format)
    values = _unpack4(codes, dim) if proj_format == "int4" else codes
    index = torch.arange(dim) // block
    return (scales.float()[:, index] * (values.int() - zeros.int()[:, index]).float()).to(dtype)


def _top_code(proj_format: str) -> int:
    tops = {"int8": 255, "int4": 15}
    if proj_format not in tops:
        raise ValueError(f"proj_format must be 'float32', 'int8' or 'int4', got {proj_format!r}")
    return tops[proj_format]


def _round_up_bfloat16(x: Tensor) -> Tensor:
    """The smallest bfloat16 not below x > 0."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def _pack4(codes: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def _unpack4(packed: Tensor, dim: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :dim]


# ---------------------------------------------------------------- moments


@lru_cache(maxsize=2)
def dynamic_map(signed: bool) -> Tensor:
    """The 256 entries of the 8-bit dynamic map in ascending order, float32 (8-bit optimizers, section 1.3).

    Decade e holds 2**e evenly spaced means of (0.1, 1] times a power of ten; the ends are 0 and 1.
    """
    top = 7 if signed else 8
    entries = [Fraction(0), Fraction(1)]
    for e in range(0 if signed else 1, top):
        for k in range(2**e):
            mean = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * k + 1, 2 ** (e + 1))
            value = mean * Fraction(10) ** (e - top + 1)
            entries += [value, -value] if signed else [value]
    return torch.tensor([float(v) for v in sorted(entries)], dtype=torch.float64).to(torch.float32)


def _encode(x: Tensor, signed: bool) -> Tensor:
    """The nearest entry of each float32 element, ties to the lower code (midpoints are exact in float64)."""
    table = dynamic_map(signed).double()
    return torch.searchsorted((table[:-1] + table[1:]) / 2, x.double().contiguous()).to(torch.uint8)


def _normalise(part: Tensor, absmax: Tensor) -> Tensor:
    """part / absmax by a reciprocal, with a power of two that keeps it in range; blocks of zeros give zeros."""
    tiny, huge = 2.0**100, 2.0**-100
    pre = torch.where(absmax < 2.0**-100, tiny, torch.where(absmax > 2.0**100, huge, 1.0)).float()
    inverse = torch.where(absmax > 0, 1.0 / (absmax * pre), 0.0)
    return (part * pre) * inverse


def dynamic8_quantize(x: Tensor, signed: bool, block: int = 256) -> tuple[Tensor, Tensor]:
    """Encode the rows of a matrix to the dynamic map, one absmax for each ``block`` elements of a row.

    Args:
        x: float32 [rows, cols], finite.
        signed: the signed map (first moment) or the unsigned one (second moment, x >= 0).
        block: elements that share an absmax; a block never crosses a row.

    Returns:
        codes uint8 [rows, cols], absmax float32 [rows, ceil(cols / block)].
    """
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    absmax = torch.empty(rows, (cols + block - 1) // block)
    for b in range(absmax.shape[1]):
        part = x[:, b * block : (b + 1) * block]
        absmax[:, b] = part.abs().amax(1)
        codes[:, b * block : (b + 1) * block] = _encode(_normalise(part, absmax[:, b : b + 1]), signed)
    return codes, absmax


def dynamic8_dequantize(codes: Tensor, absmax: Tensor, signed: bool, block: int = 256) -> Tensor:
    """Decode to float32: map entry times the absmax of its block, shape of ``codes`` ([rows, cols])."""
    index = torch.arange(codes.shape[1]) // block
    return dynamic_map(signed)[codes.long()] * absmax[:, index]


def absmax(tensors: list[Tensor]) -> Tensor:
    """max |x| of each tensor as float32 [len]: infinity where any element is not finite, 0 where there is none."""
    out = torch.zeros(len(tensors))
    for i, x in enumerate(tensors):
        if x.numel():
            largest = x.detach().float().abs().amax()
            out[i] = largest if torch.isfinite(x).all() else torch.inf
    return out


# ---------------------------------------------------------------- one step


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
    m = m * _float32(beta1) + gradient * _float32(1 - beta1)
    v = v * _float32(beta2) + (gradient * gradient) * _float32(1 - beta2)
    bias1, bias2 = _float32(1 / (1 - beta1**t)), _float32(1 / (1 - beta2**t) ** 0.5)
    root = v.double().sqrt().float()  # correctly rounded; torch's float32 sqrt may be off by one unit
    normalised = (m * bias1) / (root * bias2 + _float32(eps))
    if quantised:
        codes, absmax1 = dynamic8_quantize(m, True, block)
        lost = (codes == 127) & (m != 0)  # a first moment that lost its sign moves one code towards it
        exp_avg.copy_(torch.where(lost, torch.where(m > 0, 128, 126), codes.int()).to(torch.uint8))
        exp_avg_absmax.copy_(absmax1)
        codes, absmax2 = dynamic8_quantize(v, False, block)
        exp_avg_sq.copy_(codes)
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
    rate = _float32(lr * scale)
    if weight.dtype == torch.uint8:
        _update_int8(
            weight, scales, zeros, update, _float32(lr * weight_decay), rate, stochastic_round, group_size, draws, stats
        )
        return
    keep = _float32(1 - lr * weight_decay)
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
        zip(_grouped(flat, group_size), _grouped(update, group_size), _grouped(draws, group_size), strict=True)
    ):
        s, z, q = scales[g], int(zeros[g]), q8.int()
        d = -((q - z).float() * decay) - u * (torch.tensor(rate) / s)
        d = d.clamp(-_FLOAT_MAX, _FLOAT_MAX)
        if not (d != 0).any():
            continue
        x = q.float() + d
        low, high = _scaled(s, x.min(), z), _scaled(s, x.max(), z)
        fits = not _weight_range(low, high)[0] < _float32(s.item() * 0.5)
        moved = q + _round(d.clamp(-(2.0**20), 2.0**20), stochastic_round, j)
        least, most = int(moved.min()), int(moved.max())
        if fits and least >= 0 and most <= 255:
            q8.copy_(moved)
            continue
        shift = _round_even(127.5 - (most + least) / 2)
        if fits and most - least <= 255 and abs(z + shift) <= 32767:
            q8.copy_(moved + shift)
            zeros[g] = z + shift
            stats[0] += 1
            continue
        offset = (q.double() + d.double()) - z
        low, high = _scaled(s, offset.min(), 0), _scaled(s, offset.max(), 0)
        constant = _constant_range(low) if low == high else None
        new_scale, new_zero = constant or _weight_range(low, high)
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
) -> None:
    """AdamW on each weight; the moment blocks run along the flat weight. See :func:`q_galore_torch.ops.adam8_step_`."""
    for i, weight in enumerate(weights):
        if weight.numel() == 0:
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
) -> None:
    """Projected AdamW on each weight matrix. See :func:`q_galore_torch.ops.galore_step_`."""
    dtype = getattr(torch, compute_dtype)
    for i, weight in enumerate(weights):
        if weight.numel() == 0 or exp_avg[i].numel() == 0:
            continue
        right = sides[i] == RIGHT
        dim = weight.shape[1] if right else weight.shape[0]
        basis = projector_dequantize(
            proj_codes[i], proj_scales[i], proj_zeros[i], proj_format, proj_block, dim, dtype=dtype
        )
        if low_rank:
            projected = grads[i].float()
        else:
            gradient = grads[i].to(dtype)
            projected = (basis @ (gradient.t() if right else gradient)).float()
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
        ).to(dtype)
        update = (normalised.t() @ basis if right else basis.t() @ normalised).float()
        draws = noise(seed, ids[i], noise_steps[i], 0, weight.numel())
        _update(
            weight,
            scales[i],
            zeros[i],
            update.contiguous(),
            lr,
            weight_decay,
            scale,
            stochastic_round,
            group_size,
            draws,
            stats[i],
        )

"""Noise, storage formats and their codecs."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

FLOAT_MAX = torch.finfo(torch.float32).max
_MASK32 = 0xFFFFFFFF


# ---------------------------------------------------------------- noise


def philox_4x32_10(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & _MASK32, (p0 >> 32) ^ c[3] ^ k[1], p0 & _MASK32]
        k = [(k[0] + 0x9E3779B9) & _MASK32, (k[1] + 0xBB67AE85) & _MASK32]
    return c


def noise(seed: int, id: int, step: int, start: int, count: int, *, device: torch.device | str | None = None) -> Tensor:
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
        k0, k1, k2, _ = philox_4x32_10(counter, [seed & _MASK32, (seed >> 32) & _MASK32])
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


def grouped(x: Tensor, group: int) -> list[Tensor]:
    """The consecutive groups of a flat tensor (the last may be short)."""
    return list(torch.split(x.reshape(-1), group)) if x.numel() else []


def weight_range(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of a group whose values lie in [low, high]: four codes of head-room on each side."""
    widest = max((high - low) / 247.0, max(abs(low), abs(high)) / 32512.0, 2.0**-100)
    scale = to_float32(min(widest, FLOAT_MAX))
    zero = round_even(127.5 - (high + low) / (2.0 * scale))
    return scale, max(-32767, min(32767, zero))


def constant_range(value: float) -> tuple[float, int] | None:
    """Scale and zero point that make code 128 decode to ``value`` exactly, or None where that scale is too small."""
    if value == 0.0 or abs(value) * 2.0**-14 < 2.0**-100:
        return None
    return to_float32(abs(value) * 2.0**-14), 128 - (16384 if value > 0 else -16384)


def to_float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()


def round_even(x: float) -> int:
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
    for group in grouped(weight.detach().float(), group_size):
        low, high = group.min().item(), group.max().item()
        constant = constant_range(low) if low == high else None
        scale, zero = constant or weight_range(low, high)
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


_FP4_MAGNITUDES = [Fraction(n, 12) for n in (0, Fraction(1, 16), 2, 3, 4, 6, 8, 12)]
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_TOP_CODES = {"int8": 255, "int4": 15}
_TOP_ENTRIES = {"fp8": 1.0, "fp8_e4m3": 448.0, "fp4": 1.0, "nf4": 1.0}
_PACKED = ("int4", "fp4", "nf4")


@lru_cache(maxsize=4)
def projector_map(proj_format: str) -> Tensor:
    """What each code of a format without zero points stands for, float32.

    ``"fp8"`` is :func:`dynamic_map`; ``"fp8_e4m3"`` torch's float8_e4m3fn; ``"fp4"`` the 15 values of bitsandbytes' FP4
    and ``"nf4"`` the 16 of QLoRA (arXiv 2305.14314, appendix E), ascending.
    """
    if proj_format == "fp8":
        return dynamic_map(True)
    if proj_format == "fp8_e4m3":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    if proj_format == "nf4":
        return torch.tensor(_NF4, dtype=torch.float64).float()
    values = sorted({sign * x for x in _FP4_MAGNITUDES for sign in (-1, 1)})
    return torch.tensor([float(x) for x in values], dtype=torch.float64).float()


def projector_quantize(basis: Tensor, proj_format: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode basis vectors, one a row.

    Args:
        basis: float32 [r, d], finite.
        proj_format: ``"float32"``, ``"bfloat16"``, ``"int8"``, ``"int4"``, ``"fp8"``, ``"fp8_e4m3"``, ``"fp4"`` or
            ``"nf4"``.
        block: elements of a row that share a scale; the last block of a row may be short. 0: all [r, d] share one.

    Returns:
        codes (float32 or bfloat16 [r, d]; uint8 [r, d]; 4 bits: uint8 [r, ceil(d / 2)], even columns in the low
        nibble), scales bfloat16 [r, ceil(d / block)] or [1, 1] (empty for float32, bfloat16), zero points uint8 of the
        scales' shape (empty unless int8 or int4).
    """
    no_scales, no_zeros = torch.empty(0, dtype=torch.bfloat16), torch.empty(0, dtype=torch.uint8)
    if not torch.isfinite(basis).all():
        raise ValueError("projector_quantize: basis must be finite, got a NaN or an infinity")
    if proj_format in ("float32", "bfloat16"):
        return basis.to(getattr(torch, proj_format), copy=True), no_scales, no_zeros
    _check_format(proj_format)
    rows, dim = basis.shape
    affine = proj_format in _TOP_CODES
    blocks = (dim + block - 1) // block if block else 1
    codes = torch.empty(rows, dim, dtype=torch.uint8)
    scales = torch.zeros(rows if block else 1, blocks, dtype=torch.bfloat16)
    zeros = torch.zeros(scales.shape, dtype=torch.uint8) if affine else no_zeros
    for b in range(blocks if basis.numel() else 0):
        here = slice(b * block, (b + 1) * block) if block else slice(None)
        part = basis[:, here]
        shared = part if block else part.reshape(1, -1)
        low, high = shared.amin(1, keepdim=True).clamp(max=0.0), shared.amax(1, keepdim=True).clamp(min=0.0)
        if affine:
            top = _TOP_CODES[proj_format]
            needed = torch.where(torch.isinf(high - low), high / top - low / top, (high - low) / top)
        else:
            needed = torch.maximum(-low, high) / _TOP_ENTRIES[proj_format]
        scale = _round_up_bfloat16(needed.clamp(min=2.0**-100))
        scales[:, b] = scale[:, 0]
        if affine:
            zero = torch.round(-low / scale.float())
            zeros[:, b] = zero[:, 0].to(torch.uint8)
            code = (torch.round(part / scale.float()) + zero).clamp(0, top).to(torch.uint8)
        elif proj_format == "fp8_e4m3":
            code = (part / scale.float()).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            code = _nearest(part / scale.float(), projector_map(proj_format))
        codes[:, here] = code
    return (_pack4(codes) if proj_format in _PACKED else codes), scales, zeros


def projector_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    proj_format: str,
    block: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode basis vectors [r, dim] in float32, rounded to ``dtype``.

    ``scale * (code - zero point)`` for int8 and int4, ``scale * map[code]`` for the other formats with scales.
    """
    if proj_format in ("float32", "bfloat16"):
        return codes.to(dtype)
    _check_format(proj_format)
    values = _unpack4(codes, dim) if proj_format in _PACKED else codes
    index = torch.arange(dim) // block if block else torch.zeros(dim, dtype=torch.int64)
    if proj_format in _TOP_CODES:
        steps = (values.int() - zeros.int()[:, index]).float()
    else:
        steps = projector_map(proj_format)[values.int()]
    return (scales.float()[:, index] * steps).to(dtype)


def _check_format(proj_format: str) -> None:
    if proj_format not in _TOP_CODES and proj_format not in _TOP_ENTRIES:
        known = ", ".join(("float32", "bfloat16", *_TOP_CODES, *_TOP_ENTRIES))
        raise ValueError(f"proj_format must be one of {known}, got {proj_format!r}")


def _round_up_bfloat16(x: Tensor) -> Tensor:
    """The smallest bfloat16 not below x > 0, or the largest finite one."""
    bits = x.view(torch.int32)
    up = ((bits + 0xFFFF) & ~0xFFFF).clamp(max=0x7F7F0000)
    return up.view(torch.float32).to(torch.bfloat16)


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


def _nearest(x: Tensor, entries: Tensor) -> Tensor:
    """The nearest of ascending entries for each element, ties to the lower code (midpoints are exact in float64)."""
    table = entries.double()
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
        codes[:, b * block : (b + 1) * block] = _nearest(_normalise(part, absmax[:, b : b + 1]), dynamic_map(signed))
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

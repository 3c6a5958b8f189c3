"""Projector formats: what every code means, that encoding takes the nearest one, and the layout of the arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from q_galore_torch import ops, reference
from shapes import MATRICES, same_bits, spread

FORMATS = list(ops.PROJ_FORMATS)
AFFINE = {"int8": 255, "int4": 15}
TOPS = {"fp8": 1.0, "fp8_e4m3": 448.0, "fp4": 1.0, "nf4": 1.0}
SCALED = [*AFFINE, *TOPS]
PACKED = ("int4", "fp4", "nf4")

# Typed from the definitions. FP4: {0, 1/16, 2, 3, 4, 6, 8, 12} / 12 with both signs.
FP4 = [x / 12 for x in (-12, -8, -6, -4, -3, -2, -1 / 16, 0, 1 / 16, 2, 3, 4, 6, 8, 12)]


def levels() -> Iterator[str]:
    for level in ops.simd_levels():
        ops.set_simd_level(level)
        yield level


def bases() -> Iterator[tuple[str, Tensor]]:
    """Bases with ties, zeros of both signs, huge and tiny values; 4 x 333."""
    generator = torch.Generator().manual_seed(7)
    ties = torch.randint(-192, 193, (4, 333), generator=generator) / 192
    ties[:, ::5] = 1.0
    yield "ties", ties
    yield "normal", torch.randn(4, 333, generator=generator)
    yield "zeros", torch.zeros(4, 333) * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    huge = (torch.rand(4, 333, generator=generator) * 2 - 1) * 3.3e38
    huge[0, ::7] = torch.finfo(torch.float32).max  # more than a bfloat16 scale can be
    yield "huge", huge
    yield "tiny", torch.randn(4, 333, generator=generator) * 1e-38
    yield "spikes", torch.randn(4, 333, generator=generator) * 10 ** (torch.rand(4, 333, generator=generator) * 40 - 30)


def spread_out(scales: Tensor, block: int, shape: torch.Size) -> Tensor:
    """The scale of every element, float64 [r, d]."""
    if block == 0:
        return scales.double().expand(shape)
    return scales.double().repeat_interleave(block, 1)[:, : shape[1]]


@pytest.mark.parametrize("proj_format", FORMATS)
@pytest.mark.parametrize("block", [0, 1, 5, 64, 256, 5000])
def test_projector_equals_reference(proj_format: str, block: int) -> None:
    for rows, cols in MATRICES:
        basis = spread(rows, cols, seed=rows + cols)
        expected = reference.projector_quantize(basis, proj_format, block)
        for level in levels():
            got = ops.projector_quantize(basis, proj_format, block)
            assert all(map(same_bits, got, expected)), (level, rows, cols)
            for dtype in (torch.float32, torch.bfloat16):
                decoded = ops.projector_dequantize(*got, proj_format, block, cols, dtype)
                want = reference.projector_dequantize(*got, proj_format, block, cols, dtype)
                assert same_bits(decoded, want), (level, rows, cols, dtype)


@pytest.mark.parametrize("proj_format", FORMATS)
def test_projector_equals_reference_at_any_magnitude_and_thread_count(proj_format: str) -> None:
    threads = torch.get_num_threads()
    for name, basis in [*bases(), ("large", torch.randn(65, 1021, generator=torch.Generator().manual_seed(1)))]:
        for block in (0, 64):
            expected = reference.projector_quantize(basis, proj_format, block)
            want = reference.projector_dequantize(*expected, proj_format, block, basis.shape[1])
            for level in levels():
                for count in (1, 3):
                    torch.set_num_threads(count)
                    got = ops.projector_quantize(basis, proj_format, block)
                    decoded = ops.projector_dequantize(*got, proj_format, block, basis.shape[1])
                    torch.set_num_threads(threads)
                    assert all(map(same_bits, got, expected)), (name, block, level, count)
                    assert same_bits(decoded, want), (name, block, level, count)


def test_four_bit_values_are_the_published_ones() -> None:
    assert same_bits(reference.projector_map("fp4"), torch.tensor(FP4, dtype=torch.float64).float())
    # NF4 (QLoRA, arXiv 2305.14314): normal quantiles at 8 evenly spaced places from 0.9677083 to 1/2 (left out),
    # negative ones at 7, and 0, all over the largest. The printed values are good to 3e-7.
    end = 0.5 * ((1 - 1 / (2 * 15)) + (1 - 1 / (2 * 16)))
    positive = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values / positive.max()
    torch.testing.assert_close(reference.projector_map("nf4").double(), values, rtol=0, atol=3e-7)


@pytest.mark.parametrize("proj_format", ["fp4", "nf4"])
def test_four_bit_values_are_those_of_bitsandbytes(proj_format: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    theirs = torch.unique(functional.get_4bit_type(proj_format, device="cpu"))  # ascending; FP4 holds 0 twice
    assert torch.equal(reference.projector_map(proj_format), theirs)


@pytest.mark.parametrize("proj_format", list(TOPS))
def test_projector_codes_decode_to_the_map(proj_format: str) -> None:
    """Every code at scale 1; FP4's unused sixteenth code stands for 1."""
    entries = reference.projector_map(proj_format)
    entries = torch.cat([entries, entries.new_ones(16 - len(entries))]) if proj_format in PACKED else entries
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127] if proj_format == "fp8_e4m3" else codes  # 0x7f and 0xff are NaN in E4M3
    values = entries[torch.stack([codes & 15, codes >> 4], 1).int()] if proj_format in PACKED else entries[codes.int()]
    for _ in levels():
        scales, zeros = torch.ones(1, 1, dtype=torch.bfloat16), torch.empty(0, dtype=torch.uint8)
        dim = 2 * len(codes) if proj_format in PACKED else len(codes)
        assert torch.equal(
            ops.projector_dequantize(codes[None], scales, zeros, proj_format, 0, dim), values.view(1, -1)
        )


@pytest.mark.parametrize("proj_format", list(TOPS))
@pytest.mark.parametrize("block", [0, 64])
def test_projector_takes_the_nearest_entry(proj_format: str, block: int) -> None:
    """Against a search of all entries in float64: the decoded value over the scale is one of the nearest to x."""
    entries = reference.projector_map(proj_format).double()
    entries = entries[torch.isfinite(entries)]
    for name, basis in bases():
        codes, scales, zeros = ops.projector_quantize(basis, proj_format, block)
        scale = spread_out(scales, block, basis.shape)
        got = ops.projector_dequantize(codes, scales, zeros, proj_format, block, basis.shape[1]).double() / scale
        x = (basis / scale.float()).double()
        least = (x[..., None] - entries).abs().amin(-1)
        assert ((got - x).abs() <= least + 2.0**-23 * got.abs()).all(), name


@pytest.mark.parametrize("proj_format", list(TOPS))
def test_projector_decides_at_the_very_midpoint(proj_format: str) -> None:
    """The last float at or below each midpoint and the first above it, at scale 1; ties as each format says."""
    entries = reference.projector_map(proj_format).double()
    entries = torch.unique(entries[torch.isfinite(entries)])  # ascending
    middle = (entries[:-1] + entries[1:]) / 2
    below = middle.float()
    below = torch.where(below.double() > middle, torch.nextafter(below, below - 1), below)
    above = torch.nextafter(below, below + 1)
    top = torch.tensor([TOPS[proj_format]])
    basis = torch.cat([top, below, above])[None]
    for _ in levels():
        parts = ops.projector_quantize(basis, proj_format, 0)
        assert parts[1].item() == 1
        got = ops.projector_dequantize(*parts, proj_format, 0, basis.shape[1]).double()[0]
        lower, upper = got[1:].chunk(2)
        assert torch.equal(upper, entries[1:])
        if proj_format == "fp8_e4m3":  # a tie is the neighbour whose code is even, as in torch
            assert torch.equal(lower.float(), below.to(torch.float8_e4m3fn).float())
        else:
            assert torch.equal(lower, entries[:-1])


def test_projector_e4m3_codes_are_those_of_torch() -> None:
    for name, basis in bases():
        for _ in levels():
            codes, scales, _ = ops.projector_quantize(basis, "fp8_e4m3", 64)
            theirs = (basis / spread_out(scales, 64, basis.shape).float()).to(torch.float8_e4m3fn)
            assert torch.equal(codes, theirs.view(torch.uint8)), name
            assert not theirs.isnan().any() and not (codes & 127 == 127).any()


@pytest.mark.parametrize("proj_format", SCALED)
@pytest.mark.parametrize("block", [0, 64, 256])
def test_projector_round_trip_is_within_half_a_step(proj_format: str, block: int) -> None:
    basis = torch.linalg.qr(torch.randn(700, 64))[0].t().contiguous()
    codes, scales, zeros = ops.projector_quantize(basis, proj_format, block)
    back = ops.projector_dequantize(codes, scales, zeros, proj_format, block, 700)
    scale = spread_out(scales, block, basis.shape)
    if proj_format in AFFINE:
        half = torch.full_like(scale, 0.5)
    else:
        entries = reference.projector_map(proj_format).double()
        entries = entries[torch.isfinite(entries)].sort().values
        above = torch.searchsorted(entries, basis.double() / scale).clamp(1, len(entries) - 1)
        half = (entries[above] - entries[above - 1]) / 2
    assert ((back.double() - basis.double()).abs() <= half * scale * (1 + 1e-5)).all()


@pytest.mark.parametrize("proj_format", SCALED)
def test_projector_scale_is_the_least_bfloat16_that_cuts_nothing(proj_format: str) -> None:
    basis = torch.randn(64, 256)
    for block, parts in ((256, basis), (0, basis.view(1, -1))):
        low, high = parts.amin(1).double().clamp(max=0), parts.amax(1).double().clamp(min=0)
        if proj_format in AFFINE:
            span = (high - low) / AFFINE[proj_format]
        else:
            span = torch.maximum(high, -low) / TOPS[proj_format]
        scale = ops.projector_quantize(basis, proj_format, block)[1]
        assert scale.dtype == torch.bfloat16
        ratio = scale.double().flatten() / span
        assert (ratio >= 1 - 1e-7).all() and (ratio <= 1 + 2.0**-7).all(), "rounded up by less than a bfloat16 step"


@pytest.mark.parametrize("proj_format", FORMATS)
@pytest.mark.parametrize("block", [0, 64, 100])
def test_projector_layout(proj_format: str, block: int) -> None:
    codes, scales, zeros = ops.projector_quantize(torch.randn(16, 513), proj_format, block)
    if proj_format in ("float32", "bfloat16"):
        assert codes.dtype == getattr(torch, proj_format) and codes.shape == (16, 513)
        assert scales.numel() == zeros.numel() == 0
        return
    assert codes.dtype == torch.uint8 and codes.shape == (16, 257 if proj_format in PACKED else 513)
    assert scales.shape == ((16, math.ceil(513 / block)) if block else (1, 1))
    assert zeros.shape == (scales.shape if proj_format in AFFINE else (0,))


@pytest.mark.parametrize("proj_format", PACKED)
def test_projector_packs_the_even_column_low(proj_format: str) -> None:
    basis = torch.tensor([[1.0, 0.0, -1.0]])
    codes = ops.projector_quantize(basis, proj_format, 64)[0]
    high = 15 if proj_format == "nf4" else 14
    assert codes.tolist() == [[high | 7 << 4, 0]], "zero is code 7, -1 code 0; the nibble behind an odd row is 0"


@pytest.mark.parametrize("proj_format", FORMATS)
def test_projector_zero_block_decodes_to_zero(proj_format: str) -> None:
    for block in (0, 256):
        parts = ops.projector_quantize(torch.zeros(2, 300), proj_format, block)
        assert not ops.projector_dequantize(*parts, proj_format, block, 300).any()


def test_projector_one_scale_is_that_of_one_long_row() -> None:
    basis = torch.randn(12, 40)
    for proj_format in SCALED:
        one = ops.projector_quantize(basis, proj_format, 0)
        row = ops.projector_quantize(basis.view(1, -1), proj_format, 480)
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(one, row, strict=True)), proj_format


@pytest.mark.parametrize("proj_format", FORMATS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_projector_refuses_what_is_not_finite(proj_format: str, bad: float) -> None:
    basis = torch.randn(3, 100)
    basis[2, 99] = bad
    with pytest.raises(ValueError, match="projector_quantize: source: holds a value that is not finite"):
        ops.projector_quantize(basis, proj_format, 64)


def test_projector_refuses_bad_input() -> None:
    known = "float32, bfloat16, int8, int4, fp8, fp8_e4m3, fp4, nf4"
    with pytest.raises(ValueError, match=f"proj_format must be one of {known}, got 'int3'"):
        ops.projector_quantize(torch.zeros(1, 2), "int3", 256)
    with pytest.raises(ValueError, match=r"basis must be contiguous float32 \[\*, \*\] on cpu, got float32 \[2\]"):
        ops.projector_quantize(torch.zeros(2), "int4", 256)
    with pytest.raises(ValueError, match=r"block must be from 0 \(one scale for all\) to 2147483647, got -1"):
        ops.projector_quantize(torch.zeros(1, 2), "int4", -1)
    with pytest.raises(ValueError, match=r"projector: expected FLOAT32 \(0\), BFLOAT16 \(1\), .*, got format 21"):
        torch.ops.q_galore.projector_quantize(torch.zeros(1, 2), 21, 256)
    with pytest.raises(ValueError, match=r"format must be the number of a format, got 4294967313"):  # 2^32 + 17
        torch.ops.q_galore.projector_quantize(torch.zeros(1, 2), 2**32 + 17, 256)
    codes, scales, zeros = ops.projector_quantize(torch.randn(4, 512), "int4", 256)
    for target in (16, 99, 2**32):
        with pytest.raises(ValueError, match=rf"target_format must be 0 \(float32\) or 1 \(bfloat16\), got {target}"):
            torch.ops.q_galore.projector_dequantize(codes, scales, zeros, 17, 256, 512, target)
    with pytest.raises(ValueError, match=r"dim must be >= 0, got -512"):
        ops.projector_dequantize(codes, scales, zeros, "int4", 256, -512)
    with pytest.raises(ValueError, match=r"codes must be contiguous uint8 \[\*, 255\]"):
        ops.projector_dequantize(codes, scales, zeros, "int4", 256, 510)
    with pytest.raises(ValueError, match=r"scales must be contiguous bfloat16 \[1, 1\] on cpu, got bfloat16 \[4, 2\]"):
        ops.projector_dequantize(codes, scales, zeros, "int4", 0, 512)
    with pytest.raises(ValueError, match=r"zeros must be contiguous uint8 \[0\] on cpu, got uint8 \[4, 2\]"):
        ops.projector_dequantize(codes, scales, zeros, "nf4", 256, 512)

"""The 8-bit dynamic map: arithmetic encoding equals the nearest-entry search."""

from __future__ import annotations

import pytest
import torch

from q_galore_torch import ops, reference
from shapes import MATRICES, same_bits, spread

LEVELS = pytest.mark.parametrize("level", ops.simd_levels())
MAPS = pytest.mark.parametrize("signed", [True, False])


def encode_rows(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """Codes of values in [-1, 1] as they are: each row ends in 1.0, so that its absmax is one."""
    rows = torch.nn.functional.pad(x, (0, -x.numel() % 255)).view(-1, 255)
    rows = torch.cat([rows, torch.ones(rows.shape[0], 1)], 1)
    codes, absmax = ops.dynamic8_quantize(rows.contiguous(), signed, 256)
    assert (absmax == 1).all()
    return codes[:, :255].reshape(-1)[: x.numel()]


def nearest(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """Exhaustive search in float64 (differences of float32 are exact enough there); argmin takes the lower code."""
    table = reference.dynamic_map(signed).double()
    return torch.cat([(part[:, None] - table).abs().argmin(1) for part in x.double().split(4096)]).to(torch.uint8)


@LEVELS
@MAPS
def test_dynamic8_encode_is_the_nearest_entry_at_every_threshold(level, signed):
    ops.set_simd_level(level)
    table = reference.dynamic_map(signed).double()
    near = ((table[:-1] + table[1:]) / 2).float()
    values = [near]
    up = down = near
    for _ in range(20):
        up, down = torch.nextafter(up, torch.tensor(torch.inf)), torch.nextafter(down, torch.tensor(-torch.inf))
        values += [up, down]
    x = torch.cat([*values, table.float()]).clamp(-1 if signed else 0, 1)
    assert torch.equal(encode_rows(x, signed), nearest(x, signed))


@MAPS
def test_dynamic8_encode_is_the_nearest_entry_on_random_floats(signed):
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 0x3F800000, (100_000,), generator=generator, dtype=torch.int32)  # all floats of [0, 1)
    small = bits.view(torch.float32)
    uniform = torch.rand(50_000, generator=generator)
    decades = 10 ** (-8 * torch.rand(50_000, generator=generator))
    x = torch.cat([small, uniform, decades, torch.tensor([0.0, -0.0, 1.0, 1e-45, 2**-126])])
    if signed:
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, -x, x)
    expected = nearest(x, signed)
    for level in ops.simd_levels():
        ops.set_simd_level(level)
        assert torch.equal(encode_rows(x, signed), expected), level


@MAPS
def test_dynamic8_decode_gives_the_map(signed):
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    assert same_bits(ops.dynamic8_dequantize(codes, torch.ones(1, 1), signed)[0], reference.dynamic_map(signed))


@MAPS
@pytest.mark.parametrize("block", [1, 7, 64, 256, 1000])
def test_dynamic8_equals_reference(signed, block):
    for rows, cols in MATRICES:
        for power in (1.0, 1e-30, 1e-42, 1e30):
            x = spread(rows, cols, seed=rows) * power
            x = x if signed else x.abs()
            expected = reference.dynamic8_quantize(x, signed, block)
            decoded = reference.dynamic8_dequantize(*expected, signed, block)
            for level in ops.simd_levels():
                ops.set_simd_level(level)
                got = ops.dynamic8_quantize(x, signed, block)
                assert all(map(same_bits, got, expected)), (level, rows, cols, power)
                assert same_bits(ops.dynamic8_dequantize(*got, signed, block), decoded), (level, rows, cols, power)


@MAPS
def test_dynamic8_round_trip_and_zero_blocks(signed):
    x = spread(4, 512).abs()
    x[2] = 0.0
    codes, absmax = ops.dynamic8_quantize(x, signed)
    back = ops.dynamic8_dequantize(codes, absmax, signed)
    assert not back[2].any()
    table = reference.dynamic_map(signed)
    step = torch.maximum(table[1:].diff().max(), table.diff().max())
    assert ((back - x).abs() <= absmax.repeat_interleave(256, 1) * step / 2 * 1.0001).all()
    assert torch.equal(back.abs().view(4, 2, 256).amax(2), absmax), "the largest magnitude is exact"


def test_dynamic8_refuses_bad_input():
    with pytest.raises(ValueError, match=r"x must be contiguous float32 \[\*, \*\] on cpu, got float32 \[3\]"):
        ops.dynamic8_quantize(torch.zeros(3), True)
    with pytest.raises(ValueError, match="block must be from 1"):
        ops.dynamic8_quantize(torch.zeros(3, 3), True, 0)
    codes, absmax = ops.dynamic8_quantize(torch.randn(2, 300), True)
    with pytest.raises(ValueError, match=r"absmax must be contiguous float32 \[2, 2\]"):
        ops.dynamic8_dequantize(codes, absmax[:, :1].contiguous(), True)

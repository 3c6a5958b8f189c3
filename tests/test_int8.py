"""INT8 weights: encoding, decoding, and what a group keeps exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from q_galore_torch import ops, reference
from shapes import LENGTHS, offset, same_bits, spread

LEVELS = pytest.mark.parametrize("level", ops.simd_levels())
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

SPECIAL = {
    "zeros": torch.zeros(256),
    "ones": torch.ones(256),
    "negative constant": torch.full((300,), -3.7e-3),
    "tiny": torch.randn(256) * 1e-36,
    "tiny constant": torch.full((256,), 1e-38),
    "huge": torch.tensor([3e38, -3e38] * 128),
    "one sign": torch.rand(512) + 5,
    "far from zero": torch.rand(512) * 1e-3 + 100,
    "one outlier": torch.cat([torch.randn(255) * 1e-4, torch.tensor([1e4])]),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [1, 7, 64, 256, 1000])
def test_int8_equals_reference(dtype, group_size):
    for length in LENGTHS if group_size > 1 else LENGTHS[:6]:
        x = spread(length, seed=length).clamp(-6e4, 6e4).to(dtype)
        expected = reference.int8_quantize(x, group_size)
        decoded = {target: reference.int8_dequantize(*expected, group_size, target) for target in FLOATS}
        for level, values in itertools.product(ops.simd_levels(), (x, offset(x))):
            ops.set_simd_level(level)
            got = ops.int8_quantize(values, group_size)
            assert all(map(same_bits, got, expected)), (level, length)
            for target in FLOATS:
                assert same_bits(ops.int8_dequantize(*got, group_size, target), decoded[target]), (level, length)


@LEVELS
@pytest.mark.parametrize("name", SPECIAL)
def test_int8_special_groups_equal_reference(level, name):
    ops.set_simd_level(level)
    got, expected = ops.int8_quantize(SPECIAL[name]), reference.int8_quantize(SPECIAL[name])
    assert all(map(same_bits, got, expected))


@pytest.mark.parametrize("name", SPECIAL)
def test_int8_round_trip_is_within_half_a_step(name):
    x = SPECIAL[name]
    codes, scales, zeros = ops.int8_quantize(x)
    back = ops.int8_dequantize(codes, scales, zeros, 256, torch.float32)
    half = scales.double().repeat_interleave(256)[: x.numel()] / 2
    assert ((back.double() - x.double()).abs() <= half * (1 + 1e-4) + x.double().abs() * 2**-23).all()


def test_int8_constants_and_zero_are_exact():
    for value in (1.0, -1.0, 0.0, 3.5e-7, -2.25e20):
        for length in (1, 5, 256):
            codes, scales, zeros = ops.int8_quantize(torch.full((length,), value))
            decoded = ops.int8_dequantize(codes, scales, zeros, 256, torch.float32)
            assert torch.equal(decoded, torch.full((length,), value))
    straddles = torch.linspace(-1, 2, 256)
    straddles[40] = 0.0
    assert ops.int8_dequantize(*ops.int8_quantize(straddles), 256, torch.float32)[40] == 0.0


def test_int8_keeps_head_room_on_both_sides():
    codes, _, _ = ops.int8_quantize(torch.randn(100, 256))
    assert (codes.amin(1) <= 5).all() and (codes.amin(1) >= 3).all()
    assert (codes.amax(1) >= 250).all() and (codes.amax(1) <= 252).all()


def test_int8_refuses_bad_input():
    with pytest.raises(ValueError, match="not finite|finite"):
        ops.int8_quantize(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="finite"):
        ops.int8_quantize(torch.tensor([1.0, float("inf")]))
    with pytest.raises(ValueError, match=r"int8_quantize: weight must be contiguous float32 or .*, got float64 \[3\]"):
        ops.int8_quantize(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="not contiguous"):
        ops.int8_quantize(torch.zeros(3, 4).t())
    with pytest.raises(ValueError, match="group_size must be from 1"):
        ops.int8_quantize(torch.zeros(3), 0)
    codes, scales, zeros = ops.int8_quantize(torch.randn(512))
    with pytest.raises(ValueError, match=r"scales must be contiguous float32 \[2\] on cpu, got float32 \[1\]"):
        ops.int8_dequantize(codes, scales[:1], zeros, 256, torch.float32)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        ops.int8_dequantize(codes, scales, zeros, 256, torch.float64)

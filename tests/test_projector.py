"""Projector formats: packed INT4 and INT8 basis vectors."""

from __future__ import annotations

import pytest
import torch

from q_galore_torch import ops, reference
from shapes import MATRICES, same_bits, spread


@pytest.mark.parametrize("proj_format", ["float32", "int8", "int4"])
@pytest.mark.parametrize("block", [1, 5, 64, 256])
def test_projector_equals_reference(proj_format, block):
    for rows, cols in MATRICES:
        basis = spread(rows, cols, seed=rows + cols)
        expected = reference.projector_quantize(basis, proj_format, block)
        for level in ops.simd_levels():
            ops.set_simd_level(level)
            got = ops.projector_quantize(basis, proj_format, block)
            assert all(map(same_bits, got, expected)), (level, rows, cols)
            for dtype in (torch.float32, torch.bfloat16):
                decoded = ops.projector_dequantize(*got, proj_format, block, cols, dtype)
                want = reference.projector_dequantize(*got, proj_format, block, cols, dtype)
                assert same_bits(decoded, want), (level, rows, cols, dtype)


@pytest.mark.parametrize("proj_format, top", [("int8", 255), ("int4", 15)])
def test_projector_round_trip_is_within_half_a_step(proj_format, top):
    basis = torch.linalg.qr(torch.randn(700, 64))[0].t().contiguous()
    codes, scales, zeros = ops.projector_quantize(basis, proj_format, 256)
    back = ops.projector_dequantize(codes, scales, zeros, proj_format, 256, 700)
    half = scales.float().repeat_interleave(256, 1)[:, :700] / 2
    assert ((back - basis).abs() <= half * (1 + 1e-5)).all()
    span = basis.view(64, 700)[:, :256].amax(1).clamp(min=0) - basis[:, :256].amin(1).clamp(max=0)
    assert (scales[:, 0].float() <= span / top * 1.01).all(), "a scale is rounded up by less than a bfloat16 step"


def test_projector_int4_takes_half_a_byte_a_value():
    codes, scales, zeros = ops.projector_quantize(torch.randn(16, 512), "int4", 256)
    assert codes.shape == (16, 256) and codes.dtype == torch.uint8
    assert scales.numel() * 2 + zeros.numel() == 3 * 32


def test_projector_zero_block_decodes_to_zero():
    for proj_format in ("int8", "int4"):
        parts = ops.projector_quantize(torch.zeros(2, 300), proj_format, 256)
        assert not ops.projector_dequantize(*parts, proj_format, 256, 300).any()


def test_projector_refuses_bad_input():
    with pytest.raises(ValueError, match="finite"):
        ops.projector_quantize(torch.tensor([[1.0, float("inf")]]), "int4", 256)
    with pytest.raises(ValueError, match="proj_format must be one of float32, int8, int4, got 'int3'"):
        ops.projector_quantize(torch.zeros(1, 2), "int3", 256)
    with pytest.raises(ValueError, match=r"basis must be contiguous float32 \[\*, \*\] on cpu, got float32 \[2\]"):
        ops.projector_quantize(torch.zeros(2), "int4", 256)
    codes, scales, zeros = ops.projector_quantize(torch.randn(4, 512), "int4", 256)
    with pytest.raises(ValueError, match=r"codes must be contiguous uint8 \[\*, 255\]"):
        ops.projector_dequantize(codes, scales, zeros, "int4", 256, 510)

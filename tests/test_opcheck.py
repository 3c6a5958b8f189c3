"""Schemas, fakes and registrations of every op (torch.library.opcheck), and what tracing refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

from q_galore_torch import ops
from steps import HYPER, fresh_moments, weight_parts

op = torch.ops.q_galore
HYPER_ORDER = ("lr", "beta1", "beta2", "eps", "weight_decay")


def step_arguments(side: int | None, storage: str, moments: str):
    """Positional arguments of a step op for one 40 x 24 matrix, side None: not projected; both sides: norm limit."""
    projected = side is not None
    shape = {None: (40, 24), ops.RIGHT: (8, 40), ops.LEFT: (8, 24), ops.FULL: (8, 8)}[side]
    weight = [[x] for x in weight_parts(torch.randn(40, 24), storage)]
    states = [[x] for x in fresh_moments(shape, moments, 256, by_row=projected)]
    hyper = [HYPER[name] for name in HYPER_ORDER]
    stats = torch.zeros(1, 2, dtype=torch.int64)
    common = [*weight, [torch.randn(40, 24)], *states]
    if not projected:
        return (*common, [1], [1], [0], stats, torch.ones(1), *hyper, 3, True, 256, 256)
    right = [[x] for x in ops.projector_quantize(torch.randn(8, 24), "int4", 64)]
    left = [[x] for x in ops.projector_quantize(torch.randn(8, 40), "int4", 64)]
    projector = {ops.RIGHT: [*right, [], [], []], ops.LEFT: [*left, [], [], []], ops.FULL: [*left, *right]}[side]
    limit = 1.01 if side == ops.FULL else 0.0
    norms = torch.ones(1, dtype=torch.float64)
    options = (17, 64, False, *hyper, 0.25, 3, True, 256, 256, 0, limit)
    return (*common, *projector, [side], [1], [1], [0], stats, norms, torch.ones(1), *options)


def cases():
    codes, scales, zeros = ops.int8_quantize(torch.randn(40, 24))
    moment = ops.dynamic8_quantize(torch.randn(8, 300), True)
    yield "noise", op.noise.default, (torch.empty(0), 1, 2, 3, 4, 50)
    yield "absmax", op.absmax.default, ([torch.randn(5), torch.randn(3, 3).bfloat16()],)
    yield "int8_quantize", op.int8_quantize.default, (torch.randn(40, 24), 256)
    yield "int8_dequantize", op.int8_dequantize.default, (codes, scales, zeros, 256, 1)
    for name, number in ops.PROJ_FORMATS.items():
        for block in (64, 0):
            parts = ops.projector_quantize(torch.randn(8, 25), name, block)
            yield (
                f"projector_quantize {name} {block}",
                op.projector_quantize.default,
                (torch.randn(8, 25), number, block),
            )
            yield (
                f"projector_dequantize {name} {block}",
                op.projector_dequantize.default,
                (*parts, number, block, 25, 0),
            )
    yield "dynamic8_quantize", op.dynamic8_quantize.default, (torch.randn(8, 300), True, 256)
    yield "dynamic8_dequantize", op.dynamic8_dequantize.default, (*moment, True, 256)
    yield "subspace_random", op.subspace_random.default, (torch.empty(0), 4, 24, 1, 2, 3)
    for side, dim in ((0, 24), (1, 40)):
        arguments = (torch.randn(40, 24), torch.randn(8, dim), side, 0, 0)
        yield f"subspace_refresh side {side}", op.subspace_refresh.default, arguments
    gradient, right, left = torch.randn(40, 24), torch.randn(8, 24), torch.randn(5, 40)
    yield "captured_energy right", op.captured_energy.default, (gradient, right, torch.empty(0), 1)
    yield "captured_energy both", op.captured_energy.default, (gradient, right, left, 0)
    for storage in ("float32", "int8"):
        for moments in ("float32", "dynamic8"):
            yield f"adam8_step_ {storage} {moments}", op.adam8_step_.default, step_arguments(None, storage, moments)
            for side in (ops.RIGHT, ops.LEFT, ops.FULL):
                arguments = step_arguments(side, storage, moments)
                yield f"galore_step_ {side} {storage} {moments}", op.galore_step_.default, arguments


CASES = list(cases())


@pytest.mark.parametrize("name, function, arguments", CASES, ids=[c[0] for c in CASES])
def test_opcheck(name, function, arguments):
    torch.library.opcheck(function, arguments)


def test_every_op_is_checked():
    checked = {function._schema.name for _, function, _ in CASES}
    plain = {"simd_level", "best_simd_level", "set_simd_level", "set_cpu_tables", "cuda_version"}  # no tensors
    plain.add("linear_backward")  # written in Python: test_compile.py
    registered = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("q_galore::")}
    assert checked == registered - {f"q_galore::{name}" for name in plain}


def test_fakes_refuse_wrong_shapes_and_devices():
    codes, scales, zeros = (x.to("meta") for x in ops.int8_quantize(torch.randn(512)))
    with pytest.raises(RuntimeError, match=r"scales: expected \[2\], got \[1\]"):
        ops.int8_dequantize(codes, scales[:1], zeros, 256, torch.float32)
    with pytest.raises(RuntimeError, match="scales: expected meta, got cpu"):
        ops.int8_dequantize(codes, torch.zeros(2), zeros, 256, torch.float32)
    names = [argument.name for argument in op.galore_step_.default._schema.arguments]
    arguments = dict(zip(names, step_arguments(ops.FULL, "int8", "dynamic8"), strict=True))
    arguments = tree_map_only(torch.Tensor, lambda x: x.to("meta"), arguments)
    op.galore_step_(**arguments)
    for name, value, message in (
        ("grads", [torch.randn(24, 40, device="meta")], r"grads\[0\]: expected .*40, 24.*, got \[24, 40\]"),
        ("right_codes", arguments["proj_codes"], r"projector codes: expected \[8, 12\], got \[8, 20\]"),
        ("right_codes", [], r"expected lists of 1, got \[0, 1, 1\]"),
        ("absmax", torch.ones(2, device="meta"), r"absmax: expected \[1\], got \[2\]"),
        ("norms", torch.zeros(2, device="meta").double(), r"norms: expected \[1\], got \[2\]"),
        ("exp_avg", [torch.zeros(8, 24, device="meta").byte()], r"moments\[0\]: expected \[8, 8\], got \[8, 24\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op.galore_step_(**{**arguments, name: value})


def test_value_errors_come_through_the_binding():
    """std::invalid_argument is a ValueError in Python: undocumented in torch, relied on here."""
    with pytest.raises(ValueError, match=r"q_galore::absmax: tensors\[0\] must be contiguous float32"):
        ops.absmax([torch.zeros(3, dtype=torch.int64)])


def test_simd_levels():
    assert ops.simd_levels()[0] == "scalar"
    for level in ops.simd_levels():
        ops.set_simd_level(level)
        assert ops.simd_level() == level
    with pytest.raises(ValueError, match="level must be one of scalar, avx2, avx512, got 'neon'"):
        ops.set_simd_level("neon")
    for number in (-1, 3, 2**32):
        with pytest.raises(ValueError, match=f"level must be 0 .*, got {number}"):
            torch.ops.q_galore.set_simd_level(number)
    assert ops.simd_level() == ops.simd_levels()[-1]


def test_other_tables_are_two():
    with pytest.raises(ValueError, match=r"set_cpu_tables: backend, linalg must be two addresses or 0, 0, got 1, 0"):
        op.set_cpu_tables(1, 0)


def test_absmax():
    values = [
        torch.tensor([1.0, -3.0]),
        torch.zeros(0),
        torch.tensor([1.0, float("nan")]),
        torch.full((9,), -torch.inf),
    ]
    assert ops.absmax(values).tolist() == [3.0, 0.0, torch.inf, torch.inf]
    assert ops.absmax([]).shape == (0,)
    with pytest.raises(ValueError, match="tensors must be a list of at least one, got 0"):
        op.absmax.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), [])
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(10_001).to(dtype)
        assert ops.absmax([x, x[1:]]).tolist() == [x.float().abs().max().item(), x[1:].float().abs().max().item()]

"""Kernels on one thread: 8-bit Adam against torch, INT8 decoding, projector formats, the INT8 update pass.

    python benchmarks/bench_kernels.py [--elements N] [--rounds N] [--no-save]

Every contestant works on the same number of elements in the same process, in turns. A copy is of the same bytes that
the kernel reads and writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import timing
import torch

from q_galore_torch import ops

HYPER = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, seed=0)


def adam8_against_fused(elements: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """adam8 with 8-bit moments at each SIMD level against torch.optim.AdamW(fused=True)."""
    parameter = torch.nn.Parameter(torch.randn(elements).to(dtype))
    parameter.grad = torch.randn(elements).to(dtype)
    fused = torch.optim.AdamW([parameter], fused=True)
    weight, gradient = parameter.detach().clone(), parameter.grad
    blocks = -(-elements // 256)
    moments = [torch.full((elements,), 127, dtype=torch.uint8), torch.zeros(elements, dtype=torch.uint8)]
    maxima = [torch.zeros(blocks), torch.zeros(blocks)]
    stats = torch.zeros(1, 2, dtype=torch.int64)
    empty = torch.empty(0), torch.empty(0, dtype=torch.int16)
    count = 0

    def ours(level: str):
        def step() -> None:
            nonlocal count
            count += 1
            ops.set_simd_level(level)
            ops.adam8_step_(
                [weight], [empty[0]], [empty[1]], [gradient], [moments[0]], [moments[1]], [maxima[0]], [maxima[1]],
                [count], [count], [0], stats, **HYPER,
            )  # fmt: skip

        return step

    contestants = {"torch AdamW(fused)": fused.step, **{f"adam8 {level}": ours(level) for level in ops.simd_levels()}}
    return timing.ratios(timing.contest(contestants, rounds), "torch AdamW(fused)")


def dequantize_against_copy(elements: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """int8_dequantize against a copy of as many bytes: codes and half-copies of the result."""
    elements //= 2  # results below 32 MiB, which malloc gives back without new pages, as it does for the copy
    codes, scales, zeros = ops.int8_quantize(torch.randn(elements))
    size = torch.empty(0, dtype=dtype).element_size()
    # One byte read and `size` bytes written for each element: a copy of (1 + size) / 2 bytes moves as much.
    source = torch.zeros(elements * (1 + size) // 2, dtype=torch.uint8)

    def ours(level: str):
        def run() -> None:
            ops.set_simd_level(level)
            ops.int8_dequantize(codes, scales, zeros, 256, dtype)

        return run

    contestants = {"copy": source.clone, **{f"int8 {level}": ours(level) for level in ops.simd_levels()}}
    return timing.ratios(timing.contest(contestants, rounds), "copy")


def projector_formats(decode_to: torch.dtype | None, level: str, rounds: int) -> dict[str, dict[str, float]]:
    """Every projector format against int4, a basis of 256 x 4096: decoding, or encoding where ``decode_to`` is None."""
    ops.set_simd_level(level)
    basis, dim = torch.randn(256, 4096), 4096

    def contestant(name: str, block: int):
        parts = ops.projector_quantize(basis, name, block)
        if decode_to is None:
            return lambda: ops.projector_quantize(basis, name, block)
        return lambda: ops.projector_dequantize(*parts, name, block, dim, decode_to)

    blocks = {name: 64 if name in ("fp4", "nf4") else 256 for name in ops.PROJ_FORMATS}
    return timing.ratios(timing.contest({n: contestant(n, b) for n, b in blocks.items()}, 5 * rounds), "int4")


def update_pass() -> dict[str, Any]:
    """The INT8 update pass against memcpy, timed by the C program (no op exposes it alone)."""
    tests = Path(__file__).parent.parent / "csrc/tests"
    subprocess.run(["make", "-s", "-C", str(tests), "bench"], check=True)
    out = subprocess.run([str(tests / "build/run/bench_update")], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=11_000_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"machine": timing.machine(), "elements": arguments.elements}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        table = adam8_against_fused(arguments.elements, dtype, arguments.rounds)
        record[f"adam8 {name}"] = table
        timing.show(f"8-bit Adam on {name} parameters, one thread", table, "torch AdamW(fused)")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        table = dequantize_against_copy(arguments.elements, dtype, arguments.rounds)
        record[f"int8_dequantize to {name}"] = table
        timing.show(f"INT8 weights to {name}, one thread", table, "copy")
    for level in ops.simd_levels():
        for target in (torch.float32, torch.bfloat16, None):
            what = f"decoding to {target}".replace("torch.", "") if target else "encoding"
            table = projector_formats(target, level, arguments.rounds)
            record[f"projector {what} {level}"] = table
            timing.show(f"Projector, {what}, {level}, one thread", table, "int4")
    ops.set_simd_level(ops.simd_levels()[-1])
    record["int8 update"] = update_pass()
    timing.show("INT8 update pass, one thread", record["int8 update"], "copy")
    if not arguments.no_save:
        timing.save("kernels", record)


if __name__ == "__main__":
    main()

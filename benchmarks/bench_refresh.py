"""A warm refresh of a basis against the thin SVD it replaces, where its time goes, and what both capture.

python benchmarks/bench_refresh.py [--rounds N] [--svd-rounds N] [--threads N] [--no-save]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timing
import torch
from torch import Tensor

from q_galore_torch import ops
from q_galore_torch.subspace import LEFT, RIGHT

RANK = 512
SHAPES = {(2048, 5461): LEFT, (4096, 4096): RIGHT}
DTYPES = ("float32", "bfloat16")


def moving_gradients(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Two gradients a hundred steps apart, so to say: one spectrum i^-0.5, directions turned a little, own noise."""
    few = min(rows, cols)
    strengths = torch.arange(1.0, few + 1) ** -0.5
    left, right = torch.randn(rows, few) / rows**0.5, torch.randn(few, cols) / cols**0.5
    signal = (left * strengths) @ right
    turned = ((left + 0.3 * torch.randn(rows, few) / rows**0.5) * strengths) @ right
    noise = 0.3 * signal.std()
    return signal + noise * torch.randn(rows, cols), turned + noise * torch.randn(rows, cols)


def old_basis(gradient: Tensor, side: int) -> Tensor:
    """What a state holds: three power steps on the earlier gradient, in INT4."""
    dim = gradient.shape[1] if side == RIGHT else gradient.shape[0]
    basis = ops.subspace_refresh(gradient, ops.subspace_random(RANK, dim, 0, 0, 0), side, 3).basis
    return ops.projector_dequantize(*ops.projector_quantize(basis, "int4", 256), "int4", 256, dim)


def median_ms(run: Callable[[], object], rounds: int) -> float:
    seconds = timing.contest({"": run}, rounds, warmup=1)[""]
    return round(1e3 * statistics.median(seconds), 3)


def split(gradient: Tensor, basis: Tensor, side: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the parts of one power step, each measured alone: torch's products of the same sizes and tiles.

    Gram matrices and triangular products in the numbers that a warm step has: one pass for the old basis and for Z, two
    for the new basis, and a check of both bases. Factorisations are what a square random basis takes, mostly.
    """
    dim, other = (gradient.shape[1], gradient.shape[0]) if side == RIGHT else gradient.shape
    matrix = gradient if side == RIGHT else gradient.t()
    z = torch.randn(RANK, other)
    table = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        g, p, q = matrix.to(dtype), basis.to(dtype), z.to(dtype)
        table[f"three products with G, {name}"] = 2 * median_ms(lambda p=p, g=g: p @ g.t(), rounds) + median_ms(
            lambda q=q, g=g: q @ g, rounds
        )
    table["three casts of G to bfloat16"] = 3 * median_ms(gradient.bfloat16, rounds)

    triangle = torch.zeros(RANK, RANK)

    def gram(vectors: Tensor) -> None:
        for i in range(0, RANK, 128):
            torch.mm(vectors[i : i + 128], vectors[: i + 128].t(), out=triangle[i : i + 128, : i + 128])

    def apply(vectors: Tensor, out: Tensor) -> None:
        for i in range(0, RANK, 128):
            torch.mm(triangle[i : i + 128, : i + 128], vectors[: i + 128], out=out[i : i + 128])

    total = 0.0
    for length, grams, applied in ((dim, 5, 3), (other, 1, 1)):
        vectors = torch.randn(RANK, length)
        total += grams * median_ms(partial(gram, vectors), rounds)
        total += applied * median_ms(partial(apply, vectors, torch.empty_like(vectors)), rounds)
    table["Gram matrices and L^-1 M"] = total
    table["a square random basis: factorisations, mostly"] = median_ms(
        lambda: ops.subspace_random(RANK, RANK, 0, 0, 0), rounds
    )
    return {name: round(value, 3) for name, value in table.items()}


def one_shape(rows: int, cols: int, side: int, arguments: argparse.Namespace) -> dict[str, Any]:
    before, gradient = moving_gradients(rows, cols)
    basis = old_basis(before, side)

    svd_seconds: list[float] = []
    for _ in range(arguments.svd_rounds):
        start = time.perf_counter()
        _, values, _ = torch.linalg.svd(gradient, full_matrices=False)
        svd_seconds.append(time.perf_counter() - start)
    svd_ms = 1e3 * statistics.median(svd_seconds)
    squares = values.double().square()
    best = (squares[:RANK].sum() / squares.sum()).item()
    record: dict[str, Any] = {"svd ms": round(svd_ms, 1), "svd energy": round(best, 6)}

    given = {
        "float32 G and GEMMs": (gradient, "float32"),
        "float32 G, bfloat16 GEMMs": (gradient, "bfloat16"),
        "bfloat16 G and GEMMs": (gradient.bfloat16(), "bfloat16"),
    }
    contestants = {
        name: partial(ops.subspace_refresh, g, basis, side, 0, compute) for name, (g, compute) in given.items()
    }
    table = timing.ratios(timing.contest(contestants, arguments.rounds, warmup=1), "float32 G and GEMMs")
    print(f"\n{rows} x {cols}, rank {RANK}: thin float32 SVD {svd_ms:.0f} ms, captures {best:.4f}")
    for name, row in table.items():
        found = contestants[name]()
        record[f"refresh, {name}"] = {
            **row,
            "times faster than the SVD": round(svd_ms / row["ms"], 1),
            "power steps": found.power_steps,
            "fallbacks": found.fallbacks,
            "energy old": round(found.energy_old, 6),
            "energy new": round(found.energy_new, 6),
            "share of the SVD's energy": round(found.energy_new / best, 5),
        }
        print(
            f"  {name:26s} {row['ms']:8.1f} ms, {svd_ms / row['ms']:6.1f} times faster; {found.power_steps} step(s), "
            f"energy {found.energy_old:.4f} -> {found.energy_new:.4f}, {found.energy_new / best:.4f} of the SVD's"
        )
    record["split ms"] = split(gradient, basis, side, arguments.rounds)
    for name, value in record["split ms"].items():
        print(f"  {name:46s} {value:8.1f} ms")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--svd-rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record: dict[str, Any] = {"machine": timing.machine(), "threads": arguments.threads, "rank": RANK}
    for (rows, cols), side in SHAPES.items():
        record[f"{rows} x {cols}"] = one_shape(rows, cols, side, arguments)
    if not arguments.no_save:
        timing.save("refresh", record)


if __name__ == "__main__":
    main()

"""Training and kernels on a GPU, against torch's fused AdamW and against a copy of the same bytes.

    python benchmarks/bench_gpu.py [--models 60m 350m 1b layer] [--tokens N] [--rounds N] [--device cuda] [--quick]
                                   [--no-save]

Each model is trained alone, in bfloat16, by each contestant in turn: tokens a second and the time of a step without
refreshes of bases, what these add to an update on the average, and the largest memory that torch's allocator had given
out. A kernel's rate counts the bytes that it has to
move (docs/kernels) and is a share of the rate of a large copy. --quick: tiny sizes, to see that everything runs; on the
CPU, too (--device cpu).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import bench_train
import timing
import torch
from bench_train import BASE, Case, training

from pretrain.model import LlamaConfig  # bench_train has put examples/ on the path
from q_galore_torch import ops
from q_galore_torch.subspace import first_refresh_steps

CASES = {
    "60m": Case(LlamaConfig(32000, 512, 1376, 8, 8), 128, False),
    "350m": Case(LlamaConfig(32000, 1024, 2736, 24, 16), 256, False),
    "1b": Case(LlamaConfig(32000, 2048, 5461, 24, 32), 512, False),
    "layer": Case(LlamaConfig(32000, 4096, 11008, 1, 32), 1024, True),
}
TITLES = {"layer": "one decoder layer of the 7B"}
CONTESTANTS = (BASE, "low-rank, INT8 weights", "low-rank, INT8 weights, per layer")
NEVER = 1 << 40  # steps
SAMPLE = 1 << 26  # elements of a kernel's array


class Clock:
    """Seconds of work on a device, which is waited for before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], rounds: int, warmup: int = 2) -> float:
        """The median of some rounds."""
        times = []
        for turn in range(warmup + rounds):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            if turn >= warmup:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def forget_peak(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def trained(case: Case, name: str, tokens: int, rounds: int, clock: Clock) -> dict[str, float]:
    """One contestant on a model of its own."""
    clock.forget_peak()
    with clock.device:
        contestant = training(case, name, torch.bfloat16, tokens)
    for _ in range(warmup(contestant.optimizer)):
        contestant.update()
    refresh_ms = bench_train.refresh_ms(contestant.optimizer)
    postpone_refreshes(contestant.optimizer)
    seconds = clock.seconds(contestant.update, rounds)
    row = {
        "ms": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": clock.peak(),
        "refresh_ms": refresh_ms,
    }
    if name != CONTESTANTS[2]:  # per layer the step happens in the backward
        for group in contestant.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 1e-3)
        row["step_ms"] = 1e3 * clock.seconds(contestant.optimizer.step, rounds)
    return {key: round(value, 4) for key, value in row.items()}


def warmup(optimizer: torch.optim.Optimizer) -> int:
    """Updates until all first bases are made (those of 168 matrices in 21), and compared in the one after."""
    steps = first_refresh_steps(sum("last_due" in state for state in optimizer.state.values()))
    return max([bench_train.WARMUP, *(step + 3 for step in steps)])


def postpone_refreshes(optimizer: torch.optim.Optimizer) -> None:
    """What is timed from the next update on has none: of 168 matrices one is due in almost every step."""
    for state in optimizer.state.values():
        if "last_due" in state:
            state["last_due"] += NEVER


def model_table(case: Case, tokens: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """Every contestant; one that does not fit says so in place of its figures."""
    table: dict[str, Any] = {}
    for name in CONTESTANTS:
        try:
            table[name] = trained(case, name, tokens, rounds, clock)
        except torch.OutOfMemoryError:
            table[name] = {"failed": "out of memory"}
    return table


def show_model(title: str, table: dict[str, Any]) -> None:
    print(f"\n{title:36s} {'tokens/s':>10s} {'ms':>9s} {'step ms':>9s} {'peak GB':>9s} {'of AdamW':>9s}")
    base = table[BASE].get("ms")
    for name, row in table.items():
        if "failed" in row:
            print(f"  {name:34s} {row['failed']}")
            continue
        step = f"{row['step_ms']:.2f}" if "step_ms" in row else "-"
        share = f"{row['ms'] / base:.2f}" if base else "-"
        figures = f"{row['tokens_per_second']:10.0f} {row['ms']:9.2f} {step:>9s} {row['peak_bytes'] / 1e9:9.2f}"
        print(f"  {name:34s} {figures} {share:>9s}")


def kernels(count: int) -> dict[str, tuple[Callable[[], object], float]]:
    """What each kernel is called as, and the bytes that one call has to move."""
    rank = 512
    floats = torch.randn(count)
    halves = floats.bfloat16()
    codes, scales, zeros = ops.int8_quantize(floats)
    basis = torch.randn(rank, count // rank)
    decoder = ops.projector_quantize(basis, "int4", 256)
    dynamic = ops.dynamic8_quantize(basis, True)
    weight, grad, held = halves.clone(), halves, (codes.clone(), scales.clone(), zeros.clone())
    moments = [torch.full((count,), 127, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)]
    maxima = [torch.zeros(-(-count // 256)) for _ in range(2)]
    empty, none = torch.empty(0), torch.empty(0, dtype=torch.int16)
    stats = torch.zeros(1, 2, dtype=torch.int64)
    hyper = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, seed=0)

    def adam8(what: torch.Tensor, steps: torch.Tensor, points: torch.Tensor) -> Callable[[], object]:
        lists = [[what], [steps], [points], [grad], [moments[0]], [moments[1]], [maxima[0]], [maxima[1]]]
        return lambda: ops.adam8_step_(*lists, [1], [1], [0], stats, **hyper)

    group, block = 6 / 256, 4 / 256  # bytes an element of an INT8 group and of a moment's absmax
    moment = 2 * (1 + block)
    return {
        "absmax, bfloat16": (lambda: ops.absmax([halves]), 2.0 * count),
        "int8_quantize, float32": (lambda: ops.int8_quantize(floats), (4 + 1 + group) * count),
        "int8_dequantize, bfloat16": (
            lambda: ops.int8_dequantize(codes, scales, zeros, 256, torch.bfloat16),
            (1 + group + 2) * count,
        ),
        "projector_quantize, int4": (lambda: ops.projector_quantize(basis, "int4", 256), 4.5 * count),
        "projector_dequantize, int4 to bfloat16": (
            lambda: ops.projector_dequantize(*decoder, "int4", 256, basis.shape[1], torch.bfloat16),
            2.5 * count,
        ),
        "dynamic8_quantize": (lambda: ops.dynamic8_quantize(basis, True), (4 + 1 + block) * count),
        "dynamic8_dequantize": (lambda: ops.dynamic8_dequantize(*dynamic, True), (1 + block + 4) * count),
        "adam8, bfloat16 weight": (adam8(weight, empty, none), (4 + 2 + 2 * moment) * count),
        "adam8, INT8 weight": (adam8(*held), (2 + 2 + group + 2 * moment) * count),
    }


def kernel_table(count: int, rounds: int, clock: Clock) -> dict[str, dict[str, float]]:
    """GB a second of each kernel, and the share of a copy's."""
    with clock.device:
        source = torch.zeros(4 * count, dtype=torch.uint8)
        target = torch.empty_like(source)
        calls = kernels(count)
    copy = 2 * source.numel() / clock.seconds(lambda: target.copy_(source), rounds)
    table = {"copy": {"gb_per_second": copy / 1e9, "share": 1.0}}
    for name, (call, size) in calls.items():
        rate = size / clock.seconds(call, rounds)
        table[name] = {"gb_per_second": rate / 1e9, "share": rate / copy}
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in table.items()}


def refresh_table(sizes: list[tuple[int, int, int]], rounds: int, clock: Clock) -> dict[str, dict[str, float]]:
    """Milliseconds of a refresh with bfloat16 products and of the thin SVD."""
    table = {}
    for rows, cols, rank in sizes:
        with clock.device:
            gradient = torch.randn(rows, cols)
            basis = ops.subspace_random(rank, rows, 0, 0, 0, device=clock.device)
        halves = gradient.bfloat16()

        def warm(halves=halves, basis=basis) -> object:
            return ops.subspace_refresh(halves, basis, ops.LEFT, 1, "bfloat16")

        def exact(gradient=gradient) -> object:
            return torch.linalg.svd(gradient, full_matrices=False)

        table[f"{rows} x {cols}, rank {rank}"] = {
            "refresh_ms": round(1e3 * clock.seconds(warm, rounds), 3),
            "svd_ms": round(1e3 * clock.seconds(exact, 1, 1), 3),
        }
    return table


def machine(device: torch.device) -> dict[str, Any]:
    """As of the other measurements, and the GPU."""
    record = timing.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = properties.name
        record["gpu_memory"] = properties.total_memory
        record["cuda"] = torch.version.cuda
    return record


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args(words)
    clock = Clock(torch.device(arguments.device))
    rounds = arguments.rounds
    tiny = {name: Case(LlamaConfig(264, 32, 48, 1, 2), 8, case.alone) for name, case in CASES.items()}
    record: dict[str, Any] = {"machine": machine(clock.device), "tokens": arguments.tokens, "models": {}}
    record["kernels"] = kernel_table(1 << 18 if arguments.quick else SAMPLE, rounds, clock)
    print("GB/s of a kernel, share of a copy")
    for name, row in record["kernels"].items():
        print(f"  {name:40s} {row['gb_per_second']:9.1f} {row['share']:6.2f}")
    sizes = [(48, 64, 8)] if arguments.quick else [(2048, 5461, 512), (4096, 4096, 1024)]
    record["refresh"] = refresh_table(sizes, rounds, clock)
    print("\nA refresh, bfloat16 products, against torch.linalg.svd")
    for name, row in record["refresh"].items():
        print(f"  {name:40s} {row['refresh_ms']:9.2f} ms {row['svd_ms']:10.2f} ms")
    for name in arguments.models:
        case = (tiny if arguments.quick else CASES)[name]
        record["models"][name] = model_table(case, arguments.tokens, rounds, clock)
        show_model(TITLES.get(name, name), record["models"][name])
    if not (arguments.no_save or arguments.quick):
        timing.save("gpu", record)


if __name__ == "__main__":
    main()

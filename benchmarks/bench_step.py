"""A projected INT8 step, its memory, and a LLaMA block's forward + backward, each against its rival.

    python benchmarks/bench_step.py [--public FOLDER] [--rounds N] [--threads N] [--no-save]

--public: an unpacked wheel of the public Q-GaLore 1.0 (see peers.py), which then runs in the same process.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch import ops

HYPER = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, seed=0)
ROWS, COLS, RANK = 2048, 5461, 512


class ProjectedStep:
    """One INT8 matrix with an INT4 projector on its left and 8-bit moments."""

    def __init__(self, weight: Tensor, low_rank: bool, compute_dtype: str) -> None:
        self.weight = [[x] for x in ops.int8_quantize(weight)]
        basis = torch.linalg.qr(torch.randn(ROWS, RANK))[0].t().contiguous()
        self.projector = [[x] for x in ops.projector_quantize(basis, "int4", 256)]
        blocks = -(-COLS // 256)
        self.moments = [
            [torch.full((RANK, COLS), 127, dtype=torch.uint8)],
            [torch.zeros(RANK, COLS, dtype=torch.uint8)],
            [torch.zeros(RANK, blocks)],
            [torch.zeros(RANK, blocks)],
        ]
        self.stats = torch.zeros(1, 2, dtype=torch.int64)
        self.low_rank, self.compute_dtype, self.count = low_rank, compute_dtype, 0

    def __call__(self, gradient: Tensor) -> None:
        self.count += 1
        ops.galore_step_(
            *self.weight, [gradient], *self.moments, *self.projector, [1], [self.count], [self.count], [0], self.stats,
            proj_format="int4", proj_block=256, low_rank=self.low_rank, scale=0.25, compute_dtype=self.compute_dtype,
            **HYPER,
        )  # fmt: skip


def projected_step(public: Path | None, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Ours from a full and from a low-rank gradient against fused AdamW and the public step."""
    weight, gradient = torch.randn(ROWS, COLS) * 0.02, torch.randn(ROWS, COLS) * 1e-3
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    fused = torch.optim.AdamW([parameter], fused=True)
    given, projected = gradient.to(dtype), torch.randn(RANK, COLS) * 1e-3
    contestants = {"torch AdamW(fused), float32": fused.step}
    for compute in ("float32", "bfloat16"):
        full, low_rank = (ProjectedStep(weight, flag, compute) for flag in (False, True))
        contestants[f"from G, {compute} GEMMs"] = lambda step=full: step(given)
        contestants[f"from R, {compute} GEMMs"] = lambda step=low_rank: step(projected)
    base = "torch AdamW(fused), float32"
    if public is not None:
        import peers

        # Its groups have to divide the matrix: 5461 columns do (2048 rows are a multiple of 256).
        step = peers.public_step(peers.load_public(public), weight.to(dtype), RANK)
        base = "public Q-GaLore 1.0"
        contestants[base] = lambda: step(given.clone())
    return timing.ratios(timing.contest(contestants, rounds), base)


def step_temporaries() -> dict[str, float]:
    """Bytes a weight that one step allocates beyond its arguments: all of it, and without the tile of U."""
    weight = torch.randn(ROWS, COLS) * 0.02
    record = {}
    for low_rank in (False, True):
        step = ProjectedStep(weight, low_rank, "float32")
        gradient = torch.randn(RANK, COLS) if low_rank else torch.randn(ROWS, COLS)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(gradient)
        allocated = max(event.cpu_memory_usage for event in profile.events())
        tile = 256 * COLS * 4
        name = "from R" if low_rank else "from G"
        record[f"{name}: bytes a weight"] = round(allocated / weight.numel(), 3)
        record[f"{name}: without the tile of U"] = round((allocated - tile) / weight.numel(), 3)
    return record


class Block(nn.Module):
    """The linear layers of a LLaMA block of width 512 / 1376 with attention and SwiGLU between them."""

    def __init__(self, hidden: int = 512, inner: int = 1376) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({k: nn.Linear(hidden, hidden, bias=False) for k in ("q", "k", "v", "o")})
        self.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(hidden, inner, bias=False),
                "up": nn.Linear(hidden, inner, bias=False),
                "down": nn.Linear(inner, hidden, bias=False),
            }
        )
        self.norms = nn.ModuleList([nn.RMSNorm(hidden), nn.RMSNorm(hidden)])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        h = self.norms[0](x)
        q, k, v = (self.attn[name](h).view(batch, length, 8, -1).transpose(1, 2) for name in "qkv")
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["o"](mixed.transpose(1, 2).reshape(batch, length, hidden))
        h = self.norms[1](x)
        return x + self.mlp["down"](nn.functional.silu(self.mlp["gate"](h)) * self.mlp["up"](h))


def block_backward(rounds: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Forward + backward of 4096 tokens: nn.Linear, low-rank with float weights, low-rank with INT8 weights."""
    torch.manual_seed(0)
    x = torch.randn(16, 256, 512, dtype=dtype, requires_grad=True)
    contestants, keep = {}, []

    def add(name: str, block: nn.Module) -> None:
        def run() -> None:
            block.zero_grad(set_to_none=True)
            x.grad = None
            block(x).square().mean().backward()

        contestants[name] = run

    add("nn.Linear", Block().to(dtype))
    for name, bits in (("low-rank, float weights", None), ("low-rank, INT8 weights", 8)):
        block = qg.prepare_model(Block().to(dtype), rank=128, target_modules=["attn", "mlp"], weight_bits=bits)
        keep.append(qg.QGaLoreAdamW8bit(qg.param_groups(block, rank=128, update_proj_gap=10**6), lr=1e-3))
        for _ in range(12):  # past the first data-driven bases
            block(x).square().mean().backward()
            keep[-1].step()
            keep[-1].zero_grad()
        add(name, block)
    return timing.ratios(timing.contest(contestants, rounds), "nn.Linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--public", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record: dict[str, Any] = {"machine": timing.machine(), "threads": arguments.threads}
    shape = f"{ROWS} x {COLS}, rank {RANK}"
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        table = projected_step(arguments.public, dtype, arguments.rounds)
        base = "public Q-GaLore 1.0" if arguments.public else "torch AdamW(fused), float32"
        record[f"step, {name} gradient"] = table
        timing.show(f"One INT8 step of {shape}, {name} gradient", table, base)
    record["step temporaries"] = step_temporaries()
    for name, value in record["step temporaries"].items():
        print(f"  {name:34s} {value}")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        table = block_backward(arguments.rounds, dtype)
        record[f"block forward + backward, {name}"] = table
        timing.show(
            f"Forward + backward of a LLaMA block (512/1376, rank 128, 4096 tokens), {name}", table, "nn.Linear"
        )
    record["peak RSS MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if not arguments.no_save:
        timing.save("step", record)


if __name__ == "__main__":
    main()

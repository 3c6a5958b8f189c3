"""What storing a basis in each projector format costs in accuracy.

    python benchmarks/projector_error.py [--dims D ...] [--no-save]
    python benchmarks/projector_error.py --table [--dim D]

The first form measures and writes results/projector_error.json, the second prints that file as a Markdown table. P is
r x d with r = d / 4 orthonormal rows, from two sources with fixed seeds: `gaussian`, the QR decomposition of a Gaussian
matrix; `structured`, the leading right singular directions of a matrix with spectrum 1 / i, log-normal column scales
(sigma 1) and 1 % noise, whose entries are far from evenly large. With p the decoded basis, N Gaussian, c Gaussian:

    rms          |p - P|_F / |P|_F                           worst       max |p - P| in units of 1 / sqrt(d)
    gram         max |p p^T - I|                             update      |N^T p - N^T P|_F / |N^T P|_F
    round_trip  |p^T p x - x| / |x|, x = P^T c, a gradient inside the subspace; `outside`: the part of that error which
                leaves the subspace; `stretch_low`, `stretch_high`: extreme eigenvalues of p p^T

`..._unit` is the same after dividing each row of p by its norm.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import timing
import torch
from torch import Tensor

from q_galore_torch import ops

# int4 with blocks of 96 takes as many bytes as nf4 with blocks of 64.
CASES = [
    *(("float32", 256), ("bfloat16", 256), ("int8", 256), ("int8", 0), ("fp8", 256), ("fp8", 0), ("fp8_e4m3", 256)),
    *(("fp8_e4m3", 0), ("int4", 256), ("int4", 96), ("int4", 0), ("fp4", 64), ("fp4", 128), ("fp4", 256), ("fp4", 0)),
    *(("nf4", 64), ("nf4", 128), ("nf4", 256), ("nf4", 0)),
]
# Title, source of the basis, key.
COLUMNS = [
    ("RMS error", "gaussian", "rms"),
    ("worst, in RMS entries", "gaussian", "worst"),
    ("max abs(p p^T - I)", "gaussian", "gram"),
    ("update error", "gaussian", "update"),
    ("the same, unit rows", "gaussian", "update_unit"),
    ("round trip", "gaussian", "round_trip"),
    ("RMS error, structured", "structured", "rms"),
]
RESULT = timing.RESULTS / "projector_error.json"


def gaussian_basis(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(dim)
    return torch.linalg.qr(torch.randn(dim, dim // 4, generator=generator, dtype=torch.float64))[0].t()


def structured_basis(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(dim + 1)
    rank, rows = dim // 4, 3 * dim // 8
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.randn(rows, dim, generator=generator, dtype=torch.float64) / dim**0.5
    right *= torch.randn(dim, generator=generator, dtype=torch.float64).exp()
    matrix = (left / torch.arange(1, rows + 1)) @ right
    noise = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    matrix += 0.01 * matrix.norm() / noise.norm() * noise
    directions = torch.linalg.eigh(matrix @ matrix.t())[1][:, -rank:].t() @ matrix
    return torch.linalg.qr(directions.t())[0].t()


def errors(exact: Tensor, decoded: Tensor, seed: int) -> dict[str, float]:
    """The figures of a decoded basis; both float64 [r, d]."""
    generator = torch.Generator().manual_seed(seed)
    rank, dim = exact.shape
    direction = torch.randn(rank, 64, generator=generator, dtype=torch.float64)
    inside = torch.randn(64, rank, generator=generator, dtype=torch.float64) @ exact
    update = direction.t() @ exact
    gram = decoded @ decoded.t()
    eigenvalues = torch.linalg.eigvalsh(gram)
    round_trip = (inside @ decoded.t()) @ decoded
    outside = round_trip - (round_trip @ exact.t()) @ exact
    figures = {
        "rms": ((decoded - exact).norm() / exact.norm()).item(),
        "worst": ((decoded - exact).abs().max() * dim**0.5).item(),
        "gram": (gram - torch.eye(rank, dtype=torch.float64)).abs().max().item(),
        "stretch_low": eigenvalues[0].item(),
        "stretch_high": eigenvalues[-1].item(),
        "outside": (outside.norm() / inside.norm()).item(),
    }
    for suffix, basis in (("", decoded), ("_unit", decoded / decoded.norm(dim=1, keepdim=True))):
        figures["update" + suffix] = ((direction.t() @ basis - update).norm() / update.norm()).item()
        figures["round_trip" + suffix] = (((inside @ basis.t()) @ basis - inside).norm() / inside.norm()).item()
    return figures


def measure(dims: list[int]) -> list[dict[str, Any]]:
    rows = []
    for dim in dims:
        for source, basis in (("gaussian", gaussian_basis(dim)), ("structured", structured_basis(dim))):
            exact = basis.contiguous()
            for proj_format, block in CASES:
                parts = ops.projector_quantize(exact.float(), proj_format, block)
                decoded = ops.projector_dequantize(*parts, proj_format, block, dim).double()
                size = sum(part.numel() * part.element_size() for part in parts) / exact.numel()
                row = {"source": source, "dim": dim, "rank": dim // 4, "format": proj_format, "block": block}
                rows.append({**row, "bytes": size, **errors(exact, decoded, dim)})
            print(f"{source}, d = {dim}: done", flush=True)
    return rows


def table(rows: list[dict[str, Any]], dim: int) -> str:
    """The rows of one d as Markdown, a line for each format and block."""
    chosen = [row for row in rows if row["dim"] == dim]
    cells: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in chosen:
        line = cells.setdefault((row["format"], row["block"]), {("", "bytes"): row["bytes"]})
        line.update({(row["source"], key): row[key] for _, source, key in COLUMNS if source == row["source"]})
    lines = ["| format | block | bytes | " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    lines.append("|---" * (3 + len(COLUMNS)) + "|")
    for (name, block), line in cells.items():
        shown_block = "-" if name in ("float32", "bfloat16") else "all" if block == 0 else str(block)
        figures = [f"{line[source, key]:.3g}" if (source, key) in line else "" for _, source, key in COLUMNS]
        lines.append(f"| {name} | {shown_block} | {line['', 'bytes']:.3f} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def by_length(rows: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> str:
    """Errors of Gaussian bases at each d, and the energy lost on recorded gradients, as Markdown.

    Args:
        rows: of this program.
        recorded: of ``recorded_gradients.py``; those of part "formats" are read, at the full rank of each model.
    """
    lengths = sorted({row["dim"] for row in rows})
    found = {
        r["setting"]["model"]: r["result"]["ratio"] for r in recorded if r["part"] == "formats" and r["rank"] == 64
    }
    header = ["format", "block", "bytes", *(f"RMS, worst; d = {d}" for d in lengths)]
    lines = [header + [f"energy lost, {model}: mean, worst" for model in found]]
    lines.append(["---"] * len(lines[0]))
    for name, block in CASES:
        title = name if name in ("float32", "bfloat16") else f"{name}, block {block}"
        chosen = [r for r in rows if (r["source"], r["format"], r["block"]) == ("gaussian", name, block)]
        figures = [f"{row['rms']:.2g}, {row['worst']:.2g}" for row in sorted(chosen, key=lambda row: row["dim"])]
        lost = [
            f"{100 - 100 * ratio[title]['mean']:.2f} %, {100 - 100 * ratio[title]['minimum']:.2f} %"
            for ratio in found.values()
            if title in ratio
        ]
        if lost:
            lines.append([name, "-" if title == name else str(block), f"{chosen[0]['bytes']:.3f}", *figures, *lost])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--dim", type=int, default=1024)
    arguments = parser.parse_args()
    if arguments.table:
        rows = json.loads(RESULT.read_text())["rows"]
        recorded = [json.loads(line) for line in (timing.RESULTS / "recorded_gradients.jsonl").read_text().splitlines()]
        print(table(rows, arguments.dim), by_length(rows, recorded), sep="\n\n")
        return
    rows = measure(arguments.dims)
    print(table(rows, arguments.dim if arguments.dim in arguments.dims else arguments.dims[-1]))
    if not arguments.no_save:
        timing.save("projector_error", {"machine": timing.machine(), "rows": rows})


if __name__ == "__main__":
    main()

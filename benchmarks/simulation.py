"""How far simulated INT8 training is from the real one, by the dtype of the simulated weight and its place on the axis.

    python benchmarks/simulation.py

Two linear layers with weights of deviation 0.02 about an offset learn a fixed map for 100 steps, once in INT8 with full
gradients and once simulated. Written to ``results/simulation.json``; docs/simulation.md has the table.
"""

from __future__ import annotations

from argparse import Namespace

import tables
import timing
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch.utils.simulate_quantization import prepare_model_for_int8_training_simulation

OFFSETS = (0.0, 0.05, 0.1, 0.3, 1.0)
STEPS = 100
PAGE = tables.PAGE.with_name("simulation.md")


def network(offset: float, dtype: torch.dtype) -> nn.Module:
    """Two layers to convert and a head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.Tanh(), nn.Linear(256, 256), nn.Linear(256, 8))
    with torch.no_grad():
        for index in (0, 3):
            model[index].weight.normal_(offset, 0.02)
    return model.to(dtype)


def train(model: nn.Module, groups: list[dict[str, object]], dtype: torch.dtype, steps: int, seed: int) -> float:
    """The last loss."""
    opt = qg.QGaLoreAdamW8bit(groups, lr=0.002, weight_decay=0.0, seed=seed)
    draw, loss = torch.Generator().manual_seed(1), torch.zeros(())
    for _ in range(steps):
        x = torch.randn(64, 256, generator=draw)
        loss = (model(x.to(dtype)).float() - x[:, :8]).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


def real(offset: float, dtype: torch.dtype, steps: int, seed: int = 0) -> tuple[list[tuple[Tensor, ...]], float]:
    """Codes, scales and zero points of both layers after training in INT8, and the last loss."""
    model = qg.prepare_model(network(offset, dtype), rank=64, target_modules=["0", "3"], grad_mode="full")
    loss = train(model, qg.param_groups(model, update_proj_gap=20), dtype, steps, seed)
    return [(model[i].qweight, model[i].scales, model[i].zeros) for i in (0, 3)], loss


def simulated(offset: float, dtype: torch.dtype, steps: int) -> tuple[list[tuple[Tensor, ...]], float]:
    """The same simulated."""
    args = Namespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
    model = prepare_model_for_int8_training_simulation(network(offset, dtype), args, ["0", "3"])
    matrices = [model[0].weight, model[3].weight]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    loss = train(model, [{"params": rest}, {"params": matrices, "rank": 64, "update_proj_gap": 20}], dtype, steps, 0)
    return [model[i].read() for i in (0, 3)], loss


def difference(offset: float, dtype: torch.dtype, steps: int) -> float:
    """The share of codes that differ after some steps."""
    pairs = list(zip(real(offset, dtype, steps)[0], simulated(offset, dtype, steps)[0], strict=True))
    return sum((a[0] != b[0]).float().mean().item() for a, b in pairs) / len(pairs)


def main() -> None:
    """All cells, the JSON and the table."""
    rows, lines = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for offset in OFFSETS:
            codes, _ = real(offset, dtype, 1)
            distance = max((part[0].int() - part[2].int().view(-1, 1)).abs().max().item() for part in codes)
            losses = [real(offset, dtype, STEPS, seed)[1] for seed in range(3)]
            row = {"dtype": str(dtype).removeprefix("torch."), "offset": offset, "farthest": distance}
            row.update(differ_after_1=difference(offset, dtype, 1), differ_after_5=difference(offset, dtype, 5))
            row.update(int8_losses=losses, simulated_loss=simulated(offset, dtype, STEPS)[1])
            rows.append(row)
            differ = [f"{row[f'differ_after_{steps}']:.2%}" for steps in (1, 5)]
            seeds = ", ".join(f"{loss:.3f}" for loss in losses)
            lines.append([row["dtype"], f"{offset:g}", str(distance), *differ, seeds, f"{row['simulated_loss']:.3f}"])
    header = ["weight", "offset", "farthest", "differ after 1 step", "5 steps", "INT8 losses", "simulated"]
    text = tables.markdown(header, lines)
    tables.rewrite(PAGE, "simulation", text)
    print(text)
    timing.save("simulation", {"machine": timing.machine(), "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()

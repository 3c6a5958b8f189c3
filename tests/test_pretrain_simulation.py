"""run_pretrain --simulation: full gradients, and with --weight_quant float weights on an INT8 grid."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from pretrain_support import (  # noqa: E402
    Q_GALORE,
    losses,
    one_thread,  # noqa: F401 - a fixture
    records,
    run,
    tiny_flags,
)
from q_galore_torch import ops  # noqa: E402
from test_pretrain_processes import run_together  # noqa: E402

SIMULATION = {**Q_GALORE, "simulation": True}
UPSTREAM = {"lazy_rule": "upstream"}  # under which the real run, too, has full gradients


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("kind", "step", "loss", "lr", "grad_norm", "tokens", "refreshes")
    return [tuple(row.get(name) for name in names) for row in rows if row["kind"] in ("train", "eval")]


def codes_of(folder: Path) -> dict[str, torch.Tensor]:
    """The INT8 codes of every matrix of a checkpoint, real or simulated."""
    saved = torch.load(folder / "model.pt", weights_only=True)
    codes = {name.removesuffix(".qweight"): value for name, value in saved.items() if name.endswith(".qweight")}
    for name in [name.removesuffix(".scales") for name in saved if name.endswith(".scales")]:
        if name not in codes:
            weight, scales, zeros = (saved[f"{name}.{part}"] for part in ("weight", "scales", "zeros"))
            spread = [part.repeat_interleave(256)[: weight.numel()].view_as(weight) for part in (scales, zeros)]
            codes[name] = ((weight.float() / spread[0]).round() + spread[1]).to(torch.uint8)
            again = ops.int8_dequantize(codes[name], scales, zeros.to(torch.int16), 256, weight.dtype)
            assert torch.equal(again, weight)
    return codes


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2, "grad_clipping": 0.5}], ids=["plain", "clipped"])
def test_simulated_run_is_the_int8_run_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every loss and gradient norm, and in the end every code."""
    real = run(tmp_path, **Q_GALORE, **UPSTREAM, **changes)
    mine = run(tmp_path, **SIMULATION, **UPSTREAM, **changes, save_dir=tmp_path / "simulated")
    assert numbers(mine) == numbers(real) and len(numbers(mine)) == 14
    codes = [codes_of(tmp_path / name / "model_12") for name in ("run", "simulated")]
    assert codes[0].keys() == codes[1].keys() and len(codes[0]) == 14
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    saved = torch.load(tmp_path / "simulated" / "model_12" / "model.pt", weights_only=True)
    assert all(saved[f"{name}.weight"].dtype == torch.float32 for name in codes[1])


def test_simulated_run_in_bfloat16_is_close_to_the_int8_run(tmp_path: Path) -> None:
    real = run(tmp_path, **Q_GALORE, **UPSTREAM, dtype="bfloat16")
    mine = run(tmp_path, **SIMULATION, **UPSTREAM, dtype="bfloat16", save_dir=tmp_path / "simulated")
    for kind in ("train", "eval"):
        assert losses(mine, kind) == pytest.approx(losses(real, kind), rel=2e-3)


def test_simulation_without_weight_quant_is_the_method_on_float_weights(tmp_path: Path) -> None:
    flags = {**Q_GALORE, **UPSTREAM, "weight_quant": None, "stochastic_round": None}
    real = run(tmp_path, **flags)
    mine = run(tmp_path, **flags, simulation=True, save_dir=tmp_path / "simulated")
    assert numbers(mine) == numbers(real)
    assert not codes_of(tmp_path / "simulated" / "model_12")


def test_simulation_has_full_gradients_under_every_rule(tmp_path: Path) -> None:
    for weight_quant in (True, None):
        flags = {**SIMULATION, "weight_quant": weight_quant, "num_training_steps": 1, "eval_tokens": 64}
        rows = run(tmp_path, **flags, save_dir=tmp_path / f"quant-{weight_quant}")
        (summary,) = [row for row in rows if row["kind"] == "summary"]
        assert summary["gradients"] == 4 * 116_032  # of the tiny model, in float32


def test_per_layer_simulation_gives_the_ordinary_losses(tmp_path: Path) -> None:
    first = run(tmp_path, **SIMULATION, gradient_accumulation=2)
    name = "q_galore_adamw8bit_per_layer"
    second = run(tmp_path, **{**SIMULATION, "optimizer": name}, gradient_accumulation=2, save_dir=tmp_path / "second")
    assert losses(second) == losses(first) and losses(second, "eval") == losses(first, "eval")


def test_interrupted_simulation_gives_the_same_losses(tmp_path: Path) -> None:
    whole = run(tmp_path, **SIMULATION, save_every=5)
    shutil.copytree(tmp_path / "run" / "model_5", tmp_path / "model_5")
    second = run(tmp_path, **SIMULATION, continue_from=tmp_path / "model_5", save_dir=tmp_path / "second")
    assert numbers(second) == [row for row in numbers(whole) if row[1] > 5]


def test_two_processes_simulate_like_one(tmp_path: Path) -> None:
    flags = {**SIMULATION, "num_training_steps": 5, "total_batch_size": 4, "grad_clipping": 1.0, "eval_every": 3}
    per_layer = {**flags, "optimizer": "q_galore_adamw8bit_per_layer", "grad_clipping": None}
    jobs, expected = [], {}
    for name, changes in (("ordinary", flags), ("per_layer", per_layer)):
        expected[name] = run(tmp_path, **changes, batch_size=4, save_dir=tmp_path / f"{name}-alone")
        jobs.append(tiny_flags(tmp_path, **changes, batch_size=1, save_dir=tmp_path / name))
    run_together(tmp_path, 2, jobs)
    for name, alone in expected.items():
        rows = records(tmp_path / name)
        for kind in ("train", "eval"):
            assert losses(rows, kind) == pytest.approx(losses(alone, kind), rel=2e-3), name

"""GaLoreAdamW and GaLoreAdamW8bit: GaLore's formula, defaults and constructor."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from galore_reference import low_rank_stream

SHAPES = [(48, 32), (32, 48), (32, 32)]
CLASSES = [qg.GaLoreAdamW, qg.GaLoreAdamW8bit]


class GaLore:
    """GaLore's step for one matrix in float64; a new basis keeps the old one's signs, eps is added as in AdamW."""

    def __init__(
        self, weight: Tensor, rank: int, gap: int, scale: float, proj_type: str, lr: float, eps: float
    ) -> None:
        self.weight, self.rank, self.gap, self.scale, self.type = weight.double().clone(), rank, gap, scale, proj_type
        self.lr, self.eps = lr, eps
        self.left = self.right = self.m = self.v = torch.zeros((), dtype=torch.float64)
        self.step = 0

    def update(self, gradient: Tensor) -> None:
        g = gradient.double()
        tall = g.shape[0] >= g.shape[1]
        kind = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(
            self.type, self.type
        )
        if self.step % self.gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            self.left, self.right = kept(u.t()[: self.rank], self.left), kept(vh[: self.rank], self.right)
        r = g if kind == "left" else g @ self.right.t()
        r = r if kind == "right" else self.left @ r
        self.step += 1
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.999 * self.v + 0.001 * r * r
        m, v = self.m / (1 - 0.9**self.step), self.v / (1 - 0.999**self.step)
        n = m / (v.sqrt() + self.eps)
        n = n if kind == "right" else self.left.t() @ n
        n = n if kind == "left" else n @ self.right
        self.weight -= self.lr * self.scale * n


def kept(vectors: Tensor, old: Tensor) -> Tensor:
    """Signs of a first basis as the package chooses them, of a later one as the one before has them."""
    if old.dim() == 0:
        return vectors * vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    return vectors * (vectors * old).sum(dim=1, keepdim=True).sign()


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_galore_adamw_follows_galores_formula(rows: int, cols: int, proj_type: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(rows, cols))
    group = {"params": [weight], "rank": 6, "update_proj_gap": 3, "scale": 0.5, "proj_type": proj_type}
    opt = qg.GaLoreAdamW([group], lr=0.01, eps=1e-4)  # R of both sides is diagonal at first, and else rounding noise
    reference = GaLore(weight.detach(), 6, 3, 0.5, proj_type, 0.01, 1e-4)
    for gradient in low_rank_stream(rows, cols, 7):
        weight.grad = 100 * gradient
        reference.update(weight.grad)
        opt.step()
    assert opt.telemetry()[0]["refreshes"] == 3
    torch.testing.assert_close(weight.detach().double(), reference.weight, rtol=1e-4, atol=2e-5)


def test_galore_adamw_without_a_rank_is_adamw() -> None:
    p, q = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    ours, theirs = qg.GaLoreAdamW([p], lr=0.01), torch.optim.AdamW([q], lr=0.01, eps=1e-6, weight_decay=0)
    for _ in range(5):
        p.grad = q.grad = torch.randn(50)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", CLASSES)
def test_galore_adamw_projects_as_galore_unless_the_group_says_otherwise(kind: type[qg.QGaLoreAdamW8bit]) -> None:
    def group(**options: Any) -> dict[str, Any]:
        return kind([{"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 4, **options}]).param_groups[0]

    defaults = group()
    assert [defaults[key] for key in ("proj_format", "subspace", "lazy_rule")] == ["float32", "svd", "fixed"]
    assert (group(quantize_type="4bit")["proj_format"], group(quantize_type="4bit")["proj_block"]) == ("fp4", 64)
    assert group(quant=True, quant_n_bit=8)["proj_format"] == "int8"
    assert group(proj_format="nf4")["proj_format"] == "nf4"
    assert group(proj_block=128)["proj_format"] == "float32"
    assert [group(subspace="warm", lazy_rule="energy")[key] for key in ("subspace", "lazy_rule")] == ["warm", "energy"]


def test_galore_adamw_leaves_the_defaults_of_q_galore_alone() -> None:
    opt = qg.QGaLoreAdamW8bit([{"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 4}])
    (group,) = opt.param_groups
    assert [group[key] for key in ("proj_format", "subspace", "lazy_rule")] == ["int4", "warm", "energy"]


def test_galore_adamw_moments_are_float32_and_those_of_8bit_codes() -> None:
    for kind, dtype in ((qg.GaLoreAdamW, torch.float32), (qg.GaLoreAdamW8bit, torch.uint8)):
        weight = nn.Parameter(torch.zeros(128, 64))
        assert kind([{"params": [weight], "rank": 64}]).state[weight]["exp_avg"].dtype == dtype


def test_galore_adamw_constructor_is_galore_torchs() -> None:
    weight = nn.Parameter(torch.zeros(4))
    (group,) = qg.GaLoreAdamW([weight]).param_groups
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [1e-3, (0.9, 0.999), 1e-6, 0.0]
    (group,) = qg.GaLoreAdamW([weight], 0.1, (0.5, 0.6), 1e-4, 0.2, True, True, seed=3).param_groups
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay", "seed")] == [0.1, (0.5, 0.6), 1e-4, 0.2, 3]
    (group,) = qg.GaLoreAdamW8bit([weight], min_8bit_size=8).param_groups
    assert [group[key] for key in ("lr", "eps", "weight_decay", "min_8bit_size")] == [1e-3, 1e-8, 1e-2, 8]


def test_galore_adamw_refuses_to_leave_out_the_bias_correction() -> None:
    with pytest.raises(ValueError, match="correct_bias=False is not supported"):
        qg.GaLoreAdamW([nn.Parameter(torch.zeros(4))], correct_bias=False)


@pytest.mark.parametrize("kind", CLASSES)
def test_galore_adamw_state_goes_on_bit_for_bit(kind: type[qg.QGaLoreAdamW8bit]) -> None:
    def build() -> tuple[nn.Module, qg.QGaLoreAdamW8bit]:
        torch.manual_seed(1)
        model = qg.prepare_model(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 8)), rank=8, target_modules=["0"])
        return model, kind(qg.param_groups(model, update_proj_gap=3), lr=0.01)

    def train(model: nn.Module, opt: qg.QGaLoreAdamW8bit, steps: range) -> None:
        for step in steps:
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()

    model, opt = build()
    train(model, opt, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    other, resumed = build()
    states = torch.load(file, weights_only=True)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    train(model, opt, range(5, 10))
    train(other, resumed, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))

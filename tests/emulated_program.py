"""The optimizer on the emulated CUDA kernels and on the CPU's: python emulated_program.py (test_cuda_emulated.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import q_galore_torch as qg
from emulated import Emulated
from q_galore_torch.optim import galore_adamw

MODES: dict[str, dict[str, Any]] = {
    "low rank": {},
    "both sides": {"proj_type": "full"},
    "float": {"weight_bits": None},
    "full gradients": {"grad_mode": "full"},
}


def build(gap: int = 4, **options: Any) -> tuple[nn.Sequential, qg.QGaLoreAdamW8bit]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 5))
    qg.prepare_model(model, rank=8, target_modules=["0", "2"], **options)
    groups = qg.param_groups(model, rank=8, update_proj_gap=gap, norm_growth_limit=1.05)
    return model, qg.QGaLoreAdamW8bit(groups, lr=0.01, min_8bit_size=64)


def train(model: nn.Module, optimizer: qg.QGaLoreAdamW8bit, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 64, generator=generator), torch.randint(5, (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_training(gpu: Emulated, **options: Any) -> None:
    """Losses, weights and schedule of steps with refreshes; sums of products differ in their last bits alone."""
    found = []
    for on in (False, True):
        gpu.use(on)
        gpu.forget_counts()
        model, optimizer = build(**options)
        losses = train(model, optimizer, 10)
        assert (gpu.launches() > 0) == on
        gpu.use(False)
        exported = qg.export_model(model, torch.float32)
        found.append((losses, exported.state_dict(), optimizer.telemetry()))
    (losses, weights, told), (other_losses, other_weights, other_told) = found
    torch.testing.assert_close(losses, other_losses, rtol=2e-3, atol=0)
    for name, weight in weights.items():
        # A rounding that falls the other way moves a weight by one step of its scale.
        error = (weight - other_weights[name]).norm() / weight.norm()
        assert error < 5e-3, (name, error)
    assert [t.get("refreshes") for t in told] == [t.get("refreshes") for t in other_told]
    assert max(t.get("refreshes", 0) for t in told) >= 2


def check_bits_without_products(gpu: Emulated) -> None:
    """Where nothing is projected every bit is the CPU's: weights of each kind, moments, what is counted of ranges."""
    found: list[list[Tensor]] = []
    for on in (False, True):
        gpu.use(on)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 80), nn.Linear(80, 7).bfloat16(), nn.LayerNorm(80))
        qg.prepare_model(model, rank=8, target_modules=["0", "1"], grad_mode="full")
        optimizer = qg.QGaLoreAdamW8bit(model.parameters(), lr=0.05, min_8bit_size=64)
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
            optimizer.step()
        states = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
        found.append([*model.state_dict().values(), *states])
    assert all(left.equal(right) for left, right in zip(*found, strict=True))


def check_waits(gpu: Emulated) -> None:
    """A step without a refresh makes the host wait for nothing, and its launches do not grow with the layers."""
    galore_adamw.asynchronous = lambda device: True  # type: ignore[assignment]
    launches = []
    for layers in (2, 12):
        gpu.use()
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers)))
        qg.prepare_model(model, rank=4, target_modules="all-linear")
        optimizer = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=1000), lr=0.01)
        for step in range(10):
            model(torch.randn(4, 32)).square().mean().backward()
            if step == 9:
                gpu.forget_counts()
            optimizer.step()
            optimizer.zero_grad()
        launches.append(gpu.launches())
        assert gpu.waits() == 0, gpu.waits()
    assert launches[0] == launches[1] > 0, launches
    print(f"launches in a step: {launches[0]}")


def check_flags(gpu: Emulated) -> None:
    """A gradient that is not finite: its layer is left alone, the others are updated, and the host hears of it."""
    gpu.use()
    model, optimizer = build(gap=1000)
    train(model, optimizer, 11)
    layer, before = model[2], {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    model(torch.randn(32, 64, generator=generator)).square().mean().backward()
    layer.leaf.grad[3, 5] = math.nan
    gpu.forget_counts()
    try:
        optimizer.step()  # the number is there at once, so this step tells of it, when it is made
    except qg.NonFiniteGradientError as error:
        print(error)
    assert gpu.waits() == 0
    after = model.state_dict()
    unchanged = {name for name, value in before.items() if value.equal(after[name])}
    assert {"2.qweight", "2.scales", "2.zeros"} <= unchanged and "0.qweight" not in unchanged
    optimizer.check()  # told of once


def main() -> None:
    torch.set_num_threads(1)
    gpu = Emulated()
    check_bits_without_products(gpu)
    for name, options in MODES.items():
        check_training(gpu, **options)
        print(f"{name}: as on the CPU")
    check_waits(gpu)
    check_flags(gpu)


if __name__ == "__main__":
    main()

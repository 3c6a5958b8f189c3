"""The example's LLaMA, its loss and its schedules."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from pretrain import losses  # noqa: E402
from pretrain.data import held_out_batches  # noqa: E402
from pretrain.model import LlamaConfig, LlamaForCausalLM, build_model, hidden_states  # noqa: E402
from pretrain.report import tensor_bytes  # noqa: E402
from pretrain.schedules import SCHEDULERS, rate_factor  # noqa: E402
from pretrain_support import TINY, write_config  # noqa: E402


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 257, shape, generator=torch.Generator().manual_seed(1))


def test_number_of_parameters_is_the_configs(model: LlamaForCausalLM) -> None:
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters


def test_logits_do_not_depend_on_later_tokens(model: LlamaForCausalLM) -> None:
    first = tokens(1, 20)
    second = first.clone()
    second[0, 12:] = (second[0, 12:] + 1) % 257
    assert torch.equal(model(first)[0, :12], model(second)[0, :12])
    assert not torch.allclose(model(first)[0, 12:], model(second)[0, 12:])


def test_attention_depends_on_relative_positions(model: LlamaForCausalLM) -> None:
    """Rotary scores of two positions depend on their distance only, and do depend on it."""
    cos, sin = model.model._angles(40, torch.zeros(1))
    from pretrain.model import rotate

    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))

    def score(i: int, j: int) -> float:
        return float(rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j]))

    assert score(5, 3) == pytest.approx(score(37, 35), abs=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_model_equals_transformers(model: LlamaForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    theirs = build_model(write_config(tmp_path), use_hf_model=True, dtype=torch.float32)
    assert set(theirs.state_dict()) == set(model.state_dict())
    theirs.load_state_dict(model.state_dict())
    batch = tokens(2, 50)
    ours = hidden_states(model, batch)
    assert torch.allclose(hidden_states(theirs, batch), ours, atol=1e-5 * ours.abs().max().item())
    assert torch.allclose(theirs(batch).logits, model(batch), atol=1e-5)


@pytest.mark.parametrize("at_once", [264, 264 * 7, 264 * 64, 2**25])
def test_loss_in_chunks_equals_the_loss_at_once(
    model: LlamaForCausalLM, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    batch = tokens(2, 33)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    losses.summed_loss(model, inputs, targets).backward()
    chunked = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    assert losses.summed_loss(model, inputs, targets).item() == pytest.approx(loss.item(), rel=1e-6)
    for name, p in model.named_parameters():
        assert p.grad is not None and chunked[name] is not None
        assert torch.allclose(p.grad, chunked[name], rtol=1e-4, atol=1e-5 * p.grad.abs().max().item()), name


@pytest.mark.parametrize("length", [16, 50, 997, 998])
def test_evaluation_is_the_mean_over_all_tokens(model: LlamaForCausalLM, length: int) -> None:
    """Against one token at a time. A mean of batch means, or one batch too many, is 1 % off already."""
    stream = tokens(999).to(torch.int32)
    result = losses.evaluate(model, held_out_batches(stream, length, 7), torch.device("cpu"))
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, 998, length):
            block = stream[start : start + length + 1].long()
            logits = model(block[None, :-1])[0].double()
            for row, target in zip(logits, block[1:], strict=True):
                total += float(row.logsumexp(0) - row[target])
                count += 1
    assert result is not None and count == 998 == result[1]
    assert result[0] == pytest.approx(total / count, rel=1e-6)
    assert model.training


def test_evaluation_stops_when_asked(model: LlamaForCausalLM) -> None:
    calls = iter([False, False, True])
    batches = held_out_batches(tokens(999).to(torch.int32), 16, 4)
    assert losses.evaluate(model, batches, torch.device("cpu"), lambda: next(calls)) is None
    assert model.training


def test_schedules_rise_and_fall_as_documented() -> None:
    def factors(name: str, cycle: int = 100) -> list[float]:
        return [rate_factor(step, name, 10, 100, 0.1, cycle) for step in range(101)]

    for name in SCHEDULERS:
        assert factors(name)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert factors(name)[10] == pytest.approx(1.0)
    assert factors("constant")[100] == 1.0
    assert factors("linear")[55] == pytest.approx(0.55) and factors("linear")[100] == pytest.approx(0.1)
    assert factors("cosine")[55] == pytest.approx(0.55) and factors("cosine")[100] == pytest.approx(0.1)
    assert factors("cosine")[32] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90)))
    restarts = factors("cosine_restarts", 40)
    assert restarts[40] == restarts[80] == pytest.approx(1.0)
    assert restarts[39] < 0.11 and restarts[60] == pytest.approx(0.55)
    assert rate_factor(0, "linear", 0, 0, 0.1, 1) == 1.0  # nothing to divide by


def test_shared_storage_is_counted_once() -> None:
    base = torch.zeros(100)
    assert tensor_bytes([base, base[:10], base.view(10, 10), torch.zeros(3, dtype=torch.int8)]) == 403

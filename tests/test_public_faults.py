"""The faults of the public Q-GaLore and its forks, by the numbers of the table in docs/dropin.md: absent here.

An index. Many tests have the old behaviour beside ours, as the formula that the public code computes; the files about a
subject test it further.
"""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from dropin_model import ARGS, PROJECTED, TARGETS, Model, batch, values
from q_galore_torch import QGaLoreAdamW8bit
from q_galore_torch.utils.quantization import QGaLoreLinear, prepare_model_for_int8_training

ROOT = Path(__file__).resolve().parents[1]
EXACT: dict[str, Any] = {**PROJECTED, "quant": False}


def prepared(**changes: Any) -> nn.Module:
    return prepare_model_for_int8_training(Model(), Namespace(**{**vars(ARGS), **changes}), TARGETS)


def groups_of(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """The public script's two groups."""
    int8 = [m.weight for m in model.modules() if isinstance(m, QGaLoreLinear)]
    ids = {id(p) for p in int8}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": rest}, {"params": int8, **PROJECTED, **options}]


def public_quantize(w: Tensor, n_bit: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The public code's affine quantisation of one group, whose zero point is clamped to the codes' range."""
    most = 2**n_bit - 1
    scale = (w.max() - w.min()).clamp(min=1e-5) / most
    zero = (-torch.round(w.min() / scale)).clamp(0, most)
    return torch.clamp(torch.round(w / scale) + zero, 0, most), scale, zero


def one_weight(value: Tensor, group_size: int = 256, **group: Any) -> tuple[QGaLoreLinear, QGaLoreAdamW8bit]:
    layer = QGaLoreLinear(value, None, group_size=group_size)
    options = {"lr": 0.01, "weight_decay": 0.0, **group}
    return layer, QGaLoreAdamW8bit([{"params": [layer.weight], **EXACT, **options}])


def float_weight(value: Tensor, **group: Any) -> tuple[nn.Parameter, QGaLoreAdamW8bit]:
    weight = nn.Parameter(value.clone())
    options = {"lr": 0.01, "weight_decay": 0.0, **group}
    return weight, QGaLoreAdamW8bit([{"params": [weight], **EXACT, **options}])


def test_every_fault_of_the_page_has_a_test() -> None:
    page = (ROOT / "docs" / "dropin.md").read_text()
    told = {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.M)}
    tested = {int(name.split("_")[2]) for name in globals() if name.startswith("test_fault_")}
    assert told == tested == set(range(1, 16))


# ---------------------------------------------------------------- 1, 2: installing and importing


def test_fault_1_imports_and_steps_without_bitsandbytes_and_without_a_gpu() -> None:
    """It was written for bitsandbytes < 0.44, and needed CUDA to be imported."""
    code = """
import sys
for missing in ("bitsandbytes", "triton", "scipy", "transformers"):
    sys.modules[missing] = None
import torch
from q_galore_torch import QGaLoreAdamW8bit
from q_galore_torch.q_galore_adamw8bit import AdamW8bit
from q_galore_torch.utils.quantization import QGaLoreLinear
layer = QGaLoreLinear(torch.randn(64, 64), None)
before = layer.qweight.clone()
opt = AdamW8bit([{"params": [layer.weight], "rank": 4}], lr=0.1)
layer(torch.randn(2, 64)).sum().backward()
opt.step()
assert not torch.equal(before, layer.qweight) and not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_fault_2_every_package_is_installed() -> None:
    """``packages=["q_galore_torch"]`` left q_galore_torch.utils out; test_packaging.py looks into a real wheel."""
    setuptools = pytest.importorskip("setuptools")
    tomllib = pytest.importorskip("tomllib")
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packed = set(setuptools.find_packages(str(ROOT), include=find["include"]))
    folders = {p.parent for p in (ROOT / "q_galore_torch").rglob("*.py")}
    assert {".".join(p.relative_to(ROOT).parts) for p in folders} <= packed
    assert "q_galore_torch.utils" in packed


# ---------------------------------------------------------------- 3: per-layer updates


def test_fault_3_per_layer_updates_reach_embeddings_norms_and_head() -> None:
    """Their ``backward_hook`` was an attribute that nothing called: they stayed, and their gradients grew."""
    model = prepared()
    before = values(model)
    optimizers = {
        p: QGaLoreAdamW8bit([p] if p.dim() == 1 else [{"params": [p], **PROJECTED}]) for p in model.parameters()
    }

    def hook(p: Any) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.backward_hook = hook  # type: ignore[attr-defined]
    for step in range(3):
        model(batch(step)).backward()
    assert all(not torch.equal(value, before[name]) for name, value in values(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_fault_3_per_layer_updates_are_made_once_for_all_micro_batches() -> None:
    """Adam and the scheduler advanced on every micro-batch."""
    model = prepared()
    opt = QGaLoreAdamW8bit(groups_of(model), lr=0.01, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    qg.enable_per_layer(opt, accumulation_steps=4)
    for step in range(8):
        (model(batch(step)) / 4).backward()
        if step % 4 == 3:
            opt.step()
            scheduler.step()
    assert {state["step"] for state in opt.state.values()} == {2}
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01 / 3)


def test_fault_3_per_layer_updates_keep_the_betas() -> None:
    """The per-layer optimizers were made without them: beta2 was 0.999 whatever had been asked for."""
    results = []
    for per_layer in (False, True):
        model = prepared()
        opt = QGaLoreAdamW8bit(groups_of(model), lr=0.01, betas=(0.5, 0.6))
        if per_layer:
            qg.enable_per_layer(opt)
        for step in range(4):
            model(batch(step)).backward()
            opt.step()
            opt.zero_grad()
        results.append(values(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


# ---------------------------------------------------------------- 4: clipping


def test_fault_4_clipping_sees_int8_weights() -> None:
    """Their gradients were no ``.grad``: the norm was that of the rest, and they were never scaled."""
    model = prepared()
    model(batch(0)).backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    int8 = [p for p in trainable if hasattr(p, "group_size")]
    expected, seen = norm_of(trainable), norm_of([p for p in trainable if p not in set(int8)])
    share = norm_of(int8)
    assert len(int8) == 14 and seen < 0.99 * expected
    assert torch.nn.utils.clip_grad_norm_(trainable, expected / 10).item() == pytest.approx(expected, rel=1e-5)
    assert norm_of(int8) == pytest.approx(share / 10, rel=1e-4)


def norm_of(parameters: list[Any]) -> float:
    return sum(p.grad.double().square().sum().item() for p in parameters) ** 0.5


# ---------------------------------------------------------------- 5, 6, 7: quantisation


def test_fault_5_small_updates_of_a_bfloat16_model_arrive() -> None:
    """Dequantised, updated and rounded in bfloat16, an update of a twentieth of a step arrived at half its size."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=draw)
    layer = QGaLoreLinear(weight, None).to(torch.bfloat16)
    start, steps = layer.dequantize(torch.float32).double(), 20
    step_size = layer.scales.double().repeat_interleave(256).view(256, 256)
    lr = 0.05 * step_size.mean().item()
    opt = QGaLoreAdamW8bit([{"params": [layer.weight]}], lr=lr, weight_decay=0.0, moments_dtype="float32")
    for _ in range(steps):
        layer.weight.float_grad = torch.ones(256, 256, dtype=torch.bfloat16)
        opt.step()
    arrived = (start - layer.dequantize(torch.float32).double()).mean().item() / (steps * lr)
    assert arrived == pytest.approx(1, abs=0.03)

    old = weight.bfloat16()
    for _ in range(steps):  # the public step, group by group, and its floor + [u < fraction] in the weight's dtype
        w = old.view(-1, 256) - torch.tensor(lr, dtype=torch.bfloat16)
        scale = (w.amax(1, True) - w.amin(1, True)).clamp(min=1e-5) / 255
        zero = (-torch.round(w.amin(1, True) / scale)).clamp(0, 255)
        x = w / scale
        up = torch.rand(x.shape, generator=draw).bfloat16() < x - x.floor()
        codes = torch.clamp(torch.where(up, x.ceil(), x.floor()) + zero, 0, 255)
        old = ((codes - zero) * scale).view(256, 256)
    assert (weight.double() - old.double()).mean().item() / (steps * lr) < 0.9


def test_fault_5_weights_that_are_not_updated_stay() -> None:
    """They were rounded anew in each step, and walked at random."""
    layer, opt = one_weight(torch.randn(64, 64), stochastic_round=True)
    codes, scales, zeros = layer.qweight.clone(), layer.scales.clone(), layer.zeros.clone()
    for _ in range(20):
        layer.weight.float_grad = torch.zeros(64, 64)
        opt.step()
    assert torch.equal(layer.qweight, codes) and torch.equal(layer.scales, scales) and torch.equal(layer.zeros, zeros)


@pytest.mark.parametrize("constant", [1.0, -3.5])
def test_fault_6_a_group_of_one_sign_is_kept(constant: float) -> None:
    """256 ones decoded to 1e-5: the zero point was clamped to the range of the codes."""
    ones = torch.full((1, 256), constant)
    codes, scale, zero = public_quantize(ones)
    assert (scale * (codes - zero)).abs().max() < 1e-4
    assert torch.equal(QGaLoreLinear(ones, None).weight.detach(), ones)
    positive = 5 + torch.rand(4, 256)
    assert (QGaLoreLinear(positive, None).weight.detach() - positive).abs().max() < 0.51 / 247


def test_fault_7_int4_takes_half_a_byte() -> None:
    """It was stored one value a byte."""
    _, opt = float_weight(torch.randn(128, 64), quant=True, rank=32)
    (state,) = opt.state.values()
    assert state["proj_codes"].dtype == torch.uint8 and state["proj_codes"].numel() == 32 * 64 / 2


def test_fault_7_sizes_need_not_be_multiples_of_the_group() -> None:
    """``assert numel % group_size == 0``, without a word."""
    weight = torch.randn(7, 13)
    layer, opt = one_weight(weight, group_size=32)
    assert layer.scales.numel() == 3 and (layer.weight.detach() - weight).abs().max() < layer.scales.max()
    layer.weight.float_grad = torch.randn(7, 13)
    opt.step()
    _, opt = float_weight(torch.randn(10, 7), quant=True, rank=3, quant_group_size=16)
    next(iter(opt.state)).grad = torch.randn(10, 7)
    opt.step()


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
def test_fault_7_every_projection_type_works(proj_type: str) -> None:
    """All but "std" met an assert, in the hpml fork a name that was not defined (fault 15)."""
    gradient = torch.outer(torch.randn(12), torch.randn(8))
    weight, opt = float_weight(torch.zeros(12, 8), proj_type=proj_type, rank=2, moments_dtype="float32", lr=1.0)
    weight.grad = gradient.clone()
    opt.step()
    cosine = nn.functional.cosine_similarity(-weight.detach().flatten(), gradient.flatten(), dim=0)
    assert weight.grad is not None and cosine > 0.5
    assert torch.linalg.matrix_rank(weight.detach(), rtol=1e-4) <= 2


# ---------------------------------------------------------------- 8: the lazy rule


def gaps_of(gradients: list[Tensor]) -> list[int]:
    """The gap after each of the steps with these gradients; the base gap is 2 and two similarities decide."""
    weight, opt = float_weight(torch.zeros(32, 16), update_proj_gap=2, rank=2, queue_size=2, subspace="svd")
    gaps = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        opt.step()
        gaps.append(opt.state[weight]["gap"])
    return gaps


STEADY = torch.outer(torch.arange(1.0, 33), torch.arange(1.0, 17))


def test_fault_8_similarity_does_not_hang_on_the_signs_of_an_svd() -> None:
    """v and -v span the same line, and their cosine is -1: a stable subspace looked like one that turns round."""
    v = torch.linalg.svd(STEADY)[2][0]
    assert nn.functional.cosine_similarity(v, -v, dim=0).item() == pytest.approx(-1, abs=1e-5)
    assert gaps_of([STEADY * (-1) ** (i // 2) for i in range(30)])[-1] > 2


def test_fault_8_the_gap_is_bounded_and_the_queue_cleared() -> None:
    """A queue that stayed full doubled the gap at every refresh, without an end."""
    gaps = gaps_of([STEADY] * 150)
    stretches = [i for i in range(1, 150) if gaps[i] > gaps[i - 1]]
    assert max(gaps) == 32 and len(stretches) == 4
    # Two similarities for each stretch, so two refreshes at the gap that it had.
    assert all(later - at >= 2 * gaps[at] for at, later in zip(stretches, stretches[1:], strict=False))
    old, step = 2, 0
    while step < 150:  # similarities of 1 in a queue that is always full
        step += old
        old *= 2
    assert old > 100


def test_fault_8_the_gap_comes_back_when_the_subspace_moves() -> None:
    """It never did."""
    draw = torch.Generator().manual_seed(3)
    moving = [torch.outer(torch.randn(32, generator=draw), torch.randn(16, generator=draw)) for _ in range(80)]
    gaps = gaps_of([STEADY] * 40 + moving)
    assert gaps[39] > 2 and gaps[-1] == 2


# ---------------------------------------------------------------- 9: the step


def test_fault_9_decay_is_applied_before_the_update() -> None:
    """``(w + u) (1 - lr wd)`` in place of AdamW's ``w (1 - lr wd) + u``: the update itself was decayed."""
    start, gradient, keep = torch.full((16, 16), 2.0), torch.randn(16, 16), 1 - 0.5 * 0.5
    results = []
    for decay in (0.0, 0.5):
        weight, opt = float_weight(start, rank=4, moments_dtype="float32", lr=0.5, weight_decay=decay)
        weight.grad = gradient.clone()
        opt.step()
        results.append(weight.detach())
    update = results[0] - start
    assert torch.allclose(results[1], keep * start + update, atol=1e-5)
    assert (keep * (start + update) - results[1]).abs().max() > 0.05


@pytest.mark.parametrize("make", [float_weight, one_weight])
def test_fault_9_the_gradient_keeps_its_shape_and_values(make: Any) -> None:
    """After a step it was the projected one, which a logged norm and the next micro-batch then met."""
    owner, opt = make(torch.randn(32, 16))
    weight = opt.param_groups[0]["params"][0]
    weight.grad = torch.randn(32, 16)
    kept = weight.grad.clone()
    opt.step()
    assert torch.equal(weight.grad, kept), owner


def test_fault_9_a_layer_without_a_gradient_is_left_alone() -> None:
    """``project(None)`` raised."""
    model = prepared()
    before = values(model)
    opt = QGaLoreAdamW8bit(groups_of(model), lr=0.01)
    model(batch(0)).backward()
    idle = model.layers[1].mlp.up_proj.weight
    idle.grad = None
    opt.step()
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert changed == set(before) - {"layers.1.mlp.up_proj.weight"} and opt.state[idle]["step"] == 0


# ---------------------------------------------------------------- 10: saving


def test_fault_10_scales_and_zeros_are_saved_moved_and_copied() -> None:
    """They were attributes of a tensor: a loaded or copied model had none."""
    old = nn.Parameter(torch.zeros(4))
    old.scales = torch.ones(1)  # type: ignore[attr-defined]
    assert not hasattr(copy.deepcopy(old), "scales") and not hasattr(old.to(torch.float64), "scales")
    model = prepared()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = prepare_model_for_int8_training(Model(), ARGS, TARGETS)
    with torch.no_grad():
        for module in loaded.modules():
            if isinstance(module, QGaLoreLinear):
                module.set_weight(torch.zeros(module.weight.shape))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(model), loaded, copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)):
        for name, module in other.named_modules():
            if isinstance(module, QGaLoreLinear):
                kept = model.get_submodule(name)
                assert torch.equal(module.weight.scales, kept.weight.scales), name
                assert torch.equal(module.weight.zeros, kept.weight.zeros), name


def test_fault_10_the_optimizer_is_restored_from_a_weights_only_file() -> None:
    """The state held a pickled projector object, which ``weights_only=True`` refuses; the script never loaded it."""

    def training(steps: range, saved: Any = None) -> tuple[nn.Module, Any]:
        model = prepared()
        opt = QGaLoreAdamW8bit(groups_of(model), lr=0.01)
        if saved is not None:
            saved.seek(0)
            state = torch.load(saved, weights_only=True)
            model.load_state_dict(state["model"])
            opt.load_state_dict(state["optimizer"])
        for step in steps:
            model(batch(step)).backward()
            opt.step()
            opt.zero_grad()
        return model, opt

    whole, _ = training(range(12))
    half, opt = training(range(6))
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": opt.state_dict()}, file)
    resumed, _ = training(range(6, 12), file)
    assert all(torch.equal(value, values(resumed)[name]) for name, value in values(whole).items())


def test_fault_10_the_per_layer_state_is_one_state_dict() -> None:
    """In single-GPU mode saving asked a dict of optimizers for its state_dict, and crashed."""
    model = prepared()
    opt = QGaLoreAdamW8bit(groups_of(model), lr=0.01)
    qg.enable_per_layer(opt)
    model(batch(0)).backward()
    opt.step()
    same = prepared()
    other = QGaLoreAdamW8bit(groups_of(same), lr=0.01)
    other.load_state_dict(opt.state_dict())
    assert {state["step"] for state in other.state.values()} == {1}


# ---------------------------------------------------------------- 11: several processes


def test_fault_11_rounding_draws_nothing_from_the_random_number_generators() -> None:
    """Replicas agreed only while all ranks had drawn the same numbers; test_distributed.py runs real processes."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(0)
        layer, opt = one_weight(torch.randn(64, 64), lr=1e-3)
        for step in range(5):
            torch.manual_seed(seed)
            state = torch.random.get_rng_state()
            layer.weight.float_grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            opt.step()
            assert torch.equal(torch.random.get_rng_state(), state)
        results.append(layer.qweight)
    assert torch.equal(*results)


def test_fault_11_only_low_rank_gradients_are_reduced() -> None:
    """Every rank gathered every full gradient of every rank. What DDP reduces here is the leaf's R."""
    model = qg.prepare_model(Model(), rank=4, target_modules=["attn", "mlp"])
    leaves = [m.leaf for m in model.modules() if isinstance(m, qg.QGaLoreLinear)]
    assert all(4 in leaf.shape and leaf.numel() == 4 * max(leaf.shape) for leaf in leaves)
    full = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, qg.QGaLoreLinear))
    assert sum(leaf.numel() for leaf in leaves) * 4 < full


# ---------------------------------------------------------------- 12: cost


def test_fault_12_the_int8_matrices_of_a_group_are_one_operator_call() -> None:
    """45 kernels and 18 full-size temporaries for each matrix; here docs/kernels counts the bytes, and
    test_asynchronous.py that a step waits for nothing."""
    model = prepared()
    opt = QGaLoreAdamW8bit(groups_of(model), lr=0.01)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for step in range(3):
            model(batch(step)).backward()
            opt.step()
            opt.zero_grad()
    (calls,) = [event.count for event in profile.key_averages() if event.key == "q_galore::galore_step_"]
    assert calls == 3


# ---------------------------------------------------------------- 13: odd gradients


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fault_13_a_gradient_that_is_not_finite_is_named_and_not_used(bad: float) -> None:
    """The SVD raised from LAPACK, or NaN went into weights and moments."""
    model = prepared()
    before = values(model)
    opt = QGaLoreAdamW8bit(groups_of(model), lr=0.01)
    model(batch(0)).backward()
    model.layers[0].mlp.up_proj.weight.grad[3, 4] = bad
    with pytest.raises(qg.NonFiniteGradientError, match=r"layers\.0\.mlp\.up_proj"):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_fault_13_a_zero_gradient_is_no_reason_to_raise() -> None:
    layer, opt = one_weight(torch.randn(32, 32))
    codes = layer.qweight.clone()
    layer.weight.float_grad = torch.zeros(32, 32)
    opt.step()
    assert torch.equal(layer.qweight, codes)
    layer.weight.float_grad = torch.randn(32, 32)
    opt.step()
    assert not torch.equal(layer.qweight, codes)


def test_fault_13_convolutions_are_projected() -> None:
    """A gradient of four dimensions raised in the SVD, or its layer was left out with a log line."""
    conv = nn.Conv2d(6, 8, 3)
    before = conv.weight.detach().clone()
    opt = QGaLoreAdamW8bit([{"params": [conv.bias]}, {"params": [conv.weight], **PROJECTED}], lr=0.01)
    conv(torch.randn(2, 6, 5, 5)).square().sum().backward()
    opt.step()
    assert conv.weight.shape == before.shape and not torch.equal(conv.weight, before)
    assert torch.linalg.matrix_rank((conv.weight.detach() - before).flatten(1).double(), rtol=1e-3) <= 8


# ---------------------------------------------------------------- 14: evaluation


def test_fault_14_evaluation_divides_by_what_it_has_summed() -> None:
    """The sum was divided by one batch more than it had, which flattered every reported loss.

    That the loop makes as many updates as it is told, and not one more, is in test_pretrain.py.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    from pretrain.losses import evaluate
    from pretrain.model import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_sequence_length=8))
    draws = [torch.randint(11, (2, 2, 4)) for _ in range(3)]
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as another
    found = evaluate(model, [(d[0], d[1]) for d in draws], torch.device("cpu"))
    assert found is not None
    assert found[0] == pytest.approx(torch.tensor(11.0).log().item(), rel=1e-6) and found[1] == 24


# ---------------------------------------------------------------- 15: the hpml fork


def test_fault_15_the_projector_is_not_quantised_again_in_each_step() -> None:
    """Decoded and encoded twice a step it drifted; here its codes change at a refresh and at no other time."""
    weight, opt = float_weight(torch.randn(64, 32), quant=True, update_proj_gap=100, rank=4)
    kept = None
    for step in range(10):
        weight.grad = torch.randn(64, 32)
        opt.step()
        codes = opt.state[weight]["proj_codes"].clone()
        assert kept is None or torch.equal(codes, kept), step
        kept = codes


def test_fault_15_both_bases_of_full_are_kept() -> None:
    """The second one was stored in the place of the first."""
    weight, opt = float_weight(torch.randn(24, 40), proj_type="full", rank=3, moments_dtype="float32", lr=1.0)
    weight.grad = gradient = torch.randn(24, 40)
    before = weight.detach().clone()
    opt.step()
    state = opt.state[weight]
    assert state["dim"] == 24 and state["right_dim"] == 40 and state["exp_avg"].shape == (3, 3)
    update = (weight.detach() - before).double()
    u, _, v = torch.linalg.svd(gradient.double())
    inside = u[:, :3] @ u[:, :3].t() @ update @ v[:3].t() @ v[:3]
    assert torch.allclose(inside, update, atol=1e-4)


# ---------------------------------------------------------------- seen in the wild


def test_a_non_contiguous_gradient_gives_the_same_update() -> None:
    """The 8-bit kernels read its memory in the wrong order."""
    gradient, results = torch.randn(32, 48), []
    for given in (gradient, gradient.t().contiguous().t()):
        layer, opt = one_weight(torch.randn(32, 48, generator=torch.Generator().manual_seed(0)))
        plain = nn.Parameter(torch.zeros(32, 48))
        opt.add_param_group({"params": [plain], "lr": 0.1})
        layer.weight.float_grad = given
        plain.grad = given
        opt.step()
        results.append((layer.qweight, plain.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("keywords", "group", "message"),
    [
        (dict(lr="much"), {}, "lr must be a number >= 0, got 'much'"),
        (dict(betas="0.9"), {}, r"betas must be two numbers in \[0, 1\), got '0.9'"),
        ({}, dict(rank="8.5"), r"rank must be an integer in \[1, 2\*\*31\), got '8.5'"),
        ({}, dict(quant="perhaps"), "quant must be True or False, got 'perhaps'"),
        ({}, dict(proj_quant=True), "unknown group option proj_quant=True"),
    ],
)
def test_strings_that_say_nothing_are_refused(keywords: Any, group: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QGaLoreAdamW8bit([{"params": [nn.Parameter(torch.zeros(8, 8))], **PROJECTED, **group}], **keywords)


def test_strings_that_spell_numbers_are_parsed() -> None:
    """``optim_args`` hands on whatever stands between = and the next comma; it was used as it was, or ignored."""
    group = {"rank": "4", "update_proj_gap": "50", "scale": "0.25", "quant": "True", "quant_group_size": "128"}
    weight = nn.Parameter(torch.zeros(8, 8))
    opt = QGaLoreAdamW8bit([{"params": [weight], **group}], lr="1e-3", weight_decay="0.1", eps="1e-6")
    (made,) = opt.param_groups
    assert (made["lr"], made["weight_decay"], made["eps"]) == (1e-3, 0.1, 1e-6)
    assert (made["rank"], made["update_proj_gap"], made["scale"], made["proj_block"]) == (4, 50, 0.25, 128)

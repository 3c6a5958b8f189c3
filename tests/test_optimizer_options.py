"""Every option of the optimizer: defaults, what is parsed, what is refused and with which sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import q_galore_torch as qg
from q_galore_torch.optim import options


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*(shape or (32, 16)), dtype=dtype))


def projected(**options: Any) -> dict[str, Any]:
    opt = qg.QGaLoreAdamW8bit([{"params": [matrix()], "rank": 4, **options}])
    return opt.param_groups[0]


def test_defaults() -> None:
    group = projected()
    expected = dict(
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        moments_dtype="dynamic8",
        stochastic_round=True,
        rank=4,
        update_proj_gap=200,
        scale=0.25,
        proj_type="std",
        proj_format="int4",
        proj_block=256,
        subspace="warm",
        lazy_rule="energy",
        energy_threshold=0.8,
        max_proj_gap=None,
        norm_growth_limit=None,
        cos_threshold=0.4,
        gamma_proj=2.0,
        queue_size=5,
        moments="keep",
    )
    assert {key: group[key] for key in expected} == expected


def test_the_whole_constructor_of_upstream_is_accepted() -> None:
    opt = qg.QGaLoreAdamW8bit([matrix()], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, 32, None, 4096, 100, True, False)
    assert opt.param_groups[0]["min_8bit_size"] == 4096
    qg.QGaLoreAdamW8bit([matrix()], optim_bits=8)


@pytest.mark.parametrize(
    ("keys", "format_", "block"),
    [
        (dict(quant=True, quant_n_bit=4, quant_group_size=128), "int4", 128),
        (dict(quant=True, quant_n_bit=8), "int8", 256),
        (dict(quant=True), "int4", 256),
        (dict(quant_n_bit=8), "int8", 256),
        (dict(quant=False), "float32", 256),
        (dict(proj_format="int8"), "int8", 256),
        (dict(proj_format="float32"), "float32", 256),
        (dict(proj_block="64"), "int4", 64),
        (dict(proj_block=0), "int4", 0),
        (dict(proj_block=None), "int4", 256),
        (dict(proj_format="bfloat16"), "bfloat16", 256),
        (dict(proj_format="bfloat16", proj_block=64), "bfloat16", 256),
        (dict(proj_format="fp8"), "fp8", 256),
        (dict(proj_format="fp8_e4m3"), "fp8_e4m3", 256),
        (dict(proj_format="fp8_e4m3", proj_block=0), "fp8_e4m3", 0),
        (dict(proj_format="fp4"), "fp4", 64),
        (dict(proj_format="nf4"), "nf4", 64),
        (dict(proj_format="nf4", proj_block=128), "nf4", 128),
        (dict(quant=False, quant_group_size=64), "float32", 256),
        (dict(quant_n_bit=8, quant_group_size=0), "int8", 0),
        (dict(quantize_type="4bit"), "fp4", 64),
        (dict(quantize_type="4bit", quantize_blocksz=4096), "fp4", 4096),
        (dict(quantize_type="8bit"), "fp8", 0),
        (dict(quantize_type="8bit", quantize_blocksz=4096), "fp8", 0),
        (dict(quantize_type="8bit_blockwise"), "fp8", 4096),
        (dict(quantize_type="8bit_blockwise", quantize_blocksz="256"), "fp8", 256),
        (dict(quantize_type=None), "float32", 256),
        (dict(quantize_type=None, quantize_blocksz=4096), "float32", 256),
        (dict(proj_quantize_type="4bit"), "fp4", 64),
        (dict(proj_quantize_type="8bit_blockwise", proj_quantize_blocksz=512), "fp8", 512),
    ],
)
def test_projector_format_keys(keys: dict[str, Any], format_: str, block: int) -> None:
    group = projected(**keys)
    assert (group["proj_format"], group["proj_block"]) == (format_, block)
    assert not any("quant" in key for key in group)
    opt = qg.QGaLoreAdamW8bit([{"params": [matrix()], "rank": 4, **keys}])
    opt.load_state_dict(opt.state_dict())
    assert (opt.param_groups[0]["proj_format"], opt.param_groups[0]["proj_block"]) == (format_, block)


def test_numbers_given_as_strings_are_parsed() -> None:
    group = projected(lr="0.01", scale="1", update_proj_gap="50", gamma_proj="3", stochastic_round="False")
    assert (group["lr"], group["scale"], group["update_proj_gap"], group["gamma_proj"]) == (0.01, 1.0, 50, 3.0)
    assert group["stochastic_round"] is False
    assert projected(rank="8")["rank"] == 8
    assert projected(max_proj_gap="800", norm_growth_limit="1.01")["max_proj_gap"] == 800


def test_cos_threshold_is_accepted_and_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    options._warn_once.cache_clear()
    for _ in range(3):
        projected(cos_threshold=0.3)
    assert caplog.text.count("cos_threshold acts only under lazy_rule='upstream'") == 1
    projected(cos_threshold=0.3, lazy_rule="upstream")
    projected()
    assert caplog.text.count("cos_threshold") == 1


def test_group_values_override_the_constructor_s() -> None:
    opt = qg.QGaLoreAdamW8bit(
        [{"params": [matrix()], "lr": 0.5, "moments_dtype": "float32"}, {"params": [matrix()]}], lr=0.1
    )
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.1]
    assert [g["moments_dtype"] for g in opt.param_groups] == ["float32", "dynamic8"]


BAD_CONSTRUCTOR = [
    (dict(lr=-1), "lr must be a number >= 0, got -1"),
    (dict(lr="fast"), "lr must be a number >= 0, got 'fast'"),
    (dict(lr=float("nan")), "lr must be a number >= 0, got nan"),
    (dict(lr=True), "lr must be a number >= 0, got True"),
    (dict(betas=(0.9, 1.0)), r"betas must be two numbers in \[0, 1\), got 1.0"),
    (dict(betas=0.9), r"betas must be two numbers in \[0, 1\), got 0.9"),
    (dict(eps=0), "eps must be a number > 0, got 0"),
    (dict(weight_decay=-0.1), "weight_decay must be a number >= 0, got -0.1"),
    (dict(amsgrad=True), "amsgrad=True is not supported .*; allowed: False"),
    (dict(optim_bits=16), "optim_bits must be 8 or 32, got 16"),
    (dict(args={"x": 1}), "args=.* is not supported .*; allowed: None"),
    (dict(percentile_clipping=5), "percentile_clipping=5 is not supported .*; allowed: 100"),
    (dict(block_wise=False), "block_wise=False is not supported .*; allowed: True"),
    (dict(is_paged=True), "is_paged=True is not supported .*; allowed: False"),
    (dict(min_8bit_size=-1), "min_8bit_size must be an integer >= 0, got -1"),
    (dict(min_8bit_size=1.5), "min_8bit_size must be an integer >= 0, got 1.5"),
    (dict(moments_dtype="int8"), "moments_dtype must be 'dynamic8' or 'float32', got 'int8'"),
    (dict(seed=-1), r"seed must be an integer in \[0, 2\*\*63\), got -1"),
    (dict(stochastic_round=1), "stochastic_round must be True or False, got 1"),
    (dict(nonfinite="ignore"), "nonfinite must be 'raise' or 'skip', got 'ignore'"),
    (dict(compute_dtype="float16"), "compute_dtype must be 'float32' or 'bfloat16', got 'float16'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONSTRUCTOR)
def test_constructor_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        qg.QGaLoreAdamW8bit([matrix()], **options)


BAD_GROUP = [
    (dict(rank=0), r"rank must be an integer in \[1, 2\*\*31\), got 0"),
    (dict(rank=2.5), r"rank must be an integer in \[1, 2\*\*31\), got 2.5"),
    (dict(update_proj_gap=0), r"update_proj_gap must be an integer in \[1, 2\*\*31\), got 0"),
    (dict(update_proj_gap=10**10), r"update_proj_gap must be an integer in \[1, 2\*\*31\), got 10000000000"),
    (dict(scale=float("inf")), "scale must be a finite number, got inf"),
    (dict(proj_type="up"), "proj_type must be 'std' or 'reverse_std' or 'right' or 'left' or 'full', got 'up'"),
    (dict(proj_format="int2"), "proj_format must be 'float32' or 'bfloat16' or 'int8' or .* or 'nf4', got 'int2'"),
    (dict(proj_block=-1), r"proj_block must be an integer in \[0, 2\*\*31\), got -1"),
    (dict(proj_format="float32", proj_block=-1), r"proj_block must be an integer in \[0, 2\*\*31\), got -1"),
    (dict(quant=True, proj_format="int4"), "proj_format and quant describe the projector's format twice.*"),
    (dict(quantize_type="4bit", proj_block=64), "proj_block and quantize_type describe .* twice.*"),
    (dict(quantize_type="4bit", quant_n_bit=4), "quant_n_bit and quantize_type describe .* twice.*"),
    (dict(quantize_type="4bit", proj_quantize_type="4bit"), "quantize_type and proj_quantize_type describe .* twice.*"),
    (dict(quant_n_bit=3), "quant_n_bit must be 4 or 8, got 3"),
    (dict(quant_group_size=-1), r"quant_group_size must be an integer in \[0, 2\*\*31\), got -1"),
    (dict(quantize_type="2bit"), "quantize_type must be None or '4bit' or '8bit' or '8bit_blockwise', got '2bit'"),
    (dict(proj_quantize_type=4), "proj_quantize_type must be None or '4bit' or '8bit' or '8bit_blockwise', got 4"),
    (dict(quantize_type="4bit", quantize_blocksz=-1), r"quantize_blocksz must be an integer in \[0, 2\*\*31\), got -1"),
    (dict(quantize_blocksz=64), "quantize_blocksz=64 needs quantize_type: None or '4bit' or .*"),
    (dict(proj_quantize_type="9", quantize_blocksz=4), "quantize_blocksz and proj_quantize_type describe .* twice.*"),
    (dict(subspace="warm", lazy_rule="upstream"), "subspace must be 'svd' under lazy_rule='upstream', .*, got 'warm'"),
    (dict(subspace="qr"), "subspace must be 'warm' or 'svd' or 'random', got 'qr'"),
    (dict(lazy_rule="cosine"), "lazy_rule must be 'energy' or 'upstream' or 'fixed', got 'cosine'"),
    (dict(energy_threshold=0), r"energy_threshold must be a number in \(0, 1\], got 0"),
    (dict(energy_threshold=1.5), r"energy_threshold must be a number in \(0, 1\], got 1.5"),
    (dict(max_proj_gap=0), r"max_proj_gap must be an integer in \[1, 2\*\*31\) or None, got 0"),
    (dict(max_proj_gap=100), "max_proj_gap must be at least update_proj_gap=200, or None for 16 times that, got 100"),
    (dict(norm_growth_limit=0.99), "norm_growth_limit must be a number >= 1 or None, got 0.99"),
    (dict(norm_growth_limit=float("inf")), "norm_growth_limit must be a number >= 1 or None, got inf"),
    (dict(moments="turn"), "moments must be 'keep' or 'rotate' or 'reset', got 'turn'"),
    (dict(cos_threshold=1.5), r"cos_threshold must be a number in \[-1, 1\], got 1.5"),
    (dict(gamma_proj=0.5), r"gamma_proj must be a number in \[1, 2\*\*31\), got 0.5"),
    (dict(gamma_proj=1e308), r"gamma_proj must be a number in \[1, 2\*\*31\), got 1e\+308"),  # times a gap: infinity
    (dict(queue_size=0), r"queue_size must be an integer in \[1, 2\*\*31\), got 0"),
    (dict(seed=3), r"seed is an option of the constructor, not of a group \(got 3\)"),
    (dict(update_proj_gab=3), "unknown group option update_proj_gab=3; allowed: .*update_proj_gap.*"),
]


@pytest.mark.parametrize(("options", "message"), BAD_GROUP)
def test_group_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        projected(**options)


def test_projection_options_need_a_rank() -> None:
    with pytest.raises(ValueError, match="^scale=0.5 needs a rank: it has no meaning in a group without one$"):
        qg.QGaLoreAdamW8bit([{"params": [matrix()], "scale": 0.5}])


@pytest.mark.parametrize(
    ("parameter", "rank", "message"),
    [
        (matrix(8), 4, r"group 0 .* has shape \[8\]; a group with a rank takes two or more dimensions"),
        (matrix(0, 4), 4, "is empty and cannot be projected"),
        (matrix(8, 4, dtype=torch.float64), 4, "must be float32, bfloat16 or float16, got torch.float64"),
        (matrix(8, dtype=torch.complex64), None, "must be float32, bfloat16 or float16, got torch.complex64"),
    ],
)
def test_parameters_that_cannot_be_optimised_are_named(parameter: nn.Parameter, rank: Any, message: str) -> None:
    good = matrix()
    with pytest.raises(ValueError, match=message) as caught:
        qg.QGaLoreAdamW8bit([{"params": [good, parameter], "rank": rank}])
    assert "parameter 1 of group 0" in str(caught.value)
    with pytest.raises(ValueError, match="^conv.weight "):
        qg.QGaLoreAdamW8bit([{"params": [("fine", good), ("conv.weight", parameter)], "rank": rank}])


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    opt = qg.QGaLoreAdamW8bit([matrix()])
    for bad in ({"params": [matrix(3)], "rank": 2}, {"params": [matrix()], "ranks": 2}):
        with pytest.raises(ValueError):
            opt.add_param_group(bad)
    assert len(opt.param_groups) == 1 and len(opt.state) == 1
    with pytest.raises(TypeError, match="param_group must be a dict, got list"):
        opt.add_param_group([matrix()])  # type: ignore[arg-type]


def test_sparse_and_wrong_gradients_are_refused() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    opt = qg.QGaLoreAdamW8bit([("table", table.weight)])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="the gradient of table must be dense"):
        opt.step()


def test_a_learning_rate_may_be_a_tensor_of_one_element() -> None:
    ends = []
    for lr, group_lr in ((0.25, 0.5), (torch.tensor(0.25), torch.tensor([0.5]))):
        weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
        opt = qg.QGaLoreAdamW8bit([{"params": [weights[0]]}, {"params": [weights[1]], "lr": group_lr}], lr=lr)
        assert opt.param_groups[0]["lr"] is lr or isinstance(lr, float)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.ones(4)
            opt.step()
            scheduler.step()
        assert isinstance(opt.param_groups[1]["lr"], type(group_lr))
        opt.load_state_dict(opt.state_dict())
        ends.append(torch.stack([w.detach() for w in weights]))
    assert torch.equal(*ends)
    for bad in (torch.tensor([0.1, 0.2]), torch.tensor(-1.0), torch.tensor(True)):
        with pytest.raises(ValueError, match="^lr must be a number >= 0, got "):
            qg.QGaLoreAdamW8bit([matrix()], lr=bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lr=-1.0), "lr must be a number >= 0, got -1.0"),
        (dict(betas=(0.9, 2.0)), r"betas must be two numbers in \[0, 1\), got 2.0"),
        (dict(eps=0.0), "eps must be a number > 0, got 0.0"),
        (dict(weight_decay=float("nan")), "weight_decay must be a number >= 0, got nan"),
        (dict(scale=float("inf")), "scale must be a finite number, got inf"),
        # A gap of 0 divided by zero at a later refresh, with other bases replaced already.
        (dict(update_proj_gap=0), r"update_proj_gap must be an integer in \[1, 2\*\*31\), got 0"),
        (
            dict(update_proj_gap=400, max_proj_gap=300),
            "max_proj_gap must be at least update_proj_gap=400, or .*, got 300",
        ),
    ],
)
def test_a_setting_that_became_invalid_stops_the_step_before_any_write(change: dict[str, Any], message: str) -> None:
    weights = [nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
    opt = qg.QGaLoreAdamW8bit([{"params": [weights[0]]}, {"params": [weights[1]], "rank": 2}])
    for weight in weights:
        weight.grad = torch.ones(8, 8)
    opt.param_groups[1].update(change)
    with pytest.raises(ValueError, match=f"^{message}$"):
        opt.step()
    assert all(torch.equal(w, torch.ones(8, 8)) for w in weights)
    assert [s["step"] for s in opt.state.values()] == [0, 0]

"""The zero leaf's invariants: memory, forward, checkpoints, moves, copies, foreign writes, reads of a full weight."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch.nn import leaf as leaves
from q_galore_torch.nn.leaf import ZeroLeaf, ZeroWeight

MODES = ["low_rank", "full"]


def make(mode: str = "low_rank", bits: Any = 8, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Linear(24, 3)).to(dtype)
    qg.prepare_model(model, 4, ["0", "2"], weight_bits=bits, grad_mode=mode)
    return model, qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=3), lr=0.01)


def train(model: nn.Module, opt: Any, steps: int = 3, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
        loss = model(x.to(model[3].weight.dtype)).float().square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def write_raw(leaf: Tensor) -> None:
    """Put ones into a leaf's memory behind every check (a write that the version counter does not see)."""
    zero = leaf._zero.base  # type: ignore[attr-defined]
    torch.empty(0).set_(zero.untyped_storage()).fill_(1.0)


# ---------------------------------------------------------------- memory and forward


@pytest.mark.parametrize("mode", MODES)
def test_leaves_of_a_device_and_dtype_share_one_zero_buffer(mode: str) -> None:
    model, _ = make(mode)
    a, b = model[0].leaf, model[2].leaf
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert a._zero is b._zero and a._zero.base.numel() >= max(a.numel(), b.numel())
    assert isinstance(a, nn.Parameter) and a.is_contiguous() and a.requires_grad
    assert a.shape == ((4, 40) if mode == "low_rank" else (40, 24))


def test_the_buffer_grows_in_place_and_is_freed_with_its_last_leaf() -> None:
    gc.collect()
    key = (torch.device("cpu"), torch.float64)
    small = ZeroLeaf((2, 3), *key)
    large = ZeroLeaf((50, 7), *key)
    assert small.untyped_storage().data_ptr() == large.untyped_storage().data_ptr()
    assert not small.any() and not large.any() and large.shape == (50, 7)
    assert leaves.untouched(small) and leaves.untouched(large)
    del small, large
    gc.collect()
    assert key not in leaves._buffers


@pytest.mark.parametrize("mode", MODES)
def test_forward_and_backward_never_read_the_leaf(mode: str) -> None:
    model, opt = make(mode)
    x = torch.randn(5, 24)
    results = []
    for _ in range(2):
        y = model(x)
        y.sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
        opt.zero_grad()
        write_raw(model[0].leaf)
    model[0].leaf._zero.base.zero_()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_the_leaf_is_never_in_a_checkpoint(mode: str) -> None:
    model, opt = make(mode)
    train(model, opt)
    state = model.state_dict()
    assert list(state) == [
        *("0.bias", "0.qweight", "0.scales", "0.zeros", "0.group_size"),
        *("2.bias", "2.qweight", "2.scales", "2.zeros", "2.group_size"),
        *("3.weight", "3.bias"),
    ]
    assert {name for name, _ in model.named_parameters()} - set(state) == {
        f"{i}.{'coordinates' if mode == 'low_rank' else 'weight'}" for i in (0, 2)
    }
    other, _ = make(mode)
    names, before = [n for n, _ in other.named_parameters()], other[0].leaf
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert [n for n, _ in other.named_parameters()] == names and other[0].leaf is before
    assert torch.equal(other[0].qweight, model[0].qweight) and torch.equal(other[2].dequantize(), model[2].dequantize())
    x = torch.randn(2, 24)
    assert torch.equal(model(x), other(x))


def test_a_float_layer_s_checkpoint_is_nn_linear_s() -> None:
    model, _ = make(bits=None)
    plain = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Linear(24, 3))
    assert set(model.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 24)
    assert torch.equal(model(x), plain(x))


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("mode", MODES)
def test_a_float_checkpoint_is_quantised_on_loading(mode: str) -> None:
    model, opt = make(mode)
    plain = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Linear(24, 3))
    model.load_state_dict(plain.state_dict())
    codes, scales, zeros = qg.ops.int8_quantize(plain[0].weight.detach())
    assert torch.equal(model[0].qweight, codes) and torch.equal(model[0].scales, scales)
    assert torch.equal(model[0].zeros, zeros)
    train(model, opt)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("0.qweight", torch.zeros(40, 24), "0.qweight must be torch.uint8, got torch.float32"),
        ("0.scales", torch.zeros(4).half(), "0.scales must be torch.float32, got torch.float16"),
        ("0.qweight", torch.zeros(24, 40).byte(), "size mismatch for 0.qweight"),
        ("0.coordinates", torch.zeros(4, 40), 'Unexpected key.*"0.coordinates"'),
    ],
)
def test_loading_refuses(key: str, value: Tensor, message: str) -> None:
    model, _ = make()
    state = {**model.state_dict(), key: value}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match='Missing key.*"0.scales"'):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "0.scales"})
    assert not any(missing.endswith("coordinates") for missing in model.load_state_dict({}, strict=False).missing_keys)


def test_load_with_assign_keeps_the_leaf() -> None:
    model, opt = make()
    other, _ = make()
    leaf = model[0].leaf
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert model[0].leaf is leaf and model[0].scales.dtype == torch.float32
    opt.param_groups[0]["params"] = [
        p for p in model.parameters() if not isinstance(p, ZeroLeaf)
    ]  # assign made new ones
    model(torch.randn(2, 24)).sum().backward()
    assert leaf.grad is not None


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize(("mode", "bits"), [("low_rank", 8), ("full", 8), ("low_rank", None)])
def test_to_dtype_keeps_leaf_scales_and_order(mode: str, bits: Any) -> None:
    model, opt = make(mode, bits)
    leaf, names = model[0].leaf, [n for n, _ in model.named_parameters()]
    model.to(torch.bfloat16)
    assert [n for n, _ in model.named_parameters()] == names
    assert model[0].leaf is leaf and opt.param_groups[1]["params"][0] is leaf
    assert leaf.dtype == (torch.float32 if mode == "low_rank" else torch.bfloat16)
    assert model[0].bias.dtype == torch.bfloat16 and model[0].dequantize().dtype == torch.bfloat16
    if bits == 8:
        assert (model[0].scales.dtype, model[0].qweight.dtype) == (torch.float32, torch.uint8)
        assert model[0].zeros.dtype == torch.int16
    assert not leaf._zero.base.any()
    if mode == "full":
        assert leaf._zero is leaves.ZeroBuffer.of(torch.device("cpu"), torch.bfloat16)
    train(model, opt)
    model.float()
    assert model[0].compute_dtype == torch.float32
    train(model, opt)


def test_half_and_back_changes_no_code() -> None:
    model, _ = make()
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("0.") and "bias" not in k}
    model.half().double().float()
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value) and model.state_dict()[key].dtype == value.dtype


@pytest.mark.parametrize("mode", MODES)
def test_from_meta_by_to_empty(mode: str) -> None:
    """A model prepared on the meta device, given memory, loaded and trained like one that was never there."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Linear(24, 3))
    qg.prepare_model(model, 4, ["0", "2"], grad_mode=mode)
    old = model[0].leaf
    assert old.device.type == "meta" and model[0].qweight.device.type == "meta"
    model.to_empty(device="cpu")
    source, opt = make(mode)
    assert model[0].leaf.device.type == "cpu" and not leaves._buffers[model[0].leaf.device, torch.float32].base.any()
    model.load_state_dict(source.state_dict())
    assert model[0].scales.dtype == torch.float32
    own = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=3), lr=0.01)
    assert train(model, own) == train(source, opt)


def test_a_replaced_leaf_is_found_by_its_layer() -> None:
    """Optimizers find a layer by number: a new leaf object in the layer takes over state, projector and gradient."""
    model, opt = make()
    twin, twin_opt = make()
    train(model, opt, 4)
    train(twin, twin_opt, 4)
    layer = model[0]
    old = layer.leaf
    layer._parameters["coordinates"] = new = ZeroLeaf(old.shape, old.device, old.dtype)
    opt.zero_grad()
    assert opt.param_groups[1]["params"][0] is new and new in opt.state and old not in opt.state
    assert train(model, opt, 4, 4) == train(twin, twin_opt, 4, 4)
    assert torch.equal(layer.qweight, twin[0].qweight)
    layer.to("meta")
    assert layer.leaf is not new
    opt.zero_grad()
    assert opt.param_groups[1]["params"][0] is layer.leaf


def test_a_foreign_leaf_is_refused() -> None:
    model, opt = make()
    model[0]._parameters["coordinates"] = nn.Parameter(torch.zeros(4, 40))
    with pytest.raises(RuntimeError, match="the zero leaf of 0 was replaced by a Parameter: leave it alone"):
        opt.step()


def test_a_leaf_without_its_layer_is_refused() -> None:
    model, opt = make()
    opt = copy.deepcopy(opt)  # copies the leaves, but no layer
    for parameter in opt.param_groups[1]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match="0.coordinates is the leaf of a layer that is gone"):
        opt.step()


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copied_models_have_leaves_of_their_own(mode: str, way: str) -> None:
    model, opt = make(mode)
    train(model, opt)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        assert file.tell() < 60_000  # no zeros of the shared buffer are written
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    leaf = twin[0].leaf
    assert leaf is not model[0].leaf and leaf.uid != model[0].leaf.uid and leaves.layer_of(leaf) is twin[0]
    assert leaf.untyped_storage().data_ptr() == model[0].leaf.untyped_storage().data_ptr()
    assert leaf.label == "0" and type(leaf) is type(model[0].leaf) and leaf.binding is None
    before = twin[0].qweight.clone()
    train(model, opt)
    assert torch.equal(before, twin[0].qweight)
    own = qg.QGaLoreAdamW8bit(qg.param_groups(twin), lr=0.01)
    train(twin, own)
    assert not torch.equal(before, twin[0].qweight)


# ---------------------------------------------------------------- foreign writes


def by_optimizer(leaf: Any) -> None:
    leaf.grad = torch.ones(leaf.shape)
    torch.optim.SGD([leaf], lr=1.0).step()


def by_initialiser(leaf: Any) -> None:
    nn.init.normal_(leaf)


def by_data(leaf: Any) -> None:
    leaf.data.normal_()


def by_average(leaf: Any) -> None:
    with torch.no_grad():
        torch._foreach_lerp_([leaf], [torch.ones(leaf.shape)], 0.5)


@pytest.mark.parametrize("write", [by_optimizer, by_initialiser, by_data, by_average])
def test_a_foreign_write_is_found_undone_and_said(write: Any) -> None:
    model, opt = make()
    train(model, opt)
    write(model[2].leaf)
    assert model[2].leaf.any()
    codes = model[0].qweight.clone()
    model(torch.randn(2, 24)).sum().backward()
    with pytest.raises(
        RuntimeError, match="something wrote to the zero leaf of .*; an initialiser, optimizer or a weight"
    ):
        opt.step()
    assert not model[2].leaf.any() and torch.equal(codes, model[0].qweight)
    opt.step()  # the zeros are back
    assert not torch.equal(codes, model[0].qweight)


def test_writing_zeros_is_no_error() -> None:
    """DDP's first broadcast copies rank 0's zeros into every replica."""
    model, opt = make()
    with torch.no_grad():
        model[0].leaf.copy_(torch.zeros(4, 40))
    train(model, opt)


def test_steps_do_not_touch_the_version_counter() -> None:
    model, opt = make()
    before = model[0].leaf._version
    train(model, opt, 5)
    assert model[0].leaf._version == before


# ---------------------------------------------------------------- reads and writes of a full-mode weight


def test_metadata_of_a_full_mode_weight() -> None:
    model, _ = make("full", dtype=torch.bfloat16)
    weight = model[0].weight
    assert isinstance(weight, ZeroWeight)
    assert (weight.shape, weight.dtype, weight.device.type, weight.ndim) == ((40, 24), torch.bfloat16, "cpu", 2)
    assert weight.numel() == 960 and weight.size(1) == 24 and weight.requires_grad and weight.is_leaf
    assert type(torch.zeros_like(weight)) is Tensor


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w + 0,
        lambda w: w.detach(),
        lambda w: w.data,
        lambda w: w.clone(),
        lambda w: torch.cat([w[:20], w[20:]]),
        lambda w: torch.stack([w])[0],
        lambda w: w.float(),
        lambda w: torch.empty(40, 24).copy_(w),
        lambda w: torch.from_numpy(w.detach().numpy()),
        lambda w: torch.tensor(w.tolist()),
        lambda w: nn.functional.linear(torch.eye(24), w).t(),
    ],
)
def test_numerical_reads_of_a_full_mode_weight_decode(read: Any) -> None:
    model, _ = make("full")
    with torch.no_grad():
        value = read(model[0].weight)
    assert torch.equal(value, model[0].dequantize())
    assert type(value) is Tensor


def test_a_full_mode_weight_may_be_read_without_grad_only() -> None:
    model, _ = make("full")
    weight = model[0].weight
    assert torch.equal(weight.detach(), model[0].dequantize()) and torch.equal(weight.data, model[0].dequantize())
    assert f"{weight.detach()[0, 0].item():.4f}" in repr(weight)
    for read in (lambda: weight.norm(), lambda: nn.functional.linear(torch.ones(24), weight), lambda: weight * 2):
        with pytest.raises(RuntimeError, match="^the INT8 weight of 0 was read by .* under grad mode"):
            read()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: nn.init.normal_(w),
        lambda w: w.add_(1),
        lambda w: torch._foreach_add_([w], 1.0),
        lambda w: torch.optim.AdamW([w]).step(),
        lambda w: setattr(w, "data", torch.zeros(40, 24)),
    ],
)
def test_writes_to_a_full_mode_weight_raise(write: Any) -> None:
    model, opt = make("full")
    model(torch.randn(2, 24)).sum().backward()
    before = model[0].dequantize()
    with pytest.raises(RuntimeError, match=r"^the INT8 weight of 0 cannot be .*set_weight\(tensor\)"), torch.no_grad():
        write(model[0].weight)
    assert torch.equal(before, model[0].dequantize()) and not model[0].leaf._zero.base.any()


def test_a_low_rank_int8_layer_s_weight_reads_as_the_decoded_one() -> None:
    model, _ = make()
    assert torch.equal(model[0].weight, model[0].dequantize()) and not model[0].weight.requires_grad
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = model[0].wait

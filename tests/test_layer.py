"""QGaLoreLinear: its values, R against the projection of the full gradient, micro-batches, clipping, autocast, and what
its backward allocates."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import q_galore_torch as qg
from q_galore_torch import ops
from q_galore_torch.nn.binding import Binding

SHAPES = {"tall": (96, 64), "wide": (64, 96), "square": (64, 64), "prime": (61, 37)}


def linear(shape: str = "tall", bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    rows, cols = SHAPES[shape]
    return nn.Linear(cols, rows, bias=bias, dtype=dtype)


def prepared(module: nn.Linear, rank: int = 8, due: bool = False, **options: Any) -> tuple[Any, qg.QGaLoreAdamW8bit]:
    """The converted layer and an optimizer whose projector it borrows."""
    model = qg.prepare_model(nn.Sequential(module), rank, ["0"], **options)
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, weight_decay=0.0), lr=0.01)
    layer = model[0]
    if isinstance(layer, qg.QGaLoreLinear) and layer.grad_mode == "low_rank":
        layer.leaf.binding.due = due
    return layer, opt


PROJ_TYPES = ["std", "reverse_std", "right", "left", "full"]


def sides(proj_type: str, rows: int, cols: int) -> tuple[bool, bool]:
    """Whether the left and the right side of a rows x cols weight are projected."""
    left = {"std": rows < cols, "reverse_std": rows >= cols, "left": True, "full": True, "right": False}[proj_type]
    return left, proj_type == "full" or not left


def lent(layer: Any, proj_type: str, due: bool = False) -> tuple[Tensor, Tensor]:
    """Lends random INT8 bases to a layer; (P_L, P_R) decoded in float64, the identity where a side has none."""
    rows, cols, rank = layer.out_features, layer.in_features, layer.rank
    left, right = sides(proj_type, rows, cols)
    state: dict[str, Any] = {"side": 2 if left and right else int(left), "dim": rows if left else cols}
    decoded = [torch.eye(rows).double(), torch.eye(cols).double()]
    names = [("proj", rows if left else cols, 0 if left else 1)]
    if left and right:
        names.append(("right", cols, 1))
        state["right_dim"] = cols
    for name, dim, place in names:
        parts = ops.projector_quantize(torch.randn(rank, dim) / dim**0.5, "int8", 64)
        state.update(zip((f"{name}_codes", f"{name}_scales", f"{name}_zeros"), parts, strict=True))
        decoded[place] = ops.projector_dequantize(*parts, "int8", 64, dim).double()
    layer.leaf.binding = Binding(state, {"proj_format": "int8", "proj_block": 64})
    layer.leaf.binding.due = due
    return decoded[0], decoded[1]


def converted(proj_type: str, shape: str, rank: int, **options: Any) -> Any:
    """The layer of one linear layer, without an optimizer."""
    return qg.prepare_model(nn.Sequential(linear(shape)), rank, ["0"], proj_type=proj_type, **options)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(5,), (2, 3), (2, 3, 4), (), (0,)])
def test_forward_and_input_gradient_are_those_of_the_decoded_weight(bits: Any, dtype: torch.dtype, size: Any) -> None:
    layer, _ = prepared(linear(dtype=dtype), weight_bits=bits)
    plain = nn.Linear(64, 96, dtype=dtype)
    plain.load_state_dict({"weight": layer.dequantize(), "bias": layer.bias.detach()})
    x = torch.randn(*size, 64, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    y, expected = layer(x), plain(twin)
    assert torch.equal(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    assert layer.leaf.grad.dtype == torch.float32


def test_int8_weight_is_within_half_a_step() -> None:
    module = linear("prime")
    layer, _ = prepared(copy.deepcopy(module), group_size=100)
    half = 0.5 * layer.scales.repeat_interleave(100)[: 61 * 37].view(61, 37)
    assert ((layer.dequantize() - module.weight).abs() <= half * 1.001).all()
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert layer.qweight.dtype == torch.uint8 and layer.zeros.dtype == torch.int16


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 30])
@pytest.mark.parametrize("due", [False, True])
def test_r_is_the_projection_of_the_full_gradient(bits: Any, shape: str, rank: int, due: bool) -> None:
    """Rank 30 is beyond mn / (m + n) of the prime shape, where the layer forms G itself."""
    rows, cols = SHAPES[shape]
    layer, opt = prepared(linear(shape), rank, due, weight_bits=bits)
    full = linear(shape)
    if bits == 8:
        full, _ = prepared(linear(shape), rank, grad_mode="full")
    else:
        full.weight.data = layer.weight.detach().clone()
    x, upstream = torch.randn(7, 5, cols), torch.randn(7, 5, rows)
    layer(x).backward(upstream)
    full(x).backward(upstream)
    gradient = full.weight.grad
    assert gradient.shape == (rows, cols)
    basis = layer.leaf.binding.basis(torch.float32)
    expected = basis @ (gradient.t() if rows >= cols else gradient)
    assert layer.leaf.grad.shape == expected.shape
    assert relative(layer.leaf.grad, expected) < 2e-6
    torch.testing.assert_close(layer.bias.grad, full.bias.grad)
    if due:
        torch.testing.assert_close(layer.leaf.binding.stash, gradient)
    else:
        assert layer.leaf.binding.stash is None


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 37])
@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r_is_the_projection_of_the_full_gradient_for_every_type(
    proj_type: str, shape: str, rank: int, due: bool, dtype: torch.dtype
) -> None:
    """Over three micro-batches, against autograd in float64; at rank 37 the smaller layers form G themselves."""
    rows, cols = SHAPES[shape]
    layer = converted(proj_type, shape, rank)
    left, right = lent(layer, proj_type, due)
    full = nn.Linear(cols, rows).double()
    squares = torch.zeros(()).double()  # of the tokens' shares in R, whose sum may be small by chance
    for size in (9, 1, 4):
        x, upstream = torch.randn(2, size, cols).to(dtype), torch.randn(2, size, rows).to(dtype)
        layer(x).backward(upstream)
        full(x.double()).backward(upstream.double())
        shares = (upstream.double() @ left.t()).norm(dim=-1) * (x.double() @ right.t()).norm(dim=-1)
        squares += shares.square().sum()
    gradient = full.weight.grad
    assert gradient is not None
    expected = left @ gradient @ right.t()
    if sides(proj_type, rows, cols) == (False, True):
        expected = expected.t()  # R has a row for each basis vector
    assert layer.leaf.grad.dtype == torch.float32 and layer.leaf.grad.shape == layer.leaf.shape == expected.shape
    assert (layer.leaf.grad - expected).norm() < (2e-6 if dtype == torch.float32 else 0.01) * squares.sqrt()
    stash = layer.leaf.binding.stash
    assert (stash is not None) == due
    if due:
        assert relative(stash, gradient) < (1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_the_rank_of_every_type_is_clipped_to_the_shorter_side(proj_type: str, shape: str) -> None:
    rows, cols = SHAPES[shape]
    for rank, clipped in ((63, 63), (64, 64), (65, 64)):
        layer = converted(proj_type, shape, rank)
        left, right = sides(proj_type, rows, cols)
        other = clipped if left and right else cols if left else rows
        assert layer.rank == clipped and layer.leaf.shape == (clipped, other)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("mode", ["low_rank", "full"])
@pytest.mark.parametrize("count", [2, 5])
def test_micro_batches_equal_one_batch(bits: Any, mode: str, count: int) -> None:
    weights, gradients = [], []
    data = torch.randn(4 * count, 64)
    for parts in (1, count):
        layer, opt = prepared(linear(), weight_bits=bits, grad_mode=mode, due=True)
        for _ in range(3):
            for micro in data.chunk(parts):
                (layer(micro).square().sum() / len(data)).backward()
            gradients.append(opt.param_groups[1]["params"][0].grad)
            opt.step()
            opt.zero_grad()
        weights.append(layer.dequantize() if bits == 8 else layer.weight.detach())
    assert relative(gradients[3], gradients[0]) < 1e-5
    if bits == 8:  # a draw may fall between two nearly equal fractions
        assert (weights[0] != weights[1]).float().mean() < 0.01
    else:
        assert relative(weights[1], weights[0]) < 1e-5


def test_clip_grad_norm_scales_r_and_the_rest_together() -> None:
    torch.manual_seed(0)
    model = qg.prepare_model(nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8)), 4, ["0"])
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model))
    model(torch.randn(9, 64)).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    expected = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    assert gradients[1].shape == (4, 64)  # 0.coordinates
    twin = copy.deepcopy(gradients)
    norm = qg.clip_grad_norm_(opt, 0.5)
    torch.testing.assert_close(norm, expected)
    for parameter, before in zip(model.parameters(), twin, strict=True):
        torch.testing.assert_close(parameter.grad, before * (0.5 / (expected + 1e-6)))
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0) == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(ValueError, match="max_norm must be a number > 0, got 0"):
        qg.clip_grad_norm_(opt, 0)


@pytest.mark.parametrize(("bits", "mode"), [(8, "low_rank"), (8, "full"), (None, "low_rank")])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_bfloat16(bits: Any, mode: str, inside: bool) -> None:
    """Inside: backward() is called within the autocast block, which must not cast our float32 products again."""
    layer, _ = prepared(linear(), weight_bits=bits, grad_mode=mode)
    exact, _ = prepared(linear(), weight_bits=bits, grad_mode=mode)
    x = torch.randn(32, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = y.float().square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    exact(twin).square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (x.grad.dtype, layer.leaf.grad.dtype, layer.bias.grad.dtype) == (torch.float32,) * 3
    assert relative(x.grad, twin.grad) < 0.02
    assert relative(layer.leaf.grad, exact.leaf.grad) < 0.02
    assert relative(layer.bias.grad, exact.bias.grad) < 0.02


def test_a_bfloat16_gradient_for_a_float32_input_is_cast() -> None:
    layer, _ = prepared(linear())
    x = torch.randn(6, 64, requires_grad=True)

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0].to(torch.bfloat16)

    Rounding.apply(layer(x)).sum().backward()
    assert x.grad.dtype == layer.leaf.grad.dtype == torch.float32


def test_float16_and_float64_inputs() -> None:
    for dtype in (torch.float16, torch.float64):
        layer, _ = prepared(linear().to(dtype) if dtype == torch.float16 else linear())
        x = torch.randn(6, 64, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == dtype and layer.leaf.grad.dtype == torch.float32


def test_grad_dtype_bfloat16_accumulates_in_bfloat16() -> None:
    layer, opt = prepared(linear(), grad_dtype="bfloat16")
    exact, _ = prepared(linear())
    x = torch.randn(16, 64)
    for module in (layer, exact):
        for micro in x.chunk(4):
            module(micro).square().sum().backward()
    assert layer.leaf.grad.dtype == torch.bfloat16
    assert 0 < relative(layer.leaf.grad, exact.leaf.grad) < 0.01
    opt.step()


def test_a_frozen_leaf_gets_no_gradient_and_no_bias_is_fine() -> None:
    layer, _ = prepared(linear(bias=False))
    layer.leaf.requires_grad_(False)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.leaf.grad is None and x.grad is not None and layer.bias is None
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_low_rank_backward_without_an_optimizer_says_what_is_missing() -> None:
    model = qg.prepare_model(nn.Sequential(linear()), 8, ["0"])
    y = model(torch.randn(2, 64))  # evaluation needs none
    with pytest.raises(RuntimeError, match="^the low-rank backward of 0 needs the optimizer's projector; create"):
        y.sum().backward()


def test_full_mode_trains_without_our_optimizer_s_projector() -> None:
    layer, _ = prepared(linear(), grad_mode="full")
    fresh = copy.deepcopy(layer)
    x = torch.randn(5, 64)
    fresh(x).sum().backward()
    torch.testing.assert_close(fresh.leaf.grad, torch.ones(5, 96).t() @ x)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, _ = prepared(linear(), due=True)
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [layer.leaf.grad, layer.leaf.binding.stash, x.grad]
    layer.leaf.grad = x.grad = None
    layer.leaf.binding.drop()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for got, want in zip([layer.leaf.grad, layer.leaf.binding.stash, x.grad], expected, strict=True):
        assert torch.equal(got, want)


class Allocations(TorchDispatchMode):
    """Notes every operator whose result has new memory of at least ``size`` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.size:
                if tensor.untyped_storage().data_ptr() not in known:
                    self.large.append(str(func))
        return out


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("bits", [8, None])
def test_no_full_size_gradient_is_allocated_on_ordinary_steps(shape: str, bits: Any) -> None:
    """Traced, not believed: with few tokens nothing but a decoded INT8 weight may be as large as the weight."""
    rows, cols = SHAPES[shape]
    layer, opt = prepared(linear(shape), rank=4, weight_bits=bits)
    x = torch.randn(6, cols, requires_grad=True)

    def trace() -> list[str]:
        with Allocations(rows * cols) as seen:
            layer(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return seen.large

    decoded = ["q_galore.int8_dequantize.default"] * 2 if bits == 8 else []
    assert trace() == decoded
    layer.leaf.binding.due = True
    assert [name for name in trace() if name not in decoded] == ["aten.mm.default"]  # G: the trace sees it
    assert trace() == decoded


def test_beyond_mn_over_m_plus_n_the_full_gradient_is_formed_and_projected() -> None:
    for rank, formed in ((38, False), (39, True)):  # 96 x 64: 38.4
        layer, _ = prepared(linear(), rank, weight_bits=None)
        with Allocations(96 * 64) as seen:
            layer(torch.randn(6, 64)).sum().backward()
        assert bool(seen.large) == formed


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_every_type_forms_the_full_gradient_only_where_that_is_cheaper(proj_type: str, shape: str) -> None:
    """64 x 96: one side r > 38.4; both sides r (160 + r) > 6144, which is r > 32."""
    last = 32 if proj_type == "full" else 38
    for rank, formed in ((last, False), (last + 1, True)):
        layer = converted(proj_type, shape, rank, weight_bits=None)
        lent(layer, proj_type)
        x = torch.randn(6, layer.in_features)
        with Allocations(96 * 64) as seen:
            layer(x).sum().backward()
        assert bool(seen.large) == formed


def test_autocast_around_backward_alone_rounds_nothing() -> None:
    gradients = []
    for enabled in (False, True):
        layer, _ = prepared(linear(), due=True)
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        y = layer(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y.backward()
        gradients.append([x.grad, layer.leaf.grad, layer.bias.grad, layer.leaf.binding.stash])
    for plain, inside in zip(*gradients, strict=True):
        assert torch.equal(plain, inside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weight_bits=4), "weight_bits must be 8 or None, got 4"),
        (dict(group_size=0), "group_size must be an integer >= 1, got 0"),
        (dict(grad_mode="lowrank"), "grad_mode must be 'low_rank' or 'full', got 'lowrank'"),
        (dict(grad_dtype="float16"), "grad_dtype must be 'float32' or 'bfloat16', got 'float16'"),
        (dict(rank=0), "rank must be an integer >= 1, got 0"),
        (dict(), "grad_mode='low_rank' needs a rank, got None"),
        (dict(rank=4, proj_type="up"), "proj_type must be one of std, reverse_std, right, left, full, got 'up'"),
        (dict(grad_mode="full", weight_bits=None), "grad_mode='full' with weight_bits=None is nn.Linear itself"),
    ],
)
def test_layer_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        qg.QGaLoreLinear(8, 8, **options)


def test_a_new_layer_is_zero_and_set_weight_fills_it() -> None:
    layer = qg.QGaLoreLinear(20, 30, rank=4)
    assert not layer.dequantize().any() and not layer.bias.any()
    weight = torch.randn(30, 20)
    layer.set_weight(weight)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=0, atol=layer.scales.max().item())
    float_layer = qg.QGaLoreLinear(20, 30, rank=4, weight_bits=None)
    float_layer.set_weight(weight)
    assert torch.equal(float_layer.weight, weight)
    with pytest.raises(ValueError, match=r"weight must be \[30, 20\], got \[20, 30\]"):
        layer.set_weight(weight.t())
    assert "rank=4" in repr(layer) and "8 bits" in repr(layer)


@pytest.mark.parametrize("between", ["backward", "step"])
def test_zeroed_gradients_drop_the_stash(between: str) -> None:
    x, other = torch.randn(6, 64), torch.randn(6, 64)
    layer, opt = prepared(linear(), due=True)
    layer(x).square().sum().backward()
    layer.zero_grad(set_to_none=False)
    if between == "step":
        opt.step()
        assert opt.telemetry()[1]["refreshes"] == 0
        return
    layer(other).square().sum().backward()
    fresh, _ = prepared(linear(), due=True)
    fresh(other).square().sum().backward()
    assert torch.equal(layer.leaf.binding.stash, fresh.leaf.binding.stash)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_that_are_not_floats_are_refused(bits: Any, autocast: bool) -> None:
    layer, _ = prepared(linear(), weight_bits=bits)
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(RuntimeError, match=f"^0 expects a torch.float32 input, got {dtype}$"):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                layer(torch.ones(2, 64, dtype=dtype))


@pytest.mark.parametrize("grad_mode", ["low_rank", "full"])
def test_the_transforms_of_torch_func_are_refused(grad_mode: str) -> None:
    layer, _ = prepared(linear(), grad_mode=grad_mode)
    x = torch.ones(2, 64)
    for transformed in (torch.func.vmap(layer), torch.func.grad(lambda x: layer(x).sum())):
        with pytest.raises(RuntimeError, match=r"^0 does not support the transforms of torch\.func"):
            transformed(x)
        with torch.no_grad(), pytest.raises(RuntimeError, match="torch.func"):
            torch.func.vmap(layer)(x)
    assert torch.func.functional_call(layer, dict(layer.named_parameters()), x).shape == (2, 96)


def test_a_float_weight_takes_inputs_of_its_own_dtype() -> None:
    layer, _ = prepared(linear(dtype=torch.bfloat16), weight_bits=None)
    with pytest.raises(
        RuntimeError, match="^0 has a float weight and expects a torch.bfloat16 input like it, got .*32"
    ):
        layer(torch.ones(2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 64)).dtype == torch.bfloat16


def test_a_checkpoint_of_another_group_size_is_refused() -> None:
    source, _ = prepared(nn.Linear(16, 20), group_size=200)
    layer, _ = prepared(nn.Linear(16, 20), group_size=180)  # as many groups
    before = copy.deepcopy(layer.state_dict())
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with pytest.raises(RuntimeError, match="group_size must be 180, as in this layer, got 200"):
        layer.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    twin, _ = prepared(nn.Linear(16, 20), group_size=200)
    twin.load_state_dict(state)
    del state["group_size"]  # saved before it was written
    twin.load_state_dict(state)
    assert torch.equal(twin.dequantize(), source.dequantize())
    layer.load_state_dict(nn.Linear(16, 20).state_dict())

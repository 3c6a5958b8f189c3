"""GaLoreProjector against the formulas of the public classes, and what happens to pickled ones."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from galore_reference import low_rank_stream
from public_files import PublicProjector, save_as_public
from q_galore_torch import q_galore_projector
from q_galore_torch.q_galore_projector import GaLoreProjector

SHAPES = [(48, 32), (32, 48), (32, 32)]
TYPES = ["std", "reverse_std", "right", "left", "full"]
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": dict(quant=True),
    "int8 groups": dict(quant=True, group_size=64),
    "int4": dict(quant=True, n_bit=4),
    "int4 groups that leave a rest": dict(quant=True, n_bit=4, group_size=50),
    "4bit": dict(quantize_type="4bit"),
    "8bit": dict(quantize_type="8bit"),
    "8bit_blockwise": dict(quantize_type="8bit_blockwise", quantize_blocksz=128),
}
ERROR = {"float32": 1e-6, "int8": 0.02, "int8 groups": 0.03, "int4": 0.2, "4bit": 0.25, "8bit": 0.04}


def error_of(kind: str) -> float:
    return next(value for key, value in reversed(ERROR.items()) if kind.startswith(key))


class Public:
    """The public Q-GaLore class's rules for ``std`` without quantisation, written out in torch."""

    def __init__(self, rank: int, gap: int, scale: float, threshold: float, gamma: float, size: int) -> None:
        self.rank, self.gap, self.scale, self.threshold, self.gamma, self.size = (
            rank,
            gap,
            scale,
            threshold,
            gamma,
            size,
        )
        self.basis: Tensor | None = None
        self.past: Tensor | None = None
        self.queue: list[float] = []

    def project(self, gradient: Tensor, step: int) -> Tensor:
        tall = gradient.shape[0] >= gradient.shape[1]
        if self.basis is None or step % self.gap == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            self.basis = vh[: self.rank] if tall else u[:, : self.rank]
            first = (vh[0] if tall else u[:, 0]).clone()
            if self.past is not None:
                self.queue = [*self.queue, cosine_similarity(self.past, first, dim=0).item()][-self.size :]
                if len(self.queue) == self.size and sum(self.queue) / self.size >= self.threshold:
                    self.gap = int(self.gap * self.gamma)
            self.past = first
        return gradient @ self.basis.t() if tall else self.basis.t() @ gradient

    def back(self, low_rank: Tensor, tall: bool) -> Tensor:
        assert self.basis is not None
        return self.scale * (low_rank @ self.basis if tall else self.basis @ low_rank)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_galore_projector_std_follows_the_public_class(rows: int, cols: int) -> None:
    settings = dict(cos_threshold=0.5, gamma_proj=1.7, queue_size=2)
    ours = GaLoreProjector(8, update_proj_gap=3, scale=0.25, **settings)
    theirs = Public(8, 3, 0.25, 0.5, 1.7, 2)
    gaps = set()
    for step, gradient in enumerate(low_rank_stream(rows, cols, 60)):
        expected, got = theirs.project(gradient, step), ours.project(gradient, step)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(ours.project_back(got), theirs.back(expected, rows >= cols), rtol=1e-5, atol=1e-8)
        assert (ours.update_proj_gap, ours.queue) == (theirs.gap, theirs.queue)  # bit for bit
        gaps.add(ours.update_proj_gap)
    assert len(gaps) > 2
    assert ours.svd_count > 3


def galore(gradient: Tensor, rank: int, proj_type: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """GaLore's formulas in float64: the low-rank gradient, and the way back."""
    u, _, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    left, right = u[:, :rank], vh[:rank]
    tall = gradient.shape[0] >= gradient.shape[1]
    kind = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(proj_type, proj_type)
    if kind == "right":
        return gradient.double() @ right.t(), lambda low: low @ right
    if kind == "left":
        return left.t() @ gradient.double(), lambda low: left @ low
    return left.t() @ gradient.double() @ right.t(), lambda low: left @ low @ right


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_galore_projector_types_follow_galore(rows: int, cols: int, proj_type: str) -> None:
    gradient = low_rank_stream(rows, cols, 1)[0]
    projector = GaLoreProjector(6, proj_type=proj_type, scale=0.5)
    expected, back = galore(gradient, 6, proj_type)
    low_rank = projector.project(gradient, 0)
    assert low_rank.shape == expected.shape
    torch.testing.assert_close(low_rank.abs().double(), expected.abs(), rtol=1e-3, atol=1e-6)  # signs are LAPACK's
    torch.testing.assert_close(projector.project_back(low_rank).double(), 0.5 * back(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_galore_projector_formats_bring_a_low_rank_gradient_back(
    rows: int, cols: int, proj_type: str, kind: str
) -> None:
    gradient = torch.randn(rows, 6) @ torch.randn(6, cols)
    projector = GaLoreProjector(6, proj_type=proj_type, **FORMATS[kind])
    back = projector.project_back(projector.project(gradient, 0))
    assert (back - gradient).norm() <= error_of(kind) * (2 if proj_type == "full" else 1) * gradient.norm()


def test_galore_projector_int4_holds_two_values_a_byte() -> None:
    projector = GaLoreProjector(8, quant=True, n_bit=4, group_size=64)
    projector.project(torch.randn(64, 32), 0)
    (codes,) = projector.state_dict()["codes"]
    assert codes.dtype == torch.uint8
    assert codes.numel() == 8 * 32 // 2


@pytest.mark.parametrize(("proj_type", "groups"), [("right", 8), ("left", 64)])
def test_galore_projector_gives_each_row_of_its_orientation_a_scale(proj_type: str, groups: int) -> None:
    projector = GaLoreProjector(8, proj_type=proj_type, quant=True)
    projector.project(torch.randn(64, 32), 0)
    assert projector.state_dict()["scales"][0].shape == (groups, 1)


def test_galore_projector_quantises_once_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    quantize = q_galore_projector.ops.projector_quantize
    monkeypatch.setattr(q_galore_projector.ops, "projector_quantize", lambda *a: calls.append(1) or quantize(*a))
    projector = GaLoreProjector(8, update_proj_gap=4, quant=True, n_bit=4, cos_threshold=1)
    seen = []
    for step, gradient in enumerate(low_rank_stream(64, 32, 9)):
        projector.project_back(projector.project(gradient, step))
        seen.append(projector.ortho_matrix)
    assert len(calls) == 3 == projector.svd_count
    assert all(torch.equal(seen[0], basis) for basis in seen[1:4])
    assert not torch.equal(seen[3], seen[4])


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (4, 24, 16)])
def test_galore_projector_takes_gradients_of_more_dimensions(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape)
    projector = GaLoreProjector(1000)
    back = projector.project_back(projector.project(gradient, 0))
    torch.testing.assert_close(back, gradient, rtol=1e-4, atol=1e-5)


def test_galore_projector_takes_gradients_that_are_not_contiguous() -> None:
    gradient = torch.randn(32, 48).t()
    projector, other = GaLoreProjector(8), GaLoreProjector(8)
    torch.testing.assert_close(projector.project(gradient, 0), other.project(gradient.contiguous(), 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_galore_projector_keeps_the_dtype(dtype: torch.dtype) -> None:
    gradient = torch.randn(40, 24).to(dtype)
    projector = GaLoreProjector(24)
    low_rank = projector.project(gradient, 0)
    back = projector.project_back(low_rank)
    assert low_rank.dtype == back.dtype == dtype
    torch.testing.assert_close(back, gradient, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("proj_type", TYPES)
def test_galore_projector_survives_gradients_without_a_basis(proj_type: str, value: float) -> None:
    projector = GaLoreProjector(4, update_proj_gap=2, proj_type=proj_type)
    broken = torch.full((24, 16), value)
    first = projector.project(broken, 0)
    assert projector.svd_count == 0
    assert projector.project_back(first).shape == (24, 16)
    good = torch.randn(24, 16)
    projector.project(good, 1)  # out of turn, as the first one was missed
    assert projector.svd_count == 1
    kept = copy.deepcopy(projector.ortho_matrix)
    projector.project(broken, 2)
    assert projector.svd_count == 1
    torch.testing.assert_close(projector.ortho_matrix, kept, rtol=0, atol=0)
    projector.project(good, 3)
    assert projector.svd_count == 2


def test_galore_projector_without_a_basis_has_none() -> None:
    assert GaLoreProjector(4).ortho_matrix is None
    with pytest.raises(RuntimeError, match="call project\\(\\) with a gradient first"):
        GaLoreProjector(4).project_back(torch.ones(4, 4))


def test_galore_projector_says_each_basis_where_verbose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        GaLoreProjector(4).project(torch.randn(8, 6), 0)
        GaLoreProjector(4, verbose=True).project(torch.randn(8, 6), 0)
    assert [record.message for record in caplog.records] == ["basis 1 of a [8, 6] gradient at 0"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaLoreProjector(0), "rank must be an integer in"),
        (lambda: GaLoreProjector(4, n_bit=3, quant=True), "n_bit must be 4 or 8, got 3"),
        (lambda: GaLoreProjector(4, group_size=0, quant=True), "group_size must be -1 or an integer"),
        (lambda: GaLoreProjector(4, proj_type="up"), "proj_type must be"),
        (lambda: GaLoreProjector(4, quant=True, quantize_type="4bit"), "describe the format twice"),
        (lambda: GaLoreProjector(4, quantize_type="2bit"), "quantize_type must be None or '4bit'"),
        (
            lambda: GaLoreProjector(4).project(torch.randn(8), 0),
            r"float tensor of two or more dimensions, got .* \[8\]",
        ),
        (lambda: GaLoreProjector(4).project(torch.ones(8, 8, dtype=torch.int64), 0), "got torch.int64"),
    ],
)
def test_galore_projector_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_galore_projector_refuses_another_shape() -> None:
    projector = GaLoreProjector(4)
    projector.project(torch.randn(8, 6), 0)
    with pytest.raises(ValueError, match=r"must be \[8, 6\] as before, got \[6, 8\]"):
        projector.project(torch.randn(6, 8), 1)
    with pytest.raises(ValueError, match=r"must be \[8, 4\], got \[4, 8\]"):
        projector.project_back(torch.randn(4, 8))


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_galore_projector_state_goes_on_bit_for_bit(proj_type: str, kind: str) -> None:
    options = dict(update_proj_gap=3, proj_type=proj_type, cos_threshold=0.5, queue_size=2, **FORMATS[kind])
    projector, gradients = GaLoreProjector(6, **options), low_rank_stream(48, 32, 40)
    for step in range(20):
        projector.project(gradients[step], step)
    file = io.BytesIO()
    torch.save(projector.state_dict(), file)
    file.seek(0)
    restored = GaLoreProjector(6, **options)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for step in range(20, 40):
        assert torch.equal(restored.project(gradients[step], step), projector.project(gradients[step], step))
    assert (restored.update_proj_gap, restored.svd_count) == (projector.update_proj_gap, projector.svd_count)


def test_galore_projector_state_is_there_before_the_first_basis() -> None:
    projector = GaLoreProjector(6)
    projector.load_state_dict(GaLoreProjector(6).state_dict())
    assert projector.ortho_matrix is None
    projector.project(torch.randn(8, 6), 5)
    assert projector.svd_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rank=5), "rank must be 6, as in this projector, got 5"),
        (dict(proj_format="fp8"), "proj_format must be 'int8'"),
        (dict(codes=[]), r"the state for gradients \[8, 6\] must hold 1 bases"),
        (dict(codes=None), "codes must be a list of tensors, got None"),
        (dict(scales=[1]), r"scales must be a list of tensors, got \[1\]"),
        (dict(shape=None), r"shape must be \[\] or a list of two or more sizes, got None"),
        (dict(shape=[8]), r"a list of two or more sizes, got \[8\]"),
        (dict(shape=[8, "6"]), r"a list of two or more sizes, got \[8, '6'\]"),
        (dict(shape=[8, 0]), r"a list of two or more sizes, got \[8, 0\]"),
        (dict(update_proj_gap=0), "update_proj_gap must be an integer >= 1, got 0"),
        (dict(update_proj_gap="3"), "update_proj_gap must be an integer >= 1, got '3'"),
        (dict(svd_count=None), "svd_count must be an integer >= 0, got None"),
        (dict(due="x"), "due must be an integer >= 0, got 'x'"),
        (dict(queue=None), "queue must be a list of numbers, got None"),
        (dict(queue=["x"]), r"queue must be a list of numbers, got \['x'\]"),
        (dict(past_vector=None), r"past_vector must be a float32 tensor \[0 or 6\], got None"),
        (dict(past_vector=torch.ones(8)), r"past_vector must be a float32 tensor \[0 or 6\], got torch.float32 \[8\]"),
        (dict(codes=[torch.zeros(3, 3)]), r"codes must be torch.uint8 \[6, 6\], got torch.float32 \[3, 3\]"),
    ],
)
def test_galore_projector_refuses_another_state(change: dict[str, Any], message: str) -> None:
    projector = GaLoreProjector(6, quant=True)
    projector.project(torch.randn(8, 6), 0)
    before = projector.state_dict()
    with pytest.raises(ValueError, match=message):
        projector.load_state_dict({**before, **change})
    assert projector.state_dict() == before
    with pytest.raises(ValueError, match="must be a dict of rank"):
        projector.load_state_dict({"rank": 6})


def test_galore_projector_deepcopy_is_independent() -> None:
    projector = GaLoreProjector(6, update_proj_gap=2)
    for step, gradient in enumerate(low_rank_stream(24, 16, 3)):
        projector.project(gradient, step)
    twin = copy.deepcopy(projector)
    before = twin.ortho_matrix
    projector.project(torch.randn(24, 16), 4)
    assert torch.equal(twin.ortho_matrix, before)
    assert len(twin.queue) == 1 < len(projector.queue)


# ---------------------------------------------------------------- pickles


def public_pickle() -> bytes:
    file = io.BytesIO()
    save_as_public({"state": {0: {"step": 3, "projector": PublicProjector()}}, "param_groups": []}, file)
    return file.getvalue()


def test_galore_projector_pickled_by_the_public_code_is_refused_and_explained() -> None:
    with pytest.raises(pickle.UnpicklingError, match="pickled GaLoreProjector .* can run code: .*load_optimizer_state"):
        torch.load(io.BytesIO(public_pickle()), weights_only=False)
    with pytest.raises(pickle.UnpicklingError, match="q_galore_torch.q_galore_projector.GaLoreProjector"):
        torch.load(io.BytesIO(public_pickle()), weights_only=True)


def test_galore_projector_that_was_allowed_by_hand_is_refused_and_explained() -> None:
    with (
        torch.serialization.safe_globals([GaLoreProjector]),
        pytest.raises(pickle.UnpicklingError, match="can run code"),
    ):
        torch.load(io.BytesIO(public_pickle()), weights_only=True)


def test_galore_projector_is_not_pickled() -> None:
    with pytest.raises(pickle.PicklingError, match="save its state_dict"):
        pickle.dumps(GaLoreProjector(4))

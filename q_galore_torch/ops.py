"""One typed function for each compiled operator.

The definition of each is in :mod:`q_galore_torch.reference`, under the same name and with the same arguments; the fakes
for tracing are in ``_fakes``. The ops write the tensors they are given and do not touch autograd's version counters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C

SIMD_LEVELS = ("scalar", "avx2", "avx512")
PROJ_FORMATS = {
    "float32": 0,
    "bfloat16": 1,
    "int8": 16,
    "int4": 17,
    "fp8": 32,
    "fp8_e4m3": 18,
    "fp4": 19,
    "nf4": 20,
}
RIGHT, LEFT, FULL = 0, 1, 2

FLOAT_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_COMPUTE = {"float32": 0, "bfloat16": 1}
_op = torch.ops.q_galore


# ---------------------------------------------------------------- this machine


def core_version() -> str:
    """Version of the compiled C core."""
    return _C.core_version


def simd_level() -> str:
    """The SIMD level of the CPU kernels in use: ``"scalar"``, ``"avx2"`` or ``"avx512"``."""
    return SIMD_LEVELS[_op.simd_level()]


def simd_levels() -> list[str]:
    """The SIMD levels that this machine can run."""
    return list(SIMD_LEVELS[: _op.best_simd_level() + 1])


def set_simd_level(level: str) -> None:
    """Choose the CPU kernels for this process; every level gives the same bits.

    The environment variable ``Q_GALORE_SIMD`` does the same from outside.

    Raises:
        ValueError: ``level`` is unknown or this machine does not have it.
    """
    if level not in SIMD_LEVELS:
        raise ValueError(f"level must be one of {', '.join(SIMD_LEVELS)}, got {level!r}")
    _op.set_simd_level(SIMD_LEVELS.index(level))


def cuda_version() -> str:
    """The version of the CUDA kernels' library, which is loaded for that; no GPU is needed.

    Raises:
        RuntimeError: it is not there, cannot be loaded, or is of another version; says what to do.
    """
    return _op.cuda_version()


# ---------------------------------------------------------------- formats


def noise(seed: int, id: int, step: int, start: int, count: int, *, device: torch.device | str | None = None) -> Tensor:
    """The 24-bit uniform integers of elements ``start .. start + count``.

    Args:
        seed: any 64-bit integer.
        id: number of the parameter, 32 bits.
        step: step of that parameter, >= 0.
        start: first flat element index.
        count: how many.
        device: where they are made, default torch's default device.

    Returns:
        int32 tensor [count], each in [0, 2**24): a function of the arguments alone, the same on every device.
    """
    return _op.noise(torch.empty(0, device=device), seed, id, step, start, count)


def absmax(tensors: Sequence[Tensor]) -> Tensor:
    """max |x| of each float tensor: float32 [len], infinity where any element is not finite, 0 where there is none."""
    if not tensors:
        return torch.zeros(0)
    return _op.absmax(list(tensors))


def int8_quantize(weight: Tensor, group_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Encode a weight to INT8, rounding to nearest.

    Args:
        weight: float32, bfloat16 or float16, any shape, contiguous, finite.
        group_size: consecutive elements that share a scale and a zero point; the last group may be short.

    Returns:
        codes uint8 [weight.shape], scales float32 [groups], zero points int16 [groups], with
        ``weight = scales * (codes - zeros)``.

    Raises:
        ValueError: a value is not finite.
    """
    return _op.int8_quantize(weight, group_size)


def int8_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Decode an INT8 weight to ``dtype`` (float32, bfloat16 or float16), shape of ``codes``."""
    return _op.int8_dequantize(codes, scales, zeros, group_size, _float_code(dtype))


def projector_quantize(basis: Tensor, proj_format: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode basis vectors, one a row.

    Args:
        basis: float32 [r, d], contiguous, finite.
        proj_format: a key of ``PROJ_FORMATS``: ``"float32"``, ``"bfloat16"``; affine ``"int8"``, ``"int4"``; with a
            scale alone ``"fp8"`` (signed 8-bit dynamic map), ``"fp8_e4m3"`` (OCP), ``"fp4"`` (bitsandbytes' values),
            ``"nf4"`` (QLoRA's values).
        block: elements of a row that share a scale; a block never crosses a row. 0: one scale for all [r, d].

    Returns:
        codes (float32 or bfloat16 [r, d]; uint8 [r, d]; 4 bits: uint8 [r, ceil(d / 2)] with even columns in the low
        nibble), scales bfloat16 [r, ceil(d / block)] or [1, 1] for block 0 (empty for float32, bfloat16), zero points
        uint8 of the scales' shape (empty unless int8 or int4).

    Raises:
        ValueError: a value is not finite, an argument has the wrong dtype, shape or value.
    """
    return _op.projector_quantize(basis, _proj_code(proj_format), block)


def projector_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    proj_format: str,
    block: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode basis vectors to ``dtype`` (float32 or bfloat16), [r, dim]."""
    return _op.projector_dequantize(codes, scales, zeros, _proj_code(proj_format), block, dim, _float_code(dtype))


def dynamic8_quantize(x: Tensor, signed: bool, block: int = 256) -> tuple[Tensor, Tensor]:
    """Encode the rows of a matrix to the 8-bit dynamic map: the nearest entry, ties to the lower code.

    Args:
        x: float32 [rows, cols], contiguous.
        signed: the signed map (first moment) or the unsigned one (second moment).
        block: elements of a row that share an absmax.

    Returns:
        codes uint8 [rows, cols], absmax float32 [rows, ceil(cols / block)].
    """
    return _op.dynamic8_quantize(x, signed, block)


def dynamic8_dequantize(codes: Tensor, absmax: Tensor, signed: bool, block: int = 256) -> Tensor:
    """Decode the dynamic map to float32, shape of ``codes`` [rows, cols]."""
    return _op.dynamic8_dequantize(codes, absmax, signed, block)


# ---------------------------------------------------------------- steps


def adam8_step_(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    bias_steps: Sequence[int],
    noise_steps: Sequence[int],
    ids: Sequence[int],
    stats: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
    stochastic_round: bool = True,
    group_size: int = 256,
    block: int = 256,
    absmax: Tensor | None = None,
) -> None:
    """AdamW in place: ``W <- W (1 - lr weight_decay) - lr N`` for each weight of a list (algorithm: AdamW; 8-bit Adam).

    Args:
        weights: float32, bfloat16, float16, or uint8 codes of INT8 weights; contiguous, any shape.
        scales, zeros: float32 and int16 [groups] of INT8 weights; empty tensors for float weights.
        grads: float tensors of the weights' shapes, finite with |g| <= 1e18 unless ``absmax`` is given.
        exp_avg, exp_avg_sq: the moments, float32 or uint8 (dynamic map), of the weights' shapes. Blocks run along the
            flat weight.
        exp_avg_absmax, exp_avg_sq_absmax: float32 [ceil(numel / block)] of uint8 moments, else empty.
        bias_steps: updates counted by the bias correction, this one included.
        noise_steps, ids: step and number of each parameter, which with ``seed`` decide the rounding.
        stats: int64 [len, 2]; groups shifted and groups re-ranged are added.
        stochastic_round: round INT8 and bfloat16 weights stochastically instead of to nearest.
        group_size: elements in a group of the INT8 weights.
        block: elements in a block of the moments.
        absmax: float32 [len], as :func:`absmax` gives it for ``grads``: where it is above 1e18, infinity included, that
            weight and its moments are left as they are. None (default): no gradient is looked at.

    Raises:
        ValueError: an argument has the wrong dtype, shape or value. Nothing has been written then.
    """
    _op.adam8_step_(
        list(weights),
        list(scales),
        list(zeros),
        list(grads),
        list(exp_avg),
        list(exp_avg_sq),
        list(exp_avg_absmax),
        list(exp_avg_sq_absmax),
        list(bias_steps),
        list(noise_steps),
        list(ids),
        stats,
        _given(absmax, stats, torch.float32),
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        seed,
        stochastic_round,
        group_size,
        block,
    )


def galore_step_(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    proj_codes: Sequence[Tensor],
    proj_scales: Sequence[Tensor],
    proj_zeros: Sequence[Tensor],
    sides: Sequence[int],
    bias_steps: Sequence[int],
    noise_steps: Sequence[int],
    ids: Sequence[int],
    stats: Tensor,
    *,
    proj_format: str,
    proj_block: int,
    low_rank: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    seed: int,
    stochastic_round: bool = True,
    group_size: int = 256,
    block: int = 256,
    compute_dtype: str = "float32",
    right_codes: Sequence[Tensor] = (),
    right_scales: Sequence[Tensor] = (),
    right_zeros: Sequence[Tensor] = (),
    norm_growth_limit: float = 0.0,
    norms: Tensor | None = None,
    absmax: Tensor | None = None,
) -> None:
    """Projected AdamW in place: ``W <- W (1 - lr weight_decay) - lr scale U`` for each m x n matrix of a list.

    Right (side 0): P is r x n, ``R = P G^T`` is r x m, ``U = N^T P``. Left (side 1): P is r x m, ``R = P G`` is r x n,
    ``U = P^T N``. Full (side 2): P_L is r x m and P_R r x n, ``R = P_L G P_R^T`` is r x r, ``U = P_L^T N P_R``. N is
    Adam's direction of R (GaLore, arXiv 2403.03507, section 4; Q-GaLore, arXiv 2407.08296).

    Args:
        weights, scales, zeros, bias_steps, noise_steps, ids, stats: as in :func:`adam8_step_`.
        grads: G of the weight's shape, or R [r, k] when ``low_rank`` (k = r on both sides).
        exp_avg, exp_avg_sq: moments of R's shape [r, k]; blocks run along a row and never cross it.
        exp_avg_absmax, exp_avg_sq_absmax: float32 [r, ceil(k / block)] of uint8 moments, else empty.
        proj_codes, proj_scales, proj_zeros: as :func:`projector_quantize` gives them; P_L on both sides.
        sides: 0 (right), 1 (left) or 2 (full) for each matrix.
        scale: GaLore's alpha.
        compute_dtype: ``"float32"`` or ``"bfloat16"``, of the GEMMs.
        right_codes, right_scales, right_zeros: P_R, like the projector, with any tensors for one-sided matrices; empty
            lists (default) where no matrix is projected on both sides.
        norm_growth_limit: the Frobenius norm of each N is held to at most this many times that of its step before,
            by a smaller rate in that step; the moments keep their values (Fira, arXiv 2410.01623). 0
            (default) is off.
        norms: float64 [len], the norm of each matrix's N in its step before, 0 for none (no limit in that step);
            becomes this step's. Needed with a limit, left alone without.
        absmax: as in :func:`adam8_step_`.

    Raises:
        ValueError: an argument has the wrong dtype, shape or value. Nothing has been written then.
    """
    compute_format = _compute_code(compute_dtype)
    _op.galore_step_(
        list(weights),
        list(scales),
        list(zeros),
        list(grads),
        list(exp_avg),
        list(exp_avg_sq),
        list(exp_avg_absmax),
        list(exp_avg_sq_absmax),
        list(proj_codes),
        list(proj_scales),
        list(proj_zeros),
        list(right_codes),
        list(right_scales),
        list(right_zeros),
        list(sides),
        list(bias_steps),
        list(noise_steps),
        list(ids),
        stats,
        _given(norms, stats, torch.float64),
        _given(absmax, stats, torch.float32),
        _proj_code(proj_format),
        proj_block,
        low_rank,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        scale,
        seed,
        stochastic_round,
        group_size,
        block,
        compute_format,
        norm_growth_limit,
    )


def _given(tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or an empty one that stands for none."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor


# ---------------------------------------------------------------- subspaces


_precision_lock = threading.Lock()


@contextmanager
def _float32_products() -> Iterator[None]:
    """Float32 products with float32 factors: a Gram matrix of rounded ones never comes close enough to the identity.

    ``torch.set_float32_matmul_precision("medium")`` makes oneDNN round them to bfloat16 where the CPU has units for it.
    The setting is the process's, hence the lock.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision_lock:
        before = settings.fp32_precision
        if before in ("none", "ieee"):
            yield
            return
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before


class Refresh(NamedTuple):
    """What a refresh of a basis gave.

    Attributes:
        basis: float32 [r, d]: the new basis, or the old one's bits where it was kept.
        kept: the gradient was zero, not finite, or orthogonal to the whole basis.
        power_steps: taken.
        fallbacks: how often Householder QR took over from Cholesky.
        energy_old: share of the gradient's energy that the old basis captures, orthonormalised; 0 where kept.
        energy_new: the same of the new basis.
    """

    basis: Tensor
    kept: bool
    power_steps: int
    fallbacks: int
    energy_old: float
    energy_new: float


def subspace_refresh(
    gradient: Tensor, basis: Tensor, side: int, steps: int = 0, compute_dtype: str = "float32"
) -> Refresh:
    """Block power steps from an old basis: ``Z = orth(G P^T)``, ``Y = orth(G^T Z)``, the new basis is ``Y^T``.

    That is for the right; for the left read G^T for G. Vector i keeps the orientation of the old vector i.

    Args:
        gradient: [m, n], float32, bfloat16 or float16, contiguous; of any size and also not finite.
        basis: the old one, float32 [r, d] with d = n (right) or m (left), r <= d; it need not be orthonormal.
        side: 0 (right) or 1 (left).
        steps: power steps; 0 (default) takes one, a second one where the old basis captured less than 0.9 of the energy
            that the new one captures, and a third one where that was less than 0.97 of the second one's.
        compute_dtype: ``"float32"`` or ``"bfloat16"``, of the products with the gradient. All others are float32.

    Returns:
        The new basis, orthonormal to 1e-4, or the old one, and what was done.

    Raises:
        ValueError: an argument has the wrong dtype, shape or value.
    """
    compute_format = _compute_code(compute_dtype)
    with _float32_products():
        found, report = _op.subspace_refresh(gradient, basis, side, steps, compute_format)
    kept, power_steps, fallbacks, energy_old, energy_new = report.tolist()
    return Refresh(found, bool(kept), int(power_steps), int(fallbacks), energy_old, energy_new)


def subspace_random(
    rank: int, dim: int, seed: int, id: int, draw: int, *, device: torch.device | str | None = None
) -> Tensor:
    """A seeded random orthonormal basis.

    Args:
        rank: number of vectors.
        dim: their length, at least ``rank``.
        seed: any 64-bit integer.
        id: number of the parameter, 32 bits.
        draw: which of this parameter's bases, 32 bits.
        device: where it is made, default torch's default device.

    Returns:
        float32 [rank, dim]. The numbers drawn are the same bits everywhere; the basis is, on one machine and device.

    Raises:
        ValueError: an argument is out of range.
    """
    with _float32_products():
        return _op.subspace_random(torch.empty(0, device=device), rank, dim, seed, id, draw)


def captured_energy(
    gradient: Tensor, right: Tensor | None = None, left: Tensor | None = None, compute_dtype: str = "float32"
) -> float:
    """``||G Q^T||^2 / ||G||^2`` (right), ``||Q G||^2 / ||G||^2`` (left) or ``||Q_left G Q_right^T||^2 / ||G||^2``.

    Q is an orthonormal basis of the rows of a basis.

    Args:
        gradient: [m, n], float32, bfloat16 or float16, contiguous, finite.
        right: float32 [r, n], decoded; it need not be orthonormal. None (default): no right basis.
        left: float32 [r, m], likewise.
        compute_dtype: ``"float32"`` or ``"bfloat16"``, of the products with the gradient.

    Returns:
        The share in [0, 1], 0 for a zero gradient.

    Raises:
        ValueError: an argument has the wrong dtype, shape or value, or there is no basis.
    """
    absent = gradient.new_empty(0)
    bases = (absent if right is None else right, absent if left is None else left)
    compute_format = _compute_code(compute_dtype)
    with _float32_products():
        return _op.captured_energy(gradient, *bases, compute_format).item()


def _compute_code(compute_dtype: str) -> int:
    if compute_dtype not in _COMPUTE:
        raise ValueError(f"compute_dtype must be 'float32' or 'bfloat16', got {compute_dtype!r}")
    return _COMPUTE[compute_dtype]


def _float_code(dtype: torch.dtype) -> int:
    if dtype not in FLOAT_FORMATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return FLOAT_FORMATS[dtype]


def _proj_code(proj_format: str) -> int:
    if proj_format not in PROJ_FORMATS:
        raise ValueError(f"proj_format must be one of {', '.join(PROJ_FORMATS)}, got {proj_format!r}")
    return PROJ_FORMATS[proj_format]


from . import _fakes as _fakes  # noqa: E402  registers the fakes of the ops above

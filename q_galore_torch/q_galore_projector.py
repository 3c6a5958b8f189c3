"""GaLoreProjector: the public Q-GaLore code's projector under its old import name."""

from __future__ import annotations

import logging
import pickle
from typing import Any, NoReturn

import torch
from torch import Tensor

from q_galore_torch import ops, subspace
from q_galore_torch.optim import options, schedule
from q_galore_torch.subspace import FULL, LEFT, RIGHT

_log = logging.getLogger(__name__)

_ROW = -1  # group_size: one group for each row
_PARTS = ("codes", "scales", "zeros")
_SETTINGS = ("rank", "proj_type", "proj_format", "proj_block")


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


class GaLoreProjector:
    """Projects the gradients of one matrix, as the public Q-GaLore code and the hpml fork of GaLore do.

    :class:`q_galore_torch.QGaLoreAdamW8bit` does not need it: this is for code that calls a projector by itself. The
    low-rank gradient is [m, r] (right side), [r, n] (left) or [r, r] (full); r is ``rank``, at most min(m, n)::

        right: R = G P^T,  back: R P        P [r, n]
        left:  R = P^T G,  back: P R        P [m, r]
        full:  R = A^T G B^T,  back: A R B  A [m, r], B [r, n]

    A new basis comes from an exact SVD where ``iter`` is a multiple of ``update_proj_gap``, and is quantised once.
    After each, the public code's lazy rule may stretch the gap. A gradient that is zero or not finite has no basis: the
    one before stays (the first unit vectors where there is none), and the next call tries again.

    Args:
        rank: number of basis vectors.
        verbose: log each new basis at level INFO instead of DEBUG, default False.
        update_proj_gap: calls between two bases, default 200.
        scale: factor of what comes back, default 1.
        proj_type: ``"std"`` (default), ``"reverse_std"``, ``"right"``, ``"left"`` or ``"full"``, as for the optimizer.
        quant: store the basis as integers with a zero point, default False.
        group_size: consecutive values of P that share a scale; -1 (default): each row of P has one.
        n_bit: 8 (default), or 4, of which a byte holds two.
        cos_threshold: default 0.4.
        gamma_proj: default 2.
        queue_size: default 5. Where the mean of the last ``queue_size`` cosines between the first vectors of two bases
            in a row is at least ``cos_threshold``, the gap grows by the factor ``gamma_proj``.
        quantize_type: hpml's ``"4bit"``, ``"8bit"``, ``"8bit_blockwise"`` or None (default).
        quantize_blocksz: values that share a scale under ``quantize_type``; default 64 for ``"4bit"`` and 4096 for
            ``"8bit_blockwise"``; ``"8bit"`` has one scale.

    Attributes:
        update_proj_gap: as it is now.
        svd_count: bases so far.
        queue: the last cosines.

    Raises:
        ValueError: an option is out of range, or ``quant`` and ``quantize_type`` are both given.

    Note:
        Without ``quant`` the bases, and always the gaps, are those of the public code. With it the scales are rounded
        up to bfloat16 and zero keeps a code (docs/formats.md), so that decoded values differ within a step.

    Source: Q-GaLore (arXiv 2407.08296), GaLore (arXiv 2403.03507).

    Example:
        >>> projector = GaLoreProjector(4, update_proj_gap=10, quant=True, n_bit=4)
        >>> low_rank = projector.project(torch.randn(32, 16), 0)
        >>> low_rank.shape, projector.project_back(low_rank).shape
        (torch.Size([32, 4]), torch.Size([32, 16]))
    """

    def __init__(
        self,
        rank: int,
        verbose: bool = False,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        quant: bool = False,
        group_size: int = _ROW,
        n_bit: int = 8,
        cos_threshold: float = 0.4,
        gamma_proj: float = 2,
        queue_size: int = 5,
        *,
        quantize_type: str | None = None,
        quantize_blocksz: int | None = None,
    ) -> None:
        checks = {key: entry.check for key, entry in options.PROJECTED.items()}
        self.rank: int = checks["rank"]("rank", rank)
        self.verbose = options.boolean("verbose", verbose)
        self.update_proj_gap: int = checks["update_proj_gap"]("update_proj_gap", update_proj_gap)
        self.scale: float = checks["scale"]("scale", scale)
        self.proj_type: str = checks["proj_type"]("proj_type", proj_type)
        self.quant = options.boolean("quant", quant)
        self.quant_group_size, self.quant_n_bit = group_size, n_bit
        self.cos_threshold: float = checks["cos_threshold"]("cos_threshold", cos_threshold)
        self.gamma_proj: float = checks["gamma_proj"]("gamma_proj", gamma_proj)
        self.queue_size: int = checks["queue_size"]("queue_size", queue_size)
        self.proj_format, self.proj_block = self._format(quantize_type, quantize_blocksz)
        self.svd_count = 0
        self.queue: list[float] = []
        self._past_vector = torch.empty(0)
        self._shape: tuple[int, ...] | None = None  # of the gradient
        self._stored: list[tuple[Tensor, Tensor, Tensor]] = []  # one for each side, the left one first
        self._due = True

    def _format(self, quantize_type: str | None, quantize_blocksz: int | None) -> tuple[str, int]:
        if not self.quant:
            given: dict[str, Any] = {"quantize_type": quantize_type}
            if quantize_blocksz is not None:
                given["quantize_blocksz"] = quantize_blocksz
            return options.projector_format(given)
        if quantize_type is not None:
            raise ValueError(f"quant=True and quantize_type={quantize_type!r} describe the format twice: give one")
        if self.quant_group_size != _ROW:
            check = options.number(1, 2**31 - 1, "-1 or an integer in [1, 2**31)", integer=True)
            self.quant_group_size = check("group_size", self.quant_group_size)
        self.quant_n_bit = options.choice(4, 8)("n_bit", self.quant_n_bit)
        return f"int{self.quant_n_bit}", self.quant_group_size

    # ------------------------------------------------------------ projection

    @torch.no_grad()
    def project(self, full_rank_grad: Tensor, iter: int) -> Tensor:
        """The low-rank gradient.

        Args:
            full_rank_grad: G, float, [m, n] or of more dimensions, which is projected as the matrix that
                :func:`q_galore_torch.subspace.matrix_shape` names.
            iter: the step, from 0.

        Returns:
            R, of G's dtype.

        Raises:
            ValueError: G is not a float tensor of two or more dimensions, or not of the shape of those before.
        """
        if not full_rank_grad.is_floating_point() or full_rank_grad.dim() < 2 or full_rank_grad.numel() == 0:
            raise ValueError(
                "the gradient must be a float tensor of two or more dimensions, got "
                f"{full_rank_grad.dtype} {list(full_rank_grad.shape)}"
            )
        shape = tuple(full_rank_grad.shape)
        if self._shape not in (None, shape):
            raise ValueError(f"the gradient must be {list(self._shape or ())} as before, got {list(shape)}")
        self._shape = shape
        matrix = full_rank_grad.reshape(subspace.matrix_shape(shape))
        if self._due or iter % self.update_proj_gap == 0:
            self._refresh(matrix, iter)
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        left, right = self._bases(dtype)
        low_rank = matrix.to(dtype)
        low_rank = low_rank if right is None else low_rank @ right.t()
        low_rank = low_rank if left is None else left.t() @ low_rank
        return low_rank.to(full_rank_grad.dtype)

    @torch.no_grad()
    def project_back(self, low_rank_grad: Tensor) -> Tensor:
        """``scale`` times the full-size direction of a low-rank one.

        Args:
            low_rank_grad: of the shape that :meth:`project` gives.

        Returns:
            Of the gradients' shape and ``low_rank_grad``'s dtype.

        Raises:
            RuntimeError: there is no basis yet.
            ValueError: the shape is another one.
        """
        if self._shape is None:
            raise RuntimeError("project_back() needs a basis: call project() with a gradient first")
        dtype = torch.promote_types(low_rank_grad.dtype, torch.float32)
        left, right = self._bases(dtype)
        rows, cols = subspace.matrix_shape(self._shape)
        expected = rows if left is None else left.shape[1], cols if right is None else right.shape[0]
        if tuple(low_rank_grad.shape) != expected:
            raise ValueError(f"the low-rank gradient must be {list(expected)}, got {list(low_rank_grad.shape)}")
        full = low_rank_grad.to(dtype)
        full = full if left is None else left @ full
        full = full if right is None else full @ right
        return (full * self.scale).to(low_rank_grad.dtype).reshape(self._shape)

    @property
    def ortho_matrix(self) -> Tensor | list[Tensor] | None:
        """The decoded P, float32 [r, n] or [m, r]; the list ``[A, B]`` for ``"full"``; None before the first one."""
        if not self._stored:
            return None
        found = [basis for basis in self._bases(torch.float32) if basis is not None]
        return found if len(found) == 2 else found[0]

    def _refresh(self, matrix: Tensor, iter: int) -> None:
        plan = self._plan(self._shape)
        found = [subspace.svd_basis(matrix, side, min(shape)) for side, shape in plan]
        bases = [basis.vectors for basis in found if basis is not None]
        self._due = len(bases) < len(found)
        if self._due:
            if not self._stored:
                self._stored = [self._encode(torch.eye(*shape, device=matrix.device)) for _, shape in plan]
            return
        self._stored = [
            self._encode(vectors if side == RIGHT else vectors.t())
            for (side, _), vectors in zip(plan, bases, strict=True)
        ]
        self.svd_count += 1
        state: dict[str, Any] = {"gap": self.update_proj_gap, "past_vector": self._past_vector}
        state.update(queue=torch.tensor(self.queue, dtype=torch.float64), measured=torch.zeros(3, dtype=torch.float64))
        schedule.stretch_upstream(state, vars(self), bases[0][0])
        self.update_proj_gap, self._past_vector, self.queue = (
            state["gap"],
            state["past_vector"],
            state["queue"].tolist(),
        )
        level = logging.INFO if self.verbose else logging.DEBUG
        _log.log(level, "basis %d of a %s gradient at %d", self.svd_count, list(matrix.shape), iter)

    # ------------------------------------------------------------ storage

    def _plan(self, shape: tuple[int, ...] | None) -> list[tuple[int, tuple[int, int]]]:
        """Each projected side of gradients of a shape, the left one first, and the shape of its P."""
        if shape is None:
            return []
        rows, cols = subspace.matrix_shape(shape)
        rank, side = min(self.rank, rows, cols), subspace.side_of(self.proj_type, rows, cols)
        shapes = {LEFT: (rows, rank), RIGHT: (rank, cols)}
        return [(each, shapes[each]) for each in ((LEFT, RIGHT) if side == FULL else (side,))]

    def _layout(self, shape: tuple[int, int]) -> tuple[tuple[int, int], int]:
        """The rows in which a P of a shape is encoded, and its block: the public code's groups run across rows."""
        return (shape, shape[1]) if self.proj_block == _ROW else ((1, shape[0] * shape[1]), self.proj_block)

    def _encode(self, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, block = self._layout((basis.shape[0], basis.shape[1]))
        return ops.projector_quantize(basis.contiguous().view(rows), self.proj_format, block)

    def _bases(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The left one [m, r] and the right one [r, n]; None for a side that is not projected."""
        found: dict[int, Tensor] = {}
        for (side, shape), parts in zip(self._plan(self._shape), self._stored, strict=True):
            rows, block = self._layout(shape)
            decoded = ops.projector_dequantize(*parts, self.proj_format, block, rows[1])
            found[side] = decoded.view(shape).to(dtype)
        return found.get(LEFT), found.get(RIGHT)

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and lists of them alone, which ``torch.load(weights_only=True)`` reads."""
        state: dict[str, Any] = {key: getattr(self, key) for key in _SETTINGS}
        state.update(update_proj_gap=self.update_proj_gap, svd_count=self.svd_count, due=int(self._due))
        state.update(queue=list(self.queue), past_vector=self._past_vector, shape=list(self._shape or ()))
        state.update({part: [stored[index] for stored in self._stored] for index, part in enumerate(_PARTS)})
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the basis and the schedule of another projector.

        Args:
            state_dict: from :meth:`state_dict` of a projector of the same rank, type and format.

        Raises:
            ValueError: it is not; nothing is loaded then.
        """
        own = self.state_dict()
        if not isinstance(state_dict, dict) or state_dict.keys() != own.keys():
            raise ValueError(f"the state of a GaLoreProjector must be a dict of {', '.join(own)}")
        for key in _SETTINGS:
            if state_dict[key] != own[key]:
                raise ValueError(f"{key} must be {own[key]!r}, as in this projector, got {state_dict[key]!r}")
        sizes = state_dict["shape"]
        if not _is_list(sizes, int) or len(sizes) == 1 or any(size < 1 for size in sizes):
            raise ValueError(f"shape must be [] or a list of two or more sizes, got {sizes!r}")
        shape = tuple(sizes) or None
        plan = self._plan(shape)
        template = [self._encode(torch.zeros(size)) for _, size in plan]
        for part in _PARTS:
            if not _is_list(state_dict[part], Tensor):
                raise ValueError(f"{part} must be a list of tensors, got {state_dict[part]!r:.80}")
            if len(state_dict[part]) != len(template):
                raise ValueError(f"the state for gradients {sizes} must hold {len(template)} bases")
        for key, least in (("update_proj_gap", 1), ("svd_count", 0), ("due", 0)):
            if not isinstance(state_dict[key], int) or state_dict[key] < least:
                raise ValueError(f"{key} must be an integer >= {least}, got {state_dict[key]!r}")
        if not _is_list(state_dict["queue"], float):
            raise ValueError(f"queue must be a list of numbers, got {state_dict['queue']!r:.80}")
        past, lengths = state_dict["past_vector"], [0, *(size[side == RIGHT] for side, size in plan[:1])]
        if (
            not isinstance(past, Tensor)
            or past.dtype != torch.float32
            or list(past.shape) not in [[n] for n in lengths]
        ):
            got = f"{past.dtype} {list(past.shape)}" if isinstance(past, Tensor) else repr(past)
            raise ValueError(f"past_vector must be a float32 tensor [{' or '.join(map(str, lengths))}], got {got}")
        stored = list(zip(*(state_dict[part] for part in _PARTS), strict=True))
        for parts, expected in zip(stored, template, strict=True):
            for name, part, wanted in zip(_PARTS, parts, expected, strict=True):
                if part.dtype != wanted.dtype or part.shape != wanted.shape:
                    need, got = (f"{t.dtype} {list(t.shape)}" for t in (wanted, part))
                    raise ValueError(f"{name} must be {need}, got {got}")
        self._shape, self._stored, self._due = shape, stored, bool(state_dict["due"])
        self.update_proj_gap, self.svd_count = state_dict["update_proj_gap"], state_dict["svd_count"]
        self.queue, self._past_vector = list(state_dict["queue"]), state_dict["past_vector"]

    def __deepcopy__(self, memo: dict[int, Any]) -> GaLoreProjector:
        twin = GaLoreProjector.__new__(GaLoreProjector)
        vars(twin).update({**vars(self), "queue": list(self.queue)})  # the tensors are replaced, never written to
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise pickle.PicklingError("a GaLoreProjector is not pickled, as unpickling runs code: save its state_dict()")

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError(
            "this checkpoint holds pickled GaLoreProjector objects of the public Q-GaLore code, which are not loaded, "
            "as unpickling objects can run code: read it with q_galore_torch.utils.setup.load_optimizer_state("
            "optimizer, path), which takes all but the projected parameters' states"
        )

    def __repr__(self) -> str:
        return (
            f"GaLoreProjector(rank={self.rank}, proj_type={self.proj_type!r}, proj_format={self.proj_format!r}, "
            f"proj_block={self.proj_block}, update_proj_gap={self.update_proj_gap}, svd_count={self.svd_count})"
        )

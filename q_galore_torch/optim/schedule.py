"""When a parameter's basis is due, and what a refresh does to its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from q_galore_torch import ops, subspace
from q_galore_torch.optim.state import Projection


def is_due(state: dict[str, Any], group: dict[str, Any], shapes: Projection, low_rank: bool) -> bool:
    """Whether a new basis belongs to the parameter's next step (its own, counted from 0).

    A plain parameter has no basis before its first step, a low-rank leaf a random one. A basis that spans the whole
    space is never refreshed.
    """
    if shapes.rank == shapes.dim and (low_rank or state["refreshes"] > 0):
        return False
    if group["lazy_rule"] == "upstream":
        return state["step"] // state["gap"] * state["gap"] > state["last_due"]
    first = state["refreshes"] == 0 and not low_rank
    return first or state["step"] >= state["last_due"] + state["gap"]


def refresh(
    state: dict[str, Any],
    group: dict[str, Any],
    shapes: Projection,
    gradient: Tensor | None,
    *,
    step: int,
    low_rank: bool,
) -> bool:
    """Compute the basis that is due, encode it into the state's projector in place, and set the next date.

    Args:
        state: of the parameter.
        group: its group.
        shapes: of its projection.
        gradient: full gradient [m, n], finite and not all zero; unused for ``subspace="random"``.
        step: the parameter's own step that the basis is due for.
        low_rank: the parameter is a low-rank leaf.

    Returns:
        False where LAPACK failed: nothing is changed then, and the basis stays due.
    """
    basis = _new_basis(state, group, shapes, gradient, low_rank)
    if basis is None:
        return False
    encoded = ops.projector_quantize(basis.vectors.contiguous(), group["proj_format"], group["proj_block"])
    for key, part in zip(("proj_codes", "proj_scales", "proj_zeros"), encoded, strict=True):
        state[key].copy_(part)
    _advance(state, group, step, basis.vectors[0])
    state["refreshes"] += 1
    state["qr_fallbacks"] += basis.fallbacks
    return True


def needs_gradient(group: dict[str, Any]) -> bool:
    """Whether a refresh reads the full gradient."""
    return group["subspace"] != "random"


def _new_basis(
    state: dict[str, Any], group: dict[str, Any], shapes: Projection, gradient: Tensor | None, low_rank: bool
) -> subspace.Basis | None:
    first = state["refreshes"] == 0
    how = group["subspace"] or ("warm" if low_rank else "svd")
    upstream = group["lazy_rule"] == "upstream"
    seed, id = group["seed"], state["id"]
    if how == "random" and not upstream:
        return subspace.random_basis(shapes.rank, shapes.dim, seed, id, state["refreshes"] + 1)
    assert gradient is not None
    if first and not low_rank and not upstream:
        return subspace.cold_basis(gradient, shapes.side, shapes.rank, seed, id, group["compute_dtype"])
    if how == "svd" or upstream:
        vectors = subspace.svd_basis(gradient, shapes.side, shapes.rank)
        if vectors is None:
            return None
        if not upstream:
            vectors = subspace.matching_signs(vectors, old_basis(state, group, shapes))
        return subspace.Basis(vectors)
    steps = subspace.COLD_STEPS if first else None
    return subspace.refresh_basis(gradient, shapes.side, old_basis(state, group, shapes), steps, group["compute_dtype"])


def old_basis(state: dict[str, Any], group: dict[str, Any], shapes: Projection) -> Tensor:
    """The decoded basis of a state, float32 [r, d]."""
    return ops.projector_dequantize(
        state["proj_codes"],
        state["proj_scales"],
        state["proj_zeros"],
        group["proj_format"],
        group["proj_block"],
        shapes.dim,
        torch.float32,
    )


def _advance(state: dict[str, Any], group: dict[str, Any], step: int, first_vector: Tensor) -> None:
    gap = state["gap"]
    if group["lazy_rule"] == "upstream":
        state["last_due"] = step // gap * gap
        _stretch_upstream(state, group, first_vector)
    elif state["refreshes"] == 0:
        state["last_due"] = subspace.next_phase_step(step, state["phase"], gap) - gap
    else:  # a retry does not move the dates
        state["last_due"] += gap * max(1, (step - state["last_due"]) // gap)


def _stretch_upstream(state: dict[str, Any], group: dict[str, Any], vector: Tensor) -> None:
    """The public code's rule: signed cosine of the first vector, a queue that is never cleared, no cap."""
    past, state["past_vector"] = state["past_vector"], vector.clone()
    if past.numel() == 0:
        return
    similarity = F.cosine_similarity(past, vector, dim=0).item()
    queue = [*state["queue"].tolist(), similarity][-group["queue_size"] :]
    state["queue"] = torch.tensor(queue, dtype=torch.float64)
    if len(queue) == group["queue_size"] and sum(queue) / len(queue) >= group["cos_threshold"]:
        state["gap"] = int(state["gap"] * group["gamma_proj"])

"""When a parameter's basis is due, what a refresh does to its state, and how two bases in a row are compared."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from q_galore_torch import ops, subspace
from q_galore_torch.optim import moments
from q_galore_torch.optim.options import longest_gap
from q_galore_torch.optim.state import PARTS, UNMEASURED, Projection

# A basis has found noise where it captures, beyond chance, less than this share of what chance leaves, or less than so
# many standard deviations of what a basis captures of white noise.
NOISE, DEVIATIONS = 0.1, 4.0
SIMILARITY, CAPTURED, HELD_OUT = 0, 1, 2  # places in a state's ``measured``


def is_due(state: dict[str, Any], group: dict[str, Any], shapes: Projection, low_rank: bool) -> bool:
    """Whether a new basis belongs to the parameter's next step (its own, counted from 0).

    A plain parameter has no basis before its first step, a low-rank leaf a random one. A basis that spans the whole
    space is never refreshed.
    """
    if shapes.whole and (low_rank or state["refreshes"] > 0):
        return False
    if group["lazy_rule"] == "upstream":
        return state["step"] // state["gap"] * state["gap"] > state["last_due"]
    first = state["refreshes"] == 0 and not low_rank
    return first or state["step"] >= state["last_due"] + state["gap"]


def is_pending(state: dict[str, Any]) -> bool:
    """Whether the two newest bases wait for the next gradient to be compared on."""
    return state["past_proj_codes"].numel() > 0


def needs_gradient(state: dict[str, Any], group: dict[str, Any], shapes: Projection, low_rank: bool) -> bool:
    """Whether the parameter's next step reads its full gradient for a new basis or to compare two."""
    return is_pending(state) or (group["subspace"] != "random" and is_due(state, group, shapes, low_rank))


# ---------------------------------------------------------------- refresh


def refresh(
    state: dict[str, Any],
    group: dict[str, Any],
    shapes: Projection,
    gradient: Tensor | None,
    *,
    step: int,
    gap: int,
    low_rank: bool,
) -> bool:
    """Compute the basis that is due, encode it into the state's projector in place, and set the next date.

    Args:
        state: of the parameter.
        group: its group.
        shapes: of its projection.
        gradient: full gradient [m, n], finite and not all zero; unused for ``subspace="random"``.
        step: the parameter's own step that the basis is due for.
        gap: the one by which it is due: a comparison in the same step may have moved the state's since.
        low_rank: the parameter is a low-rank leaf.

    Returns:
        False where no basis came out: nothing is changed then, and the basis stays due.
    """
    old = decoded_bases(state, group, shapes)
    bases = _new_bases(state, group, shapes, gradient, old, low_rank)
    if bases is None:
        return False
    compared = group["lazy_rule"] == "energy" and group["subspace"] != "random" and state["refreshes"] > 0
    for (name, _, _), basis in zip(shapes.sides, bases, strict=True):
        encoded = ops.projector_quantize(basis.vectors.contiguous(), group["proj_format"], group["proj_block"])
        for part, value in zip(PARTS, encoded, strict=True):
            stored = state[f"{name}_{part}"]
            if compared:
                state[f"past_{name}_{part}"] = stored.clone()
            stored.copy_(value)
    moments.carry_over(state, group, old, lambda: decoded_bases(state, group, shapes))
    renewed = next((basis for basis in bases if len(basis.vectors) < basis.vectors.shape[1]), bases[0])
    _advance(state, group, step, gap, renewed.vectors[0])
    state["refreshes"] += 1
    state["last_refresh"] = step
    state["qr_fallbacks"] += sum(basis.fallbacks for basis in bases)
    state["measured"][CAPTURED] = _captured(gradient, shapes, bases, group["compute_dtype"])
    return True


def _captured(gradient: Tensor | None, shapes: Projection, bases: list[subspace.Basis], compute_dtype: str) -> float:
    """The share of the gradient's energy that new bases capture."""
    if gradient is None or all(math.isnan(basis.energy) for basis in bases):
        return UNMEASURED  # they were not made from it
    if len(bases) == 1:
        return bases[0].energy
    return energy(gradient, shapes, [basis.vectors for basis in bases], compute_dtype)


def _new_bases(
    state: dict[str, Any],
    group: dict[str, Any],
    shapes: Projection,
    gradient: Tensor | None,
    old: list[Tensor],
    low_rank: bool,
) -> list[subspace.Basis] | None:
    """One basis for each projected side, or None where one of them could not be found."""
    bases = []
    for index, (_, side, dim) in enumerate(shapes.sides):
        if shapes.rank == dim and state["refreshes"] > 0:  # it spans its space already
            bases.append(subspace.Basis(old[index]))
            continue
        draw = (state["refreshes"] + 1) * len(shapes.sides) + index
        basis = _new_basis(state, group, shapes.rank, dim, side, gradient, old[index], low_rank, draw)
        if basis is None:
            return None
        bases.append(basis)
    return bases


def _new_basis(
    state: dict[str, Any],
    group: dict[str, Any],
    rank: int,
    dim: int,
    side: int,
    gradient: Tensor | None,
    old: Tensor,
    low_rank: bool,
    draw: int,
) -> subspace.Basis | None:
    first = state["refreshes"] == 0
    upstream = group["lazy_rule"] == "upstream"
    seed, id, dtype = group["seed"], state["id"], group["compute_dtype"]
    if group["subspace"] == "random":
        return subspace.random_basis(rank, dim, seed, id, draw, old.device)
    assert gradient is not None
    if first and not low_rank and not upstream:
        return subspace.cold_basis(gradient, side, rank, seed, id, dtype)
    if group["subspace"] == "svd":
        basis = subspace.svd_basis(gradient, side, rank)
        if basis is None or upstream:
            return basis
        return basis._replace(vectors=subspace.matching_signs(basis.vectors, old))
    warm = subspace.refresh_basis(gradient, side, old, subspace.COLD_STEPS if first else None, dtype)
    # No power step leads out of a basis to all of which the gradient is orthogonal.
    return subspace.cold_basis(gradient, side, rank, seed, id, dtype) if warm is None else warm


def decoded_bases(state: dict[str, Any], group: dict[str, Any], shapes: Projection, past: bool = False) -> list[Tensor]:
    """The stored basis [r, d] of each projected side as float32, or the ones before them."""
    prefix = "past_" if past else ""
    return [
        ops.projector_dequantize(
            state[f"{prefix}{name}_codes"],
            state[f"{prefix}{name}_scales"],
            state[f"{prefix}{name}_zeros"],
            group["proj_format"],
            group["proj_block"],
            dim,
        )
        for name, _, dim in shapes.sides
    ]


def _advance(state: dict[str, Any], group: dict[str, Any], step: int, gap: int, first_vector: Tensor) -> None:
    if group["lazy_rule"] == "upstream":
        state["last_due"] = step // gap * gap
        stretch_upstream(state, group, first_vector)
    elif state["refreshes"] == 0:
        state["last_due"] = subspace.next_phase_step(step, state["phase"], gap) - gap
    else:  # a retry does not move the dates
        state["last_due"] += gap * max(1, (step - state["last_due"]) // gap)


# ---------------------------------------------------------------- the lazy rules


def energy(gradient: Tensor, shapes: Projection, bases: list[Tensor], compute_dtype: str) -> float:
    """The share of a full gradient's energy [m, n] that the spans of decoded bases capture."""
    by_side = {side: basis for (_, side, _), basis in zip(shapes.sides, bases, strict=True)}
    right, left = by_side.get(subspace.RIGHT), by_side.get(subspace.LEFT)
    return subspace.captured_energy(gradient, right, left, compute_dtype)


def compare(state: dict[str, Any], group: dict[str, Any], shapes: Projection, gradient: Tensor) -> None:
    """Judge the newest basis and the one before it on a gradient to which neither was fitted, and move the gap.

    ``similarity = (E_old - c) / (E_new - c)`` in [0, 1], c the chance level; 0 where the new basis found only noise.

    Args:
        state: of a parameter with two bases to compare.
        group: its group.
        shapes: of its projection.
        gradient: of the step after the refresh, [m, n], finite and not all zero.
    """
    chance = shapes.chance
    new, old = (
        energy(gradient, shapes, decoded_bases(state, group, shapes, past), group["compute_dtype"])
        for past in (False, True)
    )
    found = new - chance
    # Of k x d independent normal entries, r vectors capture a share Beta(k r / 2, k (d - r) / 2).
    deviation = math.sqrt(2 * chance * (1 - chance) / gradient.numel())
    noise = max(NOISE * (1 - chance), DEVIATIONS * deviation)
    similarity = 0.0 if found < noise else min(1.0, max(0.0, (old - chance) / found))
    for name, _, _ in shapes.sides:
        for part in PARTS:
            state[f"past_{name}_{part}"] = state[f"past_{name}_{part}"].new_empty(0)
    state["measured"][SIMILARITY], state["measured"][HELD_OUT] = similarity, new
    _stretch(state, group, similarity)


def _stretch(state: dict[str, Any], group: dict[str, Any], similarity: float) -> None:
    """A full queue whose mean reaches the threshold stretches the gap; one similarity below it takes that back."""
    base, threshold = group["update_proj_gap"], group["energy_threshold"]
    queue, full = _queued(state, group, similarity)
    gap = state["gap"]
    if similarity < threshold:
        gap = base
    elif full and sum(queue) / len(queue) >= threshold:
        multiple = math.ceil(gap * group["gamma_proj"] / base)
        gap = base * min(multiple, longest_gap(group) // base)
        queue = []
    state["gap"], state["queue"] = gap, torch.tensor(queue, dtype=torch.float64, device="cpu")


def _queued(state: dict[str, Any], group: dict[str, Any], similarity: float) -> tuple[list[float], bool]:
    """The last similarities with a new one, and whether there are as many as decide."""
    queue = [*state["queue"].tolist(), similarity][-group["queue_size"] :]
    return queue, len(queue) == group["queue_size"]


def stretch_upstream(state: dict[str, Any], group: dict[str, Any], vector: Tensor) -> None:
    """The public code's rule: signed cosine of the first vector, a queue that is never cleared, no cap.

    Args:
        state: holds ``gap``, ``queue``, ``past_vector`` (empty before the first basis) and ``measured``, which change.
        group: holds ``cos_threshold``, ``gamma_proj`` and ``queue_size``.
        vector: the first one of a new basis, float32 [d].
    """
    past, state["past_vector"] = state["past_vector"], vector.clone()
    if past.numel() == 0:
        return
    similarity = F.cosine_similarity(past, vector, dim=0).item()
    queue, full = _queued(state, group, similarity)
    state["queue"] = torch.tensor(queue, dtype=torch.float64, device="cpu")
    state["measured"][SIMILARITY] = similarity
    if full and sum(queue) / len(queue) >= group["cos_threshold"]:
        state["gap"] = int(state["gap"] * group["gamma_proj"])

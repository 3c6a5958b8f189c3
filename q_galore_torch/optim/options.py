"""Checking of the optimizer's options: what is allowed, what it means, what is refused and why."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from q_galore_torch.ops import PROJ_FORMATS
from q_galore_torch.subspace import PROJ_TYPES

_log = logging.getLogger(__name__)

Check = Callable[[str, Any], Any]


class Option(NamedTuple):
    """A default and a check that returns the canonical value or raises ValueError."""

    default: Any
    check: Check


def _refuse(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key} must be {allowed}, got {value!r}")


def number(low: float, high: float, allowed: str, *, integer: bool = False, open_ends: str = "") -> Check:
    """A check for a number in [low, high]; ``open_ends`` names excluded ends ("low", "high").

    Strings that spell a number are parsed; a bool is not a number.
    """

    def check(key: str, value: Any) -> Any:
        parsed: Any = value
        if isinstance(value, str):
            try:
                parsed = int(value) if integer else float(value)
            except ValueError:
                raise _refuse(key, value, allowed) from None
        numeric = isinstance(parsed, Real) and not isinstance(parsed, bool)
        if not numeric:
            raise _refuse(key, value, allowed)
        outside = not low <= parsed <= high  # NaN too
        at_open_end = ("low" in open_ends and parsed == low) or ("high" in open_ends and parsed == high)
        if outside or at_open_end or (integer and parsed != int(parsed)):
            raise _refuse(key, value, allowed)
        return int(parsed) if integer else float(parsed)

    return check


def choice(*values: Any, later: Mapping[Any, str] | None = None) -> Check:
    """A check for one of ``values``; values in ``later`` are known, but refused with the reason given.

    A string that spells one of the integers among them is parsed.
    """
    spelt = {str(v): v for v in values if isinstance(v, int) and not isinstance(v, bool)}

    def check(key: str, value: Any) -> Any:
        value = spelt.get(value, value) if isinstance(value, str) else value
        for known, why in (later or {}).items():
            if type(value) is type(known) and value == known:
                raise ValueError(f"{key}={value!r} {why}; allowed: {_listed(values)}")
        if not any(type(value) is type(v) and value == v for v in values):
            raise _refuse(key, value, _listed(values))
        return value

    return check


def boolean(key: str, value: Any) -> bool:
    """A check for True or False, or their names as strings."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _refuse(key, value, "True or False")
    return value


def only(value: Any, why: str) -> Check:
    """A check for an option that exists for compatibility: any other value is refused."""

    def check(key: str, given: Any) -> Any:
        if type(given) is not type(value) or given != value:
            raise ValueError(f"{key}={given!r} is not supported ({why}); allowed: {value!r}")
        return given

    return check


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(v) for v in values)


_rate = number(0.0, math.inf, "a number >= 0", open_ends="high")


def _lr(key: str, value: Any) -> Any:
    """A learning rate; a tensor of one element stays a tensor, as in torch.optim."""
    if not isinstance(value, Tensor):
        return _rate(key, value)
    if value.numel() != 1 or value.is_complex():
        raise _refuse(key, value, "a number >= 0")
    _rate(key, value.item())
    return value


def _betas(key: str, value: Any) -> tuple[float, float]:
    allowed = "two numbers in [0, 1)"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _refuse(key, value, allowed)
    check = number(0.0, 1.0, allowed, open_ends="high")
    return check(key, value[0]), check(key, value[1])


def _lazy_rule(key: str, value: Any) -> str:
    return choice("energy", "upstream", "fixed")(key, "energy" if value is None else value)


def _subspace(key: str, value: Any) -> str:
    return choice("warm", "svd", "random")(key, "warm" if value is None else value)


def _or_none(check: Check) -> Check:
    """A check that lets None pass."""
    return lambda key, value: None if value is None else check(key, value)


_int32 = 2**31 - 1
_GAPS = 16  # the longest gap, in gaps


def _proj_block(key: str, value: Any) -> int | None:
    """Elements that share a scale, 0 for the whole tensor; None stands for the format's default."""
    return None if value is None else number(0, _int32, "an integer in [0, 2**31)", integer=True)(key, value)


# Options of every group; the constructor gives their defaults.
COMMON: dict[str, Option] = {
    "lr": Option(1e-3, _lr),
    "betas": Option((0.9, 0.999), _betas),
    "eps": Option(1e-8, number(0.0, math.inf, "a number > 0", open_ends="low high")),
    "weight_decay": Option(1e-2, number(0.0, math.inf, "a number >= 0", open_ends="high")),
    "moments_dtype": Option("dynamic8", choice("dynamic8", "float32")),
    "stochastic_round": Option(True, boolean),
}
# Options of the constructor alone.
GLOBAL: dict[str, Option] = {
    "seed": Option(0, number(0, 2**63 - 1, "an integer in [0, 2**63)", integer=True)),
    "nonfinite": Option("raise", choice("raise", "skip")),
    "compute_dtype": Option("float32", choice("float32", "bfloat16")),
    "min_8bit_size": Option(4096, number(0, 2**63 - 1, "an integer >= 0", integer=True)),
    "optim_bits": Option(32, number(8, 32, "8 or 32", integer=True)),
    "amsgrad": Option(False, only(False, "AMSGrad is not part of Q-GaLore")),
    "args": Option(None, only(None, "pass each option by its own name")),
    "percentile_clipping": Option(100, only(100, "clip with torch.nn.utils.clip_grad_norm_")),
    "block_wise": Option(True, only(True, "moments are always quantised blockwise")),
    "is_paged": Option(False, only(False, "paged states are not implemented")),
}
# Constructor options that every group carries along, so that the state dict holds them.
KEPT = ("seed", "nonfinite", "compute_dtype", "min_8bit_size")
# What every group remembers of the update before. Not an option; it is here so that the state dict holds it.
REMEMBERED: dict[str, Option] = {"last_grad_norm": Option(0.0, _rate)}
# Options of a group with a rank.
PROJECTED: dict[str, Option] = {
    "rank": Option(None, number(1, _int32, "an integer in [1, 2**31)", integer=True)),
    "update_proj_gap": Option(200, number(1, _int32, "an integer in [1, 2**31)", integer=True)),
    "scale": Option(0.25, number(-math.inf, math.inf, "a finite number", open_ends="low high")),
    "proj_type": Option("std", choice(*PROJ_TYPES)),
    "proj_format": Option("int4", choice(*PROJ_FORMATS)),
    "proj_block": Option(None, _proj_block),
    "subspace": Option("warm", _subspace),
    "lazy_rule": Option("energy", _lazy_rule),
    "energy_threshold": Option(0.8, number(0.0, 1.0, "a number in (0, 1]", open_ends="low")),
    "cos_threshold": Option(0.4, number(-1.0, 1.0, "a number in [-1, 1]")),
    "gamma_proj": Option(2.0, number(1.0, _int32, "a number in [1, 2**31)")),
    "queue_size": Option(5, number(1, _int32, "an integer in [1, 2**31)", integer=True)),
    "max_proj_gap": Option(None, _or_none(number(1, _int32, "an integer in [1, 2**31) or None", integer=True))),
    "moments": Option("keep", choice("keep", "rotate", "reset")),
    "norm_growth_limit": Option(None, _or_none(number(1.0, math.inf, "a number >= 1 or None", open_ends="high"))),
}
# Other projects' names of proj_format and proj_block: the public Q-GaLore's, and the two spellings of the hpml fork of
# GaLore. "8bit" there is one scale for the whole tensor, whatever the block size says.
_UPSTREAM_QUANT: dict[str, Option] = {
    "quant": Option(True, boolean),
    "quant_n_bit": Option(4, choice(4, 8)),
    "quant_group_size": Option(None, _proj_block),
}
_QUANTIZE_TYPES = {None: ("float32", 0), "4bit": ("fp4", 64), "8bit": ("fp8", 0), "8bit_blockwise": ("fp8", 4096)}
_HPML = (("quantize_type", "quantize_blocksz"), ("proj_quantize_type", "proj_quantize_blocksz"))
_FORMAT_KEYS = (("proj_format", "proj_block"), tuple(_UPSTREAM_QUANT), *_HPML)
_CHANGING = ("lr", "betas", "eps", "weight_decay")
_CHANGING_PROJECTED = ("scale", "update_proj_gap", "max_proj_gap")
# Keys that torch, its schedulers and its users put into groups; they are passed through.
_PASSED = {
    *("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr"),
    *("base_momentum", "max_momentum", "momentum"),
}


def check_constructor(given: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical values of the constructor's options.

    Args:
        given: every option but ``params``.

    Returns:
        The same keys.

    Raises:
        ValueError: naming key, value and what is allowed.
    """
    known = {**COMMON, **GLOBAL}
    checked = {key: known[key].check(key, value) for key, value in given.items()}
    if checked["optim_bits"] not in (8, 32):
        raise _refuse("optim_bits", given["optim_bits"], "8 or 32")
    return checked


def check_group(
    group: Mapping[str, Any], defaults: Mapping[str, Any], projected: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """A parameter group with canonical options: other projects' format keys become ``proj_format`` and ``proj_block``.

    Args:
        group: the user's group.
        defaults: the constructor's values of the ``COMMON`` options.
        projected: the class's own defaults of ``PROJECTED`` options, default none.

    Returns:
        A new dict. A group with a rank holds every key of ``PROJECTED``; one without holds ``rank`` None alone.

    Raises:
        ValueError: naming key, value and what is allowed.
    """
    checked = {key: value for key, value in group.items() if key in _PASSED}
    options = {key: value for key, value in group.items() if key not in _PASSED}
    _refuse_unknown(options, defaults)
    for key in COMMON:
        checked[key] = COMMON[key].check(key, options.pop(key, defaults[key]))
    for key in KEPT:
        checked[key] = options.pop(key, defaults[key])
    for key, entry in REMEMBERED.items():
        checked[key] = entry.check(key, options.pop(key, entry.default))
    if options.get("rank") is None:
        options = {key: value for key, value in options.items() if value is not None}
        if options:
            key = next(iter(options))
            raise ValueError(f"{key}={options[key]!r} needs a rank: it has no meaning in a group without one")
        return {**checked, "rank": None}
    named = any(key in options for kind in _FORMAT_KEYS for key in kind if key != "proj_block")
    own = {key: value for key, value in projected.items() if not (named and key == "proj_format")}
    return {**checked, **_check_projected({**own, **options})}


def check_saved(group: dict[str, Any]) -> None:
    """Check the options of a state dict's group, whose names are canonical already, and make its values canonical.

    Raises:
        ValueError: naming key, value and what is allowed; the group is unchanged then.
    """
    known = {**COMMON, **{key: GLOBAL[key] for key in KEPT}, **REMEMBERED}
    checked = {key: option.check(key, group[key]) for key, option in known.items()}
    if group["rank"] is not None:
        checked.update(_check_values(group))
    group.update(checked)


def check_settings(groups: Sequence[dict[str, Any]]) -> None:
    """Check what schedulers and users change between steps, in all groups before any of them is touched.

    Raises:
        ValueError: naming key, value and what is allowed.
    """
    checked = []
    for group in groups:
        keys = _CHANGING if group["rank"] is None else (*_CHANGING, *_CHANGING_PROJECTED)
        checked.append({key: {**COMMON, **PROJECTED}[key].check(key, group[key]) for key in keys})
        if group["rank"] is not None:
            _refuse_low_cap(checked[-1])
    for group, values in zip(groups, checked, strict=True):
        group.update(values)


def _refuse_unknown(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if (key in KEPT and value == defaults[key]) or key in REMEMBERED:
            continue  # a group that was taken from an optimizer
        if key in GLOBAL:
            raise ValueError(f"{key} is an option of the constructor, not of a group (got {value!r})")
        known_keys = sorted({*COMMON, *PROJECTED, *(name for kind in _FORMAT_KEYS for name in kind)})
        if key not in known_keys:
            raise ValueError(f"unknown group option {key}={value!r}; allowed: {', '.join(known_keys)}")


def _check_projected(options: dict[str, Any]) -> dict[str, Any]:
    options["proj_format"], options["proj_block"] = projector_format(options)
    if options.get("lazy_rule") == "upstream" and options.get("subspace") not in (None, "svd"):
        raise _refuse("subspace", options["subspace"], "'svd' under lazy_rule='upstream', which compares these")
    checked = _check_values(options)
    if checked["lazy_rule"] != "upstream" and options.get("cos_threshold") is not None:
        _warn_once(
            f"cos_threshold acts only under lazy_rule='upstream'; lazy_rule={checked['lazy_rule']!r} does not read it"
        )
    return checked


def _check_values(options: Mapping[str, Any]) -> dict[str, Any]:
    checked = {key: option.check(key, options.get(key, option.default)) for key, option in PROJECTED.items()}
    _refuse_low_cap(checked)
    if checked["lazy_rule"] == "upstream":
        checked["subspace"] = "svd"
    return checked


def _refuse_low_cap(checked: Mapping[str, Any]) -> None:
    longest, gap = checked["max_proj_gap"], checked["update_proj_gap"]
    if longest is not None and longest < gap:
        raise _refuse("max_proj_gap", longest, f"at least update_proj_gap={gap}, or None for {_GAPS} times that")


def longest_gap(group: Mapping[str, Any]) -> int:
    """The cap of a projected group's gap in steps: ``max_proj_gap``, by default 16 times ``update_proj_gap``."""
    given = group["max_proj_gap"]
    return _GAPS * group["update_proj_gap"] if given is None else given


@lru_cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def projector_format(options: dict[str, Any]) -> tuple[str, int]:
    """proj_format and proj_block from whichever names were given; those are taken out of the options.

    Raises:
        ValueError: two kinds of names were given, or a value is out of range.
    """
    given = [{key: options.pop(key) for key in kind if key in options} for kind in _FORMAT_KEYS]
    named = [next(iter(keys)) for keys in given if keys]
    if len(named) > 1:
        raise ValueError(f"{named[0]} and {named[1]} describe the projector's format twice; give one kind of keys only")
    ours, upstream, *hpml = given
    name, block = (PROJECTED[key].check(key, ours.get(key, PROJECTED[key].default)) for key in _FORMAT_KEYS[0])
    if upstream:
        quant = {key: option.check(key, upstream.get(key, option.default)) for key, option in _UPSTREAM_QUANT.items()}
        name, block = f"int{quant['quant_n_bit']}" if quant["quant"] else "float32", quant["quant_group_size"]
    for (type_key, block_key), keys in zip(_HPML, hpml, strict=True):
        if keys:
            name, block = _hpml_format(keys, type_key, block_key)
    if block is None or name in ("float32", "bfloat16"):
        block = 64 if name in ("fp4", "nf4") else 256
    return name, block


def _hpml_format(keys: Mapping[str, Any], type_key: str, block_key: str) -> tuple[str, int]:
    if type_key not in keys:
        raise ValueError(f"{block_key}={keys[block_key]!r} needs {type_key}: {_listed(tuple(_QUANTIZE_TYPES))}")
    block = _proj_block(block_key, keys.get(block_key))
    name, default = _QUANTIZE_TYPES[choice(*_QUANTIZE_TYPES)(type_key, keys[type_key])]
    return name, default if block is None or default == 0 else block

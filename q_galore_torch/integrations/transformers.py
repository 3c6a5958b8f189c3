"""Training with the Trainer of Hugging Face transformers, which is imported only when it is needed.

:func:`trainer_kwargs` is the whole integration. What the Trainer does with it, and where it needs care, is in
docs/huggingface.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from q_galore_torch.integrations import distributed
from q_galore_torch.nn.convert import _targets, is_prepared, param_groups
from q_galore_torch.nn.linear import QGaLoreLinear
from q_galore_torch.optim import options as known
from q_galore_torch.optim.galore_adamw import QGaLoreAdamW8bit

_log = logging.getLogger(__name__)

# The options that TrainingArguments has under names of its own.
_NAMES_IN_ARGS = {
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
}
# The losses of transformers that are not given num_items_in_batch, or take no notice of it.
_CLASSIFIERS = ("ForSequenceClassificationLoss", "ForTokenClassification")
_CONSTANTS = {"True": True, "False": False, "None": None}
# What args.optim may ask for beside its default: GaLore's own names mean what is done here.
_GALORE = ("galore_adamw", "galore_adamw_8bit")
_TARGETS = ("attn", "mlp")  # prepare_model's default
_DEFAULTS = {key: option.default for key, option in {**known.COMMON, **known.GLOBAL}.items()}


def trainer_kwargs(
    model: nn.Module,
    args: Any = None,
    *,
    rank: int | None = None,
    lr: float | None = None,
    target_modules: Sequence[str] | str | None = None,
    optim_args: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The keyword arguments that make a ``transformers.Trainer`` train with :class:`q_galore_torch.QGaLoreAdamW8bit`.

    The Trainer's rule decides what decays: neither biases nor norms. Each setting has one place: the keywords here,
    ``optim_args``, or ``args``; one that is given in two of them is refused. In a process of several the codes of the
    model's INT8 layers are made to agree (:func:`q_galore_torch.integrations.distributed.prepare`), so that all
    processes must make this call.

    Args:
        model: the one that the Trainer gets. From :func:`q_galore_torch.prepare_model`, or an ordinary float model,
            of which the weights that ``target_modules`` names are projected.
        args: the Trainer's ``TrainingArguments``. With it ``learning_rate``, ``weight_decay``, ``adam_beta1``,
            ``adam_beta2``, ``adam_epsilon``, ``optim_args`` and ``optim_target_modules`` are read from there. Without
            it (default None) they are not: ``lr`` is required, ``weight_decay`` is 0, as the Trainer's, and in one of
            several processes the model must be on its device.
        rank: number of basis vectors. Default: the prepared layers'; a float model needs one.
        lr: learning rate.
        target_modules: for a float model, as in :func:`q_galore_torch.prepare_model`, default ``("attn", "mlp")``.
        optim_args: more options as one string, see :func:`parse_optim_args`.
        options: of the optimizer's constructor and of its projected group (``update_proj_gap``, ``scale``, ...).

    Returns:
        ``{"optimizer_cls_and_kwargs": (QGaLoreAdamW8bit, {"params": groups, ...})}``, good for one Trainer.

    Raises:
        ValueError: an option is unknown, out of range or given in two places, nothing is to be projected, or ``args``
            asks for another optimizer, FSDP, DeepSpeed or ``nn.DataParallel``.
        ImportError: transformers is not installed.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, hidden_size=96))
        >>> args = TrainingArguments(output_dir="run", learning_rate=1e-3, use_cpu=True, report_to="none")
        >>> more = trainer_kwargs(model, args, rank=8, target_modules="all-linear")
        >>> trainer = Trainer(model=model, args=args, **more)
        >>> [group.get("rank") for group in trainer.create_optimizer().param_groups]
        [None, None, 8]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    given = {key: value for key, value in (("rank", rank), ("lr", lr)) if value is not None}
    given = _merged({**given, **options}, _optim_args(args, optim_args))
    if args is not None:
        _refuse_args(args, model)
        _warn_of_loss(args, model)
        target_modules = _pattern(_one_of(target_modules, args, "optim_target_modules"))
        given.update(_from_args(args, given))
    elif "lr" not in given:
        raise ValueError("lr must be given where args is not: the Trainer hands no learning_rate to this optimizer")
    constructor, projected = _sorted({"weight_decay": 0.0, **given})
    groups = _groups(model, target_modules, projected)
    for group in groups:  # now and not in train(), where the optimizer is made
        known.check_group(group, {**_DEFAULTS, **constructor})
    groups = _split_decay(model, groups)
    _agree(model, args)
    return {"optimizer_cls_and_kwargs": (QGaLoreAdamW8bit, {"params": groups, **constructor})}


def parse_optim_args(text: str) -> dict[str, Any]:
    """The options in a string such as ``TrainingArguments(optim_args=...)`` takes.

    Args:
        text: ``"key=value, key=value"``; a pair of numbers is written ``(0.9, 0.95)``.

    Returns:
        A dict. ``True``, ``False`` and ``None`` are what they say, everything else stays a string, which the
        optimizer reads as a number where it expects one.

    Raises:
        ValueError: a part is not ``key=value``, or a key comes twice.

    Example:
        >>> parse_optim_args("rank=128, betas=(0.9, 0.95), quant=True")
        {'rank': '128', 'betas': ('0.9', '0.95'), 'quant': True}
    """
    if not isinstance(text, str):
        raise TypeError(f"optim_args must be a string, got {type(text).__name__}")
    parsed: dict[str, Any] = {}
    for part in re.split(r",(?![^(]*\))", text) if text.strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"optim_args must be 'key=value, key=value, ...', got {part.strip()!r} in {text!r}")
        if key in parsed:
            raise ValueError(f"optim_args={text!r} has {key} twice")
        pair = re.fullmatch(r"\((.*)\)", value)
        parsed[key] = tuple(v.strip() for v in pair[1].split(",")) if pair else _CONSTANTS.get(value, value)
    return parsed


def _optim_args(args: Any, optim_args: str | None) -> dict[str, Any]:
    text = _one_of(optim_args, args, "optim_args", "optim_args")
    return {} if text is None else parse_optim_args(text)


def _one_of(given: Any, args: Any, name: str, spelt: str = "target_modules") -> Any:
    """A setting from a keyword or from args, but not from both."""
    own = getattr(args, name, None)
    if given is not None and own is not None and own != given:
        raise ValueError(f"{spelt}={given!r} and args.{name}={own!r} differ: give one of them")
    return own if given is None else given


def _pattern(targets: Any) -> Any:
    """What the Trainer takes beyond prepare_model: all_linear, and regular expressions in a list of substrings."""
    if isinstance(targets, str):
        return "all-linear" if targets == "all_linear" else targets
    strings = isinstance(targets, (list, tuple)) and all(isinstance(part, str) for part in targets)
    if not strings or all(re.fullmatch(r"[\w.-]*", part) for part in targets):
        return targets  # as it was given, for messages
    return "|".join(f".*{re.escape(part)}.*|(?:{part})" for part in targets)


def _merged(given: dict[str, Any], parsed: dict[str, Any]) -> dict[str, Any]:
    for key in given.keys() & parsed.keys():
        raise ValueError(f"{key} is given twice: {given[key]!r}, and {parsed[key]!r} in optim_args")
    return {**parsed, **given}


def _from_args(args: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What TrainingArguments says of the options that it names itself."""
    found: dict[str, Any] = {}
    for key, names in _NAMES_IN_ARGS.items():
        values = tuple(getattr(args, name) for name in names)
        value = values if len(values) > 1 else values[0]
        if key not in given:
            found[key] = value
        elif values != tuple(_default(args, name) for name in names):
            if known.COMMON[key].check(key, given[key]) != known.COMMON[key].check(key, value):
                own = " and ".join(f"args.{name}" for name in names)
                raise ValueError(f"{key}={given[key]!r} and {own}={value!r} differ: give one of them")
    return found


def _sorted(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the constructor, checked, and those of the projected group."""
    projected = {key: value for key, value in given.items() if key not in _DEFAULTS}
    own = {key: value for key, value in given.items() if key in _DEFAULTS}
    checked = known.check_constructor({**_DEFAULTS, **own})
    return {key: checked[key] for key in own}, projected


def _default(args: Any, name: str) -> Any:
    return next((field.default for field in dataclasses.fields(args) if field.name == name), None)


def _refuse_args(args: Any, model: nn.Module) -> None:
    """Raise ValueError for what TrainingArguments asks for and does not get."""
    if not hasattr(args, "learning_rate") or isinstance(args, type):
        raise TypeError(f"args must be the Trainer's TrainingArguments, got {type(args).__name__}")
    optim, usual = (str(getattr(name, "value", name)) for name in (args.optim, _default(args, "optim")))
    if optim.endswith("layerwise"):
        raise ValueError(
            f"args.optim={optim!r} updates in the backward pass, where the Trainer neither clips nor accumulates nor "
            "schedules: leave optim out; the Trainer calls this optimizer's ordinary step()"
        )
    if optim not in (usual, *_GALORE):
        raise ValueError(f"args.optim={optim!r} asks for another optimizer: leave it out")
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise ValueError(f"args.{name} is not supported: start the same script with torchrun, which uses DDP")
    if getattr(args, "n_gpu", 0) > 1 and _layers(model):
        raise ValueError(
            f"the Trainer would copy the model to {args.n_gpu} GPUs in every forward (nn.DataParallel): start the "
            "script with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES"
        )


def _warn_of_loss(args: Any, model: nn.Module) -> None:
    """The Trainer leaves the mean over micro-batches to a model that takes keywords, whether it reads them or not."""
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's takes any
    forward = inspect.unwrap(type(inner).forward)
    keywords = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    mean = "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ())  # which divides,
    mean = mean and getattr(getattr(inner, "loss_function", None), "__name__", "") not in _CLASSIFIERS  # but for these
    if args.gradient_accumulation_steps > 1 and keywords and not mean and not hasattr(inner, "accepts_loss_kwargs"):
        _log.warning(
            "%s seems to ignore num_items_in_batch: its loss and gradients would be %d times too large with "
            "gradient_accumulation_steps=%d; set model.accepts_loss_kwargs = False (or True, if it does divide by it)",
            type(inner).__name__,
            args.gradient_accumulation_steps,
            args.gradient_accumulation_steps,
        )


def _layers(model: nn.Module) -> bool:
    return any(isinstance(module, QGaLoreLinear) for module in model.modules())


def _groups(
    model: nn.Module, target_modules: Sequence[str] | str | None, projected: dict[str, Any]
) -> list[dict[str, Any]]:
    if not is_prepared(model):
        return _float_groups(model, _TARGETS if target_modules is None else target_modules, projected)
    if target_modules is not None:
        raise ValueError(f"target_modules={target_modules!r} comes too late: the model is prepared already")
    if "rank" in projected:  # which is compared with the layers', and may be spelt as a string
        projected = {**projected, "rank": known.PROJECTED["rank"].check("rank", projected["rank"])}
    return param_groups(model, **projected)


def _float_groups(
    model: nn.Module, target_modules: Sequence[str] | str, projected: dict[str, Any]
) -> list[dict[str, Any]]:
    if projected.get("rank") is None:
        raise ValueError("rank must be given for a model that is not prepared, got None")
    matrices = {id(layer.weight) for layer in _targets(model, target_modules).values() if layer.weight.requires_grad}
    if not matrices:
        raise ValueError(f"target_modules={target_modules!r} matches no layer whose weight requires a gradient")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = [(name, p) for name, p in named if id(p) not in matrices]
    chosen = [(name, p) for name, p in named if id(p) in matrices]
    groups = [_group(rest, {})] if rest else []
    return [*groups, _group(chosen, projected)]


def _group(named: list[tuple[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    return {"params": [p for _, p in named], "param_names": [name for name, _ in named], **settings}


def _split_decay(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group as one that decays and one that does not, by the Trainer's own rule; none without parameters."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # it asks nothing of the Trainer
    split = []
    for group in groups:
        named = list(zip(group["param_names"], group["params"], strict=True))
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        decays = [(name, p) for name, p in named if name in decayed]
        others = [(name, p) for name, p in named if name not in decayed]
        split += [_group(decays, settings)] if decays else []
        split += [_group(others, {**settings, "weight_decay": 0.0})] if others else []
    return split


def _agree(model: nn.Module, args: Any) -> None:
    """Make the INT8 codes of several processes agree on the device where DDP will find them."""
    if args is not None:
        args.device  # noqa: B018 - starts torch.distributed where the script runs under torchrun
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not _layers(model):
        return
    distributed.prepare(model if args is None else model.to(args.device))

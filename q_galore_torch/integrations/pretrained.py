"""A pretrained Hugging Face model, prepared layer by layer while it is read."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from q_galore_torch.nn.convert import prepare_model
from q_galore_torch.shards import INDEX, SINGLE, ShardReader, names_in, read_index, some

_log = logging.getLogger(__name__)

_MARK = "_is_hf_initialized"  # transformers' own: a tensor that bears it is left alone by its initialisers


def from_pretrained(
    folder: str | os.PathLike[str],
    rank: int,
    auto_class: Any = None,
    dtype: torch.dtype | str = "auto",
    config: Any = None,
    **options: Any,
) -> Any:
    """Read a Hugging Face model from its safetensors files and prepare it, without ever holding all of it in float.

    Gives what the class's own ``from_pretrained``, followed by :func:`q_galore_torch.prepare_model`, gives. Each module
    gets its memory when its turn comes, and a matching layer is quantised and its floats are freed before the next one.

    Args:
        folder: of ``config.json`` and ``model.safetensors``, or of shards and their index.
        rank: as for ``prepare_model``.
        auto_class: ``AutoModelForSequenceClassification``, another Auto class, or a model class, or the name of one in
            ``transformers``. Default None: the class that the config names.
        dtype: of what stays float. Default ``"auto"``: what the config says, else that of the first float in the files.
        config: in place of the folder's, for instance with another ``num_labels``; not changed. Default None.
        options: further ones of ``prepare_model``: ``target_modules``, ``weight_bits``, ``device``, ...

    Returns:
        The prepared model in evaluation mode. Weights that the files lack are initialised by the model's own rule; they
        and entries that the model has no place for are logged, once each.

    Raises:
        ImportError: transformers 5 is not installed.
        FileNotFoundError: there is no folder, or no safetensors file in it.
        ValueError: a file is damaged, an entry has another shape than in the model, tied weights differ in the files,
            the files are a prepared model's, quantised already or in a form that transformers converts (merged
            experts), or an option is wrong.

    Example:
        >>> from q_galore_torch.integrations.pretrained import from_pretrained
        >>> model = from_pretrained("llama-1b", rank=256, target_modules="all-linear")  # doctest: +SKIP
    """
    transformers = _transformers()
    path = Path(folder)
    reader = ShardReader(path, _files(path))
    config = copy.deepcopy(config) if config is not None else transformers.AutoConfig.from_pretrained(path)
    if not isinstance(config, transformers.PretrainedConfig):
        raise ValueError(f"config must be one of transformers, got {config!r}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{path} is quantised already: a model of floats is needed")
    if any(name.endswith("qweight") and name.removesuffix("qweight") + "zeros" in reader for name in reader):
        raise ValueError(
            f"{path} was saved from a prepared model: prepare a model and give these files to its load_state_dict"
        )
    model = _meta_model(transformers, config, auto_class, _dtype(dtype, config, reader))
    if "initialize" in options:
        raise ValueError("initialize is not an option here: the values come from the files")
    sources = _Sources(model, reader, path)
    prepared: Any = prepare_model(model, rank, initialize=sources.fill, **options)
    sources.report()
    prepared.name_or_path = prepared.config._name_or_path = str(path)
    if prepared.can_generate() and (path / "generation_config.json").is_file():
        prepared.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return prepared.eval()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("from_pretrained needs transformers: pip install q-galore-torch[hf]") from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"from_pretrained needs transformers 5 or later, found {transformers.__version__}")
    return transformers


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor of a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder (a model of the hub is fetched with huggingface_hub.snapshot_download)"
        )
    if (folder / SINGLE).is_file():
        return dict.fromkeys(names_in(folder / SINGLE), SINGLE)
    if (folder / INDEX).is_file():
        files, metadata = read_index(folder)
        if metadata.get("format") == "q_galore_torch":
            raise ValueError(f"{folder} was written by save_model: read it with load_model")
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(
            f"{folder} holds pytorch_model.bin, a pickle, and no safetensors: rewrite it with transformers' own "
            "from_pretrained and save_pretrained"
        )
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _dtype(given: torch.dtype | str, config: Any, reader: ShardReader) -> torch.dtype:
    chosen: Any = given
    if given == "auto":
        chosen = getattr(config, "dtype", None)
        if chosen is None:
            kinds = (reader.kind(name)[0] for name in reader)
            chosen = next((dtype for dtype in kinds if dtype.is_floating_point), torch.float32)
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a float dtype of torch, got {given!r}")
    return chosen


def _meta_model(transformers: Any, config: Any, auto_class: Any, dtype: torch.dtype) -> Any:
    """The model without memory, in the dtypes that transformers would load it in."""
    from transformers.core_model_loading import build_glob_alternation
    from transformers.initialization import meta_device_safe_creation_ops

    chosen = (config.architectures or [None])[0] if auto_class is None else auto_class
    if isinstance(chosen, str):
        chosen = getattr(transformers, chosen, None)
    build = getattr(chosen, "from_config", None) or getattr(chosen, "_from_config", None)
    if build is None:
        named = config.architectures if auto_class is None else auto_class
        raise ValueError(f"auto_class must be a model class of transformers or its name, got {named!r}")
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = build(config, dtype=dtype)
    plan = model._get_dtype_plan(dtype)
    if plan:
        kept = build_glob_alternation(list(plan))[0]
        for name, parameter in model.named_parameters():
            if kept.search(name):
                parameter.data = parameter.data.to(torch.float32)
    return model


class _Sources:
    """Where the values of a meta model's tensors are, by transformers' own rules for names.

    Args:
        model: on the meta device.
        reader: of the files.
        folder: of the files, for messages.

    Raises:
        ValueError: the files do not fit the model.
    """

    def __init__(self, model: Any, reader: ShardReader, folder: Path) -> None:
        self._model, self._reader, self._folder = model, reader, folder
        own = model.state_dict(keep_vars=True)
        found, self._unexpected = _matched(model, reader, own)
        names: dict[int, list[str]] = {}
        for name, tensor in own.items():
            names.setdefault(id(tensor), []).append(name)
            source = found.get(name)
            if source is not None and reader.kind(source)[1] != tuple(tensor.shape):
                shape = list(reader.kind(source)[1])
                raise ValueError(f"{name} must be {list(tensor.shape)}, as in the model, and is {shape} in {folder}")
        # The first name that the files have, and the tensors themselves, by place: memory comes later.
        self._source: dict[str, str] = {}
        self._missing: list[str] = []
        for tied in names.values():
            there = [name for name in tied if name in found]
            if not there:
                self._missing.append(tied[0])
            for name, other in itertools.pairwise(there):
                if not _equal(reader, found[name], found[other]):
                    raise ValueError(
                        f"{name} and {other} are tied in the model and differ in {folder}: give a config with "
                        "tie_word_embeddings=False"
                    )
            self._source.update((name, found[there[0]]) for name in tied if there)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._owners = dict(_owners(model, model))

    def fill(self, module: nn.Module) -> None:
        """Give values to a module's own tensors."""
        from transformers.initialization import guard_torch_init_functions

        prefix, unset = self._names[id(module)], False
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            source = self._source.get(f"{prefix}.{key}".lstrip("."))
            if source is None:
                unset = True
            elif not getattr(tensor, _MARK, False):  # tied ones come again
                self._reader.copy_to(source, tensor)
                setattr(tensor, _MARK, True)
        if unset:
            with guard_torch_init_functions():  # leaves alone what is marked
                self._owners[id(module)]._init_weights(module)

    def report(self) -> None:
        """Log what was not in the files or not in the model."""
        ignored = _patterns(self._model, "missing")
        missing = [name for name in self._missing if not any(re.search(rule, name) for rule in ignored)]
        if missing:
            _log.warning("%s lacks %s: newly initialised, to be trained", self._folder, some(missing))
        if self._unexpected:
            _log.warning("%s has entries that the model has no place for: %s", self._folder, some(self._unexpected))


def _matched(model: Any, reader: ShardReader, own: dict[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """The stored name of each entry of the model that the files have, and the stored names that are left."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, str] = {}
    unexpected = []
    for stored in reader:
        name, converted = rename_source_key(stored, renamings, converters, prefix, own)
        if name not in own and stored in own:
            name, converted = rename_source_key(stored, [], [], prefix, own)
        if converted is not None and name in own:
            raise ValueError(
                f"{stored} is stored in a form that transformers converts to {name}: use its own from_pretrained, then "
                "prepare_model"
            )
        if name in own:
            found[name] = stored
        else:
            unexpected.append(stored)
    ignored = _patterns(model, "unexpected")
    return found, [name for name in unexpected if not any(re.search(rule, name) for rule in ignored)]


def _patterns(model: Any, kind: str) -> list[str]:
    """What the model's class says need not be told of; old files have some tables that are computed now."""
    rules = list(getattr(model, f"_keys_to_ignore_on_load_{kind}") or [])
    return rules + [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"] if kind == "unexpected" else rules


def _owners(module: nn.Module, owner: Any) -> Iterator[tuple[int, Any]]:
    """For each module the innermost model of transformers that holds it, whose rule initialises it."""
    owner = module if hasattr(module, "_init_weights") else owner
    yield id(module), owner
    for child in module.children():
        yield from _owners(child, owner)


def _equal(reader: ShardReader, name: str, other: str) -> bool:
    return reader.kind(name) == reader.kind(other) and torch.equal(reader.read(name), reader.read(other))

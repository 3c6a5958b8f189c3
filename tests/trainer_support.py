"""What the tests of the Trainer share: tiny models, data in memory, and arguments that write and report nothing."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import q_galore_torch as qg
from q_galore_torch.integrations.transformers import trainer_kwargs

SHAPE: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
RANK = 8


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=32, **SHAPE, **more))


def bert(**more: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=96, max_position_embeddings=32, **SHAPE, **{**NO_DROPOUT, **more})
    return BertForSequenceClassification(config)


def roberta(**more: Any) -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=96, max_position_embeddings=40, **SHAPE, **{**NO_DROPOUT, **more})
    return RobertaForSequenceClassification(config)


def int8(model: Any, **options: Any) -> Any:
    return qg.prepare_model(model, **{"rank": RANK, "target_modules": "all-linear", **options})


def texts(count: int = 32) -> list[dict[str, Tensor]]:
    """Sequences for a language model."""
    tokens = torch.randint(4, 96, (count, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def sentences(count: int = 32) -> list[dict[str, Tensor]]:
    """Sequences in two classes."""
    tokens = torch.randint(4, 96, (count, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


def arguments(folder: Path | str, **more: Any) -> TrainingArguments:
    usual: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1
    )
    usual.update(per_device_train_batch_size=4, max_steps=6, learning_rate=1e-3, logging_nan_inf_filter=False)
    return TrainingArguments(**{**usual, **more})


def trained(
    model: Any,
    args: TrainingArguments,
    data: list[dict[str, Tensor]],
    resume: str | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer that has trained as the one-liner says."""
    made = Trainer(model=model, args=args, train_dataset=data, **trainer_kwargs(model, args, **options))
    gc.freeze()  # accelerate collects garbage before each training: four fifths of the time of these tests
    try:
        made.train(resume_from_checkpoint=resume)
    finally:
        gc.unfreeze()
    return made


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Weights and optimizer state, flat, as copies."""
    flat = {f"model.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    for key, entry in trainer.optimizer.state_dict()["state"].items():
        flat.update({f"{key}.{name}": torch.as_tensor(value).clone() for name, value in entry.items()})
    return flat


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]

"""One run: model, batches, updates, evaluation."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import q_galore_torch as qg
from pretrain.errors import UsageError
from pretrain.report import state_bytes, tensor_bytes, weight_bytes

from . import metrics
from .data import Split, Texts
from .methods import build_optimizer, method_name

Batch = dict[str, Tensor]


class TrainingFailed(Exception):
    """The run cannot go on: the loss, a gradient or an output is no longer a number."""


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens, in the order of the data."""

    rows: list[dict[str, list[int]]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)


class FineTuning:
    """A model, its optimizer and its data, for one seed.

    Args:
        args: The flags.
        texts: What to train on.
        seed: Of the new head, the order of the rows, dropout and rounding noise.

    Raises:
        UsageError: The model cannot be loaded, or the package refuses an option.
    """

    def __init__(self, args: argparse.Namespace, texts: Texts, seed: int) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()  # the new head is meant to be new
        transformers.utils.logging.disable_progress_bar()
        self.args, self.texts, self.seed = args, texts, seed
        transformers.set_seed(seed)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                args.model_name_or_path, use_fast=not args.use_slow_tokenizer
            )
            self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
                args.model_name_or_path,
                num_labels=max(1, len(texts.labels)),
                ignore_mismatched_sizes=args.ignore_mismatched_sizes,
                dtype=torch.float32,
            )
        except (OSError, ValueError, RuntimeError) as error:
            if "ignore_mismatched_sizes" in str(error):
                raise UsageError(
                    f"the head of {args.model_name_or_path} does not have {max(1, len(texts.labels))} outputs, which "
                    "the data needs: --ignore_mismatched_sizes makes a new one"
                ) from None
            sentence = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"cannot load --model_name_or_path {args.model_name_or_path}: {sentence}") from None
        # A model that was fine-tuned before says what its labels were then.
        self.model.config.problem_type = "single_label_classification" if texts.labels else "regression"
        self._name_classes()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.longest = min(args.max_length, self.tokenizer.model_max_length, *position_counts(self.model))
        self.model.to(args.torch_device)
        self.optimizer: Optimizer = build_optimizer(self.model, args, seed)
        self.method = method_name(args, self.optimizer)
        self.train_rows = self._encode(texts.train)
        per_epoch = -(-len(texts.train) // args.rows_per_update)
        self.updates = args.max_train_steps or per_epoch * args.num_train_epochs
        self.epochs = -(-self.updates // per_epoch)
        self.scheduler = transformers.get_scheduler(
            args.lr_scheduler_type, self.optimizer, args.num_warmup_steps, self.updates
        )

    def _name_classes(self) -> None:
        """Class names in the config, and in the order of a model that was trained with them before."""
        names, config = self.texts.labels, self.model.config
        self.order = list(range(len(names)))
        if not names:
            return
        known = {str(name).lower(): number for name, number in (config.label2id or {}).items()}
        if len(known) == len(names) and known.keys() == {name.lower() for name in names}:
            self.order = [known[name.lower()] for name in names]
        config.id2label = {number: name for name, number in zip(names, self.order, strict=True)}
        config.label2id = {name: number for number, name in config.id2label.items()}

    def _encode(self, split: Split) -> Encoded:
        encoded = self.tokenizer(*split.texts, truncation=True, max_length=self.longest)
        rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        if not self.texts.labels:
            return Encoded(rows, torch.tensor(split.labels, dtype=torch.float32))
        return Encoded(rows, torch.tensor([self.order[int(label)] for label in split.labels]))

    def _batch(self, data: Encoded, numbers: list[int]) -> Batch:
        """Rows padded to the longest of them, or to the most that a row may have."""
        pad = {"padding": "max_length", "max_length": self.longest} if self.args.pad_to_max_length else {}
        batch = self.tokenizer.pad([data.rows[i] for i in numbers], return_tensors="pt", **(pad or {"padding": True}))
        batch["labels"] = data.labels[numbers]
        return {name: value.to(self.args.torch_device) for name, value in batch.items()}

    def _rows_of_updates(self) -> Iterator[list[int]]:
        """The rows of each update: every epoch has each row once, in an order of its own."""
        draw = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(self.train_rows), generator=draw).tolist()
            for start in range(0, len(order), self.args.rows_per_update):
                yield order[start : start + self.args.rows_per_update]

    def train(self) -> dict[str, Any]:
        """Train to the end and evaluate.

        Returns:
            The record of the run: method, seed, metrics, updates, loss of the last tenth of the updates, bytes, seconds
            of the updates.

        Raises:
            TrainingFailed: The loss, a gradient or an output is no longer a number.
        """
        from tqdm import tqdm  # which transformers brings

        torch.manual_seed(self.seed)  # dropout, whatever was drawn since the model was made
        self.model.train()
        losses: list[float] = []
        with tqdm(total=self.updates, desc=f"{self.method}, seed {self.seed}", leave=False, mininterval=1.0) as bar:
            start = time.perf_counter()
            for numbers in self._rows_of_updates():
                losses.append(self._update(numbers))
                bar.update()
                if len(losses) == self.updates:
                    break
            seconds = time.perf_counter() - start
        last = losses[-max(1, len(losses) // 10) :]
        return {
            "method": self.method,
            "seed": self.seed,
            "metrics": self.evaluate(),
            "updates": len(losses),
            "train_loss": sum(last) / len(last),
            "optimizer_state_bytes": state_bytes(self.optimizer),
            "projector_bytes": projector_bytes(self.optimizer),
            "weight_bytes": weight_bytes(self.model),
            "parameters": qg.num_parameters(self.model),
            "seconds": round(seconds, 2),
        }

    def _update(self, numbers: list[int]) -> float:
        """One update by the mean loss over these rows, a batch at a time; returns that loss."""
        size = self.args.per_device_train_batch_size
        total = 0.0
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            loss = self.model(**self._batch(self.train_rows, part)).loss * (len(part) / len(numbers))
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise TrainingFailed(f"the loss is {total}; a smaller --learning_rate may help")
        try:
            self.optimizer.step()
        except qg.NonFiniteGradientError as error:
            raise TrainingFailed(f"{error}; a smaller --learning_rate may help") from None
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def predict(self, split: Split) -> tuple[list[float], list[float]]:
        """Predictions and labels of every row, once each, in the model's order of classes."""
        self.model.eval()
        data = self._encode(split)
        size = self.args.per_device_eval_batch_size
        by_length = sorted(range(len(data)), key=lambda i: len(data.rows[i]["input_ids"]))  # little padding
        found: list[float] = [0.0] * len(data)
        for start in range(0, len(data), size):
            numbers = by_length[start : start + size]
            logits = self.model(**self._batch(data, numbers)).logits
            if not logits.isfinite().all():
                raise TrainingFailed("the last update left a model without finite outputs; see --learning_rate")
            values = logits.argmax(dim=-1) if self.texts.labels else logits[:, 0]
            for number, value in zip(numbers, values.tolist(), strict=True):
                found[number] = value
        return found, data.labels.tolist()

    def evaluate(self) -> dict[str, float]:
        """The metrics over all validation rows."""
        found = {}
        for end, split in self.texts.validation.items():
            predictions, labels = self.predict(split)
            if self.order != sorted(self.order):  # f1 is that of the data's class 1
                back = {number: i for i, number in enumerate(self.order)}
                predictions, labels = [back[int(p)] for p in predictions], [back[int(v)] for v in labels]
            values = metrics.compute(self.texts.metrics, predictions, labels)
            found.update({name + end: value for name, value in values.items()})
        return found

    def save(self, folder: str) -> None:
        """Write the model, its INT8 matrices as floats again, and the tokenizer for ``from_pretrained``."""
        model: Any = qg.export_model(self.model) if self.args.weight_quant else self.model
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def position_counts(model: nn.Module) -> list[int]:
    """How many tokens the model has learned positions for, of each table of positions."""
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    tables = [m for m in tables if isinstance(m, nn.Embedding)]
    # RoBERTa counts from behind the padding token's position.
    return [m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1) for m in tables]


def projector_bytes(optimizer: Optimizer) -> int:
    """The part of the optimizer's state that is projectors."""
    states: list[dict[str, Any]] = list(optimizer.state.values())
    parts = [f"{side}_{part}" for side in ("proj", "right") for part in ("codes", "scales", "zeros")]
    return tensor_bytes(state[part] for state in states for part in parts if part in state)

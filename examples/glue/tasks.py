"""The nine tasks of GLUE: their columns on the hub and in GLUE's own files, their labels and their metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        columns: names of the one or two text columns, as on the hub.
        labels: class names in the hub's order; none where the label is a number to be predicted.
        metrics: names of ``metrics.METRICS``; the first is the one that methods are compared by.
        folder: the task's folder in GLUE's download.
        file_columns: the text columns and the label column of GLUE's files; numbers where they have no header.
        validation: the end of each file of validation rows, "" for ``dev.tsv``.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    folder: str
    file_columns: tuple[str | int, ...]
    validation: tuple[str, ...] = ("",)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), "CoLA", (3, 1)),
    "mnli": Task(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), "MNLI",
        (*_PAIR, "gold_label"), ("_matched", "_mismatched"),
    ),
    "mrpc": Task(
        _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "MRPC", ("#1 String", "#2 String", "Quality")
    ),
    "qnli": Task(("question", "sentence"), _ENTAILMENT, ("accuracy",), "QNLI", ("question", "sentence", "label")),
    "qqp": Task(
        ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), "QQP",
        ("question1", "question2", "is_duplicate"),
    ),
    "rte": Task(_PAIR, _ENTAILMENT, ("accuracy",), "RTE", (*_PAIR, "label")),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",), "SST-2", ("sentence", "label")),
    "stsb": Task(_PAIR, (), ("pearson", "spearmanr"), "STS-B", (*_PAIR, "score")),
    "wnli": Task(_PAIR, ("not_entailment", "entailment"), ("accuracy",), "WNLI", (*_PAIR, "label")),
}  # fmt: skip

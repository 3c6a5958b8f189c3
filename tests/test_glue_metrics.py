"""examples/run_glue.py: its metrics against values worked out by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from glue.metrics import METRICS, compute  # noqa: E402
from glue.tasks import TASKS  # noqa: E402

pytest.importorskip("sklearn")

# True positives 3, false positives 2, false negatives 1, true negatives 4.
PREDICTED = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
LABELS = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]


def test_accuracy_f1_and_matthews_of_a_table_of_four() -> None:
    values = compute(["accuracy", "f1", "matthews_correlation"], PREDICTED, LABELS)
    assert values["accuracy"] == pytest.approx(7 / 10)
    assert values["f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert values["matthews_correlation"] == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))


def test_f1_is_that_of_class_one() -> None:
    assert compute(["f1"], [0, 0, 0, 1], [0, 0, 0, 0])["f1"] == 0.0


def test_pearson_of_four_points() -> None:
    # Deviations from the means 2.5 and 2: products sum to 4, squares to 5 and 4.
    value = compute(["pearson"], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 3.0, 3.0])["pearson"]
    assert value == pytest.approx(4 / math.sqrt(20))


def test_spearman_counts_ranks_only() -> None:
    # Ranks 1 2 3 4 against 1 2 4 3: 1 - 6 * 2 / (4 * 15).
    assert compute(["spearmanr"], [0.1, 0.2, 0.3, 9.0], [1.0, 2.0, 4.5, 3.0])["spearmanr"] == pytest.approx(0.8)


def test_correlation_of_one_row_is_zero() -> None:
    assert compute(["pearson", "spearmanr"], [1.0], [2.0]) == {"pearson": 0.0, "spearmanr": 0.0}


@pytest.mark.parametrize("name", ["pearson", "spearmanr", "matthews_correlation"])
def test_correlation_with_constant_predictions_is_zero(name: str) -> None:
    assert compute([name], [1, 1, 1, 1], [0, 1, 0, 1]) == {name: 0.0}


def test_metrics_of_each_task_are_those_of_glue() -> None:
    expected = {name: ("accuracy",) for name in ("mnli", "qnli", "rte", "sst2", "wnli")}
    expected |= {name: ("accuracy", "f1") for name in ("mrpc", "qqp")}
    expected |= {"cola": ("matthews_correlation",), "stsb": ("pearson", "spearmanr")}
    assert {name: task.metrics for name, task in TASKS.items()} == expected
    assert {metric for task in TASKS.values() for metric in task.metrics} == set(METRICS)

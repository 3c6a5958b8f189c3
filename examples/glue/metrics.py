"""The metrics of GLUE, from scikit-learn and the SciPy that comes with it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

METRICS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr")


def compute(names: Sequence[str], predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """The named metrics.

    Args:
        names: of ``METRICS``, spelled as the hub's ``evaluate`` spells them. ``f1`` is that of class 1.
        predictions: class numbers, or values where a number is predicted; one for each row.
        labels: the same of the data.

    Returns:
        Name -> value, in [0, 1] or [-1, 1]. A correlation that is not defined, with constant predictions or of one row,
        is 0.
    """
    from scipy import stats
    from sklearn import metrics

    def correlation(of: Callable[..., Any]) -> float:
        if len(labels) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant input is answered with 0
            value = float(of(predictions, labels).statistic)
        return value if math.isfinite(value) else 0.0

    functions = {
        "accuracy": lambda: metrics.accuracy_score(labels, predictions),
        "f1": lambda: metrics.f1_score(labels, predictions, zero_division=0.0),
        "matthews_correlation": lambda: metrics.matthews_corrcoef(labels, predictions),
        "pearson": lambda: correlation(stats.pearsonr),
        "spearmanr": lambda: correlation(stats.spearmanr),
    }
    return {name: float(functions[name]()) for name in names}

"""The table of metrics: what `data.files.<task>.metric` may name.

To add a metric, write a function in the module of its family and add its row to `METRICS`.
"""

from pilot_flwr.metrics import text
from pilot_flwr.metrics.score import Metric, Score, per_prediction

__all__ = ["METRICS", "Metric", "Score"]

METRICS: dict[str, Metric] = {
    "exact_match": Metric("exact match", per_prediction(text.exact_match)),
}
"""Metric by the name under which a task asks for it."""

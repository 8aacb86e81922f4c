"""Metrics: what a step reports, as values that merge.

Every metric record has a neutral element ``zero(…)``, an associative ``merge``, a constructor
``of(…)`` that measures one batch, and ``compute``. To measure a whole epoch, or several devices,
measure the parts and merge them: the result does not depend on how the data was cut. Counts are
int64 and merge exactly; sums are float64 (float32 on devices that have no float64, such as ``mps``)
and merge up to its rounding.

:mod:`puretrain.metrics.functional` has plain functions for a single batch. A plain tensor among
the metrics of a step counts as a :class:`Mean`, weighted by the size of the batch.
"""

from puretrain.metrics import functional
from puretrain.metrics.monoids import (
    Accuracy,
    Confusion,
    Count,
    Max,
    Mean,
    Metric,
    Min,
    Std,
    Sum,
    Variance,
    as_metric,
    compute_all,
    merge_all,
    merge_trees,
)

__all__ = [
    "Accuracy",
    "Confusion",
    "Count",
    "Max",
    "Mean",
    "Metric",
    "Min",
    "Std",
    "Sum",
    "Variance",
    "as_metric",
    "compute_all",
    "functional",
    "merge_all",
    "merge_trees",
]

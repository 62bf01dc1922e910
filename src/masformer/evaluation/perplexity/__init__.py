"""Perplexity by length and by position, for several plans of one loaded model.

`windows` cuts documents, `losses` scores what a window predicts, `measure` sums up one model at one length, `compare`
does so for several plans and lengths and pairs the plans document by document.
"""

from masformer.evaluation.perplexity.compare import (
    Difference,
    compare_plans,
    difference_table,
    paired_differences,
    perplexity_table,
)
from masformer.evaluation.perplexity.losses import exp_or_inf, prepared_base
from masformer.evaluation.perplexity.measure import (
    FIRST_BUCKET,
    DocumentLosses,
    PerplexityResult,
    PositionLoss,
    perplexity,
)
from masformer.evaluation.perplexity.windows import (
    FixedTargets,
    prefix_token,
    rolling_windows,
    target_window,
    tokenize,
)

__all__ = [
    "FIRST_BUCKET",
    "Difference",
    "DocumentLosses",
    "FixedTargets",
    "PerplexityResult",
    "PositionLoss",
    "compare_plans",
    "difference_table",
    "exp_or_inf",
    "paired_differences",
    "perplexity",
    "perplexity_table",
    "prefix_token",
    "prepared_base",
    "rolling_windows",
    "target_window",
    "tokenize",
]

"""The model `masformer` of lm-evaluation-harness; to import `harness.model` needs the extra `lm-eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from masformer.extras import need


def run_lm_eval(words: Sequence[str]) -> None:
    """Runs lm-eval's own command line, with `masformer` among its models; its releases to 0.4.13 read no entry points.

    Args:
        words: what lm-eval is to be told.

    Raises:
        MasformerError: lm-eval is not installed, or the model cannot be had.
    """
    need("lm-eval", "this")
    from lm_eval.__main__ import cli_evaluate

    import masformer.evaluation.harness.model  # noqa: F401  # registers it

    own, sys.argv = sys.argv, ["lm-eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = own

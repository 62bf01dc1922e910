"""`masformer lm-eval`."""

from __future__ import annotations


def lm_eval(words: list[str]) -> None:
    """lm-evaluation-harness with masformer among its models; every word goes to lm-eval as it is."""
    from masformer.evaluation.harness import run_lm_eval

    run_lm_eval(words)

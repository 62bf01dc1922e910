"""lm-eval's own command line, with `masformer` among its models, for its versions that read no entry points.

python -m masformer.evaluation.harness --model masformer --model_args pretrained=MODEL,plan=PLAN.yaml --tasks ...
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from masformer.errors import MasformerError
from masformer.streams import guarded


def main() -> int:
    """Runs lm_eval with the words of this command line; returns the exit code: 2, with a line, for a wrong value."""
    return guarded(_run)


def _run() -> int:
    if find_spec("lm_eval") is None:
        print("masformer: error: this needs lm-eval: pip install 'masformer[lm-eval]'", file=sys.stderr)
        return MasformerError.exit_code
    from lm_eval.__main__ import cli_evaluate

    import masformer.evaluation.harness.model  # noqa: F401  # registers it

    try:
        cli_evaluate()
    except MasformerError as error:
        print(f"masformer: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

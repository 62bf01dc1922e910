"""Parts that an installation may lack: the packages that each needs, and the extra that brings them."""

from __future__ import annotations

from importlib.util import find_spec

from masformer.errors import MasformerError

EXTRAS = {
    "completion": ("shtab",),
    "datasets": ("datasets", "pyarrow"),
    "lm-eval": ("lm_eval",),
    "plots": ("matplotlib",),
    "rouge": ("rouge_score", "rouge"),
    "serve": ("fastapi", "openai", "pydantic", "uvicorn"),
    "train": ("peft", "tensorboard"),
}
"""Extra -> the packages that are imported where it is asked for."""


def need(extra: str, what: str, *packages: str) -> None:
    """Asks for an extra, before the work that is nothing without it.

    Args:
        extra: one of `EXTRAS`.
        what: needs it, for the message.
        *packages: of the extra, those that are needed; by default all.

    Raises:
        MasformerError: a package is not installed.
    """
    if missing := [package for package in packages or EXTRAS[extra] if find_spec(package) is None]:
        names = ", ".join(package.replace("_", "-") for package in missing)
        raise MasformerError(f"{what} needs {names}: pip install 'masformer[{extra}]'")

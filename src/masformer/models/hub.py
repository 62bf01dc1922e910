"""Whether a name that is no path is asked for at the hub: decided before transformers waits and asks again."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id  # type: ignore[attr-defined]

from masformer.errors import MasformerError
from masformer.files import near_paths

PATIENCE = 5.0
"""Seconds for the hub to answer at all."""


def is_cached_alone(name: str, revision: str | None = None, file: str = "config.json") -> bool:
    """Whether a model of the hub can only be had from this machine's cache, the hub being out of reach.

    Args:
        name: of the model, no path of anything here.
        revision: branch, tag or commit.
        file: that is in the cache where the model is.

    Raises:
        MasformerError: it is a path rather than a name of the hub, or it is near to what is here, or it is not in the
            cache and the hub is out of reach.
    """
    path = Path(name)
    near = [each for each in near_paths(name) if Path(each).is_dir() or each.endswith(".gguf")]
    hint = f"; near: {', '.join(near)}" if near else ""
    if not _is_name(name) or (path.parent != Path() and path.parent.is_dir() and near):
        raise MasformerError(f"no folder {name} here{hint}")
    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return not _answers(constants.ENDPOINT)
    if path.parent == Path() and near:
        raise MasformerError(f"no folder {name} here{hint} (a model of the hub is named as OWNER/{name})")
    if not _answers(constants.ENDPOINT):
        raise MasformerError(
            f"no folder {name} here{hint}; as a model of the hub it is not in the cache, and {constants.ENDPOINT} is "
            "out of reach"
        )
    return False


def _is_name(name: str) -> bool:
    """Whether the hub could have a model of that name."""
    if name.startswith((".", "~", os.sep)) or name.endswith("/"):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@cache
def _answers(endpoint: str) -> bool:
    """Whether the hub answers, whatever it says; asked once, without a second try."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(endpoint, timeout=PATIENCE)
    except Exception:  # of whichever library it asks with
        return False
    return True

"""What is found out about a model's config, found out once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from transformers import PretrainedConfig

Found = TypeVar("Found")


@dataclass(frozen=True)
class _Key:
    """A config as it is now: its class and everything that it would write."""

    kind: type
    text: str
    config: PretrainedConfig = field(compare=False)


def once_per_config(find: Callable[[PretrainedConfig], Found]) -> Callable[[PretrainedConfig], Found]:
    """The same function, which asks once for configs of one class that say the same; errors are not kept.

    What it returns is shared, so it must not be changed.
    """
    kept = functools.lru_cache(maxsize=256)(lambda key: find(key.config))

    @functools.wraps(find)
    def found(config: PretrainedConfig) -> Found:
        return kept(_Key(type(config), config.to_json_string(use_diff=False), config))

    return found

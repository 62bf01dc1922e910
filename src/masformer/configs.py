"""What is found out about a model's config, found out once."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Found = TypeVar("Found")

# Where a config came from and what its weights are stored in: nothing that a model of its class is made of.
_OF_THE_FILE = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass(frozen=True)
class _Key:
    """A config as it is now: its class, and everything that it would write but where it came from."""

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
        values = json.loads(config.to_json_string(use_diff=False))
        text = json.dumps({name: value for name, value in values.items() if name not in _OF_THE_FILE})
        return kept(_Key(type(config), text, config))

    return found

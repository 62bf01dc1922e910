"""What a plan file holds, and where its schema is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from masformer.errors import check_int
from masformer.plan_text import MOST_LAYERS, MOST_UNITS
from masformer.schema import Settings


@dataclass(frozen=True)
class PlanFile(Settings):
    """A plan, and anything else beside it: how it was found, for example.

    Attributes:
        plan: its text, for example full@11-18; window:512+4, or by heads full@4,7:0; window:256+4.
        num_layers: layers of the model; by default those of the model that it is read for.
        kv_heads: KV heads of each layer, likewise.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True)

    plan: str
    num_layers: int | None = None
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        for name, most in (("num_layers", MOST_LAYERS), ("kv_heads", MOST_UNITS)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1, most)

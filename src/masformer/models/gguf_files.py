"""What a .gguf file says of itself, beside its tensors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader

QUANTISED_AS = torch.bfloat16
"""What quantised weights are written as once they are floats: in float32 they would take twice the space, for digits
that the file does not have."""


def general_metadata(path: Path) -> dict[str, Any]:
    """The entries `general.*`: name, license, where the model comes from."""
    return _read(path, path.stat().st_mtime_ns)[0]


def written_dtype(path: Path) -> torch.dtype:
    """What the weights of a file are written as: what they are stored as, or `QUANTISED_AS`."""
    return _read(path, path.stat().st_mtime_ns)[1]


@lru_cache(maxsize=2)
def _read(path: Path, changed: int) -> tuple[dict[str, Any], torch.dtype]:
    file, kinds = GGUFReader(path), GGMLQuantizationType
    general = {name: field.contents() for name, field in file.fields.items() if name.startswith("general.")}
    types = {tensor.tensor_type for tensor in file.tensors} - {kinds.F32}  # norms are, beside whatever
    plain = {frozenset(): torch.float32, frozenset({kinds.F16}): torch.float16}
    return general, plain.get(frozenset(types), QUANTISED_AS)

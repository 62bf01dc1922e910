"""What a .gguf file says of itself, beside its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFReader

QUANTISED_AS = torch.bfloat16
"""What quantised weights are written as once they are floats: in float32 they would take twice the space, for digits
that the file does not have."""


_reading = 0


@contextmanager
def reading_once() -> Iterator[None]:
    """Within this a .gguf file is read once, and the names of a model's tensors are made once.

    transformers reads the file for the config, the tokenizer and the weights, its whole vocabulary each time, and makes
    the names for each module.
    """
    global _reading
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    if not _reading:
        known: dict[Any, GGUFReader] = {}

        def read_again(path: str | os.PathLike[str], mode: Any = "r") -> GGUFReader:
            status = os.stat(path)
            key = (os.fspath(path), mode, status.st_mtime_ns, status.st_size)
            if key not in known:
                known[key] = reader(path, mode)
            return known[key]

        gguf.GGUFReader, gguf.get_tensor_name_map = read_again, lru_cache(maxsize=None)(names)  # type: ignore[misc, assignment]
    _reading += 1
    try:
        yield
    finally:
        _reading -= 1
        if not _reading:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names  # type: ignore[misc]


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

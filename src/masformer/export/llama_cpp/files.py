"""A .gguf file as a value: its metadata, and tensors that are read when they are written."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quant_shape_to_byte_shape
from gguf.gguf_writer import GGUFValue

from masformer.errors import MasformerError

ARCHITECTURE, ALIGNMENT, PARTS = "general.architecture", "general.alignment", "split.count"
_FLOATS = {GGMLQuantizationType.F32, GGMLQuantizationType.F16}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        shape: of its values, the rows first.
        kind: how they are stored.
        read: gives them as they lie in the file: numbers, or [..., bytes of a row].
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        if self.kind in _FLOATS:
            return math.prod(self.shape) * (4 if self.kind == GGMLQuantizationType.F32 else 2)
        return math.prod(quant_shape_to_byte_shape(self.shape, self.kind))


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        architecture: the name by which llama.cpp knows it.
        fields: metadata by name, without the architecture.
        tensors: by name.
    """

    architecture: str
    fields: Mapping[str, GGUFValue]
    tensors: Mapping[str, Tensor]

    def get(self, name: str, default: Any = None) -> Any:
        """A value that stands under the architecture's name, as `block_count` does."""
        field = self.fields.get(f"{self.architecture}.{name}")
        return default if field is None else field.value

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_gguf(path: str | os.PathLike[str]) -> Content:
    """What a file holds; its tensors are left in it, and read from there.

    Raises:
        MasformerError: it is no .gguf file or a part of one, is damaged, or was written for machines with the other
            order of bytes.
    """
    try:
        file = GGUFReader(path)
        known = {name: field for name, field in file.fields.items() if not name.startswith("GGUF.")}
        fields = {
            name: GGUFValue(
                field.contents(), field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            )
            for name, field in known.items()
        }
        architecture = fields.pop(ARCHITECTURE).value
    except Exception as error:  # the package raises what comes of the damage: IndexError, UnicodeDecodeError, KeyError
        raise MasformerError(f"cannot read {os.fspath(path)}: {' '.join(str(error).split())}") from error
    if file.byte_order == "S":
        raise MasformerError(f"{os.fspath(path)} was written for machines with the other order of bytes")
    if PARTS in fields and fields[PARTS].value > 1:
        raise MasformerError(
            f"{os.fspath(path)} is one of {fields[PARTS].value} parts of a file; join them first, as "
            "llama-gguf-split --merge does"
        )
    tensors = {
        each.name: Tensor(
            tuple(int(size) for size in reversed(each.shape)), each.tensor_type, partial(np.asarray, each.data)
        )
        for each in file.tensors
    }
    return Content(architecture, fields, tensors)


def write_gguf(content: Content, path: str | os.PathLike[str]) -> None:
    """Writes a file, whole or not at all; one tensor at a time is in memory.

    Raises:
        MasformerError: it cannot be written.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / "model.gguf"
            writer = GGUFWriter(temporary, content.architecture)
            for name, field in content.fields.items():
                if name == ALIGNMENT:
                    writer.add_custom_alignment(field.value)
                elif field.type != GGUFValueType.ARRAY or len(field.value):
                    writer.add_key_value(name, field.value, field.type, field.sub_type)
            for name, tensor in content.tensors.items():
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in content.tensors.values():
                writer.write_tensor_data(np.ascontiguousarray(tensor.read()))
            writer.close()
            os.replace(temporary, path)
    except OSError as error:
        raise MasformerError(f"cannot write {path}: {error.strerror or error}") from None

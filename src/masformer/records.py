"""What a measurement leaves in its JSON file: the figures, and all that is needed to judge and repeat them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masformer.errors import MasformerError, check_text
from masformer.files import missing, parse_json, read_text, write_whole

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Of the records written here; those written before there was a number have none and read the same."""
GROUPS = ("eval", "bench")
"""Commands that have commands below them, which the kind of a record names too."""
ENVIRONMENT = ("format", "kind", "command", "masformer", "code", "versions", "device", "cores", "threads", "seed")
"""Keys of a record that are no figures."""


def check_writable(path: str | os.PathLike[str] | None) -> None:
    """Before long work: whether a file could be written there.

    Raises:
        MasformerError: the folder is missing or not writable, or the path is a folder.
    """
    if path is None:
        return
    parent = Path(path).resolve().parent
    if Path(path).is_dir():
        raise MasformerError(f"cannot write {path}: it is a folder")
    if not parent.is_dir():
        raise MasformerError(f"cannot write {path}: folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise MasformerError(f"cannot write {path}: folder {parent} is not writable")


@cache
def code() -> str:
    """A digest of the package's own Python files: two records with the same one were made by the same code."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def device_name(device: torch.device) -> str:
    """Of a device, as records hold it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {platform.machine()}"


def environment() -> dict[str, Any]:
    """Code, versions, device, threads and seed of this process."""
    import torch
    import transformers

    return {
        "code": code(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
    }


def write_record(path: str | os.PathLike[str], command: Sequence[str], version: str, /, **figures: Any) -> None:
    """Writes the record whole.

    Args:
        path: the JSON file.
        command: the words of the command line.
        version: of masformer.
        **figures: plain values of any name: the plan and what was measured.
    """
    head = {"format": FORMAT, "kind": _kind(command), "command": shlex.join(command), "masformer": version}
    write_whole(path, json.dumps(head | environment() | figures, indent=2) + "\n")


def _kind(words: Sequence[str]) -> str:
    """`masformer eval perplexity MODEL` -> `eval perplexity`."""
    return " ".join(words[1 : 3 if words[1:2] and words[1] in GROUPS else 2])


@dataclass(frozen=True)
class Record:
    """What a measurement left.

    Attributes:
        path: the file.
        name: its path below the folder that was read, without `.json`, with `/` between folders.
        kind: the command's words, for example `eval perplexity`.
        command: the command line.
        environment: the version of masformer, and what `environment` gives.
        figures: everything else.
    """

    path: Path
    name: str
    kind: str
    command: str
    environment: dict[str, Any]
    figures: dict[str, Any]


def read_record(path: str | os.PathLike[str], name: str | None = None) -> Record | None:
    """Reads one record.

    Args:
        path: the JSON file.
        name: of the record; by default the file's, without `.json`.

    Returns:
        The record, or None where the file holds other JSON.

    Raises:
        MasformerError: the file cannot be read, holds no JSON or what is no text, or was written by a newer masformer.
    """
    path = Path(path)
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in ("command", "masformer")):
        return None
    check_text(str(path), json.dumps(content, ensure_ascii=False))
    number = content.get("format", 0)
    if not isinstance(number, int) or number > FORMAT:
        raise MasformerError(f"{path} has format {number!r}; this masformer reads 0 to {FORMAT}")
    try:
        kind = content.get("kind") or _kind(shlex.split(content["command"]))
    except ValueError as error:
        raise MasformerError(f"{path}: cannot read its command: {error}") from None
    return Record(
        path=path,
        name=path.stem if name is None else name,
        kind=str(kind) or "masformer",
        command=content["command"],
        environment={key: content[key] for key in ENVIRONMENT if key in content and key not in ENVIRONMENT[:3]},
        figures={key: value for key, value in content.items() if key not in ENVIRONMENT},
    )


def read_records(folder: str | os.PathLike[str], without: Iterable[Path] = ()) -> tuple[list[Record], list[Path]]:
    """Reads every record below a folder, in the order of their names.

    Args:
        folder: where.
        without: folders below it that are passed over.

    Returns:
        The records, and the `.json` files that are none.

    Raises:
        MasformerError: there is no such folder or no record in it, or as `read_record`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise missing("folder", folder)
    hidden = [other.resolve() for other in without]
    found: list[Record] = []
    others: list[Path] = []
    for path in sorted(folder.rglob("*.json"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and not any(other in path.resolve().parents for other in hidden):
            record = read_record(path, path.relative_to(folder).with_suffix("").as_posix())
            if record is None:
                others.append(path)
            else:
                found.append(record)
    if not found:
        raise MasformerError(f"no record in {folder}: commands write them with --json FILE")
    return found, others

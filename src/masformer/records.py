"""What a measurement leaves in its JSON file: the figures, and all that is needed to judge and repeat them."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from masformer.errors import MasformerError
from masformer.files import write_whole

SEED = 0


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


def environment() -> dict[str, Any]:
    """Versions, device, threads and seed of this process."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
    }


def write_record(path: str | os.PathLike[str], command: Sequence[str], version: str, **figures: Any) -> None:
    """Writes the record whole.

    Args:
        path: the JSON file.
        command: the words of the command line.
        version: of masformer.
        **figures: plain values: the plan and what was measured.
    """
    record = {"command": shlex.join(command), "masformer": version} | environment() | figures
    write_whole(path, json.dumps(record, indent=2) + "\n")

"""Checkpoints of a run: written whole, checked when they are read, the newest few kept.

A checkpoint is a folder `checkpoint-STEP`. It is written under another name, every file is flushed to the disk, a list
of the files with their sizes and checksums is written last, and then the folder is renamed. What lacks the list, or
does not match it, is never used. The format knows nothing of processes: whole tensors under their parameter's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from masformer.errors import MasformerError
from masformer.files import hash_file, parse_json, read_text

MARKER = "checkpoint.json"
FORMAT = 1


@dataclass(frozen=True)
class Found:
    """A checkpoint that was found.

    Attributes:
        path: its folder.
        step: optimizer steps that it is after.
        fault: why it cannot be used; None where it is whole.
    """

    path: Path
    step: int
    fault: str | None


def checkpoint_folder(output: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return output / "checkpoints"


def steps_saved(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, whole or not, newest first."""
    found = []
    folder = checkpoint_folder(output)
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest(output: Path) -> tuple[Found | None, list[Found]]:
    """The newest whole checkpoint, and the faulty ones that are newer."""
    faulty: list[Found] = []
    for step, path in steps_saved(output):
        found = Found(path, step, _fault(path))
        if found.fault is None:
            return found, faulty
        faulty.append(found)
    return None, faulty


def write_checkpoint(output: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Writes one checkpoint whole and then removes old ones.

    Args:
        output: the run's folder.
        step: optimizer steps so far.
        write: writes the files into the folder that it is given.
        keep: how many of the newest stay.

    Raises:
        MasformerError: it cannot be written; the earlier ones are still there.
    """
    folder = checkpoint_folder(output)
    partial, final = folder / f".checkpoint-{step}", folder / f"checkpoint-{step}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        listed = {str(path.relative_to(partial)): [path.stat().st_size, _checksum(path)] for path in files}
        (partial / MARKER).write_text(json.dumps({"format": FORMAT, "step": step, "files": listed}, indent=1) + "\n")
        for path in (*files, partial / MARKER):
            sync(path)
        for path in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync(folder)
    except Exception as error:  # OSError, and what safetensors and torch make of it
        shutil.rmtree(partial, ignore_errors=True)
        saved = steps_saved(output)
        before = f"the newest is still {saved[0][1]}" if saved else "there is none yet"
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise MasformerError(f"cannot write the checkpoint of step {step} to {folder}: {reason}; {before}") from error
    saved = steps_saved(output)
    later = [path for at, path in saved if at > step]  # faulty ones, from before the run went on from an older one
    for path in (*later, *[path for at, path in saved if at <= step][keep:]):
        shutil.rmtree(path, ignore_errors=True)
    return final


def remove_partial(output: Path) -> None:
    """Removes what an interrupted write left."""
    folder = checkpoint_folder(output)
    for path in folder.glob(".checkpoint-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Has the system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault(path: Path) -> str | None:
    """Why a checkpoint cannot be used, if so."""
    if not (path / MARKER).exists():
        return f"it is incomplete: no {MARKER}"
    try:
        marker = parse_json(read_text(path / MARKER), MARKER)
        files = {name: (int(size), str(checksum)) for name, (size, checksum) in marker["files"].items()}
        if marker["format"] != FORMAT:
            return f"it has format {marker['format']}, this version reads {FORMAT}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a MasformerError is a ValueError
        return f"its {MARKER} cannot be read: {error}"
    for name, (size, checksum) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        try:
            if _checksum(file) != checksum:
                return f"{name} is damaged: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    hash_file(digest, path)
    return digest.hexdigest()

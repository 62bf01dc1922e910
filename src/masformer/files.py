"""Files as wholes: written so that a reader sees the old content or the new one, and told apart by all their bytes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Protocol

from masformer.errors import MasformerError

READ_AT_ONCE = 1 << 20


class Hash(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> object:
        """Takes more bytes in."""


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes to a temporary name in the same folder, then renames.

    Raises:
        MasformerError: the folder does not exist or the file cannot be written.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise MasformerError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise MasformerError(f"cannot write {path}: {error.strerror}") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def content_digest(path: str | os.PathLike[str]) -> bytes:
    """SHA-256 of a file's bytes.

    Raises:
        MasformerError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        hash_file(digest, path)
    except OSError as error:
        raise MasformerError(f"cannot read {os.fspath(path)}: {error.strerror}") from None
    return digest.digest()


def hash_file(digest: Hash, path: str | os.PathLike[str]) -> None:
    """Adds a file's bytes to a hash, a piece at a time.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        while data := file.read(READ_AT_ONCE):
            digest.update(data)

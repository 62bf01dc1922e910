"""Files as wholes: read to the last byte or refused, written so that a reader sees the old content or the new one, and
told apart by all their bytes."""

from __future__ import annotations

import bz2
import difflib
import gzip
import hashlib
import io
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from masformer.errors import MasformerError

READ_AT_ONCE = 1 << 20
NEAR = 0.7
"""How alike a name must be to be proposed, from 0 to 1: one letter off in names of four and more."""


class _Streams(io.RawIOBase):
    """The content of one compressed stream after the other, up to the end of the file.

    Python's own readers of these formats take what follows a first stream and cannot be read for the end of the file.

    Args:
        file: the compressed bytes; closed with this one.
        start: makes the decompressor of a stream.
        padding: zero bytes between and after streams come in a multiple of this; 0: there are none.
    """

    def __init__(self, file: BinaryIO, start: Callable[[], Any], padding: int) -> None:
        self._file, self._start, self._padding = file, start, padding
        self._stream = start()
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                self._left = self._stream.unused_data + self._left
                if not self._next():
                    return 0
            if self._stream.needs_input and not self._left:
                self._left = self._file.read(READ_AT_ONCE)
                if not self._left:
                    raise EOFError("it ends within a compressed stream")
            given, self._left = self._left, b""
            if data := self._stream.decompress(given, len(buffer)):
                buffer[: len(data)] = data
                return len(data)

    def _next(self) -> bool:
        """Goes on to the next stream; False at the end of the file."""
        zeros = 0
        while self._left or (more := self._file.read(READ_AT_ONCE)):
            data = self._left or more
            self._left = data.lstrip(b"\0") if self._padding else data
            zeros += len(data) - len(self._left)
            if self._left:
                break
        if self._padding and zeros % self._padding:
            raise EOFError("what follows a compressed stream is neither another one nor padding")
        if self._left:
            self._stream = self._start()
        return bool(self._left)

    def close(self) -> None:
        self._file.close()
        super().close()


def _xz(path: Path) -> BinaryIO:
    return io.BufferedReader(_Streams(path.open("rb"), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 4))


def _bz2(path: Path) -> BinaryIO:
    return io.BufferedReader(_Streams(path.open("rb"), bz2.BZ2Decompressor, 0))


def _gz(path: Path) -> BinaryIO:
    return gzip.open(path, "rb")  # type: ignore[return-value]  # it refuses what follows a stream and is neither another one nor padding


COMPRESSED: dict[str, Callable[[Path], BinaryIO]] = {".gz": _gz, ".xz": _xz, ".bz2": _bz2}
"""Suffix -> what opens such a file for its content."""


def near_names(name: str, others: Iterable[str]) -> list[str]:
    """The names most like this one, at most three, the nearest first."""
    return difflib.get_close_matches(name, sorted(others), 3, NEAR)


def meant(name: str, others: Iterable[str]) -> str:
    """`did you mean ...?`, with the name most like this one; empty where none is like it."""
    near = near_names(name, others)
    return f"did you mean {near[0]}?" if near else ""


def near_paths(path: str | os.PathLike[str]) -> list[str]:
    """What is in the folder of a path that does not exist, and has nearly its name; written as the path is."""
    path = Path(path)
    try:
        names = near_names(path.name, (each.name for each in path.parent.iterdir()))
    except OSError:
        return []
    return [str(path.with_name(name)) for name in names]


def missing(what: str, path: str | os.PathLike[str]) -> MasformerError:
    """For a file or folder that is not there; names what has nearly its name."""
    near = near_paths(path)
    return MasformerError(f"{what} {os.fspath(path)} does not exist" + (f"; near: {', '.join(near)}" if near else ""))


@contextmanager
def open_content(path: str | os.PathLike[str], what: str = "") -> Iterator[BinaryIO]:
    """A file's bytes, those inside where its suffix says that it is compressed.

    Args:
        path: the file.
        what: it is, for messages, for example "the template".

    Raises:
        MasformerError: while it is open: it cannot be read, or is damaged or cut short.
    """
    path = Path(path)
    name = f"{what} {path}".lstrip()
    try:
        with COMPRESSED.get(path.suffix.lower(), lambda path: path.open("rb"))(path) as file:
            yield file
    except OSError as error:
        raise MasformerError(f"cannot read {name}: {error.strerror or ' '.join(str(error).split())}") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise MasformerError(f"cannot read {name}: {error}; the file is damaged or cut short") from None


def decode_text(data: bytes, place: str, first_line: int = 1) -> str:
    """UTF-8 text as it is, without a byte-order mark; its line ends stay.

    Args:
        data: the bytes.
        place: where they were read, for messages.
        first_line: number of the first line there.

    Raises:
        MasformerError: they are no UTF-8 text.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        raise MasformerError(f"{place}, line {line}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None


def read_text(path: str | os.PathLike[str], what: str = "") -> str:
    """The whole of a text file, compressed or not: see `decode_text`.

    Args:
        path: the file.
        what: see `open_content`.

    Raises:
        MasformerError: it cannot be read, is damaged, or no UTF-8 text.
    """
    with open_content(path, what) as file:
        return decode_text(file.read(), str(path))


def parse_json(text: str | bytes, place: str) -> Any:
    """What JSON holds.

    Args:
        text: one value.
        place: where it was read, for messages.

    Raises:
        MasformerError: it is no JSON, nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f", line {error.lineno}, column {error.colno}" if "\n" in error.doc.rstrip() else ""
        raise MasformerError(f"{place}{where}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise MasformerError(f"{place}: not JSON ({' '.join(str(error).split())})") from None


def user_cache(name: str) -> Path:
    """The folder of that name where masformer keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "masformer" / name


class Hash(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> object:
        """Takes more bytes in."""


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder where it is missing, and returns it.

    Raises:
        MasformerError: it cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MasformerError(f"cannot make folder {path}: {error.strerror}") from None
    return path


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

"""Where texts come from: files, a hub dataset, or what every Python has; and which part of it is taken."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from masformer.data.documents import TEXT, Document, Row, check_files, read_rows, selected_rows
from masformer.errors import MasformerError, check_int
from masformer.extras import need
from masformer.files import content_digest
from masformer.schema import Named, Settings, Several

PYTHON_TOPICS = "python-topics"
BUILT_IN = (PYTHON_TOPICS,)
KINDS = {"texts": "plain texts", "pairs": "prompt/target pairs", "chats": "conversations"}


@dataclass(frozen=True)
class Source(Settings):
    """Texts from one place.

    Attributes:
        files: text, JSON lines or Parquet files (see `read_documents`).
        hub: a dataset by its hub name or folder, read as a stream through the library `datasets`.
        hub_config: its configuration, where it has several.
        hub_split: its split.
        revision: its revision; by default the newest.
        builtin: a text that needs no download: `python-topics`, Python's own language reference, 465k characters.
        field: the field of the text.
        prompt: of prompt/target pairs, the field of the prompt; None for plain texts.
        target: of prompt/target pairs, the field of the target.
        messages: of conversations, the field of the list of messages (`masformer.data.chats`); None for others.
        tools: of conversations, the field of the list of tools that the template is told of; None where there is none.
        where: field -> the value a row must have to be taken; `meta.kind` is a field inside a field (`read_rows`).
        skip: leave out so many of the selected rows.
        limit: take at most so many of them.

    Raises:
        MasformerError: not exactly one place, an option that would do nothing there, or a number out of range.
    """

    files: Several[str] = default(default_factory=list)
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    revision: str | None = None
    builtin: str | None = None
    field: str = TEXT
    prompt: str | None = None
    target: str | None = None
    messages: str | None = None
    tools: str | None = None
    where: Named[Any] = default(default_factory=dict)
    skip: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.files, str):
            object.__setattr__(self, "files", [self.files])
        places = [name for name in ("files", "hub", "builtin") if getattr(self, name)]
        if len(places) != 1:
            raise MasformerError(f"a source needs one of files, hub and builtin, got {' and '.join(places) or 'none'}")
        for name, usual in (("hub_config", None), ("hub_split", "train"), ("revision", None)):
            if not self.hub and getattr(self, name) != usual:
                raise MasformerError(f"{name} does nothing without hub")
        if self.builtin and self.builtin not in BUILT_IN:
            raise MasformerError(f"unknown builtin text {self.builtin!r}; allowed: {', '.join(BUILT_IN)}")
        if self.builtin and (self.where or self.field != TEXT or self.prompt or self.messages):
            raise MasformerError(
                f"builtin {self.builtin} has no fields: where, field, prompt, target and messages do nothing"
            )
        if (self.prompt is None) != (self.target is None):
            raise MasformerError("prompt and target are given together or not at all")
        if self.prompt is not None and self.field != TEXT:
            raise MasformerError("field does nothing where prompt and target are given")
        if self.messages is not None and (self.prompt is not None or self.field != TEXT):
            raise MasformerError("field, prompt and target do nothing where messages is given")
        if self.tools is not None and self.messages is None:
            raise MasformerError("tools does nothing without messages")
        check_int("skip", self.skip, 0)
        if self.limit is not None:
            check_int("limit", self.limit, 1)

    @property
    def kind(self) -> str:
        """What it gives: one of `KINDS`."""
        return "chats" if self.messages is not None else "texts" if self.prompt is None else "pairs"

    @property
    def is_pairs(self) -> bool:
        """Whether it gives prompts and targets."""
        return self.kind == "pairs"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read: the text's, the prompt's and the target's, or the messages'."""
        if self.messages is not None:
            return (self.messages,) if self.tools is None else (self.messages, self.tools)
        return (self.field,) if self.prompt is None or self.target is None else (self.prompt, self.target)

    @property
    def place(self) -> str:
        """For people: the files' names, or the name of the dataset."""
        if self.files:
            return ", ".join(Path(file).name for file in self.files)
        return f"{self.hub} ({self.hub_split})" if self.hub else f"{self.builtin}"

    def check(self) -> None:
        """What can be known before reading, without a network.

        Raises:
            MasformerError: a file is missing or cannot be read.
        """
        if self.files:
            read_rows(self.files, self.fields, self._where, lists=self.messages is not None)

    @property
    def _where(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.where.items()}

    def rows(self, more: Sequence[str] = ()) -> Iterator[Row]:
        """The selected rows, in order, read as they are asked for.

        Args:
            more: fields that are read beside `fields`.

        Raises:
            MasformerError: something cannot be read, or nothing is selected.
        """
        stop = None if self.limit is None else self.skip + self.limit
        found = False
        for row in islice(self._all_rows((*self.fields, *more)), self.skip, stop):
            found = True
            yield row
        if not found:
            chosen = [f"{name} = {value}" for name, value in self.where.items()]
            chosen += [f"skip = {self.skip}"] if self.skip else []
            raise MasformerError(f"{self.place} holds no row" + (f" with {', '.join(chosen)}" if chosen else ""))

    def documents(self) -> list[Document]:
        """The plain texts of the selected rows that are not blank.

        Raises:
            MasformerError: it gives pairs or conversations, or as `rows`.
        """
        if self.kind != "texts":
            raise MasformerError(f"{self.place} is read as {KINDS[self.kind]}; plain texts are needed here, by field")
        return [Document(row.name, text) for row in self.rows() if (text := row.texts[self.field]).strip()]

    def _all_rows(self, fields: Sequence[str]) -> Iterator[Row]:
        if self.files:
            yield from read_rows(self.files, fields, self._where, lists=self.messages is not None)
        elif self.builtin:
            from pydoc_data.topics import topics

            for name, text in sorted(topics.items()):
                yield Row(f"{PYTHON_TOPICS}: {name}", {TEXT: text})
        else:
            yield from self._hub_rows(fields)

    def _hub_rows(self, fields: Sequence[str]) -> Iterator[Row]:
        stream = self._stream
        try:
            for number, row in enumerate(stream, start=1):
                place = f"{self.hub}, row {number}"
                name = f"{self.hub}:{number}"
                yield from selected_rows(row, fields, self._where, name, place, self.messages is not None)
        except MasformerError:
            raise
        except Exception as error:  # whatever the dataset's own files and the network raise
            raise MasformerError(f"cannot read dataset {self.hub}: {_one_line(error)}") from error

    @cached_property
    def _stream(self) -> Any:
        need("datasets", f"dataset {self.hub} of the hub")
        import datasets

        try:
            return datasets.load_dataset(
                self.hub, self.hub_config, split=self.hub_split, revision=self._commit, streaming=True
            )
        except MasformerError:
            raise
        except Exception as error:
            raise MasformerError(f"cannot open dataset {self.hub}: {_one_line(error)}") from error

    @cached_property
    def _commit(self) -> str | None:
        """The commit that the revision stands for now; None for a dataset in a folder."""
        if Path(str(self.hub)).is_dir():
            return None
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(str(self.hub), revision=self.revision).sha
        except Exception as error:
            if self.revision and len(self.revision) == 40:
                return self.revision
            reason = f"{_one_line(error)} (a revision of 40 letters and digits would need no asking)"
            raise MasformerError(f"cannot find dataset {self.hub}: {reason}") from error

    def fingerprint(self) -> str:
        """Changes with the content and with every option; reads all bytes of local files."""
        options: Mapping[str, Any] = {
            "fields": self.fields,
            "where": sorted(self._where.items()),
            "range": (self.skip, self.limit),
            "hub": (self.hub_config, self.hub_split) if self.hub else None,
        }
        digest = hashlib.sha256(repr(sorted(options.items())).encode())
        if self.files:
            paths = check_files(self.files)
        elif self.builtin:
            from pydoc_data import topics

            paths = [Path(str(topics.__file__))]
        elif Path(str(self.hub)).is_dir():
            paths = sorted(path for path in Path(str(self.hub)).rglob("*") if path.is_file())
        else:
            digest.update(f"{self.hub} {self._commit}".encode())
            paths = []
        for path in paths:
            digest.update(f"{path.suffix} {path.stat().st_size}".encode())
            digest.update(content_digest(path))
        return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

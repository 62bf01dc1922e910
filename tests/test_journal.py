"""Journals lose nothing but a line that was never whole, and touch no other file."""

from __future__ import annotations

import pytest

from masformer.errors import MasformerError
from masformer.journal import append_lines, recover_lines


def read(row):
    return row["a"]


@pytest.mark.parametrize("torn", ["", "{", '{"a": 3, "b', '{"a": "\u00fc'])
def test_whole_lines_are_kept_and_a_torn_one_is_cut_off(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    assert recover_lines(path, read, "a thing") == []
    append_lines(path, [{"a": 1}, {"a": "\u2028 \r \u00fc"}])
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert recover_lines(path, read, "a thing") == [1, "\u2028 \r \u00fc"]
    assert path.read_bytes() == whole
    path.write_bytes(whole + '{"a": "ü'.encode()[:-1])  # within a character
    assert len(recover_lines(path, read, "a thing")) == 2


def test_a_last_line_that_lacks_its_end_alone_is_whole(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert recover_lines(path, read, "a thing") == [1, 2]
    append_lines(path, [{"a": 3}])
    assert recover_lines(path, read, "a thing") == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "line"),
    [('{"b": 1}', 1), ('{"a": 1}\n{"b": 1}\n{"a": 2, ', 2), ('{"a": 1}\n\n', 2), ("[1]\n", 1), ("text", 1), ("7", 1)],
)
def test_other_files_are_refused_and_stay_as_they_are(tmp_path, content, line):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(MasformerError, match=rf"x\.jsonl, line {line}: not a thing; name another file"):
        recover_lines(path, read, "a thing")
    assert path.read_text() == content
    with pytest.raises(MasformerError, match="cannot use the journal"):
        recover_lines(tmp_path / "missing" / "x", read, "a thing")
    with pytest.raises(MasformerError, match="cannot write the journal"):
        append_lines(tmp_path / "missing" / "x", [{}])

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masformer import MasformerError
from masformer.data import Document, Row, read_documents, read_rows
from masformer.data.sources import Source

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
texts = st.text(st.characters(codec="utf-8"), max_size=30)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_form_is_read_in_order(tmp_path, suffix):
    plain, lines = tmp_path / f"a.MD{suffix}", tmp_path / f"b.ndjson{suffix}"
    plain.write_bytes(COMPRESS[suffix]("Ein Satz.\r\nNoch einer: ä\n".encode()))
    lines.write_bytes(COMPRESS[suffix](b'{"id": 1, "text": "one"}\n\n{"text": "two\\u2028three"}'))
    assert list(read_documents([plain, str(lines)])) == [
        Document(str(plain), "Ein Satz.\r\nNoch einer: ä\n"),
        Document(f"{lines}:1", "one"),
        Document(f"{lines}:3", "two\u2028three"),
    ]


def is_right_or_refused(path, texts):
    try:
        return [document.text for document in read_documents([path])] == texts
    except MasformerError as error:
        return str(path) in str(error) and "\n" not in str(error)


PADDING = {".xz": [b"", b"\0" * 4, b"\0" * 8000], ".gz": [b"", b"\0", b"\0" * 9000], ".bz2": [b""]}


@pytest.mark.parametrize("suffix", PADDING)
def test_every_stream_of_a_compressed_file_is_read(tmp_path, suffix):
    parts = [
        b"".join(b'{"text": "%d of %d"}\n' % (line, part) for line in range(1 + 4000 * part)) for part in (0, 1, 2)
    ]
    for number, padding in enumerate(PADDING[suffix]):
        path = tmp_path / f"{number}.jsonl{suffix}"
        path.write_bytes(b"".join(COMPRESS[suffix](part) + padding for part in (*parts, b"")))
        assert len(list(read_documents([path]))) == 12003


@pytest.mark.parametrize("suffix", PADDING)
def test_no_byte_after_a_compressed_stream_is_passed_over(tmp_path, suffix):
    first, second = (COMPRESS[suffix](b'{"text": "%s"}\n' % word) for word in (b"one", b"two"))
    path = tmp_path / f"a.jsonl{suffix}"
    left = [second[:cut] for cut in range(1, len(second))]
    left += [second[:place] + bytes([second[place] ^ 255]) + second[place + 1 :] for place in range(len(second))]
    left += [b"x", b"garbage after the end", b"\0garbage", second + b"PK"] + [b"\0" * 3] * (suffix != ".gz")
    silent = []
    for rest in left:
        path.write_bytes(first + rest)
        if not is_right_or_refused(path, ["one", "two"]):
            silent.append(rest)
    assert silent == []


def test_a_changed_byte_of_a_parquet_file_changes_no_text(tmp_path):
    path, texts = tmp_path / "a.parquet", [f"text number {row}" for row in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, write_page_checksum=True)
    whole = path.read_bytes()
    silent = []
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        if not is_right_or_refused(path, texts):
            silent.append(place)
    assert silent == []


def test_a_parquet_value_that_is_no_text_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), path)
    with pytest.raises(MasformerError, match=r"cannot read .*a\.parquet"):
        list(read_documents([path]))


@given(st.lists(texts, max_size=6), st.booleans(), st.booleans())
def test_json_lines_round_trip(tmp_path_factory, rows, escaped, bom):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    content = "\n".join(json.dumps({"body": row, "n": 1}, ensure_ascii=escaped) for row in rows)
    path.write_bytes(content.encode("utf-8-sig" if bom else "utf-8"))
    kept = [row for row in rows if row.strip()]
    if kept:
        assert [document.text for document in read_documents([path], field="body")] == kept
    else:
        with pytest.raises(MasformerError, match="holds no document"):
            list(read_documents([path], field="body"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert next(read_documents(tmp_path / "a.txt")).text == "hello"


def test_nothing_is_read_beyond_the_limit(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nbroken')
    (tmp_path / "b.txt").write_bytes(b"\xff")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    assert [document.text for document in read_documents(paths, limit=2)] == ["one", "two"]
    with pytest.raises(MasformerError, match="line 3: not JSON"):
        list(read_documents(paths, limit=3))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no document: it is empty"),
        ("a.txt", b" \n", "a.txt holds no document"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no document"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl holds no document: it is empty, or every text in it is blank"),
        ("a.txt", b"one\ntwo \xff", "a.txt, line 2: not UTF-8 text (invalid start byte)"),
        ("a.txt", "utf".encode("utf-16"), "a.txt, line 1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl, line 2: not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: not JSON (Exceeds the limit"),
        ("a.jsonl", b'["text"]', "a.jsonl, line 1: holds a list; each line must be one object"),
        ("a.jsonl", b'{"id": 1, "body": "x"}', "no field 'text'; the fields there are: id, body"),
        ("a.jsonl", b"{}", "no field 'text'; the fields there are: none at all"),
        ("a.jsonl", b'{"text": null}', "field 'text' holds a NoneType, it must hold a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair"),
        ("a.txt.gz", b"plain", "a.txt.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "a.txt.gz: Compressed file ended before"),
        ("a.txt.gz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 99, "a.txt.gz: Error -3"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}')[:-9], "the file is damaged or cut short"),
        ("a.txt.xz", b"plain text, not xz", "a.txt.xz: Input format not supported"),
        ("a.txt.bz2", b"plain", "a.txt.bz2: Invalid data stream"),
        ("a.json", b"{}", "a.json is of the kind .json; allowed: text files and JSON lines (.jsonl, .ndjson)"),
        ("a.parquet.gz", b"PAR1", "a.parquet.gz is of the kind .parquet"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MasformerError) as error:
        list(read_documents([tmp_path / name]))
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_can_be_known_beforehand_is_said_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for paths, limit, message in [
        ([tmp_path / "a.txt", tmp_path / "b.txt"], None, r"b\.txt does not exist"),
        ([tmp_path], None, "is a folder"),
        ([], None, "no data file given"),
        ([tmp_path / "a.txt"], 0, "limit of documents must be at least 1, got 0"),
    ]:
        with pytest.raises(MasformerError, match=message):
            read_documents(paths, limit=limit)


ROWS = [
    {"text": "one", "split": "train", "meta": {"kind": "a"}, "n": 1},
    {"text": " ", "split": "test", "meta": {"kind": "b"}, "n": 2},
    {"text": "three", "split": "train", "meta": {"kind": "b"}, "n": 3},
]


@pytest.fixture(params=["jsonl.xz", "parquet"])
def rows_file(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(lzma.compress("\n".join(map(json.dumps, ROWS)).encode()))
    return path


def test_documents_and_selected_rows_of_json_lines_and_parquet(rows_file):
    assert [document.text for document in read_documents(rows_file)] == ["one", "three"]
    assert list(read_rows([rows_file], ["text", "split"], {"meta.kind": "b"})) == [
        Row(f"{rows_file}:2", {"text": " ", "split": "test"}),
        Row(f"{rows_file}:3", {"text": "three", "split": "train"}),
    ]
    assert [row.texts["text"] for row in read_rows([rows_file], ["text"], {"n": "3", "split": "train"})] == ["three"]


LISTS = [
    {"text": "one", "n": 1, "items": [{"a": "x", "k": "p"}, {"a": "y", "k": "q"}]},
    {"text": "two", "n": 2, "items": []},
    {"text": "three", "n": 3, "items": [{"a": "z", "k": "q"}]},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_each_entry_of_a_list_is_a_row(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LISTS), path)
    else:
        path.write_text("\n".join(map(json.dumps, LISTS)))
    assert list(read_rows([path], ["text", "items.a"])) == [
        Row(f"{path}:1#1", {"text": "one", "items.a": "x"}),
        Row(f"{path}:1#2", {"text": "one", "items.a": "y"}),
        Row(f"{path}:3#1", {"text": "three", "items.a": "z"}),
    ]
    found = read_rows([path], ["items.a"], {"items.k": "q", "n": "3"})
    assert [(row.name, row.texts) for row in found] == [(f"{path}:3#1", {"items.a": "z"})]
    source = Source(files=[str(path)], prompt="text", target="items.a", where={"items.k": "q"})
    assert [list(row.texts.values()) for row in source.rows()] == [["one", "y"], ["three", "z"]]


@pytest.mark.parametrize(
    ("fields", "where", "message"),
    [
        (["text", "body"], {}, "no field 'body'; the fields there are: text"),
        (["n"], {}, "field 'n' holds a int, it must hold a string"),
        (["text"], {"spilt": "train"}, "no field 'spilt' to select by; the fields there are: text"),
        (["text"], {"meta.sort": "a"}, "no field 'meta.sort' to select by"),
    ],
)
def test_wrong_fields_are_named(rows_file, fields, where, message):
    with pytest.raises(MasformerError) as error:
        list(read_rows([rows_file], fields, where))
    assert message in str(error.value)


def test_damaged_parquet_and_fields_of_plain_text_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(MasformerError, match=r"cannot read .*a\.parquet"):
        list(read_documents([tmp_path / "a.parquet"]))
    with pytest.raises(MasformerError, match=r"plain text, it has no fields \(asked for: split\)"):
        read_rows([tmp_path / "a.txt"], ["text"], {"split": "train"})

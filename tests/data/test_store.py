import json
import os
import time

import pytest
from words import WORDS, text, word_tokenizer

from masformer import MasformerError
from masformer.data import sources, store
from masformer.data.sources import Source
from masformer.data.store import token_store


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path):
    rows = [{"text": text(5), "split": "a"}, {"text": " ", "split": "a"}, {"text": text(7, 3), "split": "b"}]
    return write(tmp_path / "rows.jsonl", rows)


def ids(words):
    return [WORDS.index(word) + 3 for word in words.split()]


def test_documents_are_what_the_tokenizer_makes_of_them_and_an_end(tmp_path, file):
    found = token_store("rows", Source(files=[file]), word_tokenizer(), tmp_path / "cache")
    assert [found.document(index).tolist() for index in range(len(found))] == [
        [*ids(text(5)), 1],
        [*ids(text(7, 3)), 1],
    ]
    assert (found.blank, found.characters, found.end_token) == (1, len(text(5)) + 1 + len(text(7, 3)), 1)
    begun = token_store("rows", Source(files=[file]), word_tokenizer(begin=True), tmp_path / "cache")
    assert begun.document(0).tolist() == [0, *ids(text(5)), 1]
    bare = token_store("rows", Source(files=[file]), word_tokenizer(end=False), tmp_path / "cache")
    assert bare.document(0).tolist() == ids(text(5))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_pairs_are_a_template_and_a_target(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{"long": text(6), "short": text(2, 9)}])
    source = Source(files=[path], prompt="long", target="short")
    found = token_store("pairs", source, word_tokenizer(begin=True), tmp_path, template="w50 {prompt} w51 w52")
    assert found.document(0).tolist() == [0, *ids(f"w50 {text(6)} w51 w52 {text(2, 9)}"), 1]
    assert found.parts.tolist() == [[2, 8, 10]]
    with pytest.raises(MasformerError, match=r"must hold \{prompt\} exactly once, got 'w50'"):
        token_store("pairs", source, word_tokenizer(), tmp_path, template="w50")


def test_what_was_tokenized_is_read_again_until_something_changes(tmp_path, file, monkeypatch):
    calls = []
    encode = store.token_rows
    monkeypatch.setattr(store, "token_rows", lambda *arguments: calls.append(1) or encode(*arguments))

    def read(**options):
        return token_store("rows", Source(files=[file], **options), word_tokenizer(), tmp_path / "cache")

    first = read()
    assert (len(calls), read().tokens.tolist()) == (1, first.tokens.tolist())
    assert len(calls) == 1
    assert len(read(where={"split": "b"})) == 1
    assert len(read(skip=1)) == 1
    assert len(read(limit=1)) == 1
    assert len(calls) == 4
    write(tmp_path / "rows.jsonl", [{"text": text(4)}])
    assert read().lengths.tolist() == [5]
    assert len(calls) == 5


def test_an_interrupted_or_damaged_store_is_made_again(tmp_path, file, monkeypatch):
    cache = tmp_path / "cache"

    def read():
        return token_store("rows", Source(files=[file]), word_tokenizer(), cache)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_texts", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            read()
    assert not list(cache.iterdir())
    whole = read().tokens.tolist()
    (folder,) = cache.iterdir()
    with (folder / "tokens.bin").open("r+b") as tokens:
        tokens.truncate(4)
    assert read().tokens.tolist() == whole
    (cache / ".left").mkdir()
    os.utime(cache / ".left", (time.time() - 10**6,) * 2)
    (folder / "store.json").unlink()
    assert read().tokens.tolist() == whole
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize("damaged", ["tokens.bin", "offsets.npy", "store.json"])
def test_a_damaged_store_is_made_again(tmp_path, file, damaged):
    made = [token_store("x", Source(files=[file]), word_tokenizer(), tmp_path / "cache") for _ in range(2)]
    (folder,) = (tmp_path / "cache").iterdir()
    tokens = made[0].tokens.tolist()
    whole = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    again = token_store("x", Source(files=[file]), word_tokenizer(), tmp_path / "cache")
    assert again.tokens.tolist() == tokens
    assert again.offsets.tolist() == made[0].offsets.tolist()


def test_hub_datasets_are_streamed(tmp_path, monkeypatch):
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": text(3), "n": 1}, {"text": text(4), "n": 2}])
    write(folder / "test.jsonl", [{"text": text(9), "n": 1}])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    found = token_store("hub", Source(hub=str(folder), where={"n": 2}), word_tokenizer(), tmp_path / "cache")
    assert found.lengths.tolist() == [5]
    found = token_store("hub", Source(hub=str(folder), hub_split="test"), word_tokenizer(), tmp_path / "cache")
    assert found.lengths.tolist() == [10]
    for options, message in [
        ({"hub": "nobody/nothing"}, "cannot find dataset nobody/nothing"),
        ({"hub": str(folder), "hub_split": "val"}, "cannot open dataset .*dataset: .*val"),
        ({"hub": str(folder), "field": "body"}, "no field 'body'; the fields there are: text, n"),
    ]:
        with pytest.raises(MasformerError, match=message):
            token_store("hub", Source(**options), word_tokenizer(), tmp_path / "cache")


def test_the_text_that_every_python_has(tmp_path):
    found = token_store("python", Source(builtin="python-topics", limit=3), word_tokenizer(), tmp_path)
    assert len(found) == 3
    assert sources.BUILT_IN == ("python-topics",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a source needs one of files, hub and builtin, got none"),
        ({"files": ["a"], "hub": "b"}, "a source needs one of files, hub and builtin, got files and hub"),
        ({"files": ["a"], "hub_split": "test"}, "hub_split does nothing without hub"),
        ({"builtin": "bible"}, "unknown builtin text 'bible'; allowed: python-topics"),
        ({"builtin": "python-topics", "where": {"a": 1}}, "has no fields"),
        ({"files": ["a"], "prompt": "p"}, "prompt and target are given together"),
        ({"files": ["a"], "prompt": "p", "target": "t", "field": "f"}, "field does nothing"),
        ({"files": ["a"], "skip": -1}, "skip must be at least 0, got -1"),
        ({"files": ["a"], "limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_wrong_sources_are_named(options, message):
    with pytest.raises(MasformerError, match=message):
        Source(**options)


@pytest.mark.parametrize("fields", [{"prompt": "text", "target": "split"}, {"messages": "text"}])
def test_where_plain_texts_are_needed_other_kinds_are_refused(file, fields):
    assert [document.text for document in Source(files=file).documents()] == [text(5), text(7, 3)]
    with pytest.raises(MasformerError, match=r"rows\.jsonl is read as .*; plain texts are needed here"):
        Source(files=file, **fields).documents()


def test_nothing_selected_and_nothing_but_blanks_are_named(tmp_path, file):
    for options, message in [
        ({"where": {"split": "c"}}, r"rows\.jsonl holds no row with split = c"),
        ({"skip": 9}, r"rows\.jsonl holds no row with skip = 9"),
        ({"skip": 1, "limit": 1}, r"source x \(rows\.jsonl\) holds no text: every row in it is blank"),
    ]:
        with pytest.raises(MasformerError, match=message):
            token_store("x", Source(files=[file], **options), word_tokenizer(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())

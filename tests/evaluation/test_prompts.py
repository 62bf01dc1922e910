"""Examples, templates, what is cut, and shots."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from masformer import MasformerError
from masformer.data.sources import Source
from masformer.data.store import token_store
from masformer.evaluation.prompts import (
    QUERY,
    SUMMARY,
    Example,
    Prompter,
    Template,
    choose_shots,
    read_examples,
)
from tiny import letter_tokenizer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
MEETINGS = [
    {"text": "first meeting", "split": "train", "queries": [{"kind": "all", "q": "What?", "a": "This."}]},
    {
        "text": "second meeting",
        "split": "test",
        "queries": [{"kind": "all", "q": "What?", "a": "That."}, {"kind": "some", "q": "Who?", "a": "They."}],
    },
    {"text": "third meeting", "split": "test", "queries": []},
    {"text": "fourth meeting", "split": "test", "queries": [{"kind": "all", "q": "What?", "a": "More."}]},
]
FIELDS = {"document_field": "text", "target_field": "queries.a", "query_field": "queries.q"}


@pytest.fixture
def tokenizer():
    return letter_tokenizer(eos_token="<e>")


@pytest.fixture
def chatty(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT)


@pytest.fixture
def meetings(tmp_path):
    return write(tmp_path / "meetings.jsonl", MEETINGS)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_one_example_for_each_selected_entry_of_a_list(meetings):
    found = read_examples([meetings], **FIELDS, where={"split": "test", "queries.kind": "all"})
    assert found == [
        Example("meetings.jsonl:2#1", "second meeting", "That.", "What?"),
        Example("meetings.jsonl:4#1", "fourth meeting", "More.", "What?"),
    ]
    assert [each.query for each in read_examples([meetings], **FIELDS, where={"split": "test"})] == [
        "What?",
        "Who?",
        "What?",
    ]


def test_the_limit_counts_documents(meetings):
    found = read_examples([meetings], **FIELDS, where={"split": "test"}, documents=1)
    assert [each.name for each in found] == ["meetings.jsonl:2#1", "meetings.jsonl:2#2"]
    assert len(read_examples([meetings], **FIELDS, documents=2)) == 3


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "x.jsonl", [{"d": folder, "t": "target"}]))
    assert [each.name for each in read_examples(paths, document_field="d", target_field="t")] == [
        f"{paths[0]}:1",
        f"{paths[1]}:1",
    ]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"d": "x", "t": "y"}, {"d": "x2", "t": " "}], {}, "data.jsonl:2: field 't' is blank"),
        ([{"d": "", "t": "y"}], {}, "data.jsonl:1: field 'd' is blank"),
        ([{"d": "x", "t": "y"}, {"d": "x"}], {}, "data.jsonl, line 2: no field 't'; the fields there are: d"),
        ([{"d": "x", "t": ["y"]}], {}, "data.jsonl, line 1: field 't' holds a list, it must hold a string"),
        ([{"d": "x", "t": "y"}], {"query_field": "q"}, "data.jsonl, line 1: no field 'q'; the fields there are: d, t"),
        ([{"d": "x", "t": "y"}], {"query_field": "d"}, "field 'd' is named twice"),
        ([{"d": "x", "t": "y"}], {"where": {"t": "z"}}, "no example is selected with t = z"),
        ([{"d": "x", "t": "y"}], {"where": {"s": "z"}}, "data.jsonl, line 1: no field 's' to select by"),
        ([{"d": "x", "t": "y"}, {"d": "x", "t": "z"}], {}, "data.jsonl:2: the same document as in "),
        ([{"d": "x", "t": "y"}], {"documents": 0}, "limit of documents must be at least 1, got 0"),
        (
            [{"d": "x", "q": [{"t": "a"}, {"u": "b"}]}],
            {"target_field": "q.t"},
            "data.jsonl, line 1, entry 2 of q: no field 'q.t'; the fields there are: u",
        ),
        (
            [{"d": "x", "q": [{"t": "a"}], "p": [{"k": "b"}]}],
            {"target_field": "q.t", "query_field": "p.k"},
            "data.jsonl, line 1: q and p are both lists",
        ),
        ([], {}, "no example is selected"),
    ],
)
def test_wrong_data_is_named_by_file_line_and_field(tmp_path, rows, fields, message):
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(MasformerError) as error:
        read_examples([path], **{"document_field": "d", "target_field": "t"} | fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no place", r"must hold \{document\} once, it does 0 times"),
        ("{document} and {document}", "it does 2 times"),
        ("{document}\n\n{abstract}", r"line 3: unknown placeholder \{abstract\}; allowed: \{document\}, \{query\}"),
        ("{document} {}", r"unknown placeholder \{\}"),
        ("{document} {query!r}", r"unknown placeholder \{query!r\}"),
        ("{document:>9}", r"unknown placeholder \{document:>9\}"),
        ("{document} {", "allowed: {document}"),
        ("{document} }", "Single '}'"),
    ],
)
def test_wrong_templates_are_named(tmp_path, text, message):
    path = tmp_path / "template.txt"
    path.write_text(text)
    with pytest.raises(MasformerError, match=message) as error:
        Template.load(path)
    assert "template.txt" in str(error.value)


def test_templates_are_read_and_filled(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("JSON {{1}} {query}: {document}\nAnswer: \n")
    template = Template.load(path)
    assert template.has_query
    assert template.filled("{x}", "{document}") == "JSON {1} {document}: {x}\nAnswer: "
    assert Template(QUERY).has_query > Template(SUMMARY).has_query
    with pytest.raises(MasformerError, match=r"cannot read the template missing\.txt"):
        Template.load("missing.txt")


@pytest.mark.parametrize(("cut", "kept"), [("middle", "abcdefvwxyz"), ("tail", "abcdefghijk"), ("head", "pqrstuvwxyz")])
def test_the_document_alone_is_cut_to_the_length(tokenizer, cut, kept):
    document = "abcdefghijklmnopqrstuvwxyz"
    prompter = Prompter(tokenizer, Template("Read {document} now: {query}"), cut=cut)
    example = Example("x", document, "target", "why")
    prompt = prompter.prompt(example, 25)
    assert tokenizer.decode(prompt.tokens) == f"Read {kept} now: why"
    assert (len(prompt.tokens), prompt.cut) == (25, 15)
    whole = prompter.prompt(example, 40)
    assert tokenizer.decode(whole.tokens) == f"Read {document} now: why"
    assert whole.cut == 0
    assert prompter.prompt(example, 15).cut == 25
    with pytest.raises(MasformerError, match="x: a prompt of 14 tokens has no room for the document"):
        prompter.prompt(example, 14)


def test_the_chat_template_is_around_the_prompt(chatty, tokenizer):
    template, example = Template("{document}, {query}"), Example("x", "document", "target", "why")
    for chat in (None, True):
        assert chatty.decode(Prompter(chatty, template, chat=chat).prompt(example, 99).tokens) == (
            "<user>document, why</><a>"
        )
    assert chatty.decode(Prompter(chatty, template, chat=False).prompt(example, 99).tokens) == "document, why"
    cut = Prompter(chatty, template, cut="tail").prompt(example, 20)
    assert chatty.decode(cut.tokens) == "<user>doc, why</><a>"
    with pytest.raises(MasformerError, match="the tokenizer has no chat template"):
        Prompter(tokenizer, template, chat=True)


def test_shots_come_first_as_turns_or_as_text(chatty, tokenizer):
    shots = [Example("s", "a long shot", "SHORT"), Example("t", "two", "TWO")]
    example = Example("x", "document", "target")
    turns = Prompter(chatty, Template("D: {document}"), shots=shots, shot_tokens=6, cut="tail")
    assert chatty.decode(turns.prompt(example, 200).tokens) == (
        "<user>D: a long</><assistant>SHORT</><user>D: two</><assistant>TWO</><user>D: document</><a>"
    )
    for end, space in (("=", " "), ("\n", "")):
        text = Prompter(tokenizer, Template("{document}" + end), shots=shots, shot_tokens=6, cut="middle")
        assert tokenizer.decode(text.prompt(example, 99).tokens) == (
            f"a lhot{end}{space}SHORT\n\ntwo{end}{space}TWO\n\ndocument{end}"
        )
    with pytest.raises(MasformerError, match=r"since the template and 2 shots alone takes .* or fewer --shots"):
        turns.prompt(example, 20)


def test_shots_are_drawn_by_the_seed_and_never_of_a_tested_document():
    pool = [Example(str(number), f"document {number % 10}", str(number), str(number)) for number in range(30)]
    tested = [Example("t", "document 3", "other", "q"), Example("u", "document 5", "other", "q")]
    drawn = choose_shots(pool, tested, 24, seed=1)
    assert drawn == choose_shots(pool, tested, 24, seed=1) != choose_shots(pool, tested, 24, seed=2)
    assert {shot.document for shot in drawn} == {f"document {number}" for number in range(10) if number not in (3, 5)}
    with pytest.raises(MasformerError, match="25 shots asked for, but 24 examples are left"):
        choose_shots(pool, tested, 25)


def test_a_prompt_without_chat_has_the_tokens_that_training_on_pairs_has(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl", [{"d": "a report of things", "t": "things"}])
    source = Source(files=[str(path)], prompt="d", target="t")
    store = token_store("x", source, tokenizer, tmp_path / "cache", template="Sum up. {prompt}\nSummary:\n")
    (example,) = read_examples([path], document_field="d", target_field="t")
    prompter = Prompter(tokenizer, Template("Sum up. {document}\nSummary:\n"))
    assert store.document(0)[: store.parts[0, 2]].tolist() == prompter.prompt(example, 99).tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cut": "end"}, "unknown cut 'end'; allowed: tail, head, middle"), ({"shot_tokens": 0}, "shot_tokens must be")],
)
def test_wrong_values_are_named(tokenizer, options, message):
    with pytest.raises(MasformerError, match=message):
        Prompter(tokenizer, Template("{document}"), **options)

"""Conversations: the assistant's turns are predicted up to their end and nothing else, or one line says why not."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from masformer import MasformerError
from masformer.data.chat_rows import ChatRows
from masformer.data.packing import make_rows
from masformer.data.report import report_rows, report_text
from masformer.data.sources import Source
from masformer.data.store import token_store
from masformer.generation import prompt_tokens
from tiny import letter_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<m>' + m.role + '\n' + m.content + '<e>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<m>assistant\n' }}{% endif %}"
)
HALF = "{% for m in messages %}{{ '<m>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
MARKED = (
    HALF
    + "{{ m.content + '<e>' }}{% endgeneration %}{% else %}{{ m.content + '<e>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
SHORT = HALF + "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<e>\n' }}{% endfor %}"
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<m>[' + m.content + ']' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<e>' }}{% endif %}{% endfor %}"
)
REWRITING = (
    "{% for m in messages %}{{ '<m>' + m.role + '\n' + (m.content if loop.last else m.content[-20:]) + '<e>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<m>assistant\n' }}{% endif %}"
)


def tokenizer(template):
    made = letter_tokenizer(eos_token="<e>", additional_special_tokens=["<m>"])
    made.chat_template = template
    return made


def say(role, content, **more):
    return {"role": role, "content": content} | more


TALK = [
    say("system", "be brief"),
    say("user", "hi"),
    say("assistant", "hello"),
    say("user", "bye"),
    say("assistant", "ok"),
]


def stored(tmp_path, template, *talks, field="messages"):
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps({field: talk}) for talk in talks))
    source = Source(files=[str(path)], messages=field)
    return token_store("talks", source, tokenizer(template), tmp_path / "cache")


def predicted(store, index=0):
    """What is predicted of a conversation, turn by turn."""
    turns, text = [], tokenizer(None)
    before = False
    for token, own in zip(store.document(index).tolist(), store.own(index).tolist(), strict=True):
        if own:
            turns = turns if before else [*turns, []]
            turns[-1].append(token)
        before = own
    return [text.decode(turn) for turn in turns]


WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_template_is_told_of_the_tools_of_a_conversation(tmp_path, template):
    path = tmp_path / "talks.jsonl"
    rows = [{"m": TALK, "t": WEATHER}, {"m": TALK, "t": None}, {"m": TALK, "t": []}]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = Source(files=[str(path)], messages="m", tools="t")
    named = "{% if tools %}{{ 'tools: ' + tools[0].function.name + '\n' }}{% endif %}" + template
    store = token_store("talks", source, tokenizer(named), tmp_path / "cache")
    begins = [tokenizer(None).decode(store.document(row).tolist()).startswith("tools: weather") for row in range(3)]
    assert begins == [True, False, False]
    assert [predicted(store, row) for row in range(3)] == [["hello<e>", "ok<e>"]] * 3
    with pytest.raises(MasformerError, match=r"talks.jsonl:1: the chat template does not read tools"):
        token_store("talks", source, tokenizer(template), tmp_path / "cache")
    with pytest.raises(MasformerError, match="tools does nothing without messages"):
        Source(files=[str(path)], tools="t")


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (CHATML, ["hello<e>", "ok<e>"]),
        (MARKED, ["hello<e>", "ok<e>"]),
        (SHORT, ["hello<e>", "ok<e>"]),
        (PLAIN, ["hello\n", "ok\n<e>"]),
        (LLAMA2, [" hello<e>", " ok<e>"]),
    ],
)
def test_the_assistants_turns_are_predicted_up_to_their_end(tmp_path, template, turns):
    talk = TALK[template == LLAMA2 :]
    store = stored(tmp_path, template, talk)
    assert predicted(store) == turns
    made = tokenizer(template)
    whole = made.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    assert store.document(0).tolist() == whole + [made.eos_token_id] * (template == PLAIN)
    if template in (CHATML, PLAIN):  # a chat begins as it does where an answer is asked for
        prompt = prompt_tokens(made, "hi", system="be brief")
        assert store.document(0).tolist()[: len(prompt)] == prompt
        assert store.own(0).tolist().index(True) == len(prompt)


@pytest.mark.parametrize("template", [CHATML, MARKED, SHORT])
def test_what_comes_after_the_last_answer_is_left_out_and_nothing_said_is_blank(tmp_path, template):
    silent = [say("user", "hi"), say("assistant", " ")]
    store = stored(tmp_path, template, [*TALK, say("user", "more")], TALK[:2], [], silent, TALK[1:3])
    assert (len(store), store.blank) == (2, 3)
    assert predicted(store) == ["hello<e>", "ok<e>"]
    assert predicted(store, 1) == ["hello<e>"]
    assert "more" not in tokenizer(None).decode(store.document(0))


def test_empty_contents_are_turns_like_others(tmp_path):
    talk = [say("user", ""), say("assistant", ""), say("user", "x"), say("assistant", "y")]
    assert predicted(stored(tmp_path, CHATML, talk)) == ["<e>", "y<e>"]


def test_answers_that_follow_each_other_are_all_predicted(tmp_path):
    talk = [say("user", "a"), say("assistant", "b"), say("assistant", "c")]
    assert predicted(stored(tmp_path, CHATML, talk)) == ["b<e>", "c<e>"]


TOOLS = (
    "{% for m in messages %}{{ '<m>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments.x }}{% endfor %}{{ '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<m>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
CALLS = [
    say("user", "go"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    say("tool", "9"),
    say("assistant", "9!"),
]


def test_tools_are_trained_on_where_the_template_reads_them(tmp_path):
    assert predicted(stored(tmp_path, TOOLS, CALLS)) == ["7<e>", "9!<e>"]


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (None, TALK, "the tokenizer lacks; name one that has it in model.tokenizer"),
        (
            REWRITING,
            [*TALK[:2], say("assistant", "thought " * 5), *TALK[3:]],
            "which tokens of message 3 are the assistant's cannot be told",
        ),
        (CHATML + "!", TALK, "which tokens of message 3 are the assistant's cannot be told"),
        (MARKED.replace("== 'assistant'", "== 'assistant' and loop.last"), TALK, "marks 1 of 2 assistant's turns"),
        ("{{ raise_exception('no\nsystem') }}", TALK, "the chat template refuses the messages: no system"),
        (LLAMA2, TALK, "leaves out what messages of the role system say"),
        (
            LLAMA2,
            [*TALK[1:], say("tool", "9"), say("assistant", "9!")],
            "leaves out what messages of the role tool say",
        ),
        (CHATML, CALLS, "the chat template does not read tool_calls"),
        (CHATML, [say("assistant", "hello")], "it begins with the assistant's turn"),
        (CHATML, [say("bot", "hello")], "message 1 has the role 'bot'; allowed: system, developer, user, assistant"),
        (CHATML, [{"from": "human", "value": "hi"}], "message 1 has no role; the fields there are: from, value"),
        (CHATML, [{"role": "user"}], "message 1 must have text as its content, got None"),
        (CHATML, [say("user", [{"type": "text", "text": "hi"}])], "message 1 must have text as its content"),
        (CHATML, ["hi"], "message 1 must be an object with role and content, got 'hi'"),
        (CHATML, "hi", "field 'messages' holds a str, it must hold a list"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(tmp_path, template, talk, message):
    with pytest.raises(MasformerError) as error:
        stored(tmp_path, template, talk)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


def test_an_answer_that_runs_into_the_template_is_refused(tmp_path):
    """A token may hold the end of the prompt and the beginning of the answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: n for n, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"])}
    made = Tokenizer(models.BPE(letters, [("Ċ", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", chat_template=CHATML)
    path = tmp_path / "talks.jsonl"
    for content, refused in [("fine", False), ("\nfine", True)]:
        path.write_text(json.dumps({"messages": [say("user", "hi"), say("assistant", content)]}))
        if refused:
            with pytest.raises(MasformerError, match="message 2 are the assistant's cannot be told"):
                token_store("x", Source(files=[str(path)], messages="messages"), fast, tmp_path / "cache")
        else:
            token_store("x", Source(files=[str(path)], messages="messages"), fast, tmp_path / "cache")


def test_conversations_are_read_from_parquet_and_fields_of_any_name(tmp_path):
    rows = [{"talk": {"turns": TALK}, "split": "a"}, {"talk": {"turns": TALK[1:3]}, "split": "b"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "talks.parquet")
    source = Source(files=str(tmp_path / "talks.parquet"), messages="talk.turns", where={"split": "a"})
    source.check()
    store = token_store("talks", source, tokenizer(CHATML), tmp_path / "cache")
    assert store.document(0).tolist() == stored(tmp_path, CHATML, TALK).document(0).tolist()
    assert predicted(store) == ["hello<e>", "ok<e>"]
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(MasformerError, match="plain text, it has no fields"):
        Source(files=[str(tmp_path / "a.txt")], messages="messages").check()


def test_a_template_that_changes_makes_another_store(tmp_path):
    stored(tmp_path, CHATML, TALK)
    stored(tmp_path, CHATML, TALK)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    stored(tmp_path, PLAIN, TALK)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_rows_hold_whole_conversations_that_see_themselves_alone(tmp_path):
    long = [say("user", "x"), say("assistant", "y" * 90)]
    late = [say("user", "x" * 90), say("assistant", "y")]
    store = stored(tmp_path, CHATML, TALK[1:3], TALK[1:3], long, late)
    rows = make_rows([store], 60, None, "tail")
    assert isinstance(rows, ChatRows)
    first, second = rows[0], rows[1]
    each = len(store.document(0))
    assert first["input_ids"].tolist() == store.document(0).tolist() * 2
    assert first["position_ids"].tolist() == [*range(each)] * 2
    for place, (token, label) in enumerate(zip(first["input_ids"][1:], first["shift_labels"], strict=False)):
        inside = (place + 1) % each
        assert label == (token if inside and store.own(0)[inside] else -100)
    assert second["input_ids"].tolist() == store.document(2).tolist()[:60]
    assert len(rows) == 2
    report = report_rows([store], rows)
    assert report["cut"] == {"chats": 1, "tokens": len(store.document(2)) - 60, "dropped": 1, "rule": "tail"}
    labels = [label for row in (first, second) for label in row["shift_labels"].tolist()]
    assert report["predicted"] == sum(label != -100 for label in labels)
    assert f"{report['predicted']} of {report['tokens']} tokens are the assistant's" in report_text(report)
    assert "1 conversation cut at the end" in report_text(report)
    assert "1 left out, whose first answer begins beyond a row" in report_text(report)
    with pytest.raises(MasformerError, match="rows of 8 tokens are too short: no answer of a conversation begins"):
        make_rows([store], 8, None, "tail")
    with pytest.raises(MasformerError, match="chats cannot be packed across documents"):
        make_rows([store], 60, "across", "tail")

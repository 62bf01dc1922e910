"""One way from text to tokens: whoever makes a prompt, it is what training made of the same text, without an end."""

import gzip
import io
import json
import sys
from types import SimpleNamespace

import pytest
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizer

from masformer import MasformerError, apply_plan
from masformer.cli.generate import _given, _prompt
from masformer.data import read_documents
from masformer.data.sources import Source
from masformer.data.store import token_store
from masformer.data.tokens import open_ended, opening_tokens, part_tokens
from masformer.evaluation.prompts import Example, Prompter, Template
from masformer.evaluation.retrieval import TASKS, Prober
from masformer.generation import end_tokens, generate, generate_batch, prompt_tokens
from tiny import PLAN, letter_tokenizer, tiny

BEGIN, END, MARK = 256, 257, 258


def fast(single, nested=False):
    tokenizer = letter_tokenizer(bos_token="<b>", eos_token="<e>", additional_special_tokens=["<m>"])
    special = [("<b>", BEGIN), ("<e>", END), ("<m>", MARK)]
    template = TemplateProcessing(single=single, special_tokens=special)
    both = Sequence([ByteLevel(trim_offsets=False), template])
    tokenizer.backend_tokenizer.post_processor = both if nested else template
    return tokenizer


class Slow(PreTrainedTokenizer):
    """Characters, in Python."""

    vocab_size = 256

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def get_vocab(self):
        return {chr(index): index for index in range(256)} | self.added_tokens_encoder


TOKENIZERS = {
    "none": lambda: fast("$A"),
    "begin": lambda: fast("<b> $A"),
    "end": lambda: fast("$A <e>"),
    "both": lambda: fast("<b> $A <e>"),
    "two": lambda: fast("<b> <m> $A <m> <e>", nested=True),
    "slow": lambda: Slow(bos_token="<b>", eos_token="<e>", special_tokens_pattern="bos_eos"),
}
BEFORE = {"begin": [BEGIN], "both": [BEGIN], "two": [BEGIN, MARK], "slow": [BEGIN]}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["hi", "hi<e>", "<e>", "<b>hi", ""])
def test_a_text_that_goes_on_has_what_comes_before_a_text_and_nothing_after_it(kind, text):
    tokenizer = TOKENIZERS[kind]()
    expected = [*BEFORE.get(kind, []), *part_tokens(tokenizer, text)]
    assert opening_tokens(tokenizer, text) == expected
    if kind != "slow":
        goes_on = open_ended(tokenizer)
        assert goes_on(text)["input_ids"] == expected
        assert (goes_on is tokenizer) == (kind in ("none", "begin"))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_measuring_and_generating_begin_with_the_same_tokens(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    (tmp_path / "a.jsonl").write_text(json.dumps({"p": "long text", "t": "short", "text": "long text"}))
    pairs = token_store("x", Source(files=[str(tmp_path / "a.jsonl")], prompt="p", target="t"), tokenizer, tmp_path)
    texts = token_store("x", Source(files=[str(tmp_path / "a.jsonl")]), tokenizer, tmp_path)
    prompt = prompt_tokens(tokenizer, "long text", chat=False)
    prompter = Prompter(tokenizer, Template("{document}"))
    assert END not in prompt
    assert pairs.document(0).tolist() == [*prompt, *part_tokens(tokenizer, "short"), END]
    assert texts.document(0).tolist()[: len(prompt)] == prompt
    assert texts.document(0).tolist()[-1] == END
    assert prompter.prompt(Example("x", "long text", "short"), 50).tokens == prompt
    probe = Prober(tokenizer).probe(TASKS["passkey"], 600, 50, 0)
    assert list(probe.tokens) == prompt_tokens(tokenizer, probe.text, chat=False)


def test_a_text_ends_at_what_ends_texts_in_training_or_in_the_generation_config():
    tokenizer = letter_tokenizer(eos_token="<e>")
    model = apply_plan(tiny("llama", vocab_size=257, sliding_window=None, eos_token_id=None), PLAN)
    prompt = list(range(30, 50))
    free = generate_batch(model, [prompt], max_new_tokens=12).rows[0].tokens
    place = next(place for place in range(3, 12) if free[place] not in free[:place])
    for own in (None, 255, [255, 254]):  # none of them is generated
        model.generation_config.eos_token_id = own
        named = SimpleNamespace(eos_token_id=free[place], decode=tokenizer.decode)
        assert end_tokens(model, named)[-1] == free[place]
        streamed = generate(model, _Ending(tokenizer, free[place]), prompt, max_new_tokens=12)
        assert streamed.tokens == place + 1
        assert generate_batch(model, [prompt], max_new_tokens=12, end_tokens=end_tokens(model, named)).rows[0].ended
    model.generation_config.eos_token_id = free[place]
    assert generate(model, tokenizer, prompt, max_new_tokens=12).tokens == place + 1


class _Ending:
    """A tokenizer with another end."""

    def __init__(self, tokenizer, end):
        self._tokenizer, self.eos_token_id = tokenizer, end

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    "content", [b"one\r\ntwo\r\n", b"\xef\xbb\xbfone\ntwo", b"one\rtwo", "caf\u00e9\u2028\x0c\n".encode()]
)
def test_prompts_and_templates_are_read_as_data_files_are(tmp_path, monkeypatch, content):
    for name, data in {"a.txt": content, "a.txt.gz": gzip.compress(content)}.items():
        (tmp_path / name).write_bytes(data)
        (document,) = read_documents([tmp_path / name])
        assert _prompt(_given(None, str(tmp_path / name))) == document.text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert _prompt(_given(None, None)) == document.text
    (tmp_path / "t.txt").write_bytes(content + b"{document}\r\n")
    assert Template.load(tmp_path / "t.txt").filled("x", None) == document.text + "x"


def test_prompts_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one")[:-3])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfea")))
    for file, message in [
        ("a.txt", r"a\.txt, line 2: not UTF-8 text"),
        ("b.txt.gz", "cannot read the prompt file .*damaged or cut short"),
        ("c.txt", r"cannot read the prompt file .*c\.txt: No such file"),
        (None, "standard input, line 1: not UTF-8 text"),
    ]:
        with pytest.raises(MasformerError, match=message):
            _prompt(_given(None, file and str(tmp_path / file)))

"""Random small damage to whatever is read: what comes of it is right, or one clear line and exit code 2.

What is right is asked of someone else: of the undamaged file where it has checksums, of the reader of the format where
the damaged file says something different now, and of stock transformers for configs.
"""

import bz2
import contextlib
import copy
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import small
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from damage import changed_bytes, changed_values
from masformer import AttentionPlan, MasformerError, apply_plan, load_model, save_model
from masformer.cli import main
from masformer.data.documents import read_documents
from masformer.evaluation.predictions import Generated
from masformer.journal import recover_lines
from masformer.models.checkpoint import load_tokenizer
from masformer.schema import build
from masformer.study import scale
from masformer.training.checkpoints import MARKER, newest
from masformer.training.recipe import Recipe, load_recipe
from masformer.training.run import train
from served import BODIES, PATHS, make_app, make_model, plain_client
from served import refused as refused_request
from tiny import PLAN, letter_tokenizer, tiny, write_gguf

TOKENS = torch.arange(3, 33)[None]
TEXT = 'Tom\'s "quick" brown fox — 12 + 34 = 46 — jumps over the lazy dog.\n'


def cases(number):
    """The same cases each time, on every machine."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def refused(call):
    """What a call gives, and whether it was refused instead, in one line."""
    try:
        return call(), False
    except MasformerError as error:
        check_line(str(error))
        return None, True


def check_line(line):
    assert line.strip()
    assert len(line.splitlines()) == 1, line
    line.encode()


def run(*words, says=""):
    """A command: whether it was refused, with these words."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    assert code in (0, 2), (code, err.getvalue())
    if code == 2:
        (line,) = [line for line in err.getvalue().splitlines() if "masformer: error: " in line]
        assert err.getvalue().endswith(line + "\n")
        check_line(line)
        assert says in line
    return code == 2


@contextlib.contextmanager
def damaged(folder, name, content):
    """A copy of a folder in which one file holds something else; None: it is gone."""
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary) / "damaged"
        shutil.copytree(folder, copied)
        if content is None:
            (copied / name).unlink()
        else:
            (copied / name).write_bytes(content)
        yield copied


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of models: stock, with a plan, in shards, and a .gguf file."""
    folder = tmp_path_factory.mktemp("places")
    tokenizer = letter_tokenizer(eos_token="<e>")
    small = {"vocab_size": 257, "num_hidden_layers": 2, "layer_types": None}
    for kind in KINDS:
        model = tiny(kind, **small)
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    model = tiny("llama", **small)
    model.save_pretrained(folder / "shards", max_shard_size="40KB")
    save_model(apply_plan(model, AttentionPlan(PLAN[:2])), folder / "sealed", tokenizer)
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "tiny.gguf", 2)
    return folder


KINDS = ["llama", "mistral", "gpt2", "gpt_neox"]


@st.composite
def tensors_file(draw, data):
    """A safetensors file with damage to any byte, or to the names, shapes and places in its head."""
    size = int.from_bytes(data[:8], "little")
    if draw(st.booleans()):
        return draw(changed_bytes(data, 0, draw(st.sampled_from([8 + size, len(data)]))))
    head = draw(changed_values(json.loads(data[8 : 8 + size])))
    content = json.dumps(head).encode()
    return len(content).to_bytes(8, "little") + content + data[8 + size :]


def weights_of(folder):
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def check_weights(model, folder):
    """A model that was loaded has the weights that the files say, all of them numbers."""
    held = weights_of(folder)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, held[name]), name
        assert bool(weight.isfinite().all()), name
    assert held.keys() == dict(model.named_parameters()).keys()


@cases(80)
@given(st.data())
def test_weights(places, data):
    which = data.draw(st.sampled_from(["llama", "sealed"]))
    content = data.draw(tensors_file((places / which / "model.safetensors").read_bytes()))
    with damaged(places / which, "model.safetensors", content) as folder:
        loaded, wrong = refused(lambda: load_model(folder))
        if not wrong:
            check_weights(loaded[0], folder)


@cases(30)
@given(st.data())
def test_an_index_of_shards(places, data):
    index = places / "shards" / "model.safetensors.index.json"
    content = json.dumps(data.draw(changed_values(json.loads(index.read_bytes())))).encode()
    if data.draw(st.booleans()):
        content = data.draw(changed_bytes(index.read_bytes()))
    with damaged(places / "shards", index.name, content) as folder:
        loaded, wrong = refused(lambda: load_model(folder))
        if not wrong:
            check_weights(loaded[0], folder)


@cases(40)
@given(st.data())
def test_a_gguf_file(places, data):
    content = (places / "gguf" / "tiny.gguf").read_bytes()
    end = data.draw(st.sampled_from([600, 8000, len(content)]))
    with damaged(places / "gguf", "tiny.gguf", data.draw(changed_bytes(content, 0, end))) as folder:
        loaded, wrong = refused(lambda: load_model(folder / "tiny.gguf"))
        if not wrong:
            stock = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf").eval()
            found = logits(loaded[0])
            assert bool(found.isfinite().all())
            torch.testing.assert_close(found, logits(stock), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "changes", "words"), [
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 1.25, "rope_theta": 1e4}}, "does not run"),
    ("llama", {"rms_norm_eps": -5.0}, "no numbers"),
    ("gpt2", {"layer_norm_epsilon": -5.0}, "no numbers"),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused_when_loading(places, kind, changes, words):
    known = json.loads((places / kind / "config.json").read_bytes()) | changes
    with damaged(places / kind, "config.json", json.dumps(known).encode()) as folder:
        assert run("generate", folder, "--raw", "--prompt", "a", "--max-new-tokens", "2", says=words)


@pytest.mark.parametrize("number", ["inf", "nan"])
def test_a_weight_that_is_no_number_is_named(places, number):
    content = bytearray((places / "llama" / "model.safetensors").read_bytes())
    content[-4:] = torch.tensor([float(number)]).numpy().tobytes()
    with (
        damaged(places / "llama", "model.safetensors", bytes(content)) as folder,
        pytest.raises(MasformerError, match=r"is damaged: model\.norm\.weight holds what is no number"),
    ):
        load_model(folder)


@cases(100)
@given(st.data())
def test_a_config(places, data):
    """Whatever it says now, stock transformers says the same."""
    which = data.draw(st.sampled_from(KINDS))
    raw = (places / which / "config.json").read_bytes()
    content = json.dumps(data.draw(changed_values(json.loads(raw)))).encode()
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(changed_bytes(raw))
    with damaged(places / which, "config.json", content) as folder:
        loaded, wrong = refused(lambda: load_model(folder))
        if not wrong:
            torch.manual_seed(0)
            found = logits(loaded[0])
            assert bool(found.isfinite().all())
            torch.manual_seed(0)
            stock = AutoModelForCausalLM.from_pretrained(folder).eval()
            torch.testing.assert_close(found, logits(stock), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_layers_without_number_are_refused_before_they_are_made(places, kind, name):
    known = json.loads((places / kind / "config.json").read_bytes()) | {name: 10**9}
    with damaged(places / kind, "config.json", json.dumps(known).encode()) as folder:
        assert run("plan", folder, says="must be at most 1024, got 1000000000")


def test_layers_without_number_are_refused_in_a_gguf_file_too(places):
    content = (places / "gguf" / "tiny.gguf").read_bytes()
    known = b"block_count" + (4).to_bytes(4, "little")
    content = content.replace(known + (2).to_bytes(4, "little"), known + (10**9).to_bytes(4, "little"))
    with damaged(places / "gguf", "tiny.gguf", content) as folder:
        assert run("plan", folder / "tiny.gguf", says="must be at most 1024, got 1000000000")


@cases(50)
@given(st.data())
def test_a_config_with_a_plan(places, data):
    """The plan it says, on the model that it says; or refused."""
    raw = (places / "sealed" / "config.json").read_bytes()
    content = json.dumps(data.draw(changed_values(json.loads(raw)))).encode()
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(changed_bytes(raw))
    with damaged(places / "sealed", "config.json", content) as folder:
        loaded, wrong = refused(lambda: load_model(folder))
        if not wrong:
            said = json.loads(content)["masformer"]["plan"]
            plan = AttentionPlan.from_dict(loaded[0].config.masformer)
            assert plan == AttentionPlan.parse(said, 2)
            check_weights(loaded[0], folder)
            assert bool(logits(loaded[0]).isfinite().all())


@cases(50)
@given(st.data())
def test_a_tokenizer(places, data):
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    raw = (places / "llama" / name).read_bytes()
    content = json.dumps(data.draw(changed_values(json.loads(raw)))).encode()
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(changed_bytes(raw))
    with damaged(places / "llama", name, content) as folder:
        tokenizer, wrong = refused(lambda: load_tokenizer(folder))
        if not wrong:
            assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
        run("generate", folder, "--raw", "--prompt", TEXT, "--max-new-tokens", "2")


@pytest.mark.parametrize("length", ["<e>", "10", [1], {}], ids=repr)
def test_a_tokenizer_whose_length_is_no_number_is_refused_when_it_is_read(places, length):
    settings = json.loads((places / "llama" / "tokenizer_config.json").read_text())
    content = json.dumps(settings | {"model_max_length": length}).encode()
    with damaged(places / "llama", "tokenizer_config.json", content) as folder:
        assert refused(lambda: load_tokenizer(folder)) == (None, True)
        assert run("generate", folder, "--raw", "--prompt", TEXT, "--max-new-tokens", "2")


SPAN = re.compile(r"full|window:(\d+)(?:\+(\d+))?|block:(\d+)(?:x(\d+))?")
PLANS = ["full@0-1,3; window:512+4", "full@2;block:64x3", "window:9", "full,window:5+2,block:6x2,full", "block:7"]


def spans_of(text):
    """The four spans that a plan's text says, read once more, leniently about white space."""

    def one(text):
        kind = SPAN.fullmatch(text.strip())
        size, sinks, block, blocks = (kind[group] and int(kind[group]) for group in range(1, 5))
        return ("window", size, sinks or 0) if size else ("block", block, blocks or 1) if block else ("full",)

    if text.strip().startswith("full@"):
        head, rest = text.strip().removeprefix("full@").split(";")
        full = set()
        for part in head.split(","):
            first, _, last = part.partition("-")
            full |= set(range(int(first), int(last or first) + 1))
        return [("full",) if layer in full else one(rest) for layer in range(4)]
    spans = [one(part) for part in text.split(",")]
    return spans * 4 if len(spans) == 1 else spans


def check_plan(plan, text):
    said = []
    for each in plan:
        kind = type(each).__name__
        said.append(
            ("window", each.size, each.sinks)
            if kind == "WindowSpan"
            else ("block", each.size, each.lookback + 1)
            if kind == "BlockSpan"
            else ("full",)
        )
    assert said == spans_of(text)
    assert AttentionPlan.parse(str(plan), 4) == plan


@cases(80)
@given(st.data())
def test_a_plan(places, data):
    text = data.draw(st.sampled_from(PLANS))
    content = data.draw(changed_bytes(text.encode()))
    text = content.decode(errors="surrogateescape")
    plan, wrong = refused(lambda: AttentionPlan.parse(text, 4))
    if not wrong:
        check_plan(plan, text)
    if data.draw(st.integers(0, 3)) == 0:
        _, wrong = refused(lambda: AttentionPlan.parse(text, 2))
        assert run("plan", places / "llama", "--plan", text) or not wrong


@pytest.mark.parametrize("text", ["full@0-1,3\udc80 window:5", "full@0-1\n,3", "full@1\r", "window:5\n;", "x\u2028y"])
def test_a_plan_of_several_lines_is_one_line(text):
    assert refused(lambda: AttentionPlan.parse(text, 4)) == (None, True)


@cases(60)
@given(st.data())
def test_a_plan_file(tmp_path, data):
    known = {"plan": data.draw(st.sampled_from(PLANS)), "num_layers": 4, "scores": [0.5, 1.25], "made": "by hand"}
    file = tmp_path / data.draw(st.sampled_from(["plan.yaml", "plan.json"]))
    dump = yaml.safe_dump if file.suffix == ".yaml" else json.dumps
    if data.draw(st.booleans()):
        content = data.draw(changed_bytes(dump(known).encode()))
    else:
        content = json.dumps(data.draw(changed_values(known))).encode()
    file.write_bytes(content)
    plan, wrong = refused(lambda: AttentionPlan.load(file, 4))
    if not wrong:
        check_plan(plan, yaml.safe_load(content)["plan"])


def leaves(value, place=()):
    """Place -> value, of all that is neither a mapping nor a list."""
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*place, str(key)))
    elif value is not None:
        yield place, value


def check_settings(said, held):
    """What was read holds everything that the file says."""
    held = dict(leaves(held))
    for place, value in leaves(said):
        assert held[place] == value or float(held[place]) == float(value), place


@cases(80)
@given(st.data())
def test_a_recipe(tmp_path, data):
    known = copy.deepcopy(small.SETTINGS) | {"output": str(tmp_path / "out")}
    known["data"]["cache"] = str(tmp_path / "cache")
    known["evaluation"] = {"sources": {"more": {"builtin": "python-topics", "limit": 1}}, "lengths": [32, 64]}
    known["lora"] = {"rank": 2, "targets": ["q_proj"]}
    file = tmp_path / "recipe.yaml"
    if data.draw(st.booleans()):
        content = data.draw(changed_bytes(yaml.safe_dump(known).encode()))
    else:
        content = json.dumps(data.draw(changed_values(known))).encode()
    file.write_bytes(content)
    recipe, wrong = refused(lambda: load_recipe(file))
    if not wrong:
        check_settings(yaml.safe_load(content), recipe.to_dict())
    if wrong or data.draw(st.integers(0, 2)) == 0:
        assert run("train", "--config", file, "--dry-run") or not wrong


@cases(40)
@given(st.data())
def test_a_scale(tmp_path, data):
    known = (Path(scale.__file__).parent / "scales" / "tiny.yaml").read_bytes()
    file = tmp_path / "scale.yaml"
    if data.draw(st.booleans()):
        content = data.draw(changed_bytes(known))
    else:
        content = json.dumps(data.draw(changed_values(yaml.safe_load(known)))).encode()
    file.write_bytes(content)
    read, wrong = refused(lambda: scale.load_scale(str(file)))
    if not wrong:
        assert read.about == (yaml.safe_load(content).get("about") or read.about)
    if wrong:
        assert run("reproduce", "--scale", file, "--out", tmp_path / "out", "--dry-run")


ROWS = [TEXT, "zweite Zeile, mit Ümlaut\n", "x" * 300]


def texts_of(path):
    return [document.text for document in read_documents([path])]


def json_lines(content):
    return [json.loads(line)["text"] for line in content.decode("utf-8-sig").split("\n") if line.strip()]


@cases(120)
@given(st.data())
def test_a_data_file(tmp_path, data):
    """Its texts are those that it holds, or, where it has a checksum, those that were written."""
    lines = "".join(json.dumps({"id": 5, "text": text}, ensure_ascii=False) + "\n" for text in ROWS).encode()
    known, kind = data.draw(st.sampled_from([(TEXT.encode(), "txt"), (lines, "jsonl")]))
    packed = data.draw(st.sampled_from(["", ".gz", ".xz", ".bz2"]))
    expected = [TEXT] if kind == "txt" else ROWS
    content = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[packed](known)
    file = tmp_path / f"data.{kind}{packed}"
    content = data.draw(changed_bytes(content))
    file.write_bytes(content)
    found, wrong = refused(lambda: texts_of(file))
    if not wrong and not packed:
        expected = [content.decode("utf-8-sig")] if kind == "txt" else json_lines(content)
        expected = [text for text in expected if text.strip()]
    assert wrong or found == expected


@cases(40)
@given(st.data())
def test_a_parquet_file(tmp_path, data):
    file = tmp_path / "data.parquet"
    table = pyarrow.table({"id": [1, 2, 3], "text": ROWS})
    pyarrow.parquet.write_table(
        table, file, write_page_checksum=True, compression=data.draw(st.sampled_from(["none", "snappy"]))
    )
    file.write_bytes(data.draw(changed_bytes(file.read_bytes())))
    found, wrong = refused(lambda: texts_of(file))
    assert wrong or found == ROWS


@cases(30)
@given(st.data())
def test_a_row_of_data(tmp_path, data):
    """Fields of other kinds, gone or called otherwise, as `eval` meets them."""
    rows = data.draw(changed_values([{"text": text, "meta": {"kind": "a"}} for text in ROWS]))
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, wrong = refused(lambda: texts_of(file))
    assert wrong or found == [row["text"] for row in rows if row["text"].strip()]


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


RECORDS = ["perplexity-smollm2-pubmed", "decode-smollm2-cpu", "retrieval-smollm2", "search-smollm2-qmsum", "demo-cpu"]
SEARCHED = "placements", "held-out"


def shortened(value):
    """A record with the beginnings of its lists."""
    if isinstance(value, dict):
        return {key: shortened(each) for key, each in value.items()}
    return [shortened(each) for each in value[:3]] if isinstance(value, list) else value


def record_of(name, place=(), value=None):
    """A record that masformer wrote, of which one value is another."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    holder = found
    for step in place[:-1]:
        holder = holder[step]
    if place:
        holder[place[-1]] = value
    return json.dumps(found).encode()


def check_report(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.json").write_bytes(content)
        if not run("report", folder):
            assert json.loads(content)["masformer"] in (Path(folder) / "report" / "report.md").read_text()


@cases(20)
@given(st.data())
def test_a_record(data):
    """What `masformer report` reads."""
    known = shortened(json.loads(record_of(data.draw(st.sampled_from(RECORDS)))))
    if data.draw(st.integers(0, 2)) == 0:
        check_report(data.draw(changed_bytes(json.dumps(known).encode())))
    else:
        check_report(json.dumps(data.draw(changed_values(known))).encode())


@pytest.mark.parametrize(("name", "place", "value"), [
    ("search-smollm2-qmsum", (*SEARCHED, 6, "name"), [[]]),
    ("search-smollm2-qmsum", (*SEARCHED, 24, "criterion"), "window:5"),
    ("search-smollm2-qmsum", ("evidence", 0, "values", 0), "x"),
    ("attention-bfloat16-cpu", ("results", 5, "length"), 10**40),
    ("retrieval-smollm2-chat", ("results", 27, "name"), "\ud800"),
])  # fmt: skip
def test_figures_that_are_none_are_refused_by_the_name_of_their_file(tmp_path, name, place, value):
    (tmp_path / "a.json").write_bytes(record_of(name, place, value))
    assert run("report", tmp_path, says="a.json")


LINE = {"id": "a", "plan": "full", "length": 64, "prediction": TEXT, "prompt_tokens": 60, "new_tokens": 4}
LINE |= {"at_limit": False, "prefill_seconds": 0.5, "decode_seconds": 0.25, "fingerprint": "f"}


@cases(50)
@given(st.data())
def test_a_journal(tmp_path, data):
    """Each line is what stands there, except a last one whose writing was interrupted."""
    rows = [LINE, LINE | {"id": "b"}, LINE | {"id": "c", "at_limit": True}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if data.draw(st.booleans()):
        content = data.draw(changed_bytes(lines))
    else:
        content = "".join(json.dumps(row) + "\n" for row in data.draw(changed_values(rows))).encode()
    file = tmp_path / "journal.jsonl"
    file.write_bytes(content)
    found, wrong = refused(lambda: recover_lines(file, lambda row: build(Generated, row), "a prediction"))
    if not wrong:
        *said, last = content.split(b"\n")
        with contextlib.suppress(ValueError):
            said += [json.dumps(json.loads(last)).encode()] if last else []
        assert [asdict(each) for each in found] == [json.loads(line) for line in said]
    else:
        assert file.read_bytes() == content


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The settings and the folder of a run with two checkpoints, before its last step."""
    folder = tmp_path_factory.mktemp("trained")
    settings = small.settings(folder, training__steps=3, checkpoints__every=1, training__warmup_steps=0)
    train(Recipe.from_dict(settings))
    return folder


@cases(40)
@given(st.data())
def test_a_checkpoint_of_a_run(trained, data):
    """It is as it was written, or it is not used."""
    whole, _ = newest(trained / "out")
    name = data.draw(st.sampled_from(sorted(str(path.relative_to(whole.path)) for path in whole.path.rglob("*.*"))))
    content = data.draw(changed_bytes((whole.path / name).read_bytes()) | st.none())
    before = (whole.path / name).read_bytes()
    with damaged(trained / "out", str((whole.path / name).relative_to(trained / "out")), content) as folder:
        found, faulty = newest(folder)
        if found.step == whole.step:
            assert name == MARKER or content == before
        else:
            assert [each.step for each in faulty] == [whole.step]
            check_line(faulty[0].fault)


@pytest.fixture(scope="module")
def client():
    return plain_client(make_app(make_model(max_position_embeddings=80)))


@cases(40)
@given(st.data())
def test_a_request(client, data):
    """test_bodies.py has many more."""
    path = data.draw(st.sampled_from(PATHS))
    if data.draw(st.booleans()):
        content = data.draw(changed_bytes(json.dumps(BODIES[path]).encode()))
    else:
        content = json.dumps(data.draw(changed_values(BODIES[path]))).encode()
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        refused_request(answer)
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")

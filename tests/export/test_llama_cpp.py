"""Files for llama.cpp: what stands in them, and, where the package xllamacpp is installed, that llama.cpp computes with
them what masformer does. It may have a Python of its own, which MASFORMER_LLAMA_CPP_PYTHON names."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from masformer import AttentionPlan, MasformerError, apply_plan, cli, export, save_model
from masformer.export import export_gguf, export_model, gguf_config
from masformer.export.llama_cpp import cache_bytes, readme_path
from masformer.export.llama_cpp.files import read_gguf, write_gguf
from masformer.export.llama_cpp.forms import in_pairs
from masformer.export.llama_cpp.tokens import RULES
from masformer.export.sinks import NO_SINK
from masformer.export.verify import check_installed, verify_export
from tiny import MERGES, bytes_tokenizer, letter_tokenizer, plain_tokenizer, tiny, with_sinks
from tiny import write_gguf as write_tiny

TEXT = "Hi and the 東京, 1234 bands!\n"
LENGTH, NEW, BATCH, ROWS = 100, 4, 32, 264
TOKENS = torch.randint(3, 250, (LENGTH,), generator=torch.manual_seed(5))
POSITIONS = [20, 70]
PLANS = ["full@1,3; window:9", "window:9", "full@2; window:40", "full"]
WITH_SINKS = ["full@1,3; window:9+sink", "window:9+sink", "window:9+sink,full,window:9,window:9+sink"]
SCALED = {"rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_parameters": {"rope_type": "yarn", **SCALED, "original_max_position_embeddings": 32}}
LLAMA3 = {"rope_type": "llama3", **SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": ("llama", {"head_dim": 32}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, yarn": ("llama", {**YARN, "tie_word_embeddings": True}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", **SCALED}}),
    "mistral": ("mistral", {"head_dim": 32}),
    "ministral": ("ministral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, wide heads, llama3": (
        "qwen2",
        {"head_dim": 32, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo2, tied": ("olmo2", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {}),
    "smollm3, tied, yarn": ("smollm3", {**YARN, "tie_word_embeddings": True}),
}
NO_FULL = {"qwen2, wide heads, llama3"}
"""Those that llama.cpp runs under windows alone."""


def lively(case="llama", **more):
    """A tiny model none of whose weights is zero or one."""
    kind, changes = CASES[case]
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    shape |= {"vocab_size": ROWS, "initializer_range": 0.1}
    shape |= {} if kind == "olmo2" else {"head_dim": 16}
    model = tiny(kind, **(shape | changes | more))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def plans_of(case):
    """Those that its architecture takes."""
    plans = PLANS if CASES[case][0] in ("qwen3", "olmo2") else [*PLANS, *WITH_SINKS]
    return [plan for plan in plans if plan != "full" or case not in NO_FULL]


def write(model, path, plan="full@1,3; window:9", tokenizer=None, **options):
    export_model(
        apply_plan(model, AttentionPlan.parse(plan, 4)), path, "llama.cpp", tokenizer or plain_tokenizer(), **options
    )
    return path


def job(path, text=None):
    numbers = {"tokens": TOKENS.tolist(), "positions": POSITIONS, "new_tokens": NEW, "batch": BATCH, "vocabulary": ROWS}
    return {"folder": str(path), "answer": f"{path}.npz", "text": text, **numbers}


@pytest.fixture(scope="session")
def python():
    """The Python that has xllamacpp."""
    found = os.environ.get("MASFORMER_LLAMA_CPP_PYTHON", sys.executable)
    try:
        check_installed("llama.cpp", found)
    except MasformerError as error:
        pytest.skip(str(error))
    return found


def run(python, jobs, folder):
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(export.__file__).parent / "runners/run_llama_cpp.py"
    done = subprocess.run([python, "-I", script, folder / "jobs.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = []
    for each in jobs:
        with np.load(each["answer"]) as arrays:
            answers.append(dict(arrays))
    return answers


def log_probabilities(model, plan, continuation):
    whole = torch.cat([TOKENS, continuation])
    kept = [*POSITIONS, *range(LENGTH - 1, len(whole) - 1)]
    apply_plan(model, AttentionPlan.parse(plan, 4))
    with torch.no_grad():
        return model(whole[None], use_cache=False).logits[0, kept].log_softmax(-1)


def test_llama_cpp_gives_the_same_probabilities_and_tokens(python, tmp_path):
    """Every architecture and plan of the table; the prompt is longer than the window, and read in several batches."""
    made = [(case, plan, with_sinks(lively(case))) for case in CASES for plan in plans_of(case)]
    jobs = [job(write(model, tmp_path / f"{i}.gguf", plan), TEXT) for i, (_, plan, model) in enumerate(made)]
    for (case, plan, model), answer in zip(made, run(python, jobs, tmp_path), strict=True):
        continuation = torch.from_numpy(answer["continuation"]).long()
        ours = log_probabilities(model, plan, continuation)
        difference = (torch.from_numpy(answer["distributions"]) - ours).abs().max()
        assert difference < 2e-4, f"{case} under {plan}"
        assert continuation.tolist() == ours[-NEW:].argmax(-1).tolist(), f"{case} under {plan}"
        assert answer["tokenised"].tolist() == plain_tokenizer().encode(TEXT)
        others = [] if plan == "full" else ["full", plan.replace("+sink", "")]
        for other in filter(lambda other, plan=plan: other != plan, others):
            assert (log_probabilities(model, other, continuation) - ours).abs().max() > 0.5, f"{case} under {plan}"


TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3, tied", "olmo2"])
@pytest.mark.parametrize("kind", [*TYPES, "q8_0"])
def test_verify_holds_what_was_stored_against_the_model(python, tmp_path, case, kind):
    model = lively(case).to(getattr(torch, kind, torch.float32))
    model.config.dtype = model.dtype
    write(model, tmp_path / "out.gguf", quantised=None if kind in TYPES else kind)
    found = verify_export(model, tmp_path / "out.gguf", "llama.cpp", python, tokenizer=plain_tokenizer())
    assert found.window == 9 < found.tokens
    assert found.difference < 0.2 * found.full_difference
    kinds = {
        tensor.kind.name for name, tensor in read_gguf(tmp_path / "out.gguf").tensors.items() if "attn_q.w" in name
    }
    assert kinds == {TYPES.get(kind, "Q8_0")}


def test_verify_finds_a_file_that_runs_something_else(python, tmp_path):
    model = lively()
    write(model, tmp_path / "full.gguf", "full")
    apply_plan(model, AttentionPlan.parse("full@1; window:9", 4))
    with pytest.raises(MasformerError, match=r"computes something else from .*full.gguf: the logits differ by \d"):
        verify_export(model, tmp_path / "full.gguf", "llama.cpp", python)
    write(model, tmp_path / "out.gguf")
    other = bytes_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)]))
    other.add_tokens(["don"])
    with pytest.raises(MasformerError, match="splits text in another way"):
        verify_export(model, tmp_path / "out.gguf", "llama.cpp", python, tokenizer=other)
    (tmp_path / "out.gguf").write_bytes((tmp_path / "out.gguf").read_bytes()[:-5000])
    with pytest.raises(MasformerError, match=r"cannot read|cannot run"):
        verify_export(model, tmp_path / "out.gguf", "llama.cpp", python)


def stored(path):
    content = read_gguf(path)
    tensors = {name: (each.shape, each.kind, each.read().tobytes()) for name, each in content.tensors.items()}
    return content, {name: field.value for name, field in content.fields.items()}, tensors


@pytest.mark.parametrize(
    ("case", "plan"), [(case, plans_of(case)[index]) for case in CASES if case not in NO_FULL for index in (0, -1)]
)
def test_a_quantised_file_is_given_a_plan_by_other_metadata(tmp_path, case, plan):
    """The same file comes of the model at once; tensors that were there lie in it byte for byte."""
    model, sinks = with_sinks(lively(case)), None
    old = stored(write(model, tmp_path / "tiny.gguf", "full", quantised="q8_0"))
    if "+sink" in plan:
        sinks = tmp_path / "fitted"
        save_model(apply_plan(model, AttentionPlan.parse("window:9+sink", 4)), sinks)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    export_gguf(
        tmp_path / "tiny.gguf",
        tmp_path / "a/tiny.gguf",
        AttentionPlan.parse(plan, None if "," in plan and "@" not in plan else 4),
        sinks=sinks,
    )
    ours, direct = (
        stored(tmp_path / "a/tiny.gguf"),
        stored(write(model, tmp_path / "b/tiny.gguf", plan, quantised="q8_0")),
    )
    assert ours[0].architecture == direct[0].architecture
    assert ours[1] == direct[1]
    assert ours[2] == direct[2]
    changed = re.compile(r"blk\.[03]\.attn_(v|output)\.bias" if sinks else "none")
    for name, (shape, kind, data) in old[2].items():
        if CASES[case][0] == "qwen2" and (".attn_q." in name or ".attn_k." in name):
            rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1)
            data = in_pairs(rows, 4 if ".attn_q." in name else 2).tobytes()
        assert (ours[2][name] == (shape, kind, data)) is not bool(changed.fullmatch(name))
    added = {
        name for name in ours[2].keys() - old[2].keys() if not name.endswith(("attn_sinks.weight", "output.weight"))
    }
    assert all(changed.fullmatch(name) for name in added)
    assert {name for name in old[1] if name.startswith("tokenizer.")} <= ours[1].keys()


@pytest.mark.parametrize(
    ("plan", "sinks", "message"),
    [
        (
            "full@1; window:9+sink",
            None,
            "and a .gguf file has no weights for them: name the folder",
        ),
        ("full@1; window:9", "fitted", "has no constant sink, so sinks do nothing; allowed: window:512+sink"),
        ("window:9+sink", "fitted", "has constant sinks in layers [1], but fitted has no weights for them"),
        ("full@1; window:9+sink", "heads", "has constant sinks in layers [2], but heads has no weights for them"),
        ("full@1; window:9+sink", "stock", "stock has no weights of constant sinks; allowed: a folder of"),
        ("full@1; window:9+sink", "missing", "missing has no weights of constant sinks; allowed: a folder of"),
        (
            "full@1; window:9+sink",
            "other",
            "sink_logit of layer 0 in other must be [4], as the model has",
        ),
        ("full@1; window:9+sink", "damaged", "cannot read damaged: "),
    ],
)
def test_constants_that_do_not_fit_a_file_are_refused(tmp_path, monkeypatch, plan, sinks, message):
    monkeypatch.chdir(tmp_path)
    source = write_tiny(tmp_path / "tiny.gguf", 4)
    fitted = AttentionPlan.parse("full@1; window:9+sink", 4)
    for name, heads in {"fitted": 4, "other": 2}.items():
        save_model(apply_plan(with_sinks(tiny("llama", num_attention_heads=heads)), fitted), name)
    heads = AttentionPlan.parse("full@1,2:0; window:9+sink", 4, 2)
    save_model(apply_plan(with_sinks(tiny("llama")), heads), "heads")
    tiny("llama").save_pretrained("stock")
    Path("damaged").mkdir()
    Path("damaged/model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(MasformerError) as raised:
        export_gguf(source, "out.gguf", AttentionPlan.parse(plan, 4), sinks=sinks)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("out.gguf").exists()


@pytest.mark.parametrize(
    ("case", "architecture", "added"),
    [
        ("llama", "granite_swa", {"logit_scale": 1.0}),
        ("qwen2", "granite_swa", {"logit_scale": 1.0}),
        ("smollm3", "granite_swa", {"attention.rope_pattern": [True, True, True, False]}),
        (
            "qwen3, tied",
            "step35",
            {"rope.dimension_count": 64, "rope.dimension_count_swa": 32, "expert_feed_forward_length": 0},
        ),
        ("olmo2", "olmo2", {}),
    ],
)
def test_the_architecture_with_windows_and_its_metadata(tmp_path, case, architecture, added):
    content, fields, tensors = stored(write(lively(case), tmp_path / "out.gguf", "full@0,3; window:9"))
    assert content.architecture == architecture
    window = {"attention.sliding_window": 9, "attention.sliding_window_pattern": [False, True, True, False]}
    for name, value in (window | added).items():
        assert fields[f"{architecture}.{name}"] == value
    sinks = [
        np.frombuffer(data, np.float32) for name, (_, _, data) in tensors.items() if name.endswith("attn_sinks.weight")
    ]
    assert len(sinks) == (4 if architecture == "granite_swa" else 0)
    assert all((each == np.float32(NO_SINK)).all() and len(each) == 4 for each in sinks)
    if architecture == "step35":
        assert "output.weight" in tensors


def test_rows_that_turn_together_lie_side_by_side():
    rows = np.arange(16).reshape(16, 1)
    assert in_pairs(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_full_attention_keeps_the_architecture(tmp_path):
    for case, name in {"mistral": "llama", "qwen3": "qwen3", "olmo2": "olmo2"}.items():
        content, fields, _ = stored(write(lively(case), tmp_path / f"{name}.gguf", "full"))
        assert content.architecture == name
        assert not any("sliding_window" in field for field in fields)


def test_the_tokenizer_and_the_template_are_in_the_file(tmp_path):
    _, fields, _ = stored(write(lively(), tmp_path / "out.gguf"))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (len(tokens), tokens[256:260], tokens[262:]) == (ROWS, ["an", "th", "and", "the"], ["[PAD262]", "[PAD263]"])
    assert types[259:] == [1, 3, 3, 5, 5]
    assert [tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")] == ["<s>", "</s>"]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "message.content" in fields["tokenizer.chat_template"]


def split_by(name):
    """The steps of a rule, as a tokenizer has them."""
    steps = []
    for step in RULES[name]:
        if step["type"] == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step["type"] == "Split":
            steps.append(pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated"))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def pieces_tokenizer(prefix=True, merges=None, metaspace=False):
    """A SentencePiece tokenizer as transformers has it: BPE with bytes for what has no piece."""
    special, letters = ["<unk>", "<s>", "</s>"], ["▁", *"abdehnt"]
    pieces = ["an", "th", "▁a", "▁th", "the", "and", "▁the", "▁and"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    pairs = [(word[:at], word[at:]) for word in pieces for at in range(1, len(word))]
    pairs = [pair for pair in pairs if set(pair) <= set(letters + pieces)]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        merges or pairs,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always" if prefix else "never", split=False)
    else:
        steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    single = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    fast.backend_tokenizer.post_processor = single
    return fast


TOKENIZERS = {name: lambda name=name: bytes_tokenizer(split_by(name), ignore_merges=True) for name in RULES}
TOKENIZERS["dbrx"] = lambda: bytes_tokenizer(split_by("llama-bpe"))
TOKENIZERS["default"] = pieces_tokenizer
TOKENIZERS["default, no prefix"] = lambda: pieces_tokenizer(prefix=False)
TOKENIZERS["default, metaspace"] = lambda: pieces_tokenizer(metaspace=True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_known_pre_tokenizer_is_named(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    _, fields, _ = stored(write(lively(vocab_size=300), tmp_path / "out.gguf", tokenizer=tokenizer))
    assert fields["tokenizer.ggml.pre"] == name.split(",")[0]
    assert fields["tokenizer.ggml.add_bos_token"] is name.startswith("default")
    if name.startswith("default"):
        assert fields["tokenizer.ggml.model"] == "llama"
        assert fields["tokenizer.ggml.add_space_prefix"] is ("no prefix" not in name)
        assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_llama_cpp_splits_text_as_each_of_them_does(python, tmp_path):
    made = {
        name: (tokenizer(), tmp_path / f"{index}.gguf") for index, (name, tokenizer) in enumerate(TOKENIZERS.items())
    }
    for tokenizer, path in made.values():
        write(lively(vocab_size=300), path, "full", tokenizer=tokenizer)
    text = "the band  and\tthe hat 1234, I'll 'RE don't\n\n  東京 é banded\r\n x"
    jobs = [job(path, text) | {"vocabulary": 300} for _, path in made.values()]
    for (name, (tokenizer, _)), answer in zip(made.items(), run(python, jobs, tmp_path), strict=True):
        assert answer["tokenised"].tolist() == tokenizer.encode(text), name


def unigram():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)])))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            lambda: bytes_tokenizer(pre_tokenizers.Whitespace()),
            "how this tokenizer splits text is not known; known: gpt-2",
        ),
        (lambda: bytes_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), '"add_prefix_space": true'),
        (lambda: letter_tokenizer(bos_token="<s>"), "the tokenizer has no merges"),
        (unigram, "is written no Unigram tokenizer"),
        (lambda: pieces_tokenizer(merges=[("a", "n")]), "merges are not those of a SentencePiece model"),
        (lambda: None, "reads no file without a tokenizer"),
        (lambda: object(), "no tokenizer of the kind object"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_run_otherwise_is_refused(tmp_path, tokenizer, message):
    model = apply_plan(lively(vocab_size=300), AttentionPlan.parse("full@1; window:9", 4))
    with pytest.raises(MasformerError) as raised:
        export_model(model, tmp_path / "out.gguf", "llama.cpp", tokenizer())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": {"blk.0.attn_sinks.weight": (4,)}}, "reads no tensor blk.0.attn_sinks.weight"),
        ({"extra": {"blk.1.ffn_gate_inp.weight": (4, 32)}}, "reads no tensor blk.1.ffn_gate_inp.weight"),
        ({"entries": lambda writer: writer.add_logit_scale(2.0)}, "does not read llama.logit_scale as llama does"),
        ({"entries": lambda writer: writer.add_expert_count(4)}, "does not read llama.expert_count as llama does"),
        (
            {"entries": lambda writer: writer.add_key_length(16)},
            "rotary positions in 8 of 16 values of a head: not with",
        ),
        ({"extra": {"blk.4.attn_q.weight": (32, 32)}}, "reads no tensor blk.4.attn_q.weight"),
        ({"skipped": ["blk.2.attn_output.weight"]}, "lacks 1 tensors of llama models, among them blk.2.attn_output.w"),
        (
            {"skipped": ["output_norm.weight", "blk.0.ffn_up.weight"]},
            "lacks 2 tensors of llama models, among them blk.0",
        ),
        ({"entries": lambda writer: writer.add_uint16("split.count", 3)}, "is one of 3 parts of a file; join them"),
    ],
)
@pytest.mark.parametrize("plan", ["full@1; window:9", "full", "full@1; window:9+sink"])
def test_a_file_that_the_other_architecture_would_read_otherwise_is_refused(tmp_path, change, message, plan):
    source = write_tiny(tmp_path / "tiny.gguf", 4, **change)
    for act in (gguf_config, lambda source: export_gguf(source, tmp_path / "out.gguf", AttentionPlan.parse(plan, 4))):
        with pytest.raises(MasformerError, match=message):
            act(source)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("kept", ["_pattern", ""])
def test_a_file_whose_layers_slide_already_is_refused(tmp_path, kept):
    """Under full attention it would go on sliding, and by another rule where it has no list."""
    content = read_gguf(write(lively("olmo2"), tmp_path / "slides.gguf"))
    fields = {name: field for name, field in content.fields.items() if kept or not name.endswith("_pattern")}
    write_gguf(replace(content, fields=fields), tmp_path / "slides.gguf")
    with pytest.raises(MasformerError, match=r"slide already \(olmo2.attention.sliding_window"):
        gguf_config(tmp_path / "slides.gguf")
    write(lively("llama"), tmp_path / "other.gguf")
    with pytest.raises(MasformerError, match="architecture granite_swa, which takes no plan"):
        gguf_config(tmp_path / "other.gguf")


def test_a_file_of_an_architecture_without_windows_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    writer.add_block_count(4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(MasformerError, match="architecture gemma3, which takes no plan; allowed: llama"):
        gguf_config(tmp_path / "gemma.gguf")
    (tmp_path / "text.gguf").write_text("text")
    with pytest.raises(MasformerError, match="cannot read"):
        gguf_config(tmp_path / "text.gguf")


def test_values_beyond_float16_are_refused(tmp_path):
    model = lively(intermediate_size=100).to(torch.bfloat16)  # rows of 100 fill no blocks of Q8_0
    model.config.dtype = torch.bfloat16
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(MasformerError, match=r"layers.0.mlp.down_proj.weight has values that float16 does not hold"):
        write(model, tmp_path / "out.gguf", quantised="q8_0")
    assert list(tmp_path.iterdir()) == []
    write(model, tmp_path / "out.gguf")


def command(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_gives_a_file_a_plan_and_says_what_to_expect(capsys, tmp_path):
    source = write_tiny(tmp_path / "tiny.gguf", 4, stored=GGMLQuantizationType.Q8_0)
    plan = "full@1; window:9"
    words = ["export", source, tmp_path / "out.gguf", "--target", "llama.cpp", "--plan", plan]
    code, out, err = command(capsys, *words)
    assert (code, "out.README.md" in out) == (0, True)
    assert "3 of 4 layers have a window without sinks" in err
    text = readme_path(tmp_path / "out.gguf").read_text()
    for part in (
        "llama-server -m out.gguf -c 128",
        f"Plan: `{plan}`",
        "from b10566 on",
        "--swa-full",
        "--ctx-checkpoints",
    ):
        assert part in text
    assert command(capsys, *words)[0] == 2
    readme_path(tmp_path / "out.gguf").write_text("my own")
    assert command(capsys, *words, "--overwrite")[0] == 0
    assert readme_path(tmp_path / "out.gguf").read_text() == "my own"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.README.md", "out.gguf", "tiny.gguf"]


def test_the_command_gives_a_file_constants_and_verifies_them(capsys, python, tmp_path):
    """Those of a folder; the model that the file is held against has them as well."""
    plan, model = "full@1; window:9+sink", with_sinks(lively())
    source = write(model, tmp_path / "tiny.gguf", "full")
    save_model(apply_plan(model, AttentionPlan.parse("window:9+sink", 4)), tmp_path / "fitted")
    words = ["export", source, tmp_path / "out.gguf", "--target", "llama.cpp", "--plan", plan, "--python", python]
    code, out, err = command(capsys, *words, "--sinks", tmp_path / "fitted", "--verify")
    assert (code, "verified in llama.cpp" in out, err) == (0, True, "")
    text = readme_path(tmp_path / "out.gguf").read_text()
    assert f"Plan: `{plan}`" in text
    assert "constants in place of the first tokens" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tiny.gguf", "out.gguf", "--plan", "window:9+sink"],
            "name the folder that masformer convert --sinks fit made",
        ),
        (["tiny.gguf", "out.gguf", "--plan", "window:9+4"], "window:9+sink (put constants in place of first tokens"),
        (["tiny.gguf", "out.gguf", "--plan", "window:9", "--dtype", "float16"], "the tensors of a .gguf file stay"),
        (["tiny.gguf", "out.gguf", "--plan", "window:9", "--quantised", "q8_0"], "the tensors of a .gguf file stay"),
        (["tiny.gguf", "tiny.gguf", "--plan", "window:9"], "exists already"),
        (["tiny.gguf", "tiny.gguf", "--plan", "window:9", "--overwrite"], "is the source itself"),
        (["tiny.gguf", "folder.gguf", "--plan", "window:9", "--overwrite"], "is a folder"),
        (["tiny.gguf", "out.bin", "--plan", "window:9"], "OUT must end in .gguf"),
        (["missing.gguf", "out.gguf", "--plan", "window:9"], "model file missing.gguf does not exist"),
    ],
)
def test_a_wrong_value_is_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny.gguf", 4)
    (tmp_path / "folder.gguf").mkdir()
    code, _, err = command(capsys, "export", *words, "--target", "llama.cpp")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder.gguf", "tiny.gguf"]


def test_the_cache_is_what_llama_cpp_sets_aside(tmp_path):
    """By hand: 2 KV heads of 16 values, keys and values of 2 bytes; cells in multiples of 256."""
    content = read_gguf(write(lively("qwen2"), tmp_path / "out.gguf"))
    cell = 2 * 16 * 2 * 2
    assert cache_bytes(content, AttentionPlan.parse("full", 4), 8192) == 4 * 8192 * cell
    assert cache_bytes(content, AttentionPlan.parse("full@1; window:256", 4), 8192) == (8192 + 3 * 768) * cell
    assert cache_bytes(content, AttentionPlan.parse("full@1; window:257", 4), 8000) == (8192 + 3 * 1024) * cell
    assert cache_bytes(content, AttentionPlan.parse("window:9", 4), 100) == 4 * 256 * cell


def test_what_was_read_is_written_again(tmp_path):
    path = write(lively("qwen3"), tmp_path / "out.gguf", quantised="q8_0")
    write_gguf(read_gguf(path), tmp_path / "again.gguf")
    assert stored(path)[1:] == stored(tmp_path / "again.gguf")[1:]


def test_the_bench_times_the_same_weights_with_and_without_a_plan(capsys, python, tmp_path):
    write(lively(max_position_embeddings=2048), tmp_path / "tiny.gguf", "full")
    plan, constants = "full@1,3; window:9", "full@1,3; window:9+sink"
    save_model(apply_plan(with_sinks(lively()), AttentionPlan.parse("window:9+sink", 4)), tmp_path / "fitted")
    words = [
        "bench",
        "llama-cpp",
        tmp_path / "tiny.gguf",
        "--plan",
        plan,
        "--plan",
        constants,
        "--sinks",
        tmp_path / "fitted",
        "--lengths",
        "1020",
        "--new",
        "4",
        "--repeats",
    ]
    record = tmp_path / "record.json"
    code, out, _ = command(capsys, *words, "1", "--threads", "1", "--python", python, "--quiet", "--json", record)
    written = json.loads(record.read_text())
    assert (written["kind"], written["settings"]["threads"]) == ("bench llama-cpp", 1)
    assert len(written["results"]) == len(written["plans"]) * 2 + 2
    rows = {(row["pass"], row["name"]): row for row in json.loads(out.splitlines()[-1])["results"]}
    assert (code, len(rows)) == (0, 6)
    for (_, name), row in rows.items():
        assert row["tokens_per_second"] > 0
        assert row["cache_bytes"] == pytest.approx(row["predicted_cache_bytes"], abs=20000), name
    assert rows["prompt", constants]["cache_bytes"] == rows["prompt", plan]["cache_bytes"]
    assert rows["prompt", plan]["predicted_cache_bytes"] < rows["prompt", "all full"]["predicted_cache_bytes"]
    assert [each.name for each in tmp_path.iterdir() if "bench" in each.name] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "window:9+4", "--lengths", "64"], "llama.cpp cannot run window:9+4 on llama models"),
        (["--plan", "window:9+sink", "--lengths", "64"], "name the folder that masformer convert"),
        (["--plan", "window:9", "--lengths", "64", "--sinks", "x"], "has no constant sink, so sinks do nothing"),
        (["--plan", "window:9", "--lengths", "129"], "129 tokens: allowed for"),
        (["--plan", "window:9", "--lengths", "32"], "and 32 new ones: 33 to 128"),
        (["--plan", "window:9", "--lengths", "64", "--repeats", "0"], "repeats"),
        (["--plan", "window:9", "--lengths", "64", "--python", "no/python"], "no/python: No such file"),
    ],
)
def test_the_bench_refuses_before_the_work(capsys, tmp_path, words, message):
    source = write_tiny(tmp_path / "tiny.gguf", 4)
    code, _, err = command(capsys, "bench", "llama-cpp", source, "--quiet", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err

"""SmolLM2-135M-Instruct as its .gguf file gives it, through every part: in one file, because reading it takes long."""

import json
import pydoc_data.topics

import pytest
import torch
from transformers import AutoTokenizer

from masformer import AttentionPlan, apply_plan, load_model, save_model, serving
from masformer.data import Document
from masformer.evaluation.perplexity import perplexity, prefix_token, tokenize
from masformer.evaluation.prompts import Example, Prompter, Template
from masformer.evaluation.retrieval import TASKS, Prober, retrieve
from masformer.evaluation.summarization import summarize
from masformer.export import export_model
from masformer.export.verify import verify_export
from served import chat, client_of, generated

pytestmark = pytest.mark.pretrained


def test_a_pretrained_model_predicts_english(smollm2):
    model, tokenizer = smollm2
    text = Document("classes", pydoc_data.topics.topics["objects"])
    documents, text_bytes = tokenize(tokenizer, [text], max_tokens=256)
    result = perplexity(model, documents, 256, prefix=prefix_token(tokenizer), text_bytes=text_bytes)
    assert result.tokens == 256
    assert 5 < result.perplexity < 30
    assert 0.4 < result.bits_per_byte < 1.5


def test_smollm2_finds_a_pass_key(smollm2):
    model, tokenizer = smollm2
    plans = {"full": AttentionPlan.parse("full", 30), "local": AttentionPlan.parse("window:64+4", 30)}
    results, _ = retrieve(model, Prober(tokenizer), [TASKS["passkey"]], plans, [320], [50.0], 2)
    assert {result.name: result.score.mean for result in results if result.depth == 50} == {"full": 100, "local": 0}


def test_smollm2_reads_the_document_in_its_chat_template(smollm2, tmp_path):
    model, tokenizer = smollm2
    text = "Alice opened a bakery in Paris in 1999. " + "The weather there is often mild. " * 60
    example = Example("x", text, "Alice opened a bakery in Paris.", "Where did Alice open a bakery?")
    prompter = Prompter(tokenizer, Template("{document}\n\n{query}"), cut="tail")
    plans = {"full": AttentionPlan.parse("full", 30), "mixed": AttentionPlan.parse("full@8-20; window:64+4", 30)}
    results, _ = summarize(model, prompter, [example], plans, [128], tmp_path / "o", max_new_tokens=24)
    full = json.loads((tmp_path / "o").read_text().splitlines()[0])
    assert prompter.chat
    assert full["prompt_tokens"] == 128
    assert "Paris" in full["prediction"]
    assert "<|im_end|>" not in full["prediction"]
    assert results[0].metrics["rouge1"].mean > 20


def test_a_gguf_file_becomes_a_checkpoint_with_a_plan(smollm2, tmp_path):
    model, tokenizer = smollm2
    plan = AttentionPlan.parse("full@11-18; window:8+4", 30)
    save_model(apply_plan(model, plan), tmp_path / "out", tokenizer)
    again, _ = load_model(tmp_path / "out")
    tokens = tokenizer("The standard library is very extensive, and offers a wide range.", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**tokens).logits, model(**tokens).logits)
    assert AttentionPlan.from_dict(again.config.masformer) == plan


def test_a_gguf_file_is_exported(smollm2, tmp_path):
    model, tokenizer = smollm2
    apply_plan(model, AttentionPlan.parse("full@11-18; window:16", 30))
    export_model(model, tmp_path / "out", "mlx-lm", tokenizer)
    assert verify_export(model, tmp_path / "out", "transformers").difference < 1e-3
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template
    assert "Weights: " in (tmp_path / "out/README.md").read_text()


def test_a_real_model_answers(smollm2):
    model, tokenizer = apply_plan(smollm2[0], AttentionPlan.parse("full@11-18; window:16+4", 30)), smollm2[1]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = chat(client_of(serving.build_app(model, tokenizer, "m")), messages)
    assert answer == generated(model, tokenizer, messages)
    assert "Paris" in answer

"""The pass key, learnt from nothing: local spans find it nearby; study/test_tiny.py has full and mixed ones."""

import json

import pytest
from rich.console import Console

from masformer import AttentionPlan, load_model
from masformer.evaluation.retrieval import TASKS, Prober, graded_lengths, retrieve, training_pairs, word_tokenizer
from masformer.training.recipe import Recipe
from masformer.training.run import train

TASK = TASKS["passkey"]
LENGTH, LAYERS, WINDOW = 160, 3, 20
DEPTHS = [0.0, 25.0, 50.0, 100.0]
EXAMPLES = 20
REACH = LAYERS * (WINDOW - 1)
PROMPTS = {"digits": 2, "max_new_tokens": 4}
SETTINGS = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
        },
    },
    "training": {"steps": 250, "rows": 2, "device_rows": 2, "learning_rate": 4e-3, "warmup_steps": 10},
    "checkpoints": {"every": None},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with the tokenizer and the pairs, none of which is tested."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = word_tokenizer([TASK], PROMPTS["digits"])
    tokenizer.save_pretrained(folder / "tokenizer")
    prober = Prober(tokenizer, **PROMPTS)
    tested = {prober.probe(TASK, LENGTH, depth, index).text for depth in DEPTHS for index in range(EXAMPLES)}
    pairs = training_pairs(tokenizer, [TASK], graded_lengths(62, LENGTH), 2000, **PROMPTS)
    lines = [json.dumps(pair) + "\n" for pair in pairs if pair["prompt"] not in tested]
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def scores(plan, material, tmp_path):
    """Depth -> percent, of a model that was trained under a plan."""
    source = {"files": [str(material / "pairs.jsonl")], "prompt": "prompt", "target": "target"}
    model = {**SETTINGS["model"], "tokenizer": str(material / "tokenizer"), "plan": plan}
    data = {"sources": {"pairs": source}, "length": 1024, "cache": str(material / "cache")}
    recipe = Recipe.from_dict({**SETTINGS, "output": str(tmp_path / "run"), "model": model, "data": data})
    trained, tokenizer = load_model(train(recipe, console=Console(quiet=True)).model)
    plans = {plan: AttentionPlan.parse(plan, LAYERS)}
    results, reach = retrieve(
        trained, Prober(tokenizer, **PROMPTS), [TASK], plans, [LENGTH], DEPTHS, EXAMPLES, batch=50
    )
    found = {result.depth: result.score.mean for result in results if result.depth is not None}
    return found, reach[0].effective_length


def test_local_spans_find_it_within_their_reach_alone(material, tmp_path):
    tokenizer = word_tokenizer([TASK], PROMPTS["digits"])
    probe = Prober(tokenizer, **PROMPTS).probe(TASK, LENGTH, 50, 0)
    key = tokenizer.convert_tokens_to_ids(probe.answers[0])
    assert probe.tokens[::-1].index(key) > REACH
    found, reach = scores(f"window:{WINDOW}", material, tmp_path)
    assert found.pop(100.0) >= 95
    assert max(found.values()) <= 15, "one of 90 numbers, by chance"
    assert reach is None

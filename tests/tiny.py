"""Tiny random models of every architecture that the tests know, and a plan with all kinds of spans for them."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from masformer import AttentionPlan, BlockSpan, FullSpan, WindowSpan

VOCABULARY = 61
PLAN = AttentionPlan((WindowSpan(5, 2), FullSpan(), BlockSpan(6, 1), WindowSpan(9)))
GPTS = ["gpt_neox", "gpt2", "gpt_neo"]
LLAMAS = ["llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "phi3"]
LLAMAS += ["olmo2", "olmo3"]
ARCHITECTURES = LLAMAS + GPTS


def tiny_config(kind, **changes):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind not in GPTS:
        shape |= {"num_key_value_heads": 2, "sliding_window": 7}
    if kind not in (*GPTS, "phi3", "olmo2"):
        shape["head_dim"] = 8
    if kind == "gemma2":
        shape |= {"attn_logit_softcapping": 0.4, "query_pre_attn_scalar": 8}
    if kind == "gpt2":
        shape["n_inner"] = shape.pop("intermediate_size")
        shape |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if kind == "gpt_neo":
        shape |= {"attention_types": [[["global", "local"], 2]], "window_size": 7}
    return AutoConfig.for_model(kind, **(shape | changes))


def random_plan(seed):
    """Four spans of any kind."""
    choose = random.Random(seed)
    spans = [
        lambda: FullSpan(),
        lambda: WindowSpan(choose.randint(1, 12), choose.choice([0, 0, 1, 4, 14])),
        lambda: BlockSpan(choose.randint(1, 12), choose.randint(0, 2)),
    ]
    return AttentionPlan(tuple(choose.choice(spans)() for _ in range(4)))


def tiny(kind, **changes):
    """A stock model in evaluation mode, the same each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


def letter_tokenizer(letters=None, **options):
    """A tokenizer with a token for each letter, by default for each byte; options as of PreTrainedTokenizerFast."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if letters is None else letters
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)

"""Tiny random models of every architecture that the tests know, and a plan with all kinds of spans for them."""

import random

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from masformer import AttentionPlan, BlockSpan, FullSpan, WindowSpan
from masformer.models.bridge import add_sinks
from masformer.models.sinks import named_sinks

VOCABULARY = 61
MERGES = [("a", "n"), ("t", "h"), ("an", "d"), ("th", "e")]
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


def random_unit_plan(seed, kv_heads=2):
    """The same by heads: in most layers the KV heads differ."""
    plans = [random_plan(f"{seed} {head}") for head in range(kv_heads)]
    return AttentionPlan(tuple(zip(*plans, strict=True)))


def kv_heads_of(kind):
    """KV heads of a tiny model."""
    return 4 if kind in GPTS else 2


def tiny(kind, **changes):
    """A stock model in evaluation mode, the same each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


def with_sinks(model):
    """The same model, with constant sinks that matter in every layer; they are aside until a plan asks for them."""
    add_sinks(model, AttentionPlan.uniform(model.config.num_hidden_layers, WindowSpan(9, constant_sink=True)))
    generator = torch.Generator().manual_seed(3)
    for _, weight in named_sinks(model):
        weight.data = 2 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


def letter_tokenizer(letters=None, **options):
    """A tokenizer with a token for each letter, by default for each byte; options as of PreTrainedTokenizerFast."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if letters is None else letters
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def bytes_tokenizer(split, **options):
    """A byte-level tokenizer with a few merges."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES, **options))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def plain_tokenizer():
    tokenizer = bytes_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


def write_gguf(path, layers, skipped=(), extra=None, entries=lambda writer: None, stored=None):
    """A tiny llama as a .gguf file; `entries` adds metadata, `stored` is the type of its matrices."""
    sizes = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    sizes |= {"attn_output": (32, 32), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes = {f"blk.{layer}.{name}.weight": size for layer in range(layers) for name, size in sizes.items()}
    shapes |= {"token_embd.weight": (64, 32), "output_norm.weight": (32,), "output.weight": (64, 32)} | (extra or {})
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(letter_tokenizer().get_vocab())[:63], "!!"])
    writer.add_token_merges(["! !"])
    entries(writer)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name not in skipped:
            values = random.normal(size=shape).astype(np.float32)
            if stored is None or len(shape) == 1 or shape[-1] % 32:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

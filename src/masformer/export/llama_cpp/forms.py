"""How llama.cpp runs a plan: an architecture of its own whose layers slide, and that computes what the model does.

Its `llama`, `qwen2` and `qwen3` have no windows. `granite_swa` is Llama with a list of layers that slide, and with
learned sinks, which are those of the plan or weigh nothing; `step35` normalises queries and keys head by head as Qwen 3
does; `olmo2` reads the list itself. Each stands for full attention no less: layers that do not slide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.gguf_writer import GGUFValue
from gguf.quants import dequantize

from masformer.attention import ConstantSinks
from masformer.errors import MasformerError
from masformer.export.forms import window_of
from masformer.export.llama_cpp.files import Content, Tensor
from masformer.export.sinks import NO_SINK, output_bias, value_bias
from masformer.models.sinks import check_fit, sink_layers
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan

OUTPUT = "output.weight"
"""The tensor of the output layer, in files where it is not the embeddings."""
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_SLIDING = r"attention\.sliding_window(_pattern)?"
_KEYS = (
    r"block_count|context_length|embedding_length|feed_forward_length|vocab_size|attention\.head_count(_kv)?"
    r"|attention\.(key|value)_length|attention\.layer_norm_rms_epsilon|rope\.dimension_count|rope\.freq_base"
    rf"|tensor_data_layout|{_SLIDING}"
)
_SCALED = rf"{_KEYS}|rope\.scaling\.\w+"


@dataclass(frozen=True)
class Form:
    """An architecture of llama.cpp, and the one that runs its weights with windows.

    Attributes:
        pairs: whether the rows of a head's queries and keys lie in pairs, as rotary positions turn them.
        windows: the architecture with windows.
        since: the first version that has it, and runs it right.
        norms: of each layer, beside the matrices.
        more: tensors that it reads where they are there, beside an output layer, with `*` for a layer.
        keys: what of the metadata it takes for the same.
        tied: whether the embeddings may be the output layer.
    """

    pairs: bool
    windows: str
    since: str
    norms: tuple[str, ...]
    more: tuple[str, ...]
    keys: str
    tied: bool = True

    def tensors(self, layers: int) -> tuple[set[str], set[str]]:
        """The names of those that a file must have, and of those that it may have beside them."""
        every = [f"blk.*.{part}.weight" for part in (*self.norms, *_MATRICES)]
        needed = ["token_embd.weight", "output_norm.weight", *[OUTPUT] * (not self.tied), *every]
        return _names(needed, layers), _names([OUTPUT, *self.more], layers)


def _names(patterns: Iterable[str], layers: int) -> set[str]:
    return {name.replace("*", str(layer)) for name in patterns for layer in range(layers)}


_NORMS, _HEADS = ("attn_norm", "ffn_norm"), ("attn_q_norm", "attn_k_norm")
_BIASES = ("rope_freqs.weight", *(f"blk.*.{part}.bias" for part in _MATRICES))
FORMS = {
    "llama": Form(True, "granite_swa", "b10566", _NORMS, _BIASES, _SCALED),
    "smollm3": Form(True, "granite_swa", "b10566", _NORMS, _BIASES, _SCALED),
    "qwen2": Form(False, "granite_swa", "b10566", _NORMS, _BIASES, _SCALED),
    "qwen3": Form(False, "step35", "b10229", (*_NORMS, *_HEADS), (), _KEYS),
    "olmo2": Form(False, "olmo2", "b11063", ("post_attention_norm", "post_ffw_norm", *_HEADS), (), _KEYS, False),
}
"""Architecture without windows -> its form."""


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys, of which the first half of a head turns with the second, with those that turn together
    side by side: 0, 4, 1, 5, 2, 6, 3, 7 for a head of 8.

    Args:
        rows: [heads x head_dim, ...], numbers or the bytes of a row.
        heads: how many.
    """
    halves: np.ndarray = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    pairs: np.ndarray = halves.swapaxes(1, 2).reshape(rows.shape)
    return pairs


def with_plan(
    content: Content, plan: AttentionPlan, sinks: Mapping[int, ConstantSinks], where: object = "the model"
) -> Content:
    """The file that runs a plan, of one without windows; what is stored in the tensors stays.

    Args:
        content: of an architecture in `FORMS`, which `check` has passed.
        plan: one span per layer, full or the one window.
        sinks: layer -> its constant sinks; of those layers that have none in the plan they are not read.
        where: they come from, for messages.

    Raises:
        MasformerError: constant sinks are missing or do not fit.
    """
    form = FORMS[content.architecture]
    if plan.is_full:
        return content
    heads, kv_heads = content.get("attention.head_count"), kv_heads_of(content)
    check_fit(where, sinks, plan, ((heads,), (kv_heads, head_dim_of(content))))
    fields = {
        name.replace(f"{content.architecture}.", f"{form.windows}.", 1)
        if name.startswith(f"{content.architecture}.")
        else name: field
        for name, field in content.fields.items()
    }
    tensors = dict(content.tensors)
    if form.windows == "granite_swa" and not form.pairs:
        for name, tensor in content.tensors.items():
            if found := re.search(r"\.attn_(q|k)\.", name):
                tensors[name] = _permuted(tensor, heads if found[1] == "q" else kv_heads)
    added, others = _ADDED[form.windows](content, plan, {layer: sinks[layer] for layer in sink_layers(plan)})
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    window: dict[str, Any] = {
        "attention.sliding_window": window_of(plan),
        "attention.sliding_window_pattern": sliding(plan),
    }
    for name, value in (window | added).items():
        if isinstance(value, list):
            fields[f"{form.windows}.{name}"] = GGUFValue(value, GGUFValueType.ARRAY, GGUFValueType.BOOL)
        else:
            fields[f"{form.windows}.{name}"] = GGUFValue(value, kinds[type(value)])
    return Content(form.windows, fields, tensors | others)


def sliding(plan: AttentionPlan) -> list[bool]:
    """Which layers slide."""
    return [not isinstance(span, FullSpan) for span in plan]


def kv_heads_of(content: Content) -> int:
    """Heads of keys and values in each layer."""
    return int(content.get("attention.head_count_kv", content.get("attention.head_count")))


def head_dim_of(content: Content) -> int:
    """Values of a head."""
    own = content.get("embedding_length") // content.get("attention.head_count")
    return int(content.get("attention.key_length", own))


def check(content: Content) -> None:
    """Raises MasformerError where a file lacks tensors of its architecture, or has tensors or metadata that the
    architecture with windows would not read as this one does."""
    name, form = content.architecture, FORMS[content.architecture]
    for key, field in content.fields.items():
        if not key.startswith(f"{name}."):
            continue
        rest = key.removeprefix(f"{name}.")
        if form.windows == name and re.fullmatch(_SLIDING, rest):
            raise MasformerError(f"layers of the file slide already ({key}); take the file without that it was made of")
        if rest in ("expert_count", "expert_used_count") and not field.value:
            continue
        if rest == "rope.scaling.type" and field.value == "none":
            continue
        if not re.fullmatch(form.keys, rest):
            raise MasformerError(
                f"llama.cpp's {form.windows}, which runs windows for {name}, does not read {key} as {name} does"
            )
        if field.type == GGUFValueType.ARRAY:
            raise MasformerError(f"{key} differs from layer to layer, which llama.cpp's {form.windows} is not run with")
    needed, more = form.tensors(content.get("block_count"))
    for tensor in content.tensors:
        if tensor not in needed | more:
            raise MasformerError(f"llama.cpp's {form.windows}, which runs windows for {name}, reads no tensor {tensor}")
    if missing := sorted(needed - content.tensors.keys()):
        raise MasformerError(f"the file lacks {len(missing)} tensors of {name} models, among them {missing[0]}")
    rotary = content.get("rope.dimension_count", head_dim_of(content))
    if rotary != head_dim_of(content):
        raise MasformerError(
            f"rotary positions in {rotary} of {head_dim_of(content)} values of a head: not with windows"
        )


def _permuted(tensor: Tensor, heads: int) -> Tensor:
    return replace(tensor, read=lambda: in_pairs(tensor.read(), heads))


def floats(values: np.ndarray) -> Tensor:
    """A tensor in float32."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return Tensor(values.shape, GGMLQuantizationType.F32, lambda: values)


def _biased(content: Content, projection: str, rows: int, added: Callable[[], torch.Tensor]) -> Tensor:
    """The bias of a projection: what was there before, and what is added."""
    own = content.tensors.get(f"{projection}.bias")

    def read() -> np.ndarray:
        bias: np.ndarray = added().cpu().numpy()
        return (bias if own is None else bias + _values(own)).astype(np.float32)

    return Tensor((rows,), GGMLQuantizationType.F32, read)


def _output_bias(sinks: ConstantSinks, output: Tensor) -> torch.Tensor:
    return output_bias(sinks, torch.from_numpy(_values(output)))


def _values(tensor: Tensor) -> np.ndarray:
    """What a tensor holds, in float32."""
    try:
        values: np.ndarray = dequantize(np.ascontiguousarray(tensor.read()), tensor.kind)
    except NotImplementedError:
        raise MasformerError(
            f"weights stored as {tensor.kind.name} cannot be read here, so the bias for constant sinks is not known"
        ) from None
    return values.astype(np.float32).reshape(tensor.shape)


Added = tuple[dict[str, Any], dict[str, Tensor]]


def _granite_swa(content: Content, plan: AttentionPlan, sinks: Mapping[int, ConstantSinks]) -> Added:
    heads = content.get("attention.head_count")
    keys: dict[str, Any] = {"logit_scale": 1.0, "rope.dimension_count": head_dim_of(content)}
    if content.architecture == "smollm3":
        keys["attention.rope_pattern"] = [(layer + 1) % 4 != 0 for layer in range(len(plan))]
    none = np.full(heads, NO_SINK)
    tensors = {f"blk.{layer}.attn_sinks.weight": floats(none) for layer in range(len(plan))}
    for layer, each in sinks.items():
        tensors[f"blk.{layer}.attn_sinks.weight"] = floats(each.logit.detach().float().cpu().numpy())
        output = content.tensors[f"blk.{layer}.attn_output.weight"]
        added = {
            "attn_v": (each.value.numel(), partial(value_bias, each)),  # type: ignore[union-attr]
            "attn_output": (output.shape[0], partial(_output_bias, each, output)),
        }
        for name, (rows, bias) in added.items():
            projection = f"blk.{layer}.{name}"
            tensors[f"{projection}.bias"] = _biased(content, projection, rows, bias)
    return keys, tensors


def _step35(content: Content, plan: AttentionPlan, sinks: Mapping[int, ConstantSinks]) -> Added:
    head_dim, base = head_dim_of(content), float(content.get("rope.freq_base", 10000.0))
    keys = {
        "rope.dimension_count": 2 * head_dim,  # it takes half of it in full layers
        "rope.dimension_count_swa": head_dim,
        "rope.freq_base": base,
        "rope.freq_base_swa": base,
        "expert_feed_forward_length": 0,
    }
    return keys, {OUTPUT: content.tensors.get(OUTPUT, content.tensors["token_embd.weight"])}


def _olmo2(content: Content, plan: AttentionPlan, sinks: Mapping[int, ConstantSinks]) -> Added:
    return {}, {}


_ADDED = {"granite_swa": _granite_swa, "step35": _step35, "olmo2": _olmo2}
"""Architecture with windows -> what it needs beside the window: metadata and tensors."""

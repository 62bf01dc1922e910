"""Mixed attention spans for pretrained language models (MASFormer, arXiv 2310.12442).

Load a model with a plan (`load_model`, `apply_plan`), keep it (`save_model`, `export_model`), find its plan
(`search`), measure it (`perplexity`, `compare_plans`, `retrieve`, `summarize`), train it (`load_recipe`,
`train`) and use it (`generate`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from masformer.errors import MasformerError
from masformer.registered import when_transformers_is_there

if TYPE_CHECKING:
    from masformer.attention import attend
    from masformer.cache import SpanCache
    from masformer.evaluation.perplexity import compare_plans, perplexity, prefix_token, tokenize
    from masformer.evaluation.retrieval import retrieve
    from masformer.evaluation.summarization import summarize
    from masformer.export import check_export, export_model
    from masformer.fitting import fit_sinks
    from masformer.generation import generate, prompt_tokens
    from masformer.models.bridge import apply_plan
    from masformer.models.checkpoint import load_model
    from masformer.models.graphs import compile_tokens, graph_tokens
    from masformer.models.saving import save_model
    from masformer.placement import search, search_layers
    from masformer.plan import AttentionPlan
    from masformer.spans import BlockSpan, FullSpan, WindowSpan
    from masformer.training import load_recipe
    from masformer.training.run import train

__version__ = "0.2.0"
__all__ = [
    "AttentionPlan",
    "BlockSpan",
    "FullSpan",
    "MasformerError",
    "SpanCache",
    "WindowSpan",
    "apply_plan",
    "attend",
    "check_export",
    "compare_plans",
    "compile_tokens",
    "export_model",
    "fit_sinks",
    "generate",
    "graph_tokens",
    "load_model",
    "load_recipe",
    "perplexity",
    "prefix_token",
    "prompt_tokens",
    "retrieve",
    "save_model",
    "search",
    "search_layers",
    "summarize",
    "tokenize",
    "train",
]
_LATER = {
    "AttentionPlan": "masformer.plan",
    "BlockSpan": "masformer.spans",
    "FullSpan": "masformer.spans",
    "SpanCache": "masformer.cache",
    "WindowSpan": "masformer.spans",
    "apply_plan": "masformer.models.bridge",
    "attend": "masformer.attention",
    "check_export": "masformer.export",
    "compare_plans": "masformer.evaluation.perplexity",
    "compile_tokens": "masformer.models.graphs",
    "export_model": "masformer.export",
    "fit_sinks": "masformer.fitting",
    "generate": "masformer.generation",
    "graph_tokens": "masformer.models.graphs",
    "load_model": "masformer.models.checkpoint",
    "load_recipe": "masformer.training",
    "perplexity": "masformer.evaluation.perplexity",
    "prefix_token": "masformer.evaluation.perplexity",
    "prompt_tokens": "masformer.generation",
    "retrieve": "masformer.evaluation.retrieval",
    "save_model": "masformer.models.saving",
    "search": "masformer.placement",
    "search_layers": "masformer.placement",
    "summarize": "masformer.evaluation.summarization",
    "tokenize": "masformer.evaluation.perplexity",
    "train": "masformer.training.run",
}
"""Name -> the module that has it, which is imported when somebody asks for the name."""


when_transformers_is_there()


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Mixed attention spans for pretrained language models (MASFormer, arXiv 2310.12442)."""

from masformer.attention import attend
from masformer.cache import SpanCache
from masformer.errors import MasformerError
from masformer.models.bridge import apply_plan
from masformer.models.checkpoint import load_model, save_model
from masformer.plan import AttentionPlan
from masformer.spans import BlockSpan, FullSpan, WindowSpan

__version__ = "0.1.0"
__all__ = [
    "AttentionPlan",
    "BlockSpan",
    "FullSpan",
    "MasformerError",
    "SpanCache",
    "WindowSpan",
    "apply_plan",
    "attend",
    "load_model",
    "save_model",
]

"""Hypothesis strategies shared by the tests."""

from hypothesis import strategies as st

from masformer import AttentionPlan, BlockSpan, FullSpan, WindowSpan

windows = st.builds(WindowSpan, st.integers(1, 12), st.integers(0, 14))
blocks = st.builds(BlockSpan, st.integers(1, 12), st.integers(0, 3))
local_spans = windows | blocks
spans = st.just(FullSpan()) | local_spans
constant_spans = st.builds(WindowSpan, st.integers(1, 12), st.integers(0, 3), st.just(True)) | st.builds(
    BlockSpan, st.integers(1, 12), st.integers(0, 2), st.just(True)
)
"""Local spans with a constant sink."""
units = st.integers(2, 3).flatmap(
    lambda kv_heads: st.lists(
        spans | st.lists(spans | constant_spans, min_size=kv_heads, max_size=kv_heads), min_size=1, max_size=8
    ).map(lambda layers: AttentionPlan(layers, kv_heads))
)
"""Plans by heads, as a rule."""
plans = st.lists(spans | constant_spans, min_size=1, max_size=8).map(AttentionPlan)

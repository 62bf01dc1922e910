"""Hypothesis strategies shared by the tests."""

from hypothesis import strategies as st

from masformer import AttentionPlan, BlockSpan, FullSpan, WindowSpan

windows = st.builds(WindowSpan, st.integers(1, 12), st.integers(0, 14))
blocks = st.builds(BlockSpan, st.integers(1, 12), st.integers(0, 3))
local_spans = windows | blocks
spans = st.just(FullSpan()) | local_spans
plans = st.lists(spans, min_size=1, max_size=8).map(AttentionPlan)

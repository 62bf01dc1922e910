"""Choosing the layers or KV heads that need full attention, by measurement on the user's own text.

`texts` cuts windows and retrieval probes, `measure` scores plans on them with shared prefixes and a journal, `gradient`
measures what a wider span is worth to each unit, `criteria` weighs losses and gains, `choice` makes plans of what was
measured under a budget (`budget`), `finding` searches and holds the plan against controls (`result`), `report` shows
the result.
"""

from masformer.placement.budget import Budget
from masformer.placement.criteria import parse_criteria
from masformer.placement.finding import METHODS, UNITS, search, search_layers
from masformer.placement.report import placement_table, plot_search, summary
from masformer.placement.result import Completeness, Evidence, GradientWork, PlacementScore, SearchResult, Work

__all__ = [
    "METHODS",
    "UNITS",
    "Budget",
    "Completeness",
    "Evidence",
    "GradientWork",
    "PlacementScore",
    "SearchResult",
    "Work",
    "parse_criteria",
    "placement_table",
    "plot_search",
    "search",
    "search_layers",
    "summary",
]

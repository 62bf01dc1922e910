"""Choosing the layers that need full attention, by measurement on the user's own text.

`texts` cuts windows and retrieval probes, `measure` scores plans on them with shared prefixes and a journal, `search`
chooses a plan under a budget (`budget`) and holds it against controls (`result`), `report` shows the result.
"""

from masformer.placement.budget import Budget
from masformer.placement.report import placement_table, plot_search
from masformer.placement.result import Evidence, PlacementScore, SearchResult, Work
from masformer.placement.search import METHODS, parse_criteria, search_layers

__all__ = [
    "METHODS",
    "Budget",
    "Evidence",
    "PlacementScore",
    "SearchResult",
    "Work",
    "parse_criteria",
    "placement_table",
    "plot_search",
    "search_layers",
]

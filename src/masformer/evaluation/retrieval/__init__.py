"""Finding what is hidden in long prompts, by plan, task, length and depth.

`tasks` says what is hidden and asked for, `haystack` what it is hidden in, `prompts` makes prompts and training pairs
of a given length, `measure` runs and scores them, `words` is a tokenizer for tiny models.
"""

from masformer.evaluation.retrieval.haystack import Haystack, read_haystack
from masformer.evaluation.retrieval.measure import (
    EffectiveLength,
    RetrievalResult,
    effective_length,
    parse_depths,
    retrieval_tables,
    retrieve,
)
from masformer.evaluation.retrieval.prompts import Probe, Prober, graded_lengths, training_pairs
from masformer.evaluation.retrieval.tasks import TASKS, Task, string_match_all, tasks_of
from masformer.evaluation.retrieval.words import word_tokenizer

__all__ = [
    "TASKS",
    "EffectiveLength",
    "Haystack",
    "Probe",
    "Prober",
    "RetrievalResult",
    "Task",
    "effective_length",
    "graded_lengths",
    "parse_depths",
    "read_haystack",
    "retrieval_tables",
    "retrieve",
    "string_match_all",
    "tasks_of",
    "training_pairs",
    "word_tokenizer",
]

"""What units do: each kind calls what the package has for it, and gives its figures as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from masformer import benchmarks
from masformer.cost import ModelShape, cost, forward_memory
from masformer.data import Document
from masformer.data.sources import Source
from masformer.errors import MasformerError
from masformer.evaluation.perplexity import compare_plans, prefix_token, tokenize
from masformer.evaluation.predictions import Prediction
from masformer.evaluation.prompts import Example, Prompter, Template
from masformer.evaluation.retrieval import TASKS, Prober, retrieve, tasks_of, training_pairs, word_tokenizer
from masformer.evaluation.summarization import summarize
from masformer.files import write_whole
from masformer.journal import recover_lines
from masformer.models.checkpoint import load_config, load_model
from masformer.placement import search_layers
from masformer.plan import AttentionPlan
from masformer.spans import Span
from masformer.study.units import Estimate, Place
from masformer.training.dry_run import forecast
from masformer.training.model import END, recipe_config
from masformer.training.recipe import ModelRecipe, Recipe
from masformer.training.run import train
from masformer.training.trainer import METRICS

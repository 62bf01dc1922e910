"""What units do: each kind calls what the package has for it, and gives its figures as plain values."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from masformer import benchmarks
from masformer.data.sources import Source
from masformer.defaults import BATCH as FEW
from masformer.errors import MasformerError
from masformer.evaluation.perplexity import compare_plans, prefix_token, tokenize
from masformer.evaluation.prompts import Example, Prompter, Template
from masformer.evaluation.retrieval import TASKS, Prober, retrieve, training_pairs, word_tokenizer
from masformer.evaluation.summarization import summarize
from masformer.files import parse_json, read_text, write_whole
from masformer.placement import parse_criteria, search_layers
from masformer.placement.criteria import POINTS, USUAL
from masformer.placement.finding import ROUNDS
from masformer.plan import AttentionPlan
from masformer.spans import Span
from masformer.study.models import forget, forward_estimate, layers_of, load, plan_of, unpacked
from masformer.study.units import Estimate, Place, Work
from masformer.training.dry_run import forecast
from masformer.training.model import END
from masformer.training.recipe import Backend, ModelRecipe, Recipe
from masformer.training.run import train
from masformer.training.trainer import METRICS, read_metrics

BATCH = 32
"""Prompts of retrieval that are continued together; on CUDA of all that is written."""
BENCHES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "prefill": benchmarks.bench_prefill,
    "decode": benchmarks.bench_decode,
    "train": benchmarks.bench_train,
}


class StoppedError(MasformerError):
    """A training run was stopped by a signal; it goes on from its checkpoint.

    Attributes:
        exit_code: as a shell has it, 128 and the signal's number.
    """

    def __init__(self, name: str, signal: int) -> None:
        super().__init__(f"{name} was stopped; the same command goes on from there")
        self.exit_code = 128 + signal


@dataclass(frozen=True)
class Vocabulary(Work):
    """Trains a byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2).

    Attributes:
        text: what it is trained on.
        size: tokens, the one that ends a document included.
        folder: where it goes.
    """

    text: Source
    size: int
    folder: Path

    def estimate(self) -> Estimate:
        return Estimate(note="seconds to a minute")

    def run(self, place: Place, name: str) -> dict[str, Any]:
        texts = [document.text for document in self.text.documents()]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=self.size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(self.folder)
        return {"documents": len(texts), "characters": sum(map(len, texts)), "tokens": tokenizer.get_vocab_size()}


@dataclass(frozen=True)
class Pairs(Work):
    """Writes pairs of a retrieval task to train on, and a tokenizer with a token for each of its words.

    Attributes:
        task: of `masformer.evaluation.retrieval.TASKS`.
        digits: of the numbers.
        room: tokens of an answer.
        lengths: shortest and longest pair, in tokens.
        count: pairs.
        seed: of what is drawn.
        file: where the pairs go.
        folder: where the tokenizer goes.
    """

    task: str
    digits: int
    room: int
    lengths: tuple[int, int]
    count: int
    seed: int
    file: Path
    folder: Path

    def estimate(self) -> Estimate:
        return Estimate(note="seconds")

    def run(self, place: Place, name: str) -> dict[str, Any]:
        tasks, (shortest, longest) = [TASKS[self.task]], self.lengths
        tokenizer = word_tokenizer(tasks, self.digits)
        tokenizer.save_pretrained(self.folder)
        lengths = range(shortest, longest + 1)
        rows = training_pairs(
            tokenizer, tasks, lengths, self.count, seed=self.seed, digits=self.digits, max_new_tokens=self.room
        )
        write_whole(self.file, "".join(json.dumps(row) + "\n" for row in rows))
        return {"pairs": self.count, "tokens": len(tokenizer)}


@dataclass(frozen=True)
class Train(Work):
    """Trains a model by a recipe; what was interrupted goes on from its checkpoint.

    Attributes:
        recipe: the run.
        stays: whether the model stays once everything was measured of it.
    """

    recipe: Recipe
    stays: bool = True

    def settings(self) -> dict[str, Any]:
        found = self.recipe.to_dict()
        del found["output"], found["logging"], found["checkpoints"]
        found["data"].pop("cache", None)
        return found

    def sources(self) -> Sequence[Source]:
        return (*self.recipe.data.sources.values(), *self.recipe.evaluation.sources.values())

    def models(self) -> Sequence[str]:
        return [] if self.recipe.model.source is None else [self.recipe.model.source]

    def estimate(self) -> Estimate:
        found = forecast(self.recipe)
        return Estimate(found.flops, found.memory.total, "training", f"{found.steps} steps")

    def run(self, place: Place, name: str) -> dict[str, Any]:
        began = time.monotonic()
        forget()
        model = unpacked(self.recipe.model, place)
        if model.backend == "auto" and _exact(
            benchmarks.default_device().type, model.dtype, self.recipe.training.precision
        ):
            model = replace(model, backend=EXACT)
        recipe = replace(self.recipe, model=model)
        outcome = train(recipe, resume=True, console=Console(quiet=True))
        if outcome.signal is not None:
            raise StoppedError(name, outcome.signal)
        rows = list(read_metrics(Path(self.recipe.output) / METRICS))
        return {
            "steps": self.recipe.training.steps,
            "losses": [[row["step"], row["loss"]] for row in rows if "loss" in row],
            "evaluations": [row for row in rows if "loss" not in row],
            "seconds": round(time.monotonic() - began, 1),
        }


@dataclass(frozen=True)
class UnderPlan(Work):
    """What is measured of a model under one plan.

    Attributes:
        model: the model.
        plan: its text; None: the plan that the unit `found_by` found.
        found_by: name of a unit that searches.
    """

    model: ModelRecipe
    plan: str | None
    found_by: str | None = field(default=None, kw_only=True)

    def known_plan(self) -> AttentionPlan | None:
        """The plan; None where it is to be found."""
        return None if self.plan is None else plan_of(self.model, self.plan)

    def loaded(self, place: Place) -> tuple[AttentionPlan, Any, Any]:
        """The plan, the model under it, and its tokenizer."""
        text = self.plan
        if text is None:
            assert self.found_by is not None
            found = place.beside(self.found_by, "json")
            text = parse_json(read_text(found), str(found))["result"]["plan"]
        plan = plan_of(self.model, text)
        return plan, *load(self.model, place, plan)


EXACT: Backend = "tiled"
"""The backend on CUDA in float32. `auto` takes FlexAttention there, which compiles a kernel for each span and number of
heads: that takes longer than to measure each plan once, or to train it briefly."""


def _exact(device: str, dtype: str, precision: str) -> bool:
    return (device, dtype, precision) == ("cuda", "float32", "float32")


def backend_of(model: Any, precision: str = "float32") -> Backend:
    """The backend of passes in a precision: on CUDA in float32 the tiles, else that of `auto`."""
    return EXACT if _exact(model.device.type, str(model.dtype).removeprefix("torch."), precision) else "auto"


@dataclass(frozen=True)
class Perplexity(UnderPlan):
    """Perplexity under one plan, by length, position and document.

    Attributes:
        text: documents.
        lengths: of the windows, in tokens.
        max_tokens: of each document, the first so many.
    """

    text: Source
    lengths: tuple[int, ...]
    max_tokens: int

    def estimate(self) -> Estimate:
        windows = (self.text.limit or 1) * self.max_tokens
        parts = [forward_estimate(self.model, self.known_plan(), [length], windows / length) for length in self.lengths]
        return Estimate(sum(part.flops or 0 for part in parts), max(part.memory or 0 for part in parts))

    def run(self, place: Place, name: str) -> dict[str, Any]:
        plan, loaded, tokenizer = self.loaded(place)
        tokens, _ = tokenize(tokenizer, self.text.documents(), max_tokens=self.max_tokens)
        results = compare_plans(
            loaded,
            tokens,
            {str(plan): plan},
            self.lengths,
            prefix=prefix_token(tokenizer),
            precision=place.precision,
            backend=backend_of(loaded, place.precision),
        )
        return {"plan": str(plan), "results": [result.to_dict() for result in results]}


@dataclass(frozen=True)
class Search(Work):
    """Searches for the layers or KV heads that need full attention.

    Attributes:
        model: the model.
        text: documents to choose by.
        budget: number of full layers, or heads.
        local: span of the others.
        length: of the windows.
        windows: to choose by; of the criterion retrieval, as many prompts.
        by: `layers` or `heads`.
        method: of `masformer.placement.METHODS`.
        criteria: as text; None: what the method does by default.
        rounds: of the method gradient; None: its own.
        points: of its path; None: its own.
        journal: name of the file for finished measurements; searches on the same text share one.
    """

    model: ModelRecipe
    text: Source
    budget: int
    local: str
    length: int
    windows: int
    by: str
    method: str
    criteria: str | None
    rounds: int | None
    points: int | None
    journal: str

    def estimate(self) -> Estimate:
        """Of one by gradient a pass, forward and backward, is taken for four forward passes."""
        if self.method == "gradient":
            again = (ROUNDS if self.rounds is None else self.rounds) - 1
            passes = sum((self.points or POINTS[each]) + again for each in parse_criteria(self.criteria or USUAL))
            return forward_estimate(self.model, None, [self.length], 4 * self.windows * passes)
        return forward_estimate(self.model, None, [self.length], self.windows * (layers_of(self.model) + 1))

    def writes(self) -> str | None:
        return self.journal

    def run(self, place: Place, name: str) -> dict[str, Any]:
        loaded, tokenizer = load(self.model, place)
        tokens, _ = tokenize(tokenizer, self.text.documents())
        found = search_layers(
            loaded,
            tokens,
            self.budget,
            Span.parse(self.local),
            length=self.length,
            prefix=prefix_token(tokenizer),
            method=self.method,
            by=self.by,
            criteria=self.criteria,
            rounds=self.rounds,
            points=self.points,
            windows=self.windows,
            held_out_windows=0,
            tokenizer=tokenizer,
            journal=place.beside(self.journal, "journal"),
            precision=place.precision,
            backend=backend_of(loaded, place.precision),
        )
        return found.to_dict()


@dataclass(frozen=True)
class Retrieval(UnderPlan):
    """Finds what is hidden, under one plan, by length and depth.

    Attributes:
        task: of `masformer.evaluation.retrieval.TASKS`.
        lengths: of prompt and answer together.
        depths: in percent.
        examples: prompts for each length and depth.
        seed: of the prompts.
        digits: of the numbers; by default the task's.
        room: tokens of an answer; by default the task's.
        chat: whether the question stands in the tokenizer's chat template; by default where there is one.
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    examples: int
    seed: int = 0
    digits: int | None = None
    room: int | None = None
    chat: bool | None = None

    def estimate(self) -> Estimate:
        return forward_estimate(self.model, self.known_plan(), self.lengths, self.examples * len(self.depths))

    def run(self, place: Place, name: str) -> dict[str, Any]:
        plan, loaded, tokenizer = self.loaded(place)
        prober = Prober(tokenizer, chat=self.chat, seed=self.seed, digits=self.digits, max_new_tokens=self.room)
        tasks, plans = [TASKS[self.task]], {str(plan): plan}
        kept = place.beside(name, "predictions.jsonl")
        results, reach = retrieve(
            loaded,
            prober,
            tasks,
            plans,
            self.lengths,
            self.depths,
            self.examples,
            kept,
            batch=BATCH,
            backend=backend_of(loaded),
        )
        return {
            "plan": str(plan),
            "results": [result.to_dict() for result in results],
            "effective_length": reach[0].to_dict()["effective_length"],
        }


@dataclass(frozen=True)
class Summaries(Work):
    """Summarizes documents, or answers queries about them, under one plan at several lengths of the prompt.

    Attributes:
        model: the model.
        plan: its text.
        text: documents (`prompt`) and references (`target`).
        template: the words around a document, see `masformer.evaluation.prompts.Template`.
        lengths: the most tokens of a prompt.
        max_new_tokens: the most tokens of a summary.
        query: the field of a query about the document, for the template's `{query}`; None: there is none.
    """

    model: ModelRecipe
    plan: str
    text: Source
    template: str
    lengths: tuple[int, ...]
    max_new_tokens: int
    query: str | None = None

    def estimate(self) -> Estimate:
        plan = plan_of(self.model, self.plan)
        read = forward_estimate(self.model, plan, self.lengths, self.text.limit or 1)
        return replace(read, note=f"and {self.max_new_tokens} new tokens each")

    def run(self, place: Place, name: str) -> dict[str, Any]:
        plan = plan_of(self.model, self.plan)
        examples = self._examples()
        loaded, tokenizer = load(self.model, place, plan)
        prompter = Prompter(tokenizer, Template(self.template), chat=False)
        kept, plans = place.beside(name, "predictions.jsonl"), {str(plan): plan}
        results, _ = summarize(
            loaded,
            prompter,
            examples,
            plans,
            self.lengths,
            kept,
            max_new_tokens=self.max_new_tokens,
            batch=BATCH if loaded.device.type == "cuda" else FEW,
            backend=backend_of(loaded),
        )
        return {"plan": str(plan), "results": [result.to_dict() for result in results]}

    def _examples(self) -> list[Example]:
        (prompt, target), query = self.text.fields, self.query
        rows = list(self.text.rows(() if query is None else (query,)))
        return [
            Example(
                Path(row.name).name, row.texts[prompt], row.texts[target], None if query is None else row.texts[query]
            )
            for row in rows
            if all(text.strip() for text in row.texts.values())
        ]


@dataclass(frozen=True)
class Bench(Work):
    """Times a plan, full attention and transformers by itself in one run.

    Attributes:
        model: the model.
        bench: of `BENCHES`.
        plans: name -> text.
        lengths: in tokens.
        repeats: timed rounds.
    """

    model: ModelRecipe
    bench: str
    plans: Mapping[str, str]
    lengths: tuple[int, ...]
    repeats: int

    def estimate(self) -> Estimate:
        rounds = (self.repeats + 1) * (len(self.plans) + 3) * (3 if self.bench == "train" else 1)
        return forward_estimate(self.model, None, self.lengths, rounds)

    def run(self, place: Place, name: str) -> dict[str, Any]:
        plans = {title: plan_of(self.model, text) for title, text in self.plans.items()}
        loaded, _ = load(self.model, place, next(iter(plans.values())))
        return BENCHES[self.bench](loaded, plans, self.lengths, repeats=self.repeats)

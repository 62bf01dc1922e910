"""What a scale says of each stage of a study: settings, and what they must be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from masformer.data.sources import Source
from masformer.errors import LARGEST, LARGEST_SEED, MasformerError, check_int, shown
from masformer.evaluation.prompts import Template
from masformer.evaluation.retrieval import TASKS
from masformer.placement import METHODS, UNITS
from masformer.schema import Named, Settings, Several
from masformer.settings import check_choice
from masformer.training.recipe import ModelRecipe

FULL, LOCAL = "all full", "all local"
"""Names that plans of a stage must have: what the others are held against."""


def check_plans(name: str, plans: Mapping[str, str], needed: Sequence[str] = (FULL, LOCAL)) -> None:
    """Raises MasformerError where a plan that the others are held against is missing."""
    for each in needed:
        if each not in plans:
            raise MasformerError(f"{name}.plans needs a plan named {each!r}; there are {', '.join(plans) or 'none'}")


def check_pairs(name: str, pairs: list[list[str]], what: str, known: set[str]) -> None:
    """Raises MasformerError where something is no pair of what is known."""
    for pair in pairs:
        if len(pair) != 2 or not set(pair) <= known:
            raise MasformerError(f"{name} must hold pairs of {what}, got {pair}; allowed: {', '.join(sorted(known))}")


def check_text_pairs(name: str, text: Source) -> None:
    """Raises MasformerError unless the text is of prompts and targets."""
    if not text.is_pairs:
        raise MasformerError(f"{name}.text needs prompt and target, the fields of its pairs")


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Raises MasformerError unless there are seeds, each once."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise MasformerError(f"{name}.seeds must be different whole numbers, at least one, got {list(seeds)}")
    check_each(f"{name}.seeds", seeds, 0, LARGEST_SEED)


def check_each(name: str, values: Iterable[int | None], minimum: int = 1, maximum: int = LARGEST) -> None:
    """Raises MasformerError unless all that are given are whole numbers in the range."""
    for value in values:
        if value is not None:
            check_int(name, value, minimum, maximum)


def check_depths(name: str, depths: Sequence[float]) -> None:
    """Raises MasformerError unless there are depths, all of them in percent."""
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise MasformerError(f"{name}.depths must be percentages, at least one, got {shown(depths)}")


@dataclass(frozen=True)
class RecallStage(Settings):
    """Values that are planted far back and asked for at the end, learnt from nothing.

    Attributes:
        recipe: parts of a training recipe; the pairs, tokenizer, plan and seed are added.
        plans: name -> plan.
        seeds: of the training runs; each has its own pairs.
        task: of `masformer.evaluation.retrieval.TASKS`.
        digits: of the numbers.
        room: tokens of an answer.
        train_lengths: shortest and longest pair that is trained on.
        pairs: to train on.
        length: that is tested.
        depths: in percent.
        examples: prompts for each depth.
    """

    recipe: Named[Named[Any]]
    plans: Named[str]
    seeds: Several[int]
    train_lengths: Several[int]
    pairs: int
    length: int
    depths: Several[float]
    examples: int
    task: str = "passkey"
    digits: int = 2
    room: int = 4

    def __post_init__(self) -> None:
        check_plans("recall", self.plans)
        check_seeds("recall", self.seeds)
        check_choice("recall.task", self.task, TASKS)
        if len(self.train_lengths) != 2 or self.train_lengths[0] > self.train_lengths[1]:
            raise MasformerError(f"recall.train_lengths must be the shortest and longest, got {self.train_lengths}")
        check_depths("recall", self.depths)
        check_each("recall.train_lengths", self.train_lengths)
        for name in ("examples", "pairs", "length", "room"):
            check_int(f"recall.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class FindPart(Settings):
    """What is hidden in text and asked for, under the plans of a stage.

    Attributes:
        tasks: of `masformer.evaluation.retrieval.TASKS`.
        depths: in percent.
        examples: prompts for each task and depth.
        length: of prompt and answer; None: that of the stage's windows.
        searches: of the stage `where`, names of those whose plans are asked; None: all.
        plans: of a stage that trains, names of those whose models are asked; None: all.
        seeds: of a stage that trains, those whose models are asked; None: all.
        room: tokens of an answer; None: the task's.
        chat: whether the question stands in the tokenizer's chat template; None: where there is one.
    """

    tasks: Several[str]
    depths: Several[float]
    examples: int
    length: int | None = None
    searches: Several[str] | None = None
    plans: Several[str] | None = None
    seeds: Several[int] | None = None
    room: int | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        check_depths("retrieval", self.depths)
        check_int("retrieval.examples", self.examples, 1)
        check_each("retrieval", [self.length, self.room])
        for task in self.tasks:
            check_choice("retrieval.tasks", task, TASKS)


def check_unused(name: str, asked: FindPart | None, settings: Sequence[str], why: str) -> None:
    """Raises MasformerError where retrieval is given settings that a stage does not use."""
    for setting in settings:
        if asked is not None and getattr(asked, setting) is not None:
            raise MasformerError(f"{name}.retrieval.{setting} {why}")


@dataclass(frozen=True)
class LanguageStage(Settings):
    """Language modelling: models that start from the same weights and are trained on under each plan.

    Attributes:
        recipe: parts of a training recipe; plan and seed are added.
        plans: name -> plan.
        seeds: of the training runs.
        text: held-out documents.
        lengths: context lengths that are measured.
        max_tokens: of each document, the first so many.
        start: recipe of short sequences from scratch, under full attention, that all plans start from; None: they start
            from `recipe.model`.
        vocabulary: tokens of a tokenizer that is trained first; None: the model's own.
        vocabulary_text: what it is trained on.
        long: names of plans that are also trained from scratch at the long length, with as many tokens.
        equal: pairs of names of plans of equal cost, the first with blocks and the second with windows.
        retrieval: prompts for every trained model; None: none.
        curves: name of a line -> share of the attention operations, in words -> plan; plans beside `plans`, which are
            called by both names (`heads, 25%`). What lines have under one share costs the same.
        better: pairs of lines, the first of which should lose less at every share that both have.
        untrained: whether every plan is measured before training, too.
        untouched: names of plans and lines that are not trained on, and measured before training alone.
        once: names of plans that are trained with the first seed alone.
        models_stay: whether trained models stay once everything was measured of them.
    """

    recipe: Named[Named[Any]]
    plans: Named[str]
    seeds: Several[int]
    text: Source
    lengths: Several[int]
    max_tokens: int
    start: Named[Named[Any]] | None = None
    vocabulary: int | None = None
    vocabulary_text: Source | None = None
    long: Several[str] = field(default_factory=list)
    equal: Several[Several[str]] = field(default_factory=list)
    retrieval: FindPart | None = None
    curves: Named[Named[str]] = field(default_factory=dict)
    better: Several[Several[str]] = field(default_factory=list)
    untrained: bool = False
    untouched: Several[str] = field(default_factory=list)
    once: Several[str] = field(default_factory=list)
    models_stay: bool = True

    @property
    def every(self) -> dict[str, str]:
        """All plans by their names, those of the lines too."""
        lines = ((f"{line}, {share}", plan) for line, points in self.curves.items() for share, plan in points.items())
        return self.plans | dict(lines)

    @property
    def trained(self) -> list[str]:
        """Names of the plans that are trained on."""
        left = {
            *self.untouched,
            *(f"{line}, {share}" for line in self.untouched for share in self.curves.get(line, ())),
        }
        return [name for name in self.every if name not in left]

    def seeds_of(self, name: str) -> list[int]:
        """The seeds that a plan is trained with."""
        return list(self.seeds[:1] if name in self.once else self.seeds)

    def asked_seeds(self, name: str) -> list[int]:
        """The seeds with which a trained plan is asked for what is hidden."""
        if self.retrieval is None or (self.retrieval.plans is not None and name not in self.retrieval.plans):
            return []
        wanted = self.retrieval.seeds
        return [seed for seed in self.seeds_of(name) if wanted is None or seed in wanted]

    def __post_init__(self) -> None:
        for name in self.untouched:
            check_choice("language.untouched", name, [*self.every, *self.curves])
        for name in self.once:
            check_choice("language.once", name, self.trained)
        if self.once and len(self.seeds) < 2:
            raise MasformerError("language.once does nothing with one seed; leave it out")
        if self.untouched and not self.untrained:
            raise MasformerError("language.untouched plans are measured before training; set language.untrained")
        if self.untrained and self.start is not None:
            raise MasformerError("language.untrained is of a pretrained model; leave out language.start")
        check_pairs("language.better", self.better, "lines", set(self.curves))
        check_plans("language", self.plans)
        check_seeds("language", self.seeds)
        self._check_asked()
        check_int("language.max_tokens", self.max_tokens, max(self.lengths, default=1))
        if not self.lengths:
            raise MasformerError("language.lengths needs at least one length")
        check_each("language.lengths", self.lengths)
        check_each("language.vocabulary", [self.vocabulary])
        if (self.vocabulary is None) != (self.vocabulary_text is None):
            raise MasformerError("language.vocabulary and vocabulary_text are given together or not at all")
        for name in self.long:
            check_choice("language.long", name, self.trained)
        if self.long and self.start is None:
            raise MasformerError("language.long is held against training that starts short; give language.start")
        check_pairs("language.equal", self.equal, "plans", set(self.trained))

    def _check_asked(self) -> None:
        """Raises MasformerError where `retrieval` asks for models that are not trained."""
        check_unused("language", self.retrieval, ["searches"], "is of the stage where; name trained plans in plans")
        if self.retrieval is None:
            return
        for name in self.retrieval.plans or ():
            check_choice("language.retrieval.plans", name, self.trained)
        if (seeds := self.retrieval.seeds) is None:
            return
        check_seeds("language.retrieval", seeds)
        if not set(seeds) <= set(self.seeds):
            known = ", ".join(map(str, self.seeds))
            raise MasformerError(f"language.retrieval.seeds must be of {known}, got {shown(seeds)}")
        for name in self.trained if self.retrieval.plans is None else self.retrieval.plans:
            if not self.asked_seeds(name):
                known = ", ".join(map(str, self.seeds_of(name)))
                raise MasformerError(f"language.retrieval.seeds {shown(seeds)} holds no seed of {name}: {known}")


@dataclass(frozen=True)
class SearchPart(Settings):
    """A way to find what is full (`masformer.placement.search_layers`).

    Attributes:
        by: `layers` or `heads`.
        criteria: what must not suffer, as text; None: what the method does by default.
        method: of `masformer.placement.METHODS`.
        rounds: of the method gradient; None: its own.
        points: of its path; None: its own.
        known: number of full layers -> name of the documents chosen by -> plan, where it was found before.
    """

    by: str
    criteria: str | None = None
    method: str = "gradient"
    rounds: int | None = None
    points: int | None = None
    known: Named[Named[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("where.searches.by", self.by, UNITS)
        check_choice("where.searches.method", self.method, METHODS)


@dataclass(frozen=True)
class WhereStage(Settings):
    """Which layers or KV heads are full: rules, searches, and random controls, of equal cost.

    Attributes:
        model: the model.
        choose: name -> documents that searches choose by.
        texts: name -> other documents, that placements are measured on.
        budgets: numbers of full layers; by heads, as many KV heads as these layers have.
        searches: name -> how what is full is found.
        local: span of the others.
        length: of the windows.
        windows: that a search chooses by, and as many prompts.
        random: random placements of each budget, half of them by layers and half by heads.
        controls: documents of each text that rules and random placements are measured on; None: all.
        better: pairs of searches, the first of which should find better plans.
        as_good: pairs of searches, the first of which should find plans as good.
        retrieval: prompts under what was found on the first of `choose`.
        seed: of the random placements.
    """

    model: ModelRecipe
    choose: Named[Source]
    texts: Named[Source]
    budgets: Several[int]
    searches: Named[SearchPart]
    local: str
    length: int
    windows: int = 4
    random: int = 4
    controls: int | None = None
    better: Several[Several[str]] = field(default_factory=list)
    as_good: Several[Several[str]] = field(default_factory=list)
    retrieval: FindPart | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "windows"):
            check_int(f"where.{name}", getattr(self, name), 1)
        check_int("where.random", self.random, 0)
        check_int("where.seed", self.seed, 0, LARGEST_SEED)
        check_each("where.budgets", self.budgets)
        check_each("where.controls", [self.controls])
        for name in ("choose", "texts", "budgets", "searches"):
            if not getattr(self, name):
                raise MasformerError(f"where.{name} must hold something")
        for name in (self.retrieval.searches if self.retrieval else None) or ():
            check_choice("where.retrieval.searches", name, self.searches)
        unused = ("plans", "seeds")
        check_unused("where", self.retrieval, unused, "is of stages that train; name searches in searches")
        for name in ("better", "as_good"):
            check_pairs(f"where.{name}", getattr(self, name), "searches", set(self.searches))


@dataclass(frozen=True)
class SpansStage(Settings):
    """Which local span, in layers that are not full.

    Attributes:
        model: the model.
        text: documents.
        groups: name -> spans that are compared, as text.
        equal: pairs of a block and a window span of equal cost.
        length: of the windows of text.
        full: layers that are full beside them, as text; empty: none.
    """

    model: ModelRecipe
    text: Source
    groups: Named[Several[str]]
    equal: Several[Several[str]]
    length: int
    full: str = ""

    def __post_init__(self) -> None:
        check_int("spans.length", self.length, 2)
        known = {span for spans in self.groups.values() for span in spans}
        check_pairs("spans.equal", self.equal, "spans of the groups", known)


@dataclass(frozen=True)
class SummarizationPart(Settings):
    """Fine-tuning on pairs, and summaries by length of the prompt.

    Attributes:
        recipe: parts of a training recipe on pairs.
        plans: name -> plan.
        text: documents (`prompt`) and references (`target`) to test on.
        template: the words around a document.
        lengths: of the prompts.
        max_new_tokens: of a summary.
        seed: of the training run.
    """

    recipe: Named[Named[Any]]
    plans: Named[str]
    text: Source
    template: str
    lengths: Several[int]
    max_new_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_plans("generation.summarization", self.plans)
        check_each("generation.summarization.lengths", self.lengths)
        check_int("generation.summarization.max_new_tokens", self.max_new_tokens, 1)
        check_int("generation.summarization.seed", self.seed, 0, LARGEST_SEED)
        check_text_pairs("generation.summarization", self.text)


@dataclass(frozen=True)
class RetrievalPart(Settings):
    """Retrieval by depth, without training.

    Attributes:
        model: the model.
        plans: name -> plan.
        lengths: of prompt and answer.
        depths: in percent.
        examples: prompts for each length and depth.
        task: of `masformer.evaluation.retrieval.TASKS`.
        room: tokens of an answer; None: the task's.
        chat: whether the question stands in the tokenizer's chat template; None: where there is one.
    """

    model: ModelRecipe
    plans: Named[str]
    lengths: Several[int]
    depths: Several[float]
    examples: int
    task: str = "passkey"
    room: int | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        check_plans("generation.retrieval", self.plans)
        check_each("generation.retrieval.lengths", self.lengths)
        check_depths("generation.retrieval", self.depths)
        check_int("generation.retrieval.examples", self.examples, 1)
        check_each("generation.retrieval.room", [self.room])
        check_choice("generation.retrieval.task", self.task, TASKS)


@dataclass(frozen=True)
class AnswersPart(Settings):
    """Queries about documents whose answers are scored.

    Attributes:
        text: documents (`prompt`) and references (`target`).
        query: the field of the query.
        template: the words around document and query.
        length: the most tokens of a prompt.
        max_new_tokens: of an answer.
    """

    text: Source
    query: str
    template: str
    length: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        check_each("generation.beside.answers", [self.length, self.max_new_tokens])
        check_text_pairs("generation.beside.answers", self.text)
        if not Template(self.template).has_query:
            raise MasformerError("generation.beside.answers.template has no {query}")


@dataclass(frozen=True)
class BesidePart(Settings):
    """What is written beside what is likely: plans by the loss of text and by what they find and answer, untrained.

    Attributes:
        model: the model.
        plans: name -> plan.
        text: documents.
        length: of the windows of text, and of prompts to find something in.
        retrieval: what is hidden and asked for.
        answers: queries about documents; None: none.
    """

    model: ModelRecipe
    plans: Named[str]
    text: Source
    length: int
    retrieval: FindPart
    answers: AnswersPart | None = None

    def __post_init__(self) -> None:
        check_plans("generation.beside", self.plans)
        check_int("generation.beside.length", self.length, 2)
        unused = ("searches", "plans", "seeds")
        check_unused("generation.beside", self.retrieval, unused, "is of other stages; every plan is asked")


@dataclass(frozen=True)
class GenerationStage(Settings):
    """Summaries, retrieval and answers.

    Attributes:
        summarization: fine-tuned summaries.
        retrieval: retrieval by depth.
        beside: retrieval and answers beside the loss of text.
    """

    summarization: SummarizationPart | None = None
    retrieval: RetrievalPart | None = None
    beside: BesidePart | None = None

    def __post_init__(self) -> None:
        if self.summarization is None and self.retrieval is None and self.beside is None:
            raise MasformerError("generation needs summarization, retrieval or beside")


@dataclass(frozen=True)
class CostStage(Settings):
    """What plans cost: counted, and timed.

    Attributes:
        model: the model.
        plans: name -> plan.
        counted: lengths at which operations and caches are counted.
        benches: `prefill`, `decode` or `train` -> lengths that are timed.
        repeats: timed rounds.
    """

    model: ModelRecipe
    plans: Named[str]
    counted: Several[int]
    benches: Named[Several[int]] = field(default_factory=dict)
    repeats: int = 3

    def __post_init__(self) -> None:
        check_int("cost.repeats", self.repeats, 1)
        check_each("cost.counted", self.counted)
        for bench, lengths in self.benches.items():
            check_choice("cost.benches", bench, ("prefill", "decode", "train"))
            check_each(f"cost.benches.{bench}", lengths)
        if not self.plans or not self.counted:
            raise MasformerError("cost needs at least one plan and one length to count at")

"""A training run as a file: every setting, its default, and what is allowed.

A recipe is YAML. Settings on the command line (`--training.steps 60`, `--data.sources.books.limit 5`) take the place
of those in the file. A name that does not exist, a value of the wrong kind, or a setting that would do nothing is an
error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring

from masformer.cost import count_text
from masformer.data.sources import KINDS, Source
from masformer.data.store import PROMPT
from masformer.errors import LARGEST_SEED, MasformerError, check_int, check_number
from masformer.schema import Named, Settings, Several, build
from masformer.settings import parse_yaml, read_settings, without_none

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Backend = Literal["auto", "reference", "tiled", "flash", "flex"]
Packing = Literal["across", "separate"]
Cut = Literal["tail", "head", "middle"]
Precision = Literal["float32", "bfloat16"]
Schedule = Literal["cosine", "constant", "linear"]
Sharding = Literal["none", "fsdp"]
Tracker = Literal["wandb", "mlflow", "tensorboard"]
TENSORBOARD = "tensorboard"
PRECISIONS, TRACKERS = get_args(Precision), get_args(Tracker)
BYTES = "bytes"


@dataclass(frozen=True)
class ModelRecipe(Settings):
    """What is trained.

    Attributes:
        source: hub id, folder or .gguf file; None: from scratch, by `config`.
        config: model type and sizes, as in transformers. From scratch: the model. Beside a source: what its config is
            expected to say; checked when it is loaded, and all that a dry run needs.
        tokenizer: hub id or folder, or `bytes` (one token a byte); by default the model's own.
        plan: spans as text or plan file; by default the model's own.
        full: number of full layers, in place of `plan`.
        placement: which layers are full.
        local: span of the other layers.
        max_positions: longest sequence, beyond the trained length.
        position_method: how positions are extended.
        dtype: of the weights while they are trained; 16 bits lose small updates, so use `training.precision` for speed.
        backend: implementation of attention.
    """

    source: str | None = None
    config: Named[Any] | None = None
    tokenizer: str | None = None
    plan: str | None = None
    full: int | None = None
    placement: str | None = None
    local: str | None = None
    max_positions: int | None = None
    position_method: str | None = None
    dtype: Dtype = "float32"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.source is None and self.config is None:
            raise MasformerError("model needs a source (hub id, folder, .gguf file), or a config to start from scratch")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise MasformerError("model.config needs a model_type, for example llama")
        if self.source is None and self.tokenizer is None:
            raise MasformerError("model.tokenizer is needed to start from scratch: hub id, folder, or bytes")
        if self.plan is not None and (self.full is not None or self.placement is not None or self.local is not None):
            raise MasformerError("model: give either plan or full, placement and local")
        if self.local is None and (self.full is not None or self.placement is not None):
            raise MasformerError("model: full and placement need local, the span of the other layers")
        if self.local is not None and self.full is None and self.placement is None:
            raise MasformerError("model: local needs full or placement, which say what layers stay full")
        if self.position_method is not None and self.max_positions is None:
            raise MasformerError("model.position_method does nothing without max_positions")
        if self.source is None and self.max_positions is not None:
            raise MasformerError("model.max_positions does nothing from scratch; set max_position_embeddings in config")


@dataclass(frozen=True)
class DataRecipe(Settings):
    """What it is trained on.

    Attributes:
        sources: name -> source; all plain texts, all pairs or all conversations.
        length: tokens of a row.
        packing: `across` documents (default for texts), or `separate` (each sees only itself; always so for pairs
            and conversations).
        shuffle: rows in random order, a new one each time round.
        template: of pairs: the words around the prompt.
        cut: of pairs: which part of an over-long prompt is cut out.
        max_target: of pairs: the most tokens of a target.
        cache: folder for what was tokenized; by default masformer/tokens in the user's cache folder.
    """

    sources: Named[Source]
    length: int = 2048
    packing: Packing | None = None
    shuffle: bool = True
    template: str = PROMPT
    cut: Cut = "tail"
    max_target: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        kind = _kind("data.sources", self.sources)
        check_int("data.length", self.length, 2)
        if kind != "texts" and self.packing == "across":
            raise MasformerError(f"data.packing across is for texts; {kind} are always separate")
        for name, usual in (("template", PROMPT), ("cut", "tail"), ("max_target", None)):
            if kind != "pairs" and getattr(self, name) != usual:
                raise MasformerError(f"data.{name} does nothing for {kind}; it is for sources with prompt and target")


@dataclass(frozen=True)
class EvaluationRecipe(Settings):
    """Perplexity on held-out texts while training.

    Attributes:
        sources: name -> source, of the kind that is trained on.
        lengths: context lengths in tokens; by default the training length.
        every: steps between evaluations; None: only before and after.
        at_start: evaluate before the first step.
        max_tokens: use at most the first so many tokens of each document.
        precision: of matrix products where the weights are float32: `float32` or `bfloat16` (autocast); by default
            bfloat16 on CUDA.
    """

    sources: Named[Source] = field(default_factory=dict)
    lengths: Several[int] = field(default_factory=list)
    every: int | None = None
    at_start: bool = True
    max_tokens: int | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            if self.lengths or any(each is not None for each in (self.every, self.max_tokens, self.precision)):
                raise MasformerError("evaluation does nothing without evaluation.sources")
            return
        kind = _kind("evaluation.sources", self.sources)
        if kind != "texts" and self.lengths:
            raise MasformerError(f"evaluation.lengths does nothing for {kind}: they are evaluated at data.length")
        for length in self.lengths:
            check_int("evaluation.lengths", length, 1)
        for name in ("every", "max_tokens"):
            if getattr(self, name) is not None:
                check_int(f"evaluation.{name}", getattr(self, name), 1)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after a step of so many; step 0 is before the first."""
        if not self.sources:
            return False
        if step == 0:
            return self.at_start
        return step == steps or (self.every is not None and step % self.every == 0)


@dataclass(frozen=True)
class TrainingRecipe(Settings):
    """How it is trained. A recipe means the same on any number of devices: `rows` counts all of them together.

    Attributes:
        steps: optimizer steps; give either these or `epochs`.
        epochs: times that every row is seen.
        rows: rows of one step, over all devices.
        device_rows: rows at the same time on one device; the rest is accumulated.
        learning_rate: the highest.
        schedule: after the warm-up: `cosine` to zero, `constant`, or `linear` to zero.
        warmup_steps: steps in which the rate rises to the highest.
        weight_decay: of AdamW, on matrices.
        betas: of AdamW.
        clip: largest norm of a gradient; 0: none.
        precision: `bfloat16` runs matrix products in 16 bits (autocast); the weights keep their dtype.
        checkpointing: make activations anew in the backward pass: less memory, a third more time.
        compile: compile the decoder layers (`masformer.models.compiling`): a minute at the start, faster steps on GPUs.
        loss_chunk: positions whose logits exist at the same time.
        sharding: `fsdp` spreads weights and optimizer over the processes (FSDP2).
        sequence_devices: so many devices share each row, cut into slices (docs/training.md).
        report_to: trackers that get what metrics.jsonl gets, beside it: `wandb`, `mlflow`, `tensorboard`.
        seed: of the order of rows, of new weights and dropout.
    """

    steps: int | None = None
    epochs: float | None = None
    rows: int = 8
    device_rows: int = 1
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: Several[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float = 1.0
    precision: Precision = "float32"
    checkpointing: bool = False
    compile: bool | None = None
    loss_chunk: int = 512
    sharding: Sharding = "none"
    sequence_devices: int | None = None
    report_to: Several[Tracker] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise MasformerError("training needs either steps or epochs")
        for name in ("rows", "device_rows", "loss_chunk"):
            check_int(f"training.{name}", getattr(self, name), 1)
        if self.sequence_devices is not None:
            check_int("training.sequence_devices", self.sequence_devices, 1)
        check_int("training.warmup_steps", self.warmup_steps, 0)
        check_int("training.seed", self.seed, 0, LARGEST_SEED)
        if self.steps is not None:
            check_int("training.steps", self.steps, 1)
            check_int("training.steps times training.rows", self.steps * self.rows, 1)
            if self.warmup_steps > self.steps:
                raise MasformerError(warmup_fault(self.warmup_steps, self.steps))
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) is not None:
                check_number(f"training.{name}", getattr(self, name), 0, above=True)
        for name in ("weight_decay", "clip"):
            check_number(f"training.{name}", getattr(self, name), 0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise MasformerError(f"training.betas must be two numbers from 0 to below 1, got {self.betas}")
        if self.rows % self.device_rows:
            raise MasformerError(
                f"training.rows {self.rows} must be a multiple of training.device_rows {self.device_rows}"
            )
        if self.sharing > 1 and self.compile:
            raise MasformerError(
                "training.compile is not possible with training.sequence_devices; leave one of them out"
            )

    @property
    def sharing(self) -> int:
        """How many devices share a row; 1: none do."""
        return self.sequence_devices or 1


def warmup_fault(warmup: int, steps: int) -> str:
    """What is wrong with a warm-up that is longer than the run."""
    return (
        f"training.warmup_steps {warmup} is more than the {count_text(steps, 'step')}; give at most {steps}, "
        "or for a short trial --training.warmup_steps 0"
    )


@dataclass(frozen=True)
class LoraRecipe(Settings):
    """Low-rank adapters through peft, in place of training all weights; merged into the weights at the end.

    Attributes:
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        dropout: on their input.
        targets: endings of the names of the linear layers that get one; by default all but the output layer.
        train: further modules that are trained whole, for example embeddings and norms (LongLoRA, arXiv 2309.12307).
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: Several[str] = field(default_factory=list)
    train: Several[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_int("lora.rank", self.rank, 1)
        check_number("lora.alpha", self.alpha, 0, above=True)
        check_number("lora.dropout", self.dropout, 0)
        if self.dropout >= 1:
            raise MasformerError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")


@dataclass(frozen=True)
class CheckpointRecipe(Settings):
    """Checkpoints to resume from.

    Attributes:
        every: steps between them, and one at the end, to train on from; None: only when the run is interrupted.
        keep: the newest so many are kept.
    """

    every: int | None = 100
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every is not None:
            check_int("checkpoints.every", self.every, 1)
        check_int("checkpoints.keep", self.keep, 1)


@dataclass(frozen=True)
class LoggingRecipe(Settings):
    """What is written down while training; metrics.jsonl always is.

    Attributes:
        every: steps between two lines.
        tensorboard: also for TensorBoard, in the folder tensorboard, as `training.report_to` tensorboard does.
    """

    every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_int("logging.every", self.every, 1)


@dataclass(frozen=True)
class Recipe(Settings):
    """A whole run.

    Attributes:
        output: folder for the model, checkpoints, metrics and this recipe.
        model: what is trained.
        data: on what.
        training: how.
        evaluation: perplexity on held-out texts.
        lora: adapters in place of all weights.
        checkpoints: to resume from.
        logging: what is written down.
    """

    output: str
    model: ModelRecipe
    data: DataRecipe
    training: TrainingRecipe
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    lora: LoraRecipe | None = None
    checkpoints: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    logging: LoggingRecipe = field(default_factory=LoggingRecipe)

    def __post_init__(self) -> None:
        if not self.output:
            raise MasformerError("output must name a folder")
        if len({source.kind for source in self.sources}) > 1:
            kinds = ", ".join(KINDS)
            raise MasformerError(f"evaluation.sources must be of the kind that is trained on: one of {kinds}")

    @property
    def sources(self) -> list[Source]:
        """All that is trained and evaluated on."""
        return [*self.data.sources.values(), *self.evaluation.sources.values()]

    @property
    def trackers(self) -> list[str]:
        """What gets the metrics beside metrics.jsonl: some of `TRACKERS`."""
        asked = {*(self.training.report_to or ()), *([TENSORBOARD] if self.logging.tensorboard else ())}
        return [tracker for tracker in TRACKERS if tracker in asked]

    @property
    def evaluation_lengths(self) -> list[int]:
        """Ascending context lengths."""
        return sorted(set(self.evaluation.lengths)) or [self.data.length]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, what `from_dict` reads; settings left at None are left out."""
        found: dict[str, Any] = without_none(asdict(self))
        return found

    def to_yaml(self) -> str:
        """The recipe as a file, every default written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Raises MasformerError for a name that does not exist, or a value that is not allowed."""
        recipe: Recipe = build(cls, data, "the recipe")
        return recipe


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file.

    Args:
        path: YAML file.
        overrides: words of a command line, `--a.b VALUE` or `--a.b=VALUE`; the values are read as YAML.

    Raises:
        MasformerError: the file cannot be read, or a setting is wrong.
    """
    data = read_settings(path, "recipe")
    for name, value in _overrides(overrides):
        _set(data, name, value)
    try:
        return Recipe.from_dict(data)
    except MasformerError as error:
        raise MasformerError(f"recipe {path}: {error}") from None


def _overrides(words: Sequence[str]) -> list[tuple[list[str], Any]]:
    found = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, separator, text = word.partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise MasformerError(f"cannot read {word!r}; settings are written --name.name VALUE")
        if not separator:
            if not rest:
                raise MasformerError(f"{name} needs a value")
            text = rest.pop(0)
        try:
            value = parse_yaml(text)
        except MasformerError as error:
            raise MasformerError(f"cannot read the value of {name}: {error}") from None
        found.append((name[2:].replace("-", "_").split("."), value))
    return found


def _set(data: dict[str, Any], name: list[str], value: Any) -> None:
    for part in name[:-1]:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise MasformerError(f"--{'.'.join(name)}: {part} holds no settings")
    data[name[-1]] = value


def _kind(name: str, sources: Mapping[str, Source]) -> str:
    """What the sources give: one of `KINDS`."""
    if not sources:
        raise MasformerError(f"{name} needs at least one source")
    kinds = {source.kind for source in sources.values()}
    if len(kinds) > 1:
        named = " and ".join(KINDS[kind] for kind in KINDS if kind in kinds)
        raise MasformerError(f"{name} mixes {named}; give one kind")
    return kinds.pop()


def recipe_settings() -> dict[str, list[tuple[str, str, str]]]:
    """Every setting by section, as (name, default, what it says); a default of what must be given is `required`."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    _collect(Recipe, "", found)
    return found


def _collect(cls: Any, path: str, found: dict[str, list[tuple[str, str, str]]]) -> None:
    docs = {each.arg_name: each.description or "" for each in parse_docstring(cls.__doc__ or "").params}
    hints = get_type_hints(cls)
    for option in fields(cls):
        kind = next((each for each in (hints[option.name], *get_args(hints[option.name])) if is_dataclass(each)), None)
        name = path + option.name
        if kind is not None:
            _collect(kind, f"{name}.NAME." if get_origin(hints[option.name]) is dict else f"{name}.", found)
            continue
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        shown = "required" if default is MISSING else yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        text = " ".join(docs.get(option.name, "").split())
        found.setdefault(path.rstrip(".") or "recipe", []).append((name, shown, text))

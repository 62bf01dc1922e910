"""Prompts continued under several plans, and the file that keeps what was generated, so that a run that was stopped
goes on.

The prompts of a group are sorted by their length and continued in batches; prompts of one length need no padding.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from masformer.defaults import BATCH
from masformer.errors import MasformerError, check_int
from masformer.evaluation.rouge import (
    LONGBENCH,
    ROUGE,
    SPANS,
    exact_spans,
    longbench_rouge_l,
    repetition,
    rouge_scores,
)
from masformer.files import parse_json, read_text, write_whole
from masformer.generation import generate_batch
from masformer.journal import append_lines, recover_lines
from masformer.models.bridge import apply_plan
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan
from masformer.schema import Settings, build

METRICS = (*ROUGE, LONGBENCH, SPANS, "new_tokens", "words", "repetition", "at_limit")
"""What a prediction is measured by: ROUGE and exact spans in percent (`masformer.evaluation.rouge`), its length in
tokens and in words, the share of repeated 4-grams in percent, and whether the limit ended it (100) or a token that ends
texts (0)."""


@dataclass(frozen=True)
class Generated(Settings):
    """One line of a file of predictions.

    Attributes:
        id: the prompt's name.
        plan: the plan's text form.
        length: the most tokens of the prompt.
        prediction: the generated text, without special tokens and white space around it.
        prompt_tokens: tokens of the prompt.
        new_tokens: generated tokens, without the one that ended the text.
        at_limit: no such token came before the limit.
        prefill_seconds: for reading the prompt: those of its batch, divided by the batch's prompts.
        decode_seconds: for generating, likewise.
        fingerprint: of the weights, the prompt, the reference and everything else that the prediction depends on.
    """

    id: str
    plan: str
    length: int
    prediction: str
    prompt_tokens: int
    new_tokens: int
    at_limit: bool
    prefill_seconds: float
    decode_seconds: float
    fingerprint: str


@dataclass(frozen=True)
class Prediction(Generated):
    """One line of a file of summaries.

    Attributes:
        reference: the text that a person wrote.
        cut_tokens: tokens of the document that did not fit.
    """

    reference: str
    cut_tokens: int

    def scores(self) -> dict[str, float]:
        """`METRICS` of this prediction."""
        return rouge_scores(self.prediction, self.reference) | {
            LONGBENCH: longbench_rouge_l(self.prediction, self.reference),
            SPANS: exact_spans(self.prediction, self.reference),
            "new_tokens": float(self.new_tokens),
            "words": float(len(self.prediction.split())),
            "repetition": repetition(self.prediction),
            "at_limit": 100.0 * self.at_limit,
        }


Line = TypeVar("Line", bound=Generated)


class Predictions(Generic[Line]):
    """The file of predictions, and beside it `FILE.settings.json`, which says what they were made with.

    Args:
        path: JSON lines; made if missing, gone on with if there. None: nothing is kept on disk.
        settings: plain values for the second file. Plans, lengths and prompts are no settings: others may be added to
            the same file later.
        kind: the class of its lines.

    Raises:
        MasformerError: the files cannot be read or written, hold something else, or were made with other settings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any], kind: type[Line]) -> None:
        self.path, self.kind = None if path is None else Path(path), kind
        self._kept: dict[tuple[str, str, int], Line] = {}
        if self.path is None:
            return
        beside = Path(f"{path}.settings.json")
        self._add(recover_lines(self.path, lambda row: build(kind, row), "a prediction"))
        now = json.loads(json.dumps(settings))
        if self._kept:
            try:
                before = parse_json(read_text(beside), str(beside))
                if not isinstance(before, dict):
                    raise MasformerError(f"{beside} holds no settings")
            except MasformerError as error:
                raise MasformerError(
                    f"{path} holds predictions, but {beside}, which says how they were made, cannot be read ({error}); "
                    f"give another --out"
                ) from None
            for name in {**before, **now}:
                if before.get(name) != now.get(name):
                    raise MasformerError(
                        f"{path} was made with other settings: {name} was {_short(before.get(name))}, now it is "
                        f"{_short(now.get(name))}; give another --out, or the same settings"
                    )
        else:
            write_whole(beside, json.dumps(now, indent=2, ensure_ascii=False) + "\n")

    def get(self, name: str, plan: str, length: int, fingerprint: str) -> Line | None:
        """What is there; None if nothing is.

        Raises:
            MasformerError: it was made from another text.
        """
        found = self._kept.get((name, plan, length))
        if found is not None and found.fingerprint != fingerprint:
            raise MasformerError(
                f"{self.path}: the prediction for {name} (plan {plan}, length {length}) was made with another "
                f"text or model; give another --out"
            )
        return found

    def add(self, lines: Sequence[Line]) -> None:
        """Keeps predictions; they are in the file when this returns."""
        if self.path is not None:
            append_lines(self.path, [asdict(line) for line in lines])
        self._add(lines)

    def _add(self, lines: Sequence[Line]) -> None:
        self._kept |= {(line.id, line.plan, line.length): line for line in lines}


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        name: tells it from the others of its length.
        tokens: token ids.
        fingerprint: of everything that its continuation depends on but the plan, see `fingerprint`.
        facts: what its line holds beyond `Generated`.
    """

    name: str
    tokens: Sequence[int]
    fingerprint: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Prompts that may be continued together.

    Attributes:
        length: the most tokens of a prompt.
        requests: the prompts.
        max_new_tokens: the most tokens to generate for each.
    """

    length: int
    requests: Sequence[Request]
    max_new_tokens: int


def predict(
    model: PreTrainedModel,
    tokenizer: Any,
    plans: Mapping[str, AttentionPlan],
    groups: Sequence[Group],
    kept: Predictions[Line],
    *,
    beams: int = 1,
    batch: int = BATCH,
    backend: str = "auto",
    progress: Callable[[str, int, int, int], None] | None = None,
) -> dict[str, list[list[Line]]]:
    """Continues prompts under each plan, but for those that are kept already; the model keeps the last plan.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        plans: name -> plan.
        groups: the prompts.
        kept: what is there, and where the rest goes, a batch at a time.
        beams: see `masformer.generation.generate_batch`.
        batch: prompts that are continued together.
        backend: see `masformer.attend`.
        progress: called with (name of the plan, length, prompt tokens done so far, prompt tokens in all): before
            each group under each plan, and after each batch.

    Returns:
        Name of the plan -> for each group, the lines of its requests, in order.

    Raises:
        MasformerError: what is kept was made in another way, before anything is generated.
    """
    model = bare_model(model)
    for plan in plans.values():
        for group in groups:
            for each in group.requests:
                kept.get(each.name, str(plan), group.length, each.fingerprint)
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    done, total = 0, len(plans) * sum(len(each.tokens) for group in groups for each in group.requests)
    found: dict[str, list[list[Line]]] = {}
    for name, plan in plans.items():
        apply_plan(model, plan, backend)
        found[name] = []
        for group in groups:
            lines = [kept.get(each.name, str(plan), group.length, each.fingerprint) for each in group.requests]
            todo = [index for index, line in enumerate(lines) if line is None]
            todo.sort(key=lambda index: -len(group.requests[index].tokens))  # the longest first: memory
            done += sum(len(each.tokens) for each, line in zip(group.requests, lines, strict=True) if line is not None)
            if progress is not None:
                progress(name, group.length, done, total)
            for start in range(0, len(todo), batch):
                here = todo[start : start + batch]
                output = generate_batch(
                    model,
                    [group.requests[index].tokens for index in here],
                    max_new_tokens=group.max_new_tokens,
                    end_tokens=ends,
                    beams=beams,
                )
                for index, row in zip(here, output.rows, strict=True):
                    request = group.requests[index]
                    lines[index] = kept.kind(
                        id=request.name,
                        plan=str(plan),
                        length=group.length,
                        prediction=tokenizer.decode(row.tokens, skip_special_tokens=True).strip(),
                        prompt_tokens=len(request.tokens),
                        new_tokens=len(row.tokens),
                        at_limit=not row.ended,
                        prefill_seconds=round(output.prefill_seconds / len(here), 3),
                        decode_seconds=round(output.decode_seconds / len(here), 3),
                        fingerprint=request.fingerprint,
                        **request.facts,
                    )
                    done += len(request.tokens)
                kept.add([line for index in here if (line := lines[index]) is not None])
                if progress is not None:
                    progress(name, group.length, done, total)
            found[name].append([line for line in lines if line is not None])
    return found


def model_settings(model: PreTrainedModel, backend: str) -> dict[str, Any]:
    """What all predictions of a file have in common through the model, but for its weights."""
    own = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    own.pop("transformers_version", None)
    return {"dtype": str(model.dtype), "backend": backend, "generation_config": own}


def fingerprint(weights: str, settings: Mapping[str, Any], tokens: Sequence[int], reference: Any) -> str:
    """Tells predictions apart by what they were made of.

    Args:
        weights: of `masformer.models.fingerprint.model_fingerprint`.
        settings: those of `Predictions`.
        tokens: of the prompt.
        reference: what the prediction is scored against.
    """
    parts = [weights, json.dumps(settings, sort_keys=True, default=str), list(tokens), reference]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def check_run(model: PreTrainedModel, lengths: Sequence[int], batch: int) -> None:
    """What can be known before prompts are made.

    Raises:
        MasformerError: a number out of range, a length given twice, or a model in training mode.
    """
    check_int("batch", batch, 1)
    for length in lengths:
        check_int("length", length, 1)
    if len(set(lengths)) != len(lengths):
        raise MasformerError(f"a length is given twice: {', '.join(map(str, lengths))}")
    if model.training:
        raise MasformerError("the model is in training mode; call model.eval() first")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

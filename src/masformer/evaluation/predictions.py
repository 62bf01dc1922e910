"""Generated texts and their scores, and the file that keeps them, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from masformer.errors import MasformerError
from masformer.evaluation.prompts import Example
from masformer.evaluation.rouge import LONGBENCH, ROUGE, longbench_rouge_l, repetition, rouge_scores
from masformer.files import write_whole
from masformer.journal import append_lines, recover_lines

METRICS = (*ROUGE, LONGBENCH, "new_tokens", "words", "repetition", "at_limit")
"""What a prediction is measured by: ROUGE in percent (`masformer.evaluation.rouge`), its length in tokens and in words,
the share of repeated 4-grams in percent, and whether the limit ended it (100) or a token that ends texts (0)."""


@dataclass(frozen=True)
class Prediction:
    """One line of the file of predictions.

    Attributes:
        id: the example's name.
        plan: the plan's text form.
        length: the most tokens of the prompt.
        prediction: the generated text, without special tokens and white space around it.
        reference: the text that a person wrote.
        prompt_tokens: tokens of the prompt.
        cut_tokens: tokens of the document that did not fit.
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
    reference: str
    prompt_tokens: int
    cut_tokens: int
    new_tokens: int
    at_limit: bool
    prefill_seconds: float
    decode_seconds: float
    fingerprint: str

    def scores(self) -> dict[str, float]:
        """`METRICS` of this prediction."""
        return rouge_scores(self.prediction, self.reference) | {
            LONGBENCH: longbench_rouge_l(self.prediction, self.reference),
            "new_tokens": float(self.new_tokens),
            "words": float(len(self.prediction.split())),
            "repetition": repetition(self.prediction),
            "at_limit": 100.0 * self.at_limit,
        }


class Predictions:
    """The file of predictions, and beside it `FILE.settings.json`, which says what they were made with.

    Args:
        path: JSON lines; made if missing, gone on with if there.
        settings: plain values for the second file. Plans, lengths and examples are no settings: others may be added to
            the same file later.

    Raises:
        MasformerError: the files cannot be read or written, hold something else, or were made with other settings.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path, beside = Path(path), Path(f"{path}.settings.json")
        found = recover_lines(path, lambda row: Prediction(**row), "a prediction")
        kept = self._kept = {(line.id, line.plan, line.length): line for line in found}
        now = json.loads(json.dumps(settings))
        if kept:
            try:
                before = json.loads(beside.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
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

    def get(self, example: Example, plan: str, length: int, fingerprint: str) -> Prediction | None:
        """What is there; None if nothing is.

        Raises:
            MasformerError: it was made from another text.
        """
        found = self._kept.get((example.name, plan, length))
        if found is not None and found.fingerprint != fingerprint:
            raise MasformerError(
                f"{self.path}: the prediction for {example.name} (plan {plan}, length {length}) was made with another "
                f"text or model; give another --out"
            )
        return found

    def add(self, lines: Sequence[Prediction]) -> None:
        """Keeps predictions; they are in the file when this returns."""
        append_lines(self.path, [asdict(line) for line in lines])
        self._kept |= {(line.id, line.plan, line.length): line for line in lines}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Scores of one generated text against one reference: ROUGE by the usual packages, and how much a text repeats itself.

| name | what |
|---|---|
| `rouge1`, `rouge2`, `rougeL`, `rougeLsum` | F1 of the package rouge-score with Porter stemming, as papers print it |
| `longbench_rougeL` | F of ROUGE-L of the package rouge, which LongBench prints: no stemming, words as they stand |

| `spans` | of the reference's runs of three words, those that the generated text holds word for word |

All in percent. `rougeLsum` compares sentences, which rouge-score expects on lines of their own: `split_sentences` puts
them there by a regular expression; papers mostly use NLTK's Punkt model, which has to be downloaded.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from masformer.extras import need

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""Scores of rouge-score."""
LONGBENCH = "longbench_rougeL"
"""ROUGE-L of the package rouge."""
SPANS = "spans"
"""What the text holds of the reference word for word."""
SPAN = 3
"""Words of a span."""
NGRAM = 4


def split_sentences(text: str) -> str:
    """The text with a line break after each sentence.

    A sentence ends at a line break, or at `.`, `!` or `?`, closing quotes and brackets included, before white space.
    Abbreviations ("et al. found") are split too.
    """
    sentences = re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]\u201d\u2019]))\s+|\s*\n\s*", text.strip())
    return "\n".join(sentence for sentence in sentences if sentence)


@cache
def _scorer() -> Any:
    need("rouge", "ROUGE")
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(ROUGE[:3]), use_stemmer=True)


@cache
def _sentence_scorer() -> Any:
    need("rouge", "ROUGE")
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    """F1 in percent by `ROUGE`: what `rouge_score.rouge_scorer.RougeScorer(..., use_stemmer=True)` gives, times 100.

    Args:
        prediction: the generated text; an empty one scores 0.
        reference: the text to compare with.
    """
    found = _scorer().score(reference, prediction)
    found |= _sentence_scorer().score(split_sentences(reference), split_sentences(prediction))
    return {name: 100 * float(found[name].fmeasure) for name in ROUGE}


def longbench_rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L as LongBench scores summaries (arXiv 2308.14508, `rouge_score` of its metrics.py), in percent.

    It is `Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]` of the package rouge, and 0 where
    that package fails: it refuses texts without a word.
    """
    need("rouge", "ROUGE")
    from rouge import Rouge

    try:
        return 100 * float(Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def exact_spans(prediction: str, reference: str) -> float:
    """Of the reference's runs of `SPAN` words, those that the prediction holds word for word, in percent.

    Whatever the case, without signs between the words: a recall, so that an answer may say more. A reference of fewer
    words is one span.

    Args:
        prediction: the generated text; an empty one scores 0.
        reference: the text to compare with.
    """
    said, wanted = (re.findall(r"\w+", text.lower()) for text in (prediction, reference))
    size = max(1, min(SPAN, len(wanted)))
    held, asked = _runs(said, size), _runs(wanted, size)
    return 100 * len(asked & held) / len(asked) if asked else 0.0


def _runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def repetition(text: str) -> float:
    """Share of repeated 4-grams of words, in percent: 100 (1 - distinct 4-grams / 4-grams); 0 where there are none.

    seq-rep-4 of Welleck et al., arXiv 1908.04319, section 6.1, over words that white space parts in place of tokens, so
    that tokenizers can be compared.
    """
    words = text.split()
    grams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else 0.0

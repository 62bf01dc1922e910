"""Scores are the packages' own; sentences; repetition."""

from __future__ import annotations

import pytest
from rouge import Rouge
from rouge_score import rouge_scorer

from masformer.evaluation.rouge import (
    LONGBENCH,
    ROUGE,
    exact_spans,
    longbench_rouge_l,
    repetition,
    rouge_scores,
    split_sentences,
)

PAIRS = [
    ("The cats were sitting on the mats. They slept!", "A cat sat on the mat. It was asleep."),
    (
        "The group discussed budgets and plans.\nThen it ended",
        "Plans and a budget were discussed. It ended.",
    ),
    ("growth was 3.5 percent in the cns, e.g. of axons", "the growth of axons in the cns rose by 3.5 percent"),
    ("word " * 300, "other words " * 200),
    ("nothing shared", "Completely different text."),
    ("über größe naïve", "über größe"),
]


@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_scores_equal_the_packages_own(prediction, reference):
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    expected = {name: 100 * score.fmeasure for name, score in scorer.score(reference, prediction).items()}
    whole = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    lines = whole.score(split_sentences(reference), split_sentences(prediction))
    found = rouge_scores(prediction, reference)
    assert found == expected | {"rougeLsum": 100 * lines["rougeLsum"].fmeasure}
    assert tuple(found) == ROUGE
    package = Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
    assert longbench_rouge_l(prediction, reference) == 100 * package


def test_stemming_and_sentences_count():
    assert rouge_scores("cats", "cat")["rouge1"] == 100
    swapped = rouge_scores("It was late. We left early.", "We left early. It was late.")
    assert swapped["rougeLsum"] == 100 > swapped["rougeL"]
    assert longbench_rouge_l("cats", "cat") == 0
    assert LONGBENCH not in swapped


@pytest.mark.parametrize("prediction", ["", " ", ".", "..."])
def test_an_empty_prediction_scores_nothing(prediction):
    assert set(rouge_scores(prediction, "A reference.").values()) == {0.0}
    assert longbench_rouge_l(prediction, "A reference.") == 0


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("as words . with spaces .", ["as words .", "with spaces ."]),
        ("a line\n\n another\nlast", ["a line", "another", "last"]),
        ("3.5 percent, e.g. this", ["3.5 percent, e.g.", "this"]),
        ("", [""]),
    ],
)
def test_sentences_are_put_on_lines(text, sentences):
    assert split_sentences(text).split("\n") == sentences


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("one two three", 0), ("a b c d e", 0), ("a b c d a b c d", 20), ("a " * 9, 250 / 3)],
)
def test_repetition_is_the_share_of_repeated_four_grams(text, share):
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("prediction", "reference", "share"),
    [
        ("So: the next step was, he said.", "The next step was clear.", 200 / 3),
        ("next step the was clear", "The next step was clear.", 0),
        ("It was Grad E, and others.", "Grad E", 100),
        ("", "Grad E", 0),
        ("anything", "...", 0),
    ],
)
def test_exact_spans_are_runs_of_words_that_are_held_word_for_word(prediction, reference, share):
    assert exact_spans(prediction, reference) == pytest.approx(share)

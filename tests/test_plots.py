import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from masformer import AttentionPlan, BlockSpan, FullSpan, MasformerError, WindowSpan
from masformer.plots import CELLS, FULL_COLOR, LOCAL_COLORS, _figure, pattern, picture, plot_plan
from strategies import plans, spans

MIXED = AttentionPlan.mixed(30, 8, "middle", local=WindowSpan(512, sinks=4))


def pooled(span, length, cells):
    positions = torch.arange(length)
    visible = span.visible(positions[:, None], positions).numpy()
    edges = [cell * length // cells for cell in range(cells + 1)]
    ranges = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
    return np.array([[visible[queries, keys].any() for keys in ranges] for queries in ranges])


@given(spans, st.integers(1, 50), st.integers(1, 20))
def test_a_cell_is_dark_if_any_pair_in_it_is_visible(span, length, cells):
    expected = pooled(span, length, min(cells, length))
    assert np.array_equal(pattern(span, length, cells), expected)


def test_a_few_sinks_stay_in_sight_among_a_million_tokens():
    cells = pattern(WindowSpan(512, sinks=4), 1_000_000, 100)
    assert cells[:, 0].all()
    assert np.array_equal(cells[:, 1:].sum(1), [0, 1] + [2] * 98)


def read(text):
    """The layers' marks, and the legend: mark -> (span, number of layers, most keys, mean keys)."""
    head, legend = text.split("\n\n")[:2]
    rulers, rows = head.splitlines()[::2], head.splitlines()[1::2]
    marks = "".join(rows).split()
    first = 0
    for ruler, row in zip(rulers, rows, strict=True):
        numbers = list(re.finditer(r"\d+", ruler))
        assert int(numbers[0][0]) == first
        for number in numbers:
            assert row[number.start()] == marks[int(number[0])]
            assert number.start() == row.index(marks[first]) + 2 * (int(number[0]) - first)
        first += len(row.split())
    entries = [line.split() for line in legend.splitlines()[1:]]
    return marks, {entry[0]: entry[1:] for entry in entries}


@given(plans | st.lists(spans, min_size=9, max_size=50).map(AttentionPlan), st.none() | st.integers(1, 40))
def test_the_picture_names_every_layer(plan, length):
    text = picture(plan, length)
    marks, legend = read(text)
    assert [legend[mark][0] for mark in marks] == [str(span) for span in plan]
    assert len(legend) == len(set(plan))
    for mark, (name, layers, most, *mean) in legend.items():
        span = next(span for span in plan if str(span) == name)
        assert (mark == "█") == isinstance(span, FullSpan)
        assert int(layers) == marks.count(mark)
        assert most == ("all" if isinstance(span, FullSpan) else str(span.max_visible))
        if length:
            assert float(mean[0]) == pytest.approx(span.visible_pairs(length) / length, abs=0.051)
    assert max(map(len, text.splitlines())) <= 80


def test_the_picture_of_a_mixed_plan():
    assert picture(MIXED, 2048).splitlines() == [
        "layer  0         5         10        15        20        25      29",
        "       ▂ ▂ ▂ ▂ ▂ ▂ ▂ ▂ ▂ ▂ ▂ █ █ █ █ █ █ █ █ ▂ ▂ ▂ ▂ ▂ ▂ ▂ ▂ ▂ ▂ ▂",
        "",
        "  span          layers  most keys  mean at 2,048 tokens",
        "█ full               8        all    1,024.5  100.0% of full",
        "▂ window:512+4      22        516      451.1   44.0% of full",
        "",
        "█ full            ▂ window:512+4",
        "█▄                █▄",
        "███▄              ███▄",
        "█████▄            █████▄",
        "███████▄          █·▀████▄",
        "█████████▄        █···▀████▄",
        "███████████▄      █·····▀████▄",
        "█████████████▄    █·······▀████▄",
        "███████████████▄  █·········▀████▄",
        "queries downwards, keys rightwards, 2,048 tokens; · hidden",
    ]


def test_long_models_take_several_rows():
    marks, legend = read(picture(AttentionPlan.mixed(126, 9, "spread", local=BlockSpan(1024))))
    assert len(marks) == 126
    assert legend["█"] == ["full", "9", "all"]


@settings(deadline=None, max_examples=15)
@given(plans, st.integers(1, 200))
def test_the_figure_has_a_panel_for_every_layer(plan, length):
    panels = _figure(plan, length).axes
    assert [panel.texts[0].get_text() for panel in panels] == [str(layer) for layer in range(len(plan))]
    for panel, span in zip(panels, plan, strict=True):
        (image,) = panel.images
        assert np.array_equal(image.get_array() == 2, pattern(span, length, CELLS))
        color = image.to_rgba(np.array([[2]]), norm=True)[0, 0]
        assert (tuple(color) == to_rgba(FULL_COLOR)) == isinstance(span, FullSpan)


def test_the_figure_is_a_picture(tmp_path):
    path = tmp_path / "plan.png"
    plot_plan(MIXED, path, length=1_000_000)
    pixels = imread(path)
    height, width, _ = pixels.shape
    assert width > height > 300
    full, local = (
        int(np.isclose(pixels, to_rgba(color), atol=2 / 255).all(-1).sum()) for color in (FULL_COLOR, LOCAL_COLORS[0])
    )
    assert full == pytest.approx(8 * 200 * 200 / 2, rel=0.1)
    assert 0 < local < full
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".png", b"\x89PNG\r\n"), (".pdf", b"%PDF-"), (".svg", b"<?xml"), (".JPG", b"\xff\xd8\xff"), (".webp", b"RIFF")],
)
def test_the_suffix_decides_the_format(tmp_path, suffix, start):
    path = tmp_path / f"plan{suffix}"
    plot_plan(AttentionPlan((FullSpan(), BlockSpan(4))), path, length=16)
    assert path.read_bytes().startswith(start)


def test_what_cannot_be_drawn_is_refused(tmp_path):
    for path, length, message in [
        ("plan.txt", 8, "plan.txt; allowed: .png, .pdf, .svg, .jpg, .webp"),
        ("plan", 8, "cannot tell the format of figure"),
        ("missing/plan.png", 8, "plan.png: No such file or directory"),
        ("plan.png", 0, "length must be at least 1, got 0"),
    ]:
        with pytest.raises(MasformerError) as error:
            plot_plan(MIXED, tmp_path / path, length)
        assert message in str(error.value)
    with pytest.raises(MasformerError, match="length must be at least 1, got 0"):
        picture(MIXED, 0)
    assert list(tmp_path.iterdir()) == []

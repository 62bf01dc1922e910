import io

import pytest
from rich.console import Console
from rich.table import Table

from masformer.benchmarks import bench_tables
from masformer.evaluation.retrieval import TASKS, EffectiveLength, retrieval_tables
from masformer.tables import show_table

PLANS = ["full", "full@2-3; window:64+4", "full@1,5,9,13,16,20,24,28; window:256+4"]
BY_HEADS = "; ".join(["full@" + ",".join(f"{layer}:{layer % 3}" for layer in range(0, 60, 2)), "window:256+4"])


def shown(table, width):
    file = io.StringIO()
    show_table(Console(file=file, width=width, highlight=False), table)
    return file.getvalue()


def table_of(names, figures, heading="plan"):
    table = Table(title="Figures")
    table.add_column(heading)
    for number in range(figures):
        table.add_column(f"figure {number}", justify="right")
    for row, name in enumerate(names):
        table.add_row(name, *(f"{row}{number}.123" for number in range(figures)))
    return table


@pytest.mark.parametrize("heading", ["plan", "variant"])
@pytest.mark.parametrize("figures", [1, 4, 6, 30])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_plan_and_no_figure_is_shortened(heading, figures, width):
    names = [*PLANS, BY_HEADS]
    text = shown(table_of(names, figures, heading), width)
    assert "…" not in text
    for row in range(len(names)):
        for number in range(figures):
            assert f" {row}{number}.123 " in text
    for name in names:
        assert name in text or name.replace(" ", "") in "".join(
            "".join(line.split("┃")[0].split("│")[1].split()) for line in text.splitlines() if "│" in line
        )


def test_names_that_fit_stay_in_their_place_and_others_stand_below():
    assert "1:" not in shown(table_of(PLANS, 2), 80)
    lines = shown(table_of([*PLANS, BY_HEADS], 6), 80).splitlines()
    assert lines[-1] == f"4: {BY_HEADS}"
    assert max(map(len, lines[:-4])) <= 80


def test_the_tables_of_evaluations_and_benches_name_their_plans_in_80_columns():
    reach = [EffectiveLength(name, task, 2048) for name in PLANS for task in TASKS]
    row = {"length": 8192, "median": 1.0, "tokens_per_second": 1e5, "speedup": 1.0, "share": 1.0, "exponent": 1.0}
    row |= {"cache_bytes": 10**9, "peak_bytes": 10**9, "of_limit": 1.0, "ideal_bytes": 1.0, "share_bytes": 1.0}
    tables = [retrieval_tables([], reach)[1], *bench_tables("Times", [row | {"name": name} for name in PLANS])]
    for table in tables:
        text = shown(table, 80)
        assert "…" not in text
        for name in PLANS:
            assert name in text
    assert "variable_" in shown(tables[0], 80)

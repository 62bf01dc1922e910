"""Reports of records: those of this repository, and made ones that are hard to show."""

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.image import imread

import masformer
from masformer import MasformerError, records
from masformer.placement.result import SearchResult
from masformer.reports import Code, Report, Table, build_report, document, figures, title_of
from masformer.reports.figures import draw, heat_map

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*.json"))
KINDS = {records.read_record(file).kind for file in FILES}
MARKDOWN = MarkdownIt("commonmark").enable("table")


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


class Page(HTMLParser):
    """What an HTML page holds: tables as lists of rows of texts, and everything else that the tests ask for."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.images, self.links, self.text, self.ids = [], [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [value for key, value in attributes if key in ("href", "src") and tag != "img"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append((values["alt"], values["src"]))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)
        if any(tag in self.open for tag in ("td", "th")):
            self.tables[-1][-1][-1] += data


def markdown_tables(text):
    """The tables of a Markdown text as CommonMark and GitHub's extension read them: rows of texts."""
    tables = []
    for token in MARKDOWN.parse(text):
        if token.type == "table_open":
            tables.append([])
        if token.type == "tr_open":
            tables[-1].append([])
        if token.type == "inline" and tables and token.level == 4:
            tables[-1][-1].append("".join(child.content for child in token.children))
        if token.type == "inline" and tables and token.level not in (1, 4) and token.map:
            assert token.level in (1, 2, 3, 4)
    return tables


def table_with(tables, *titles):
    (found,) = [table for table in tables if set(titles) <= set(table[0])]
    return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def number(text):
    return float(text.split(" ")[0].replace(",", ""))


def report_of(folder, *names):
    found = [records.read_record(RESULTS / f"{name}.json") for name in names]
    report = build_report(found, "test")
    report.write(folder)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    found, others = records.read_records(RESULTS)
    assert others == []
    report = build_report(found, "results", others)
    files = report.write(folder)
    assert sorted(files) == sorted(folder.iterdir())
    return report, folder


def test_every_record_of_the_repository_is_in_the_report(whole):
    report, folder = whole
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    shown = "".join(Page(page).text)
    assert len(FILES) >= 16
    for file in FILES:
        content = json.loads(file.read_text())
        assert f"### {file.stem}\n" in text
        assert f"\n{content['command']}\n" in text
        assert content["command"] in shown
        assert f"torch {content['versions']['torch']}" in shown
    assert {section.title for section in document.sections(report)} == KINDS
    assert len(KINDS) >= 9


def test_the_page_needs_nothing_else(whole):
    report, folder = whole
    page = Page((folder / "report.html").read_text())
    assert not {"script", "iframe", "link", "object", "embed"} & set(page.tags)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.links) == len(set(page.ids)) == len(KINDS)
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for _, source in page.images]
    assert pictures == [figure.png for figure in report.figures()]
    assert len(pictures) >= 13
    assert not re.search(r"https?:|url\(|@import", (folder / "report.html").read_text().split("<body>")[0])


def test_markdown_links_pictures_that_are_there(whole):
    _, folder = whole
    linked = re.findall(r"!\[.*\]\((.*)\)", (folder / "report.md").read_text())
    assert sorted(linked) == sorted(path.name for path in folder.glob("*.png"))
    for name in linked:
        height, width, _ = imread(folder / name).shape
        assert 100 < height < 4000
        assert 300 < width < 4000


def test_both_forms_hold_the_same_tables(whole):
    report, folder = whole
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    expected = [[list(table.columns), *map(list, table.rows)] for table in report.tables()]
    assert Page(page).tables == expected
    assert markdown_tables(text) == expected
    assert len(expected) > 20


def test_the_same_records_give_the_same_bytes(tmp_path):
    of_each_kind = {record.kind: record for record in records.read_records(RESULTS)[0]}.values()
    for name in ("one", "two"):
        build_report(of_each_kind, "results").write(tmp_path / name)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) > len(KINDS)
    assert one == two


def test_perplexities_equal_the_record(tmp_path):
    text, _ = report_of(tmp_path, "perplexity-smollm2-pubmed")
    rows = table_with(markdown_tables(text), "plan", "perplexity", "second half")
    results = load("perplexity-smollm2-pubmed")["results"]
    assert [row["plan"] for row in rows] == [result["name"] for result in results]
    for row, result in zip(rows, results, strict=True):
        assert row["perplexity"] == f"{result['perplexity']:.2f}"
        assert row["second half"] == f"{result['second_half']['perplexity']:.2f}"
        assert number(row["bits per byte"]) == pytest.approx(result["bits_per_byte"], rel=1e-3)
    assert "in every row length 2,048, documents 8, tokens 16,384" in text


def test_times_of_attention_equal_the_record(tmp_path):
    text, _ = report_of(tmp_path, "attention-cpu")
    rows = {row["variant"]: row for row in table_with(markdown_tables(text), "variant", "ideal")}
    results = load("attention-cpu")["results"]
    assert {result["name"] for result in results} == rows.keys()
    assert len({(result["name"], result["pass"]) for result in results}) == len(results) > len(rows)
    for result in results:
        row = rows[result["name"]]
        assert number(row[f"{result['pass']}: median, s"]) == pytest.approx(result["median"], rel=1e-3)
        assert number(row[f"{result['pass']}: times as fast"]) == pytest.approx(result["speedup"], rel=1e-3)
        assert number(row["ideal"]) == pytest.approx(result["ideal"], rel=1e-3)


@pytest.mark.parametrize("name", ["prefill-smollm2-cpu", "decode-smollm2-cpu"])
def test_times_of_generation_equal_the_record(tmp_path, name):
    text, _ = report_of(tmp_path, name)
    rows = table_with(markdown_tables(text), "variant", "length")
    for row, result in zip(rows, load(name)["results"], strict=True):
        assert (row["variant"], number(row["length"])) == (result["name"], result["length"])
        assert number(row["times as fast"]) == pytest.approx(result["speedup"], rel=1e-3)
        assert number(row["tokens per second"]) == pytest.approx(result["tokens_per_second"], rel=1e-3)
        size, unit = row["cache"].split()
        scale = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
        assert float(size) * scale == pytest.approx(result["cache_bytes"], rel=5e-3)


def test_placements_equal_the_record(tmp_path):
    text, _ = report_of(tmp_path, "search-smollm2-qmsum")
    rows = {row["placement"]: row for row in table_with(markdown_tables(text), "placement")}
    placements = load("search-smollm2-qmsum")["placements"]
    assert len(rows) == 27
    for name, scores in placements.items():
        for score in scores:
            assert rows[score["name"]][f"{name}: perplexity"] == f"{score['tail_perplexity']:.2f}"
            assert rows[score["name"]][f"{name}: KL"] == f"{score['kl']:.4f}"


def test_training_equals_the_records(tmp_path):
    names = ["train-smollm2-mixed", "train-smollm2-full"]
    text, _ = report_of(tmp_path, *names)
    tables = markdown_tables(text)
    assert {row["record"]: row["plan"] for row in table_with(tables, "record", "plan")} == {
        name: load(name)["recipe"]["model"]["plan"] for name in names
    }
    shown = [table for table in tables if table[0][:2] == ["text", "length"]]
    for name, table in zip(names, shown, strict=True):
        evaluations = load(name)["evaluations"]
        for row in [dict(zip(table[0], row, strict=True)) for row in table[1:]]:
            for step, found in evaluations.items():
                stem = f"eval_{row['text']}_2048"
                assert row[f"step {step}: perplexity"] == f"{found[f'{stem}_perplexity']:.2f}"
                assert row[f"step {step}: second half"] == f"{found[f'{stem}_second_half_perplexity']:.2f}"
    assert sum("train-loss.png" in line for line in text.splitlines()) == 1


def test_exports_are_compared_in_one_table(tmp_path):
    names = ["export-smollm2-mlx-lm", "export-smollm2-transformers", "export-smollm2-vllm"]
    rows = table_with(markdown_tables(report_of(tmp_path, *names)[0]), "record", "target")
    for row, name in zip(rows, names, strict=True):
        verification = load(name)["verification"]
        assert (row["record"], row["target"], row["version"]) == (name, load(name)["target"], verification["version"])
        assert number(row["difference"]) == pytest.approx(verification["difference"], rel=1e-3)


def test_the_demo_shows_costs_quality_and_the_medians_of_its_times(tmp_path):
    text, _ = report_of(tmp_path, "demo-cpu")
    record, tables = load("demo-cpu"), markdown_tables(text)
    assert record["conclusion"] in text
    rows = table_with(tables, "plan", "perplexity")
    assert [row["second half"] for row in rows] == [
        f"{result['second_half']['perplexity']:#.4g}" for result in record["perplexity"]
    ]
    times = {row["name"]: number(row["median"]) for row in table_with(tables, "name", "median")}
    assert times == {
        name: pytest.approx(sorted(seconds)[1], rel=1e-3) for name, seconds in record["forward"]["seconds"].items()
    }
    assert [row["length"] for row in table_with(tables, "KV cache, plan")] == ["2,048", "4,096", "32,768"]


@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("search")], ids=lambda file: file.stem)
def test_a_search_can_be_read_back(file):
    content = json.loads(file.read_text())
    result = SearchResult.from_dict(content)
    again = json.loads(json.dumps(result.to_dict()))
    assert again == {key: content.get(key) for key in again}  # records of before there was a key do not hold it
    assert SearchResult.from_dict(result.to_dict()) == result


def test_what_is_no_search_is_named(tmp_path):
    content = load("search-smollm2-qmsum-tail")
    del content["evidence"][0]["values"]
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(MasformerError, match=r"bad\.json: this is no result of a search: KeyError: 'values'"):
        build_report(records.read_records(tmp_path)[0], "bad")


NASTY = "<script>alert('x')</script> & `a` | *b* _c_ [d](http://e) &amp; $f$ ~~g~~ \\| #h"


def made(tmp_path, **figures):
    """A record as a command writes it, read back."""
    path = tmp_path / "made.json"
    records.write_record(path, ["masformer", "eval", "something", "MODEL"], "0.0", **figures)
    return records.read_record(path)


@pytest.mark.parametrize("name", ["path", "version"])
def test_figures_may_have_any_name(tmp_path, name):
    assert made(tmp_path, **{name: "mine"}).figures == {name: "mine"}


def test_text_of_records_is_never_markup(tmp_path):
    rows = [{"name": NASTY, "length": length, "score": 1.5 * length} for length in (1, 2)]
    rows += [{"name": "`code`", "length": 1, "score": 1.0}, {"name": "two\nlines", "length": 1, "score": 3.0}]
    record = made(tmp_path, model=NASTY, note=f"# {NASTY * 2}", results=rows, settings={NASTY: 1})
    report = build_report([record], NASTY)
    report.figure("picture", draw(rows, "score", "score")[0], NASTY)
    report.section(NASTY).table(Table((NASTY,), ((NASTY,), (Code("a|b`c"),)), (False,), NASTY, NASTY))
    html, text = report.to_html(), report.to_markdown()
    page = Page(html)
    assert "script" not in page.tags
    assert page.tables[0][1][0] == NASTY
    assert page.images == [(NASTY, page.images[0][1])]
    assert {NASTY, f"# {NASTY * 2}"} <= set(page.text)
    tables = markdown_tables(text)
    assert [row[0] for row in tables[0][1:]] == [NASTY, NASTY, "`code`", "two lines"]
    assert [row[0] for row in tables[1]] == [NASTY, NASTY, "a|b`c"]
    tokens = MARKDOWN.parse(text)
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    assert {child.type for child in inline} <= {
        "text",
        "code_inline",
        "image",
        "text_special",
        "strong_open",
        "strong_close",
    }
    assert not any(token.type.startswith(("html", "bullet", "ordered")) for token in tokens)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h3", "h2"]


@pytest.mark.parametrize(
    "start", ["# x", "- x", "+ x", "1. x", "12) x", "> x", "===", "---", "* x", "```", "    x", "|a|"]
)
def test_a_paragraph_is_a_paragraph_however_it_begins(start):
    report = Report("title")
    report.text(start)
    kinds = [token.type for token in MARKDOWN.parse(report.to_markdown())]
    assert kinds == ["heading_open", "inline", "heading_close", "paragraph_open", "inline", "paragraph_close"]


def test_intervals_and_general_rows(tmp_path):
    interval = {"mean": 12.34, "low": 11.81, "high": 12.89, "count": 30}
    rows = [
        {"name": "full", "plan": "full", "length": length, "rouge": interval, "raw": [1.0, 2.0], "task": "t", "n": None}
        for length in (512, 1024)
    ]
    record = made(tmp_path, model="m", settings={"samples": 3, "lengths": [512, 1024]}, results=rows, differences=[])
    report = build_report([record], "x")
    (table,) = report.tables()
    assert table.columns == ("name", "length", "rouge")
    assert table.rows == (("full", "512", "12.3 [11.8, 12.9]"), ("full", "1,024", "12.3 [11.8, 12.9]"))
    text = report.to_markdown()
    assert "Settings:\n\n```\nmodel: m\nsamples: 3\nlengths: 512, 1,024\n```" in text
    assert [figure.caption for figure in report.figures()] == ["rouge with 95% intervals, by length"]


def first_of(names):
    found = [records.read_record(RESULTS / f"{name}.json") for name in names]
    report = build_report(found, title_of(found))
    return report.title, "".join(report.blocks[0].parts)


def test_a_report_begins_with_what_was_measured_on_what_and_what_came_out(whole):
    model = "SmolLM2-135M-Instruct.Q4_1.gguf"
    title, text = first_of(["perplexity-context-smollm2", "search-smollm2-qmsum"])
    assert title == f"Perplexity and plans found by search: {model}"
    assert text.startswith(
        f"2 records of 2 commands, of {model}, on CPU, x86_64. Perplexity at 4,096 tokens: full 18.5 ["
    )
    assert text.endswith(f"Found: {load('search-smollm2-qmsum')['plan']}.")
    title, text = first_of(["attention-cpu"])
    assert title == "Times of attention"
    assert "window:512, forward 7.016; " in text
    assert text.endswith("more below.")
    assert title_of(records.read_records(RESULTS)[0]).endswith(" and more")
    text = "".join(whole[0].blocks[0].parts)
    assert text.startswith(f"{len(FILES)} records of {len(KINDS)} commands, of ")
    assert " tokens: " not in text


def test_a_plan_file_is_shown_as_its_plan(tmp_path):
    names = {"full": "full", "runs/Found.YAML": "full@1; window:8", "mine.json": "block:4"}
    rows = [{"name": name, "plan": plan, "length": 64, "score": 1.5} for name, plan in names.items()]
    reach = [{"name": name, "task": "passkey", "effective_length": 64} for name in names]
    apart = [{"name": "full", "against": "mine.json", "difference": 0.5}]
    record = made(tmp_path, kind="eval retrieval", model="m", results=rows, effective_lengths=reach, differences=apart)
    report = build_report([record], "x")
    first, second, third = report.tables()
    for table in (first, second):
        assert [row[0] for row in table.rows] == list(names.values())
    assert "block:4" in third.rows[0]
    assert not any(name in report.to_markdown() for name in list(names)[1:])


def test_rows_by_depth_give_heat_maps_and_a_table_over_all_depths(tmp_path):
    rows = [
        {
            "name": name,
            "task": "passkey",
            "length": length,
            "depth": depth,
            "score": float(length / 20 - (depth or 0) / 2),
        }
        for name in ("full", "window:8")
        for length in (1000, 2000)
        for depth in (None, 0, 50, 100)
    ]
    report = build_report([made(tmp_path, results=rows)], "x")
    (table,) = report.tables()
    assert len(table.rows) == 4
    assert "over all depths" in table.note
    figure = heat_map(rows, "score")
    panels = [axes for axes in figure.axes if axes.images]
    assert [panel.get_title() for panel in panels] == ["full\npasskey", "window:8\npasskey"]
    expected = [[50.0, 100.0], [25.0, 75.0], [0.0, 50.0]]
    assert panels[0].images[0].get_array().tolist() == expected
    assert panels[0].images[0].get_clim() == (0, 100)
    assert heat_map([row for row in rows if row["depth"] is None], "score") is None


def test_lines_have_a_point_for_each_length_and_a_band():
    rows = [
        {"name": name, "length": length, "loss": masformer.evaluation.intervals.Interval(m, m - 1, m + 2, 5)}
        for name, m in (("a", 3.0), ("b", 7.0))
        for length in (2048, 512)
    ]
    figure, caption = draw(rows, "loss", "loss, nats")
    (axes,) = figure.axes
    assert caption == "loss, nats with 95% intervals, by length"
    assert [(line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines] == [
        ("a", [512, 2048], [3.0, 3.0]),
        ("b", [512, 2048], [7.0, 7.0]),
    ]
    assert [tuple(band.get_datalim(axes.transData).intervaly) for band in axes.collections] == [(2, 5), (6, 9)]
    one, caption = draw([row for row in rows if row["length"] == 512], "loss", "loss")
    assert caption == "loss with 95% intervals"
    assert [label.get_text() for label in one.axes[0].get_yticklabels()] == ["a", "b"]
    assert draw(rows[:1], "loss", "loss") is draw(rows, "missing", "x") is None


def test_long_and_wide_tables_are_cut_and_say_so(tmp_path):
    rows = [{"name": str(index)} | {f"key{key}": index * key for key in range(20)} for index in range(100)]
    (table,) = build_report([made(tmp_path, results=rows)], "x").tables()
    assert (len(table.rows), len(table.columns)) == (60, 14)
    assert "the first 60 of 100 rows" in table.note
    assert "columns left out: key14" in table.note


def test_two_pictures_of_one_name_are_two_files(tmp_path):
    report = Report("x")
    for value in (1.0, 2.0):
        rows = [{"name": name, "score": value * number} for name, number in (("a", 1), ("b", 2))]
        report.figure("日本", draw(rows, "score", "score")[0], f"{value}")
    report.write(tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert len(set(re.findall(r"\]\((.*)\)", report.to_markdown()))) == 2


def test_records_keep_their_kind_and_old_ones_tell_it_by_their_command(tmp_path):
    record = made(tmp_path, model="m", results=[{"a": 1}])
    assert (record.kind, record.name, record.command) == ("eval something", "made", "masformer eval something MODEL")
    assert record.figures == {"model": "m", "results": [{"a": 1}]}
    content = json.loads(record.path.read_text())
    assert content["format"] == records.FORMAT
    old = {key: value for key, value in content.items() if key not in ("format", "kind")}
    record.path.write_text(json.dumps(old))
    assert records.read_record(record.path) == record
    for name, kind in {
        "attention-cpu": "bench attention",
        "decode-smollm2-cpu": "bench decode",
        "demo-cpu": "demo",
    }.items():
        assert records.read_record(RESULTS / f"{name}.json").kind == kind


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"command": "x",\n "masformer": }', r"bad\.json, line 2, column 15: not JSON \(Expecting value\)"),
        (b"", r"bad\.json: not JSON"),
        (b"\xff\xfe{}", r"bad\.json, line 1: not UTF-8 text"),
        (b"[" * 200_000, r"bad\.json"),
        (b'{"command": "masformer plan", "masformer": "9", "format": 99}', r"bad\.json has format 99; .* reads 0 to 1"),
        (b'{"command": "masformer \'", "masformer": "9"}', r"bad\.json: cannot read its command: No closing quotation"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "good.json").write_bytes((RESULTS / "attention-cpu.json").read_bytes())
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(MasformerError, match=message) as error:
        records.read_records(tmp_path)
    assert "\n" not in str(error.value)


def test_other_json_is_left_out_and_named(tmp_path):
    for name, content in {"a.json": "[]", "b.json": "{}", "c.json": '{"command": 3}', "d.json": "7"}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(MasformerError, match=r"no record in .*: commands write them with --json FILE"):
        records.read_records(tmp_path)
    below = tmp_path / "more" / "x"
    below.mkdir(parents=True)
    (below / "real.json").write_bytes((RESULTS / "attention-cpu.json").read_bytes())
    found, others = records.read_records(tmp_path)
    assert [record.name for record in found] == ["more/x/real"]
    assert [path.name for path in others] == ["a.json", "b.json", "c.json", "d.json"]
    assert "left out: a.json, b.json, c.json, d.json" in build_report(found, "x", others).to_markdown()
    assert (
        "left out: a.json, b.json, c.json, d.json, a.json, b.json and 6 more"
        in build_report(found, "x", others * 3).to_markdown()
    )
    assert records.read_records(tmp_path, without=[tmp_path / "more" / "y"])[0] == found
    with pytest.raises(MasformerError, match="no record in"):
        records.read_records(tmp_path, without=[below])
    with pytest.raises(MasformerError, match="nowhere does not exist"):
        records.read_records(tmp_path / "nowhere")


def shown_or_refused(path):
    """Whether a record gives a page, or one line that names the file."""
    try:
        return build_report([records.read_record(path)], "x").to_html().startswith("<!DOCTYPE html>")
    except MasformerError as error:
        return str(path) in str(error) and "\n" not in str(error)


ONE_OF_A_KIND = {records.read_record(file).kind: file for file in FILES}.values()


@pytest.fixture
def drawn_once(monkeypatch):
    """The same rows are drawn once, and a drawing is written once: most damage leaves most drawings as they are."""
    drawings, files = {}, {}

    def once(draw):
        def drawn(*arguments):
            key = draw.__name__, repr(arguments)
            if key not in drawings:
                drawings[key] = draw(*arguments)
            return drawings[key]

        return drawn

    def save(figure, file, **options):
        if figure not in files:
            files[figure] = io.BytesIO()
            save_drawing(figure, files[figure], **options)
        file.write(files[figure].getvalue())

    save_drawing = MatplotlibFigure.savefig
    monkeypatch.setattr(MatplotlibFigure, "savefig", save)
    monkeypatch.setattr(figures, "draw", once(draw))
    monkeypatch.setattr(figures, "heat_map", once(heat_map))


@pytest.mark.parametrize("file", ONE_OF_A_KIND, ids=lambda file: file.stem)
@pytest.mark.usefixtures("drawn_once")
def test_a_record_with_anything_in_it_is_shown_or_refused(file, tmp_path):
    """Values of records exchanged for others of all types: a report, or one line that names the file."""
    content = json.loads(file.read_text())
    strange = [None, 3, "text", [], [1], [{}], {}, {"a": {"b": 1}}, [None], {"a": [{"name": 1, "length": "x"}]}]
    kept = [key for key in content if key not in ("command", "masformer", "format", "kind")]
    for index, key in enumerate(kept):
        changed = copy.deepcopy(content)
        changed[key] = strange[index % len(strange)]
        if isinstance(content[key], list) and content[key] and isinstance(content[key][0], dict):
            rest = [{**row, "length": strange[place % 5], "name": None} for place, row in enumerate(content[key])]
            changed[key] = rest if index % 2 else changed[key]
        path = tmp_path / f"{index}.json"
        path.write_text(json.dumps(changed))
        assert shown_or_refused(path)

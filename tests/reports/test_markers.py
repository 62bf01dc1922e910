"""Tables of figures in a text file, kept up to date from records."""

import json
from pathlib import Path

import pytest

from masformer import MasformerError, cli
from masformer.reports import OutOfDateError, update_tables
from tiny import letter_tokenizer, tiny

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
ATTENTION = '<!-- table: attention-cpu.json columns="name=span,ideal:.1f" pivot=pass values=speedup:.2f -->'
END = "<!-- end -->"
LEFT_OUT = ("all full, masformer", "transformers, StaticCache")


@pytest.fixture
def file(tmp_path):
    def write(*lines, newline="\n"):
        path = tmp_path / "README.md"
        path.write_bytes(newline.join(lines).encode())
        return path

    return write


def table_of(path):
    lines = path.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [rows[0], *rows[2:]]


def test_a_table_is_written_from_its_record_and_nothing_else_changes(file):
    path = file("# Title", "", ATTENTION, "old", "lines", END, "", "text")
    assert update_tables(path, RESULTS)
    lines = path.read_text().split("\n")
    assert lines[:4] == ["# Title", "", ATTENTION, ""]
    assert lines[-4:] == ["", END, "", "text"]
    header, *rows = table_of(path)
    assert header == ["span", "ideal", "forward", "forward + backward"]
    results = json.loads((RESULTS / "attention-cpu.json").read_text())["results"]
    found = {(row[0].strip("`"), pass_): cell for row in rows for pass_, cell in zip(header[2:], row[2:], strict=True)}
    kept = {pair: cell for pair, cell in found.items() if cell != "-"}
    assert kept == {(row["name"], row["pass"]): f"{row['speedup']:.2f}" for row in results}
    assert {pass_ for _, pass_ in found.keys() - kept.keys()} == {"forward + backward"}  # a peer that has none
    assert not update_tables(path, RESULTS)
    assert path.read_text().split("\n") == lines


def test_a_check_writes_nothing_and_names_the_table(file):
    path = file("text", ATTENTION, END)
    with pytest.raises(OutOfDateError, match=r"README\.md is out of date: the table at line 2 differs") as error:
        update_tables(path, RESULTS, check=True)
    assert "\n" not in str(error.value)
    assert path.read_text() == f"text\n{ATTENTION}\n{END}"
    update_tables(path, RESULTS)
    assert not update_tables(path, RESULTS, check=True)
    path.write_text(path.read_text().replace("| 1.00 |", "| 1.01 |", 1))
    with pytest.raises(OutOfDateError):
        update_tables(path, RESULTS, check=True)


def test_rows_and_columns_are_chosen(file):
    path = file(
        f"<!-- table: prefill-smollm2-cpu where=length=8192 where='name!={'|'.join(LEFT_OUT)}'",
        '     columns="name=8192 tokens,median:.1f=first token s,cache_bytes" title="cache bytes=KV cache" -->',
        END,
    )
    update_tables(path, RESULTS)
    results = json.loads((RESULTS / "prefill-smollm2-cpu.json").read_text())["results"]
    shown = [row for row in results if row["length"] == 8192 and row["name"] not in LEFT_OUT]
    assert 0 < len(shown) < sum(row["length"] == 8192 for row in results)
    header, *rows = table_of(path)
    assert header == ["8192 tokens", "first token s", "KV cache"]
    assert [[row[0].strip("`"), *row[1:]] for row in rows] == [
        [row["name"], f"{row['median']:.1f}", f"{row['cache_bytes'] / 2**20:.0f} MiB"] for row in shown
    ]


def test_several_records_stand_side_by_side(file):
    path = file(
        "<!-- table: search-smollm2-pubmed-tail search-smollm2-qmsum-tail rows=placements columns=name",
        "     where=name=found|bottom pivot=record,text values=tail_perplexity:.2f",
        '     title="search-smollm2-pubmed-tail, held-out=papers" -->',
        END,
    )
    update_tables(path, RESULTS)
    header, *rows = table_of(path)
    assert header[:2] == ["name", "papers"]
    assert header[3] == "search-smollm2-qmsum-tail, held-out"
    assert rows == [["found", "17.52", "19.07", "17.41", "15.99"], ["bottom", "23.20", "24.46", "22.05", "20.52"]]


def test_without_options_every_column_is_shown(file):
    path = file("<!-- table: decode-smollm2-cpu -->", END)
    update_tables(path, RESULTS)
    header, *rows = table_of(path)
    assert header[:3] == ["length", "name", "plan"]
    assert "seconds" not in header
    assert len(rows) == 10


def test_other_rows_of_a_record(file):
    path = file('<!-- table: demo-cpu rows=costs columns="length,fractions.attention_flops:.0%=attention" -->', END)
    update_tables(path, RESULTS)
    assert table_of(path)[1:] == [["2,048", "44%"], ["4,096", "36%"], ["32,768", "28%"]]


def test_line_ends_stay_as_they_are(file):
    path = file("a", ATTENTION, END, "b", newline="\r\n")
    update_tables(path, RESULTS)
    content = path.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 5
    assert not update_tables(path, RESULTS, check=True)


def test_examples_in_blocks_of_code_are_left_alone(file):
    path = file("```", "<!-- table: nonsense -->", "```", "~~~~", "~~~", "<!-- table: more -->", "~~~~", ATTENTION, END)
    update_tables(path, RESULTS)
    assert "<!-- table: nonsense -->\n```\n~~~~\n~~~\n<!-- table: more -->\n~~~~" in path.read_text()
    with pytest.raises(MasformerError, match="has no comment"):
        update_tables(file("```", ATTENTION, END, "```"), RESULTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("missing", "missing.json: No such file"),
        ("", "the comment names no record"),
        ("attention-cpu columns=nam", "no column 'nam'; allowed: record, length, pass, name, span, "),
        ("attention-cpu columns=a:b:c=", "no column 'a'"),
        ("attention-cpu columns=:x", "cannot read the column ':x'"),
        ("attention-cpu columns=speedup:.2q", "unknown format '.2q'"),
        ("attention-cpu rows=placements", "no rows 'placements' in"),
        ("attention-cpu where=pass=sideways", "no row is left by where"),
        ("attention-cpu where=pass", "cannot read where 'pass'"),
        ("attention-cpu where=what=3", "no column 'what'"),
        ("attention-cpu colums=name", "cannot read 'colums=name'; allowed: records, then rows=, columns="),
        ("attention-cpu rows=results decode-smollm2-cpu", "cannot read 'decode-smollm2-cpu'"),
        ("attention-cpu columns=name columns=pass", "columns= is given twice"),
        ("attention-cpu columns=name pivot=pass", "pivot and values need each other"),
        ("attention-cpu columns=name pivot=pas values=ideal", "no column 'pas'"),
        (
            "attention-cpu columns=pass pivot=pass values=ideal",
            "several rows for forward, forward: name another column",
        ),
        ("attention-cpu columns=name title=speedup=x", "no column 'speedup' to rename; allowed: name"),
        ("attention-cpu title=speedup", "cannot read title 'speedup'; allowed: OLD=NEW"),
        ("attention-cpu call=full", "cannot read call 'full'; allowed: OLD=NEW"),
        ("attention-cpu call=half=x", "no row 'half' to call otherwise; allowed: full causal SDPA, "),
        ("attention-cpu columns='name", "cannot read this comment: No closing quotation"),
    ],
)
def test_a_wrong_comment_is_named_with_its_line(file, options, message):
    path = file("one", "", f"<!-- table: {options} -->", END)
    before = path.read_bytes()
    with pytest.raises(MasformerError) as error:
        update_tables(path, RESULTS)
    assert message in str(error.value)
    assert f"{path}, line 3: " in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["text"], "has no comment <!-- table: RECORD"),
        (["a", ATTENTION, "text"], "line 2: no <!-- end --> after this table"),
        ([ATTENTION, ATTENTION, END], "line 1: no <!-- end --> after this table"),
        (["<!-- table: attention-cpu", "columns=name"], "line 1: the comment <!-- table: has no end, -->"),
    ],
)
def test_a_frame_that_is_not_closed_is_named(file, lines, message):
    with pytest.raises(MasformerError, match=message.replace("(", r"\(")):
        update_tables(file(*lines), RESULTS)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(MasformerError, match=r"cannot read .*none\.md: No such file"):
        update_tables(tmp_path / "none.md", RESULTS)
    (tmp_path / "bytes.md").write_bytes(b"a\xff")
    with pytest.raises(MasformerError, match=r"bytes\.md is no UTF-8 text: byte 1"):
        update_tables(tmp_path / "bytes.md", RESULTS)
    (tmp_path / "other.json").write_text("{}")
    path = tmp_path / "a.md"
    path.write_text(f"<!-- table: other -->\n{END}\n")
    with pytest.raises(MasformerError, match=r"other\.json is no record of masformer"):
        update_tables(path, tmp_path)


def run(capsys, *words):
    code = cli.main(["report", *map(str, words)])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


def test_the_command_checks_and_writes_tables(capsys, file):
    path = file(ATTENTION, END)
    code, _, err = run(capsys, RESULTS, "--into", path, "--check")
    assert (code, err.count("\n"), "is out of date" in err) == (1, 1, True)
    code, out, _ = run(capsys, RESULTS, "--into", path)
    assert (code, "tables written" in out) == (0, True)
    code, out, _ = run(capsys, RESULTS, "--into", path, "--check")
    assert (code, "tables are up to date" in out) == (0, True)


def test_the_command_writes_a_report_and_leaves_it_out_the_next_time(capsys, tmp_path):
    (tmp_path / "one.json").write_bytes((RESULTS / "perplexity-smollm2-pubmed.json").read_bytes())
    (tmp_path / "other.json").write_text("[1]")
    for _ in range(2):
        code, out, _ = run(capsys, tmp_path)
        assert code == 0
        assert "1 records" not in out
        assert "1 record:" in out
        assert "no records, left out:" in out
        assert {path.suffix for path in (tmp_path / "report").iterdir()} - {".json"} == {".md", ".html", ".png"}
        (tmp_path / "report" / "inside.json").write_text("{ broken")
    assert run(capsys, tmp_path, "--out", tmp_path / "x", "--title", "My <title>")[0] == 2  # the broken one is read now
    (tmp_path / "report" / "inside.json").unlink()
    assert run(capsys, tmp_path, "--out", tmp_path / "x", "--title", "My <title>")[0] == 0
    assert "<h1>My &lt;title&gt;</h1>" in (tmp_path / "x" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "folder nowhere does not exist"),
        (["."], "no record in ."),
        ([".", "--check"], "--check needs --into FILE"),
        ([".", "--into", "a.md", "--out", "b"], "--out and --title are of a report; they do nothing with --into"),
        ([".", "--into", "a.md"], "cannot read a.md: No such file"),
        ([str(RESULTS), "--out", "file"], "cannot make folder file: "),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    code, _, err = run(capsys, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_what_commands_record_now_is_shown(capsys, tmp_path):
    """One run of a bench and of an evaluation, from the command line to the tables."""
    folder, data, out = tmp_path / "model", tmp_path / "text.jsonl", tmp_path / "runs"
    tokenizer = letter_tokenizer(bos_token="<s>")
    tiny("llama", vocab_size=len(tokenizer), sliding_window=None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_text("".join(json.dumps({"text": "the quick brown fox " * count}) + "\n" for count in (6, 7, 9, 2)))
    out.mkdir()
    shape = ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--repeats", "1", "--peers", "none"]
    words = ["bench", "attention", "--lengths", "32,64", *shape, "--span", "window:8"]
    assert cli.main([*words, "--json", str(out / "bench.json")]) == 0
    words = ["eval", "perplexity", str(folder), "--data", str(data), "--lengths", "32,96", "--target-tokens", "16"]
    words += ["--plan", "full", "--plan", "window:8", "--json", str(out / "perplexity.json")]
    assert cli.main(words) == 0
    capsys.readouterr()
    code, _, err = run(capsys, out, "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    text = (tmp_path / "report" / "report.md").read_text()
    bench, perplexity = (json.loads((out / f"{name}.json").read_text()) for name in ("bench", "perplexity"))

    def cells(title):
        """(name, length) -> the cell below a title, of the one table that has it."""
        (table,) = [part for part in text.split("\n\n") if part.startswith("|") and f"| {title} |" in part]
        header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        place = header.index(title)
        return {(row[0].strip("`"), int(row[1])): row[place] for row in rows}

    for pass_ in ("forward", "forward + backward"):
        expected = {(row["name"], row["length"]): row["speedup"] for row in bench["results"] if row["pass"] == pass_}
        found = {key: float(cell.replace(",", "")) for key, cell in cells(f"{pass_}: times as fast").items()}
        assert found == pytest.approx(expected, rel=1e-3)
    found = cells("perplexity")
    assert len(found) == len(perplexity["results"]) == 4
    for row in perplexity["results"]:
        numbers = [float(part.strip("[],")) for part in found[row["name"], row["length"]].split()]
        assert numbers == pytest.approx([row["interval"][part] for part in ("mean", "low", "high")], rel=5e-3)
    found = {key: float(cell.split()[0]) for key, cell in cells("difference").items()}
    expected = {(row["name"], row["length"]): row["difference"]["mean"] for row in perplexity["differences"]}
    assert found == pytest.approx(expected, rel=0.1, abs=1e-6)
    assert "second half" not in text
    assert "bench-results-speedup.png" in text
    assert "perplexity-results-perplexity.png" in text

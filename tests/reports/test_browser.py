"""The page of a report in a real browser, on a narrow and on a wide screen."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from masformer import records
from masformer.reports import Code, Table, build_report, title_of

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>
onload = () => {
  const all = selector => [...document.querySelectorAll(selector)];
  const box = each => { const { left, top, width } = each.getBoundingClientRect(); return [left, top, width]; };
  parent.document.body.dataset.found = JSON.stringify({
    page: [document.documentElement.clientWidth, document.documentElement.scrollWidth],
    figures: all(".figures").map(each => [...each.children].map(box)),
    images: all("img").map(each => each.naturalWidth > 0 && each.clientWidth > 0),
    names: all("#wide td:first-child").map(each => each.clientWidth),
    plans: all("#wide code").map(each => [each.innerText, new Set([...each.getClientRects()].map(at => at.top)).size]),
    folds: all("details").map(each => each.getBoundingClientRect().height),
    first: document.querySelector("h1").nextElementSibling.tagName,
  });
};
</script>"""
"""The page itself runs no script, so a copy tells what is where to the page around it."""

HEADS = "full@0:0,2:1,3:1,4:0,5:2,7:1-2,8:0,10:0,11:1,15:2,17:1,18:2,20,21:2,22:1,23:0,23:2; window:256+4"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def page():
    names = ("perplexity-smollm2-pubmed", "attention-cpu", "search-smollm2-qmsum")
    found = [records.read_record(RESULTS / f"{name}.json") for name in names]
    report = build_report(found, title_of(found))
    columns = ("name", "plan", *(f"figure {number}" for number in range(9)))
    row = ("heads by tail, chosen on papers", Code(HEADS), *("23.2 [20.8, 25.8]",) * 9)
    report.section("wide").table(Table(columns, (row,), (False, False, *(True,) * 9)))
    return report.to_html()


@pytest.fixture(params=[400, 1200], scope="module")
def seen(request, page, tmp_path_factory):
    """The width of the window, and where things stand in it."""
    folder = tmp_path_factory.mktemp("browser")
    copy = re.sub(r"<meta http-equiv=.Content-Security-Policy.*?>", "", page).replace("</head>", f"{MEASURE}</head>")
    assert copy.count("<script>") == 1
    (folder / "page.html").write_text(copy, encoding="utf-8")
    frame = f'<iframe src="page.html" style="border: 0" width="{request.param}" height="900"></iframe>'
    (folder / "frame.html").write_text(f"<body>{frame}</body>", encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars"]
    words += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    words.append((folder / "frame.html").as_uri())
    done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r'data-found="(.*?)"', done.stdout)
    return request.param, json.loads(unescape(found))


def test_the_page_fits_and_figures_stand_side_by_side_where_there_is_room(seen):
    width, found = seen
    assert found["page"] == [width, width], "nothing is scrolled sideways but tables"
    assert all(found["images"])
    assert found["first"] == "P"
    several = [boxes for boxes in found["figures"] if len(boxes) > 1]
    assert several
    for boxes in several:
        assert (boxes[0][1] == boxes[1][1]) is (width == 1200)
        assert all(left >= 0 and left + across <= width for left, _, across in boxes)


def test_names_keep_their_width_beside_plans_which_break_between_their_parts(seen):
    _, found = seen
    assert min(found["names"]) >= 90
    ((text, lines),) = found["plans"]
    assert text.replace("\n", "") == HEADS
    assert 1 < lines <= HEADS.count(",") + HEADS.count(";") + 1


def test_settings_are_folded(seen):
    _, found = seen
    assert len(found["folds"]) >= 5
    assert max(found["folds"]) < 40

"""The page of a report in a real browser, on a narrow and on a wide screen."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from masformer import records
from masformer.reports import build_report, title_of

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
    folds: all("details").map(each => each.getBoundingClientRect().height),
    first: document.querySelector("h1").nextElementSibling.tagName,
  });
};
</script>"""
"""The page itself runs no script, so a copy tells what is where to the page around it."""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def page():
    names = ("perplexity-smollm2-pubmed", "attention-cpu", "search-smollm2-qmsum")
    found = [records.read_record(RESULTS / f"{name}.json") for name in names]
    return build_report(found, title_of(found)).to_html()


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


def test_settings_are_folded(seen):
    _, found = seen
    assert len(found["folds"]) >= 5
    assert max(found["folds"]) < 40

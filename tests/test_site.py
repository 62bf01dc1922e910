"""The pages as a site: built whole, without a warning and without network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    surroundings = os.environ | {"NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return folder


def links(page):
    return re.findall(r'(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8"))


def test_every_link_leads_somewhere(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 10
    wrong = []
    for page in pages:
        for link in links(page):
            place, _, anchor = link.partition("#")
            if "://" in link or link.startswith(("mailto:", "data:")) or not place:
                continue
            there = (page.parent / place).resolve()
            there = there / "index.html" if there.is_dir() else there
            if not there.exists() or (anchor and there.suffix == ".html" and f'id="{anchor}"' not in there.read_text()):
                wrong.append((str(page.relative_to(site)), link))
    assert wrong == []


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text()
        )
        assert loaded == []


def test_the_home_page_is_the_readme_and_the_reference_is_of_docstrings(site):
    home = (site / "index.html").read_text()
    assert (ROOT / "README.md").read_text().splitlines()[0].removeprefix("# ") in home
    reference = (site / "reference" / "python" / "index.html").read_text()
    for name in ("masformer.load_model", "masformer.apply_plan", "masformer.AttentionPlan"):
        assert f'id="{name}"' in reference

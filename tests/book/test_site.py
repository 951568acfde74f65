"""The site's checker catches what it is for, and the diagrams are the ones that the code draws."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import check_site
import pytest
from book import ROOT

GOOD = """<!DOCTYPE html>
<html lang="en"><head><title>A page</title>
<link rel="stylesheet" href="_static/book.css"><link rel="canonical" href="https://example.org/">
<style>p { background: url(data:image/png;base64,AAAA) } /* url(https://example.org) */</style>
</head><body>
<h1 id="top-of-page">A page</h1>
<p><a href="#top-of-page">up</a> <a href="other.html#part%20one">other</a> <a href="folder/">in</a>
<a href="https://example.org/">away</a> <a href="mailto:someone@example.org">write</a></p>
<img src="_static/logo.svg" alt="Four bands"><script src="_static/site.js?v=1"></script>
</body></html>
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A small site without faults."""
    files = {
        "index.html": GOOD,
        "other.html": '<h1 id="part one">Another</h1>',
        "folder/index.html": "<h1>A folder</h1>",
        "_static/template.html": '<img src="nowhere.png">',
        "_static/book.css": '@font-face { src: url("font.woff2?v=1#iefix") }',
        "_static/font.woff2": "",
        "_static/logo.svg": "<svg/>",
        "_static/site.js": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_a_good_site_passes(site: Path) -> None:
    assert check_site.static_problems(site) == []


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ('<a href="gone.html">x</a>', "broken link gone.html"),
        ('<a href="#nowhere">x</a>', "no such anchor #nowhere"),
        ('<a href="other.html#nowhere">x</a>', "no such anchor other.html#nowhere"),
        ('<img src="gone.png" alt="words">', "missing asset gone.png"),
        ('<img src="//cdn.org/a.png" alt="words">', "remote asset //cdn.org/a.png"),
        (
            '<img srcset="_static/logo.svg 1x, https://cdn.org/b.png 2x" alt="words">',
            "remote asset https://cdn.org/b.png",
        ),
        ('<script src="https://cdn.org/a.js"></script>', "remote asset https://cdn.org/a.js"),
        ('<iframe src="https://cdn.org/a"></iframe>', "remote asset https://cdn.org/a"),
        ('<link rel="preconnect" href="https://cdn.org">', "remote asset https://cdn.org"),
        (
            '<style>@import "https://cdn.org/a.css";</style>',
            "remote asset https://cdn.org/a.css",
        ),
        ('<p style="background: url(https://cdn.org/a.png)">', "remote asset https://cdn.org/a"),
        ('<img src="_static/logo.svg">', "no alt text: _static/logo.svg"),
        ('<img src="_static/logo.svg" alt="">', "no alt text: _static/logo.svg"),
        (
            '<img src="_static/logo.svg" alt="_static/logo.svg">',
            "no alt text: _static/logo.svg",
        ),
        ('<p id="twice"></p><p id="twice"></p>', "duplicate id 'twice'"),
    ],
)
def test_a_fault_on_a_page_is_found(site: Path, fault: str, complaint: str) -> None:
    (site / "index.html").write_text(GOOD.replace("</body>", f"{fault}</body>"), encoding="utf-8")
    (problem,) = check_site.static_problems(site)
    assert problem.startswith(f"index.html: {complaint}")


@pytest.mark.parametrize(
    ("css", "complaint"),
    [
        ("@import url(https://cdn.org/a.css);", "remote asset https://cdn.org/a.css"),
        ("@import 'https://cdn.org/a.css';", "remote asset https://cdn.org/a.css"),
        ("p { src: url('//cdn.org/a.woff2') }", "remote asset //cdn.org/a.woff2"),
        ("p { background: url(gone.png) }", "missing asset gone.png"),
    ],
)
def test_a_fault_in_a_style_sheet_is_found(site: Path, css: str, complaint: str) -> None:
    (site / "_static" / "book.css").write_text(css, encoding="utf-8")
    assert check_site.static_problems(site) == [f"_static/book.css: {complaint}"]


def test_no_pages_is_a_fault(tmp_path: Path) -> None:
    (problem,) = check_site.static_problems(tmp_path)
    assert "no pages" in problem


def test_a_browser_sees_what_scripts_do(site: Path) -> None:
    script = "fetch('https://cdn.org/data.json').catch(() => {}); throw new Error('broken');"
    wide = '<details><div class="slab" style="width: 500px">wide</div></details>'
    page = GOOD.replace("</body>", f"{wide}<script>{script}</script></body>")
    (site / "index.html").write_text(page, encoding="utf-8")
    with check_site.found_browser() as browser:
        if browser is None:
            pytest.skip("no Chromium here")
        problems = check_site.browser_problems(site, browser)
    for complaint in ("leaves the site: https://cdn.org/data.json", "script error: broken"):
        assert f"index.html (http, light): {complaint}" in problems
    assert 'index.html (file, dark): wider than a phone: <div class="slab">' in problems
    assert not any(problem.startswith("other.html") for problem in problems)


def test_pictures_are_the_ones_that_the_code_draws() -> None:
    pinned = next(
        line.strip().partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("matplotlib==")
    )
    if version("matplotlib") != pinned or platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("another matplotlib or processor draws the same picture in other bytes")
    done = subprocess.run(
        [sys.executable, "figures/draw.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

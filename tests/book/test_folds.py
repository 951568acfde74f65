"""Engine rooms on the site: folded, found, opened by whatever leads into them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import check_site
import pytest
from book import ROOT, write_text

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CONFIGURATION = f"""
import sys
sys.path.insert(0, {str(ROOT / "_ext")!r})
extensions = ["myst_nb", "sphinx.ext.autodoc", "book_site"]
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"
html_static_path, html_css_files = [{str(ROOT / "_static")!r}], ["book.css"]
mathjax_path = "mathjax/tex-svg.js"
numfig = True
"""
INDEX = """\
# Front

{ref}`the formula <formula>`

```{py:module} llmbook.first
```

```{py:function} check_even(x)
```

```{py:function} missing(x)
```

```{toctree}
chapters/00_first
```
"""
# What stands in the room besides what the miniature has there.
MORE = """
(formula)=

$$ x = 2 y $$ (eq-inside)

Equation {eq}`eq-inside` is {ref}`here <formula>`.
"""


@pytest.fixture(scope="module")
def site(finished_book: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first chapter of the miniature, as a site."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    text = (finished_book / "chapters/00_first.ipynb").read_text(encoding="utf-8")
    more = "".join(f'    "{line}\\n",\n' for line in MORE.splitlines())
    room = '    "Half of an odd'
    assert room in text
    write_text(source / "chapters/00_first.ipynb", text.replace(room, f'{more}    "\\n",\n{room}'))
    write_text(source / "chapters/dot.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>")
    write_text(source / "conf.py", CONFIGURATION)
    write_text(source / "index.md", INDEX)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium, where there is one."""
    with check_site.found_browser() as found:
        if found is None:
            pytest.skip("no Chromium here")
        yield found


@pytest.fixture
def page(site: Path, browser: "Browser") -> Iterator["Page"]:
    """A new window of the browser; at the end, nothing has gone wrong in it."""
    with browser.new_context() as window:
        tab = window.new_page()
        watcher = check_site.Watcher(site.as_uri())
        watcher.watch(tab)
        yield tab
        assert watcher.wrong == []


SECTION = "engine-room-an-odd-number-is-refused"
ROOM, LONE = "section.engine-room > details", "details.engine-lone"


def are_open(page: "Page") -> list[bool]:
    """Whether the room is open, and whether the lone cell is."""
    return [page.locator(which).evaluate("fold => fold.open") for which in (ROOM, LONE)]


def is_seen(page: "Page", selector: str) -> bool:
    """Whether the first such element is on the screen, wherever the page is scrolled to."""
    return page.locator(selector).first.evaluate(
        """element => {
          const box = element.getBoundingClientRect();
          return element.checkVisibility() && box.top >= -1 && box.top < innerHeight;
        }"""
    )


def test_a_room_is_a_section_under_its_heading(site: Path) -> None:
    html = (site / "chapters/00_first.html").read_text(encoding="utf-8")
    assert html.count('<details class="engine') == html.count("</div></details>") == 2
    label = '<span class="engine-label">Engine room</span><span class="engine-colon">: </span>'
    heading = f'<summary>\n<h3>{label}An odd number is refused<a class="headerlink"'
    section = f'<section class="engine-room" id="{SECTION}">'
    assert f'{section}\n<details class="engine">{heading}' in html
    assert f'<span class="engine-line">{label}The limits of the machine</span>' in html
    assert f'#{SECTION}">{label}An odd number' in html, "the contents"
    assert "(0.1)" in html, "numbers are as they are elsewhere"
    assert check_site.static_problems(site) == []


def test_the_search_knows_what_is_folded(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert '"round' in index, "a word that stands in the room alone"
    assert '"details' not in index


def test_pages_without_folds_have_no_script_of_folds(site: Path) -> None:
    assert "engine_rooms.js" in (site / "chapters/00_first.html").read_text(encoding="utf-8")
    assert "engine_rooms.js" not in (site / "index.html").read_text(encoding="utf-8")


def test_the_reference_leads_to_the_cell(site: Path) -> None:
    html = (site / "index.html").read_text(encoding="utf-8")
    assert html.count('href="chapters/00_first.html#def-check_even"') == 1
    assert "def-missing" not in html, "a name that no cell defines"


@pytest.mark.parametrize("start", ["", "#def-check_even", "#formula", f"#{SECTION}"])
def test_an_address_opens_what_it_leads_into(start: str, site: Path, page: "Page") -> None:
    page.goto(f"{(site / 'chapters/00_first.html').as_uri()}{start}")
    assert are_open(page) == [bool(start), False]
    if start:
        assert is_seen(page, start)


@pytest.mark.parametrize("link", ["#def-check_even", "#formula"])
def test_a_link_from_another_page_opens_the_room(link: str, site: Path, page: "Page") -> None:
    page.goto((site / "index.html").as_uri())
    with page.expect_navigation():
        page.evaluate(f"document.querySelector(`a[href$='{link}']`).click()")
    assert are_open(page) == [True, False]
    assert is_seen(page, link)


def test_a_link_on_the_page_opens_the_room_again_and_again(site: Path, page: "Page") -> None:
    page.goto((site / "chapters/00_first.html").as_uri())
    for _ in range(2):
        page.evaluate("document.querySelector('[role=navigation] a[href*=odd]').click()")
        page.wait_for_function(f"document.querySelector({ROOM!r}).open")
        page.locator(f"{ROOM} > summary").press("Enter")
        assert are_open(page) == [False, False], "what was opened can be folded"


def test_the_keyboard_opens_a_room(site: Path, page: "Page") -> None:
    page.goto((site / "chapters/00_first.html").as_uri())
    page.locator(f"{LONE} > summary").press("Enter")
    page.locator(f"{ROOM} > summary").press("Space")
    assert are_open(page) == [True, True]
    assert page.get_by_role("heading", name="Engine room: An odd number is refused").is_visible()


def test_a_button_opens_all_and_folds_all(site: Path, page: "Page") -> None:
    page.goto((site / "chapters/00_first.html").as_uri())
    offer, button = page.locator(".engine-opener"), page.get_by_role("button", name="engine rooms")
    assert offer.inner_text() == "Open all engine rooms 0 of 2 open"
    page.locator(f"{ROOM} > summary").click()
    page.wait_for_function("document.querySelector('.engine-opener').innerText.includes('1 of 2')")
    button.click()
    assert are_open(page) == [True, True]
    assert offer.inner_text() == "Fold all engine rooms 2 of 2 open"
    button.click()
    assert are_open(page) == [False, False]


def test_paper_shows_what_the_screen_shows(site: Path, page: "Page") -> None:
    page.goto((site / "chapters/00_first.html").as_uri())
    page.emulate_media(media="print")
    assert not page.locator(".engine-opener").is_visible()
    code = page.locator(f"{ROOM} pre")
    assert page.get_by_text("An odd number is refused").first.is_visible()
    assert not code.evaluate("code => code.checkVisibility({contentVisibilityAuto: true})")
    page.locator(f"{ROOM} > summary").press("Enter")
    assert code.evaluate("code => code.checkVisibility({contentVisibilityAuto: true})")


def test_words_that_the_search_marks_are_shown(site: Path, page: "Page") -> None:
    page.goto((site / "index.html").as_uri())
    page.evaluate("localStorage.setItem('sphinx_highlight_terms', 'rounded')")
    page.goto((site / "chapters/00_first.html").as_uri())
    page.wait_for_function(f"document.querySelector({ROOM!r}).open")


def test_without_scripts_rooms_open_and_no_button_waits(site: Path, browser: "Browser") -> None:
    with browser.new_context(java_script_enabled=False) as window:
        page = window.new_page()
        page.goto((site / "chapters/00_first.html").as_uri())
        assert not page.locator(".engine-opener").is_visible()
        page.locator(f"{ROOM} > summary").click()
        assert page.locator(f"{ROOM} pre").is_visible()

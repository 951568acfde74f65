"""Check a built site: ``python tools/check_site.py SITE [--shots DIR]``.

First without a browser: internal links and anchors lead somewhere, assets exist and are our own,
images have alt texts, ids are unique. Then, where Chromium is found, every page is opened over http
in light mode and from disk in dark mode: nothing may be asked of a network, nothing may fail,
formulas must be set, and no page may be wider than a phone, with everything open that folds. The
last line says what ran.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response

# What a page fetches without being clicked: tags with these attributes, and links of these kinds.
FETCHED = {
    "audio": ["src"],
    "embed": ["src"],
    "iframe": ["src"],
    "image": ["href", "xlink:href"],
    "img": ["src", "srcset"],
    "input": ["src"],
    "object": ["data"],
    "script": ["src"],
    "source": ["src", "srcset"],
    "track": ["src"],
    "video": ["src", "poster"],
}
FETCHED_LINKS = {
    *("apple-touch-icon", "dns-prefetch", "icon", "manifest", "modulepreload"),
    *("preconnect", "prefetch", "preload", "stylesheet"),
}

CSS_URL = re.compile(r"""url\(\s*["']?([^"')]*)|@import\s+["']([^"']+)""", re.IGNORECASE)
CSS_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
FILE_NAME = re.compile(r"\S+\.(png|svg|jpe?g|gif|webp)", re.IGNORECASE)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_FLAGS = [
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-gpu", "--disable-quic", "--no-first-run"),
    # Not even a name is looked up, so that a page that asks for the network fails everywhere.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
WIDE, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}


# ---------------------------------------------------------------- without a browser


@dataclass
class Contents(HTMLParser):
    """What one page has and what it refers to."""

    ids: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    assets: list[str] = field(default_factory=list)
    without_alt: list[str] = field(default_factory=list)
    in_style: bool = False

    def __post_init__(self) -> None:
        """Set up the parser."""
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note ids, links, what is fetched, and images without words."""
        values = {name: value or "" for name, value in attrs}
        self.in_style = tag == "style"
        if "id" in values:
            self.ids[values["id"]] += 1
        if tag in {"a", "area"} and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "href" in values:
            fetched = FETCHED_LINKS & set(values.get("rel", "").lower().split())
            (self.assets if fetched else self.links).append(values["href"])
        for name in FETCHED.get(tag, []):
            if values.get(name):
                self.assets += _candidates(values[name]) if name == "srcset" else [values[name]]
        self.assets += css_urls(values.get("style", ""))
        # Sphinx gives an image without alt text its file name for one.
        alt = values.get("alt", "").strip()
        if tag == "img" and (not alt or FILE_NAME.fullmatch(alt)):
            self.without_alt.append(values.get("src", "")[:80])

    def handle_data(self, data: str) -> None:
        """Note what a style sheet within the page refers to."""
        if self.in_style:
            self.assets += css_urls(data)

    def handle_endtag(self, tag: str) -> None:
        """Leave a style sheet."""
        self.in_style = self.in_style and tag != "style"


def _candidates(srcset: str) -> list[str]:
    """The addresses in a ``srcset``."""
    return [candidate.split()[0] for candidate in srcset.split(",") if candidate.strip()]


def css_urls(css: str) -> list[str]:
    """What a style sheet refers to."""
    return [a or b for a, b in CSS_URL.findall(CSS_COMMENT.sub("", css)) if a or b]


def pages_of(site: Path) -> list[Path]:
    """The pages of the site; html files under ``_static`` are templates of the theme."""
    pages = sorted(site.rglob("*.html"))
    return [page for page in pages if "_static" not in page.relative_to(site).parts]


def read_page(path: Path) -> Contents:
    """Parse a page."""
    contents = Contents()
    contents.feed(path.read_text(encoding="utf-8"))
    contents.close()
    return contents


def static_problems(site: Path) -> list[str]:
    """Check all pages and style sheets of ``site``, a line for each problem."""
    site = site.resolve()
    pages = {path: read_page(path) for path in pages_of(site)}
    if not pages:
        return [f"{site}: no pages"]
    found = []
    for path, page in pages.items():
        wrong = [f"duplicate id {name!r}" for name, count in page.ids.items() if count > 1]
        wrong += [f"no alt text: {source}" for source in page.without_alt]
        wrong += [_bad_link(path, link, pages) for link in page.links]
        wrong += [_bad_asset(path, asset) for asset in page.assets]
        found += [f"{path.relative_to(site).as_posix()}: {text}" for text in wrong if text]
    for sheet in sorted(site.rglob("*.css")):
        urls = css_urls(sheet.read_text(encoding="utf-8"))
        wrong = [text for url in urls if (text := _bad_asset(sheet, url))]
        found += [f"{sheet.relative_to(site).as_posix()}: {text}" for text in wrong]
    return list(dict.fromkeys(found))


def _target(origin: Path, path: str) -> Path:
    """The file that a relative address on the page ``origin`` means."""
    if not path:
        return origin
    target = (origin.parent / unquote(path)).resolve()
    return target / "index.html" if target.is_dir() else target


def _bad_link(origin: Path, link: str, pages: dict[Path, Contents]) -> str | None:
    """Say what is wrong with a link; those to other sites are not followed."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    target, anchor = _target(origin, parts.path), unquote(parts.fragment)
    if not target.exists():
        return f"broken link {link}"
    if anchor and target in pages and anchor != "top" and anchor not in pages[target].ids:
        return f"no such anchor {link}"
    return None


def _bad_asset(origin: Path, asset: str) -> str | None:
    """Say what is wrong with something that the page or style sheet fetches."""
    parts = urlsplit(asset)
    if parts.scheme == "data" or (not parts.path and parts.fragment):
        return None
    if parts.scheme or parts.netloc:
        return f"remote asset {asset[:120]}"
    return None if _target(origin, parts.path).exists() else f"missing asset {asset}"


# ---------------------------------------------------------------- with a browser

# Wait for formulas, then count those that were not set and those that were set as errors.
FORMULAS = """async () => {
  if (window.MathJax?.startup?.promise) await MathJax.startup.promise;
  const count = (selector) => document.querySelectorAll(selector).length;
  return [count('.math') - count('.math > mjx-container'), count('mjx-merror, [data-mjx-error]')];
}"""

# What is folded counts as well: the width below is that of the page with everything open.
OPEN = "() => document.querySelectorAll('details').forEach((fold) => { fold.open = true; })"

# What sticks out to the right, unless it lies in something that scrolls or cuts.
TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return null;
  const held = (element) => {
    for (let outer = element.parentElement; outer; outer = outer.parentElement)
      if (getComputedStyle(outer).overflowX !== 'visible') return true;
    return false;
  };
  const name = (e) => `<${e.tagName.toLowerCase()} class="${e.getAttribute('class') ?? ''}">`;
  for (const element of document.body.querySelectorAll('*'))
    if (element.getBoundingClientRect().right > width + 1 && !held(element)) return name(element);
  return 'something';
}"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve ``site`` on a free port of this machine; yield its address."""
    handler = functools.partial(QuietHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def found_browser() -> Iterator[Browser | None]:
    """Start Chromium: the one on the path, else Playwright's own, else none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        yield None
        return
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, BROWSERS)), own)
        if not Path(path).exists():
            yield None
            return
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watcher:
    """Notes what goes wrong while pages load."""

    base: str = ""
    wrong: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """Listen to all that the page does."""
        page.on("request", self._request)
        page.on("requestfailed", lambda request: self.wrong.append(f"failed: {request.url}"))
        page.on("response", self._response)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.wrong.append(f"script error: {error}"))

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.wrong.append(f"leaves the site: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.wrong.append(f"status {response.status}: {response.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.wrong.append(f"console: {message.text}")


def browser_problems(site: Path, browser: Browser) -> list[str]:
    """Open every page over http and from disk, a line for each problem."""
    site = site.resolve()
    page = browser.new_page()
    watcher, found = Watcher(), []
    watcher.watch(page)
    with served(site) as address:
        # How a page is fetched and its colors have nothing in common: two ways stand for four.
        for base, scheme in ((address, "light"), (site.as_uri(), "dark")):
            watcher.base = base
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            for path in pages_of(site):
                name = path.relative_to(site).as_posix()
                watcher.wrong.clear()
                page.set_viewport_size(WIDE)
                page.goto(f"{base}/{name}", wait_until="load")
                wrong = _page_problems(page)
                way = f"{name} ({urlsplit(base).scheme}, {scheme})"
                found += [f"{way}: {text}" for text in dict.fromkeys(watcher.wrong + wrong)]
    page.close()
    return found


def _page_problems(page: Page) -> list[str]:
    """Check formulas and width of the page that is open."""
    wrong = []
    unset, errors = page.evaluate(FORMULAS)
    if unset > 0 or errors:
        wrong.append(f"{unset} formulas not set, {errors} with errors")
    page.evaluate(OPEN)
    page.set_viewport_size(PHONE)
    if wide := page.evaluate(TOO_WIDE):
        wrong.append(f"wider than a phone: {wide}")
    return wrong


def take_shots(site: Path, browser: Browser, into: Path) -> None:
    """Photograph every page, light and dark, on a wide screen and on a phone."""
    into.mkdir(parents=True, exist_ok=True)
    page = browser.new_page()
    with served(site.resolve()) as address:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            for path in pages_of(site):
                name = path.relative_to(site).as_posix()
                for size in (WIDE, PHONE):
                    page.set_viewport_size(size)  # type: ignore[arg-type]
                    page.goto(f"{address}/{name}", wait_until="load")
                    page.evaluate(FORMULAS)
                    page.wait_for_timeout(400)  # the sidebars slide to their places
                    stem = name.removesuffix(".html").replace("/", "-")
                    shot = into / f"{stem}-{scheme}-{size['width']}.png"
                    page.screenshot(path=shot, full_page=True)
    page.close()


def main() -> int:
    """Check, report, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path, help="the folder that holds index.html")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="photograph every page, too")
    arguments = parser.parse_args()
    found = static_problems(arguments.site)
    with found_browser() as browser:
        ran = "none found, static checks only"
        if browser:
            ran = f"Chromium {browser.version}"
            found += browser_problems(arguments.site, browser)
            if arguments.shots:
                take_shots(arguments.site, browser, arguments.shots)
    for problem in found:
        print(problem)
    count = len(pages_of(arguments.site))
    print(f"site: {count} pages, {len(found)} problems; browser: {ran}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

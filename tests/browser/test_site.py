"""The site that `make docs` builds, in headless Chromium."""

import functools
import html.parser
import http.server
import pathlib
import threading
import urllib.parse

import pytest

SITE = pathlib.Path(__file__).parents[2] / "build" / "site"
MAX_BYTES = 1_000_000
CONTRAST = pathlib.Path(__file__).with_name("contrast.js").read_text()
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if not path.is_relative_to(SITE / "source")
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_site_is_there():
    assert "index.html" in PAGES, "`make docs` builds it."


class Links(html.parser.HTMLParser):
    """The anchors of a page, and its links with their lines."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found.get("id"), found.get("name")}
        for key in ("href", "src"):
            if found.get(key):
                self.links.append((self.getpos()[0], found[key]))


def test_links_lead_somewhere():
    """To files and anchors of the site, generated pages included."""
    pages = {SITE / name: Links(SITE / name) for name in PAGES}
    problems = []
    for path, page in pages.items():
        for line, link in page.links:
            target = urllib.parse.urlsplit(urllib.parse.unquote(link))
            if target.scheme or path.name == "404.html":
                continue
            file = (path.parent / target.path).resolve()
            file = file if target.path else path
            wanted = target.fragment if file in pages else ""
            if file.is_dir():
                file /= "index.html"
            if not file.exists():
                problems.append(f"{path}:{line}: {link} is no file")
            elif wanted and wanted not in pages[file].anchors:
                problems.append(f"{path}:{line}: {link} has no such anchor")
    assert not problems, "\n".join(problems)


def test_cards_lie_side_by_side(browser, address):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(address)
    cards = page.locator(".cards li")
    first, second = (cards.nth(i).bounding_box() for i in range(2))
    assert first["y"] == second["y"] and first["x"] < second["x"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page(browser, address, scheme):
    """On a desk and a phone: whole, quiet, light and readable."""
    context = browser.new_context(color_scheme=scheme, reduced_motion="reduce")
    problems = []
    for name in PAGES:
        page = context.new_page()
        said, asked = [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on(
            "request", lambda request, asked=asked: asked.append(request.url)
        )
        page.goto(address + name, wait_until="load")
        for width in (1440, 390):
            page.set_viewport_size({"width": width, "height": 900})
            for text in page.evaluate(CONTRAST):
                problems.append(f"{name}, {width}: contrast of {text}")
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                problems.append(f"{name}, {width}: {wide} pixels wide")
        problems += [f"{name}: {text}" for text in said]
        size = 0
        for url in set(asked):
            path = urllib.parse.urlsplit(url).path.removeprefix("/")
            if url.startswith(address):
                size += (SITE / path).stat().st_size
            elif not url.startswith("data:"):
                problems.append(f"{name}: asks for {url}")
        if size > MAX_BYTES:
            problems.append(f"{name}: {size:,} bytes")
        page.close()
    context.close()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("way", ["server", "file"])
def test_search(browser, address, way):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address if way == "server" else (SITE / "index.html").as_uri())
    page.click("input[name=query]")
    page.keyboard.type("Batch Prioritized")
    found = page.locator(".md-search-result__link").first
    found.wait_for()
    found.click()
    page.wait_for_load_state()
    assert "Batch Prioritized" in page.content()
    assert not said

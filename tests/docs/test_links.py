"""Links of README and docs lead somewhere, and every figure has its script.

`make docs` checks the site's links and anchors as well, those of generated
pages too; here a broken one is named by file and line.
"""

import re
import tomllib

import pytest
from markdown.extensions.toc import slugify

from tests.docs.pages import PAGES
from tests.docs.pages import ROOT

pytestmark = pytest.mark.backends("torch")
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = re.compile(r"(docs/)?(reference|notebooks)/|(docs/)?changelog\.md")
FIGURES = ROOT / "docs" / "figures" / "figures.toml"


def links(page):
    """`(line number, target)` of the links that stay within the repository."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        for target in LINK.findall(line):
            if "://" not in target:
                yield number, target


def anchors(page):
    """The anchors of a page's headings, as the site makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {slugify(re.sub(r"[`*]", "", x), "-") for x in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    broken = []
    for number, target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        where = f"{page.relative_to(ROOT)}:{number}: {target}"
        if GENERATED.match(path):
            continue
        if not file.exists():
            broken.append(f"{where} is no file")
        elif anchor and anchor not in anchors(file):
            broken.append(f"{where}: no such heading")
    assert not broken, "\n".join(broken)


def test_every_figure_has_its_script():
    """Each picture is listed with the script that draws it, and shown."""
    scripts = tomllib.loads(FIGURES.read_text())
    drawn = {x for names in scripts.values() for x in names}
    there = {x.name for x in FIGURES.parent.iterdir()}
    pictures = {x for x in there if x.endswith((".png", ".svg", ".jpg"))}
    assert drawn == pictures, drawn ^ pictures
    for script in scripts:
        text = (ROOT / script).read_text()
        assert text, script
    words = "".join(page.read_text() for page in PAGES)
    themes = r"(_narrow)?_(light|dark)\.svg$"
    hidden = [x for x in pictures if re.sub(themes, "", x) not in words]
    assert not hidden, f"no page shows {hidden}"

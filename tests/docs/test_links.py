"""Links of README and docs lead somewhere, and every figure has its script.

`make docs` and tests/browser check the pages that are built, generated ones
too; here a broken link is named by file and line.
"""

import re
import tomllib

import pytest
from markdown.extensions.toc import slugify

from tests.docs.pages import PAGES
from tests.docs.pages import ROOT

pytestmark = pytest.mark.backends("torch")
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
# Pages that `make docs` generates are named there.
NAV = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
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
        if path.removeprefix("docs/") in NAV and not file.exists():
            continue
        if not file.exists():
            broken.append(f"{where} is no file")
        elif anchor and anchor not in anchors(file):
            broken.append(f"{where}: no such heading")
    assert not broken, "\n".join(broken)


def place(lines, name):
    """Where the list of figures has a name."""
    number = next(i for i, x in enumerate(lines, 1) if f'"{name}"' in x)
    return f"{FIGURES.relative_to(ROOT)}:{number}"


def test_every_figure_has_its_script():
    """Each picture is listed with the script that draws it, and shown."""
    scripts = tomllib.loads(FIGURES.read_text())
    listed = FIGURES.read_text().splitlines()
    gone = [x for x in scripts if not (ROOT / x).is_file()]
    problems = [f"{place(listed, x)}: there is no script {x}" for x in gone]
    drawn = {x for names in scripts.values() for x in names}
    there = {x.name for x in FIGURES.parent.iterdir()}
    pictures = {x for x in there if x.endswith((".png", ".svg", ".jpg"))}
    problems += [
        f"{place(listed, x)}: no picture {x}" for x in drawn - pictures
    ]
    problems += [f"docs/figures/{x}:1: no script" for x in pictures - drawn]
    assert not problems, "\n".join(problems)
    words = "".join(page.read_text() for page in PAGES)
    themes = r"(_narrow)?_(light|dark)\.svg$"
    hidden = [x for x in pictures if re.sub(themes, "", x) not in words]
    assert not hidden, f"no page shows {hidden}"

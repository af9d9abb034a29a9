"""README and the pages of docs/: their Python blocks, by line."""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@dataclasses.dataclass
class Block:
    """A block of Python.

    Attributes:
        line: Number of its first line in the page.
        text: Its code.
        needs: What a test cannot give it; None for a block that runs.
    """

    line: int
    text: str
    needs: str | None


def blocks(page):
    """The Python blocks of a page."""
    text = page.read_text()
    pattern = r"(?:<!-- needs: (.+?) -->\n)?```python\n(.*?)```"
    return [
        Block(text[: found.start(2)].count("\n") + 1, found[2], found[1])
        for found in re.finditer(pattern, text, re.S)
    ]

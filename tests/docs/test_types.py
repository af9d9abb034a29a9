"""A type checker reads the pages' Python, as programs of users."""

import subprocess
import sys

import pytest

from tests.docs.pages import PAGES
from tests.docs.pages import ROOT
from tests.docs.pages import blocks

pytestmark = [pytest.mark.slow, pytest.mark.backends("torch")]


def test_programs_of_the_pages(tmp_path):
    """Files have the names and lines of the pages."""
    for page in PAGES:
        lines = []
        for block in blocks(page):
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.text.splitlines()
        (tmp_path / f"{page.stem.lower()}.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--allow-redefinition", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr

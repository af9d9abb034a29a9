"""Headless Chromium."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

NEEDS = "Chromium is not installed: `make test-browser` installs it (as root)."


@pytest.fixture(scope="session")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, NEEDS
    with sync_playwright() as playwright:
        options = {"executable_path": path, "args": ["--no-sandbox"]}
        opened = playwright.chromium.launch(**options)
        yield opened
        opened.close()

"""The report of `inspect` in headless Chromium: `make test-browser`."""

import pytest

from keras_vmoe import inspection
from tests.inspection.test_inspect import batches
from tests.inspection.test_inspect import model_of


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    names = ["a class whose name is much longer than a phone is wide" * 2]
    names += [str(i) for i in range(1, 10)]
    found = inspection.inspect(
        model_of("top_k"), batches(), class_names=names, num_examples=3
    )
    return found.save(tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page(browser, report, width, scheme):
    """It opens whole, asks no network, prints nothing, overflows nowhere."""
    said, asked = [], []
    viewport = {"width": width, "height": 900}
    page = browser.new_page(viewport=viewport, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.screenshot(path=report.with_name(f"{width}_{scheme}.png"))
    assert page.title() == "What the experts do"
    assert not said
    assert {x.split(":", 1)[0] for x in asked} <= {"file", "data"}
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    images = page.evaluate("[...document.images].map(x => x.naturalWidth)")
    assert len(images) >= 13 and all(images)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    page.close()

"""The README's code runs as it stands."""

import pathlib
import re
import runpy

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    if "import keras" in block
]


def test_there_are_two_examples():
    assert len(BLOCKS) == 2


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=["layer", "model"])
def test_example(block, tmp_path):
    """Both train; the first shows that any last batch (30 = 3 * 8 + 6) fits."""
    script = tmp_path / "example.py"
    script.write_text(block)
    model = runpy.run_path(str(script))["model"]
    assert all(loss > 0 for loss in model.history.history["loss"])

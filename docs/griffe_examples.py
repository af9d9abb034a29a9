"""Examples of docstrings as code on the site: `>>>` lines become a block."""

import re

import griffe

SESSION = re.compile(r"^>>> .*(?:\n(?!\s*$|```).+)*", re.M)
# Sections whose text is not indented below their titles.
TITLE = re.compile(r"^(Example|Reference):$", re.M)


class Examples(griffe.Extension):
    """Fences interactive sessions, and sets titles in bold."""

    def on_object(self, *, obj, **_):
        """Called for every object that is loaded."""
        if obj.docstring:
            text = SESSION.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = TITLE.sub(r"**\1**", text)

"""What the site is built of beside the pages of this folder.

A hook of MkDocs: the API reference, the command line's help, the tables of
presets and recipes, the notebooks with their outputs, and the files outside of
this folder that pages link to.
"""

import contextlib
import importlib
import inspect
import io
import json
import os
import pathlib
import re

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ["COLUMNS"] = "80"

import nbconvert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from PIL import Image

from keras_vmoe import cli
from keras_vmoe.cli.papers import COLUMNS
from keras_vmoe.training import recipes

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [
    "layers", "routing", "losses", "models", "checkpoints", "data", "training",
    "training.callbacks", "training.optimizers", "training.recipes",
    "evaluation", "inspection", "inspection.pictures", "export",
    "distribution",
]  # fmt: skip
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#]+)")  # Links out of docs/.
SOURCE = "source/"
HIDDEN = "---\nsearch: {exclude: true}\n---\n\n"  # The index stays small.
FIGURE = re.compile(r"!\[(.*?)\]\(figures/(\w+)_light\.svg\)")
PICTURE = (
    '<picture class="{theme}"><source media="(max-width: 44em)" '
    'srcset="figures/{name}_narrow_{theme}.svg">'
    '<img src="figures/{name}_{theme}.svg" alt="{alt}" loading="lazy">'
    "</picture>"
)


def on_files(files, config):
    """Adds the generated pages, and what pages of docs/ link to elsewhere."""
    pages = {f"reference/{name}.md": _module(name) for name in MODULES}
    pages |= {
        "reference/index.md": _index(),
        "reference/command_line.md": _command_line(),
        "reference/presets.md": _presets(),
        "reference/recipes.md": _recipes(),
    }
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        pages[name.lower()] = HIDDEN + text.replace("](docs/", "](")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        for name, content in _notebook(path).items():
            files.append(File.generated(config, name, content=content))
    pages = [x for x in files.documentation_pages() if "/" not in x.src_uri]
    for file in pages:
        for number, line in enumerate(file.content_string.splitlines(), 1):
            for target in OUTSIDE.findall(line):
                path = ROOT / target
                if not path.is_file():
                    where = f"{file.src_uri}:{number}"
                    raise PluginError(f"{where}: there is no file {target}")
                name = SOURCE + target
                if files.get_file_from_path(name) is None:
                    files.append(
                        File.generated(config, name, abs_src_path=str(path))
                    )
    return files


def on_page_markdown(markdown, page, **_):
    """Points links out of docs/ to copies, figures to those of each theme."""

    def both_themes(match):
        alt, name = match.groups()
        return "".join(
            PICTURE.format(theme=theme, name=name, alt=alt)
            for theme in ("light", "dark")
        )

    if "/" in page.file.src_uri:
        return markdown
    markdown = FIGURE.sub(both_themes, markdown)
    return OUTSIDE.sub(lambda x: SOURCE + x[1], markdown)


def public_names(module):
    """The names of a module that users call, submodules left out.

    Args:
        module: Its name below `keras_vmoe`.
    """
    found = importlib.import_module(f"keras_vmoe.{module}")
    names = getattr(found, "__all__", None) or [
        name
        for name, value in vars(found).items()
        if getattr(value, "__module__", None) == found.__name__
        and not name.startswith("_")
    ]
    return [x for x in names if not inspect.ismodule(getattr(found, x))]


def _place(value):
    """The file and line of a definition."""
    path = pathlib.Path(inspect.getsourcefile(value)).relative_to(ROOT)
    return f"{path}:{inspect.getsourcelines(value)[1]}"


def _methods(value):
    """The public methods and properties of a class that no base has."""
    for name, method in vars(value).items() if inspect.isclass(value) else ():
        # Of a property, a class method or a static method.
        method = getattr(method, "fget", getattr(method, "__func__", method))
        is_new = not any(hasattr(x, name) for x in value.__mro__[1:])
        if name[0] != "_" and is_new and inspect.isfunction(method):
            yield method


def _check(value):
    """Raises unless a public name has a docstring and a typed signature."""
    what = value.__qualname__
    if not value.__doc__:
        raise PluginError(f"{_place(value)}: {what} has no docstring")
    function = value.__init__ if inspect.isclass(value) else value
    ours = getattr(function, "__module__", None) or ""
    if not inspect.isfunction(function) or not ours.startswith("keras_vmoe"):
        return  # A constructor of Keras, or of a protocol.
    signature = inspect.signature(function)
    bare = [
        x.name
        for x in signature.parameters.values()
        if x.annotation is x.empty
        and x.name not in ("self", "cls")
        and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
    ]
    if signature.return_annotation is signature.empty and function is value:
        bare.append("what it returns")
    if bare:
        raise PluginError(f"{_place(value)}: {what} has no type for {bare}")


def _module(module):
    """A page of the API: what a module is for, and each of its names."""
    found = importlib.import_module(f"keras_vmoe.{module}")
    lines = [f"# keras_vmoe.{module}", "", inspect.getdoc(found), ""]
    for name, value in vars(found).items():
        mine = getattr(value, "__module__", None) == found.__name__
        if mine and name[0] != "_" and name not in public_names(module):
            raise PluginError(f"{_place(value)}: {name} is not in __all__")
    for name in public_names(module):
        if callable(getattr(found, name)):
            for value in [
                getattr(found, name),
                *_methods(getattr(found, name)),
            ]:
                _check(value)
            lines += [f"::: keras_vmoe.{module}.{name}", ""]
        else:
            value = getattr(found, name)
            first = ", ".join(map(str, value[:3]))
            held = f"`({first}, ...)`: {len(value)} of ImageNet's classes."
            lines += [f"## {name}", "", held, ""]
    return "\n".join(lines)


def _index():
    """Every public name, with a link."""
    lines = [HIDDEN + "# Reference", ""]
    for module in MODULES:
        found = importlib.import_module(f"keras_vmoe.{module}")
        brief = inspect.getdoc(found).partition("\n")[0]
        lines += [f"## [keras_vmoe.{module}]({module}.md)", "", brief, ""]
        lines += ["| name | |", "|---|---|"]
        for name in public_names(module):
            value = getattr(found, name)
            brief = inspect.getdoc(value) if callable(value) else ""
            brief = (brief or "").partition("\n")[0]
            anchor = f"keras_vmoe.{module}.{name}"
            if not callable(value):
                anchor = name.lower()
            lines.append(f"| [`{name}`]({module}.md#{anchor}) | {brief} |")
        lines.append("")
    return "\n".join(lines)


def _output(*arguments):
    """What the command prints."""
    found = io.StringIO()
    with contextlib.redirect_stdout(found), contextlib.suppress(SystemExit):
        cli.main(arguments)
    return found.getvalue().strip()


def _command_line():
    """The help of every command."""
    lines = ["# The command line", "", "```text", _output("--help"), "```", ""]
    for name in cli.COMMANDS:
        lines += [f"## keras-vmoe {name}", "", "```text"]
        lines += [_output(name, "--help"), "```", ""]
    return "\n".join(lines)


def _presets():
    """The table of presets, ours beside the papers' figures."""
    rows = json.loads(_output("presets", "--format", "json"))
    heads = [
        f"paper's {COLUMNS[i - 1]}" if x == "(paper)" else x
        for i, x in enumerate(COLUMNS)
    ]
    lines = [
        "---\nhide: [toc]\n---\n\n# Presets", "",
        "`models.from_preset(name)` builds one. Millions of parameters, in "
        "total and active per token; billions of multiply-adds per image; "
        "beside them the figures that the papers print, their ImageNet-1k "
        "accuracy (*: pretrained on ImageNet-21k) and images/s. Counted with "
        "the classes of the papers' tables. `keras-vmoe presets --format csv` "
        "prints the same.", "",
        "| " + " | ".join(heads) + " |", "|---" + "|---:" * 9 + "|",
    ]  # fmt: skip
    notes = []
    for row in rows:
        cells = [f"`{row['preset']}`"]
        cells += [_cell(x) for x in list(row.values())[1 : len(COLUMNS)]]
        if row["note"]:
            notes.append(f"- `{row['preset']}`: {row['note']}.")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## Notes", "", *notes, ""])


def _cell(value):
    """A figure as the papers print it."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _recipes():
    """A table of the recipes, and each as its file."""
    lines = ["# Recipes", "", "`keras-vmoe train --recipe NAME`", ""]
    lines += [
        "| recipe | what it trains | dataset | epochs |",
        "|---|---|---|---|",
    ]
    sections = []
    folder = pathlib.Path(recipes.__file__).parent
    for name in recipes.names():
        text = (folder / f"{name}.yaml").read_text()
        head = text.partition("\n")[0].removeprefix("# ")
        config = recipes.load(name)
        lines.append(
            f"| [`{name}`](#{name}) | {head} | `{config.data.dataset}` "
            f"| {config.epochs:g} |"
        )
        # The index holds the table alone.
        sections += [f"## {name} {{ data-search-exclude }}", ""]
        sections += [head, "", "```yaml", text, "```", ""]
    return "\n".join([*lines, "", *sections])


def _notebook(path):
    """The page of a notebook, the pictures in it, and the notebook itself."""
    exporter = nbconvert.MarkdownExporter()
    text, resources = exporter.from_filename(str(path))
    folder = "notebooks/"
    title, _, rest = text.lstrip().partition("\n")
    link = f"[Download this notebook](../{SOURCE}examples/{path.name})"
    pages = {f"{folder}{path.stem}.md": f"{HIDDEN}{title}\n\n{link}\n{rest}"}
    pages[f"{SOURCE}examples/{path.name}"] = path.read_text()
    for name, content in resources["outputs"].items():
        pages[folder + name] = _lighter(name, content)
    return pages


def _lighter(name, content):
    """A picture of a notebook with 256 colors: a third of the bytes."""
    if not name.endswith(".png"):
        return content
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    picture.quantize(256).save(file, "png", optimize=True)
    return file.getvalue()

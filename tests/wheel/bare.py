"""Environments that hold the wheel and what its metadata asks for, no more."""

import email
import os
import pathlib
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.util import cache_from_source

from packaging.markers import default_environment
from packaging.requirements import Requirement


def create(folder, wheel, extras):
    """Creates an environment, and returns its Python.

    Everything but the wheel is linked from this environment: an installation
    would take a minute for each.

    Args:
        folder: `pathlib.Path` on the file system of this environment.
        wheel: `pathlib.Path`.
        extras: Names of extras of the wheel.
    """
    python, site = empty(folder)
    link(site, needs(requirements(wheel), extras))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return python


def empty(folder):
    """Creates an environment; returns its Python and where packages go."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", folder], check=True
    )
    (site,) = folder.glob("lib/python*/site-packages")
    return folder / "bin" / "python", site


def requirements(wheel):
    """What a wheel asks for, in the lines of its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (x for x in archive.namelist() if x.endswith("/METADATA"))
        asked = email.message_from_bytes(archive.read(name))
    return asked.get_all("Requires-Dist")


def link(site, names):
    """Links packages of this environment into another."""
    for name in names:
        for file in metadata.files(name):
            source, target = file.locate(), site / file
            if ".." in file.parts or not source.is_file():
                continue  # A script, or compiled elsewhere.
            _link(source, target)
            if file.suffix == ".py":
                compiled = pathlib.Path(cache_from_source(source))
                if compiled.is_file():
                    _link(compiled, pathlib.Path(cache_from_source(target)))


def _link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():  # Some packages share files.
        os.link(os.path.realpath(source), target)


def needs(lines, extras):
    """The names of the packages that requirements lead to."""
    found, left = set(), [(line, tuple(extras)) for line in lines]
    while left:
        line, extras = left.pop()
        asked = Requirement(line)
        here = default_environment()
        if asked.marker and not any(
            asked.marker.evaluate(here | {"extra": x}) for x in extras or [""]
        ):
            continue
        key = (asked.name.lower(), frozenset(asked.extras))
        if key not in found:
            found.add(key)
            deeper = metadata.requires(asked.name) or []
            left += [(x, tuple(asked.extras)) for x in deeper]
    return {name for name, _ in found}


def run(python, program, backend, folder):
    """Runs a program in an environment, and returns the finished process."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, "-I", "-c", program],
        env=kept | {"KERAS_BACKEND": backend},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def built(suffix):
    """The path of the one file in dist/ that ends so."""
    found = list((pathlib.Path(__file__).parents[2] / "dist").glob(suffix))
    assert len(found) == 1, f"`make wheel` builds it. Found: {found}."
    return found[0]


def main():
    """`FOLDER WHEEL EXTRAS PACKAGE...`: all that a wheel needs, not itself."""
    folder, wheel, extras, *packages = sys.argv[1:]
    _, site = empty(pathlib.Path(folder))
    asked = requirements(wheel) + packages
    link(site, needs(asked, extras.split(",")))


if __name__ == "__main__":
    main()

"""Sphinx's settings. autodoc imports the package, so it must be installed."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING

from trio_uring.lowlevel import Operation, operations

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent

project = "trio_uring"
author = "The trio_uring developers"
copyright = author  # noqa: A001 (Sphinx's name)
version = release = version_of("trio-uring")

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.napoleon"),
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "newsfragments"]
html_theme = "furo"  # with a dark mode and a search
html_title = f"trio_uring {release}"
html_theme_options = {
    "source_repository": "https://github.com/trio-uring/trio-uring/",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output of examples

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"  # beside what a docstring says of the argument
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
add_module_names = False
napoleon_use_rtype = False

# Links to other projects need their inventories, and so a network. The build works without one:
# there the names are not checked.
if os.environ.get("READTHEDOCS"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "trio": ("https://trio.readthedocs.io/en/stable", None),
        "anyio": ("https://anyio.readthedocs.io/en/stable", None),
        "outcome": ("https://outcome.readthedocs.io/en/stable", None),
    }
nitpick_ignore_regex = [
    (
        "py:.*",
        rf"(trio|anyio|outcome|opentelemetry|prometheus_client|{'|'.join(sys.stdlib_module_names)})(\..*)?",
    ),
    ("py:.*", "|".join(vars(builtins))),
    # Type variables, protocols for arguments, and names as they stand in annotations.
    ("py:class", r"(.*\.)?(T|T_co|StreamT|Clock|Instrument|Buffer|AsyncFile|HasFileNo|OpenFd)"),
    ("py:class", "CollectorRegistry|Meter"),
    (
        "py:class",
        r"(.*\.)?(SendsBytes|ReceivesBytes|Unpack|PosArgT|CData|StrOrBytesPath|Sqe|Exclusive)",
    ),
]

_FIELD = re.compile(r"^(Completes with|Fails with|If cancelled|Since): ", re.MULTILINE)


def make_fields(
    _app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]
) -> None:
    """Turn the four fields of an operation's docstring into a field list."""
    lines[:] = _FIELD.sub(r":\1: ", "\n".join(lines)).split("\n")


def generate(_app: Sphinx, document: str, source: list[str]) -> None:
    """Replace the placeholders by lists of operations, and of newsfragments."""
    if document == "lowlevel":
        source[0] = re.sub(r"<!-- operations: (\w+) -->", list_operations, source[0])
    if document == "history":
        source[0] = source[0].replace("<!-- newsfragments -->", list_newsfragments())


def list_operations(module: re.Match[str]) -> str:
    """Return directives for the operations of one module, in source order."""
    names = [
        name
        for name, function in vars(operations).items()
        if getattr(function, "__module__", "").endswith(f"._operations.{module[1]}")
        and str(getattr(function, "__annotations__", {}).get("return")).startswith(
            Operation.__name__
        )
    ]
    assert names, module[0]
    directives = "\n".join(f".. autofunction:: {name}\n" for name in names)
    return f"```{{eval-rst}}\n.. currentmodule:: trio_uring.lowlevel.operations\n\n{directives}```"


def list_newsfragments() -> str:
    """Return the changes since the last release, as towncrier lists them, and the releases."""
    changes = subprocess.run(
        [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "Unreleased"],
        cwd=DOCS.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    releases = (DOCS.parent / "CHANGELOG.md").read_text("utf-8").partition("<!-- releases -->")[2]
    return changes.strip() + "\n" + releases


def setup(app: Sphinx) -> None:
    """Connect the handlers to Sphinx."""
    app.connect("autodoc-process-docstring", make_fields)
    app.connect("source-read", generate)

"""Sphinx's settings. autodoc imports the package, so it must be installed."""

from __future__ import annotations

import builtins
import re
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

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "newsfragments"]
html_theme = "alabaster"
html_theme_options = {"description": "Trio on Linux io_uring"}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say units and limits; the signatures stay short
add_module_names = False
napoleon_use_rtype = False

# Names of other projects: checking these needs a network, and the build must work without one.
nitpick_ignore_regex = [
    ("py:.*", rf"(trio|anyio|{'|'.join(sys.stdlib_module_names)})(\..*)?"),
    ("py:.*", "|".join(vars(builtins))),
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
    """Return the changes since the last release, one list item for each newsfragment."""
    fragments = sorted((DOCS / "newsfragments").glob("[0-9]*.*.md"))
    kinds = {"feature": "New", "bugfix": "Fixed", "removal": "Removed", "doc": "Documentation"}
    parts = []
    for kind, title in kinds.items():
        texts = [path.read_text("utf-8").strip() for path in fragments if path.stem.endswith(kind)]
        if texts:
            parts += [f"### {title}", "", *(f"- {indent(text)}" for text in texts), ""]
    return "\n".join(parts) or "Nothing yet."


def indent(text: str) -> str:
    """Indent the lines after the first, as a list item needs it."""
    return text.replace("\n", "\n  ")


def setup(app: Sphinx) -> None:
    """Connect the handlers to Sphinx."""
    app.connect("autodoc-process-docstring", make_fields)
    app.connect("source-read", generate)

"""Settings of the documentation site, for Sphinx.

Pages are plain Markdown that reads as well in a repository browser. What only the site can show, its front page's
navigation and the reference out of the docstrings, is reStructuredText.
"""

from typing import Any

import mixencoder

project = "MixEncoder"
copyright = "the MixEncoder authors; Apache-2.0"
release = version = mixencoder.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# index.rst includes it
exclude_patterns = ["README.md"]

# anchors as repository browsers make them, so that one link serves both
myst_heading_anchors = 3

# a name between single backticks in a docstring links to what it names, where that is documented
default_role = "py:obj"
# a line may describe several arguments at once
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"MixEncoder {release}"
html_copy_source = False

# pages of the site that lie outside of its folder -> the page that includes them
INCLUDED = {"../CHANGELOG.md": "changelog.rst", "../mixencoder/pretrained/README.md": "model-card.rst"}


def link_included(app: Any, docname: str, source: list[str]) -> None:
    """Lead links to what lies outside of the folder to the page that includes it."""
    for path, page in INCLUDED.items():
        source[0] = source[0].replace(f"]({path})", f"]({page})")


def clean_attribute(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Leave out Python's own words on fields of named tuples, and take an attribute's first line for words alone.

    Napoleon would take what stands before a colon of that line for a type; a comment before it is passed over.
    """
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    elif what in ("attribute", "data", "property"):
        lines[:0] = [".. words", ""]


def setup(app: Any) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("source-read", link_included)
    # Napoleon's own has priority 500
    app.connect("autodoc-process-docstring", clean_attribute, priority=400)

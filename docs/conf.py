"""Settings of the documentation site, for Sphinx.

Pages are plain Markdown that reads as well in a repository browser. What only the site can show, its front page's
navigation and the reference out of the docstrings, is reStructuredText.
"""

import mixencoder

project = "MixEncoder"
copyright = "the MixEncoder authors; Apache-2.0"  # noqa: A001  (the name that Sphinx reads)
release = version = mixencoder.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# index.rst includes it
exclude_patterns = ["README.md"]

# anchors as repository browsers make them, so that one link serves both
myst_heading_anchors = 3

# a name between single backticks in a docstring links to what it names, where that is documented
default_role = "py:obj"
# a line may describe several arguments at once
napoleon_use_param = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"MixEncoder {release}"
html_copy_source = False

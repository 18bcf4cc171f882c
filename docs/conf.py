"""Settings of the documentation site: python -m sphinx -W --keep-going -b html docs site"""

import sublens

project = "sublens"
author = "sublens contributors"
copyright = author
version = release = sublens.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"sublens {release}"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Where": "Where", "Predicate": "Predicate"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True

"""Sphinx: ``sphinx-build -W docs OUT`` makes the site; API pages come from the docstrings."""

import torq_jax

project = "torq-jax"
author = "the torq-jax authors"
version = release = torq_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
html_theme = "furo"
html_title = "torq-jax"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False, "exclude-members": "__init__"}
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True

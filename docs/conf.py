"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "ood_scores"
author = "The ood_scores authors"
copyright = "2026, The ood_scores authors"
release = version = installed_version("ood_scores")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "ood_scores"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app):
    app.connect("autodoc-process-docstring", show_registered_name)


def show_registered_name(app, what, name, obj, options, lines):
    """Show on top of a scorer's entry the name under which it is registered, and its paper."""
    from ood_scores.scorers.registry import SCORERS

    if what == "class" and obj in SCORERS.values():
        paper = obj.tags.paper
        cited = f" Paper: `{paper.title} <{paper.url}>`__ ({paper.venue} {paper.year})." if paper else ""
        code = f" `Code of the authors <{paper.code}>`__." if paper and paper.code else ""
        note = f" Experimental: {obj.tags.experimental}." if obj.tags.experimental else ""
        aliases = ", ".join(f'``"{alias}"``' for alias in obj.tags.aliases)
        known = f" Also found as {aliases}." if aliases else ""
        lines[:0] = [f'Registered as ``"{obj.name}"``.{known}{cited}{code}{note}', ""]

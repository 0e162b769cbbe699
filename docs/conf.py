"""Sphinx configuration."""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

sys.path.insert(0, str(Path(__file__).parent))
from scorer_pages import write_pages

from ood_scores.version import __version__

project = "ood_scores"
author = "The ood_scores authors"
copyright = "2026, The ood_scores authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # the configuration of the gallery contains a function
exclude_patterns = ["_build", "tutorials", "gallery/*.ipynb", "gallery/*.py", "sg_execution_times.rst"]
html_theme = "furo"
html_title = "ood_scores"
copybutton_prompt_text = ">>> |... |$ "
copybutton_prompt_is_regexp = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def figures(block, block_vars, gallery_conf):
    """Save the figures of a block of a tutorial; the figures of this package are unknown to pyplot."""
    found = block_vars["example_globals"]
    shown = found.setdefault("__shown__", set())
    paths = []
    for value in list(found.values()):
        if isinstance(value, Figure) and id(value) not in shown:
            shown.add(id(value))
            paths.append(next(block_vars["image_path_iterator"]))
            value.savefig(paths[-1], dpi=110)
    return figure_rst(paths, gallery_conf["src_dir"])


sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": [figures],
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}

HEADINGS = {"Source:": "Source", "Fails": "When it fails", "Fits": "What it fits", "Cost:": "Cost"}
"""First words of paragraphs in the docstring of a scorer, and the headings that they get."""


def setup(app):
    write_pages()
    app.connect("autodoc-process-docstring", add_headings)


def add_headings(app, what, name, obj, options, lines):
    """Put a heading above the paragraphs of a scorer's docstring that say what it fits, its source, and its cost."""
    from ood_scores.scorers.registry import SCORERS

    if what != "class" or obj not in SCORERS.values():
        return
    for number in range(len(lines) - 1, -1, -1):
        word = re.match(r"[A-Z]\w+:?", lines[number])
        starts = number == 0 or not lines[number - 1].strip()
        if word and starts and word[0] in HEADINGS:
            lines[number:number] = [f".. rubric:: {HEADINGS[word[0]]}", ""]

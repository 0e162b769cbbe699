"""Tutorials run as notebooks, as readers download them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


@pytest.mark.parametrize("name", ["2_threshold_in_production", "4_your_own_parts"])
def test_tutorial_runs_as_a_notebook(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sphinx_gallery", reason="pip install 'ood_scores[docs]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install ipykernel")
    from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
    from sphinx_gallery.notebook import jupyter_notebook
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    _, blocks = split_code_and_text_blocks(str(TUTORIALS / f"{name}.py"))
    written = jupyter_notebook(blocks, DEFAULT_GALLERY_CONF, str(TUTORIALS))
    notebook = nbformat.reads(json.dumps(written), as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [key for output in outputs for key in output.get("data", {})]
    assert "text/html" in shown

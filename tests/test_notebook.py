"""The notebook runs from top to bottom."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks/engram.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"runs/notebook"', f'"{tmp_path / "run"}"')
        cell.source = cell.source.replace("steps=500", "steps=30")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    assert printed.count("suppressed") == 3
